"""What planning searches: options of groups and layers as one table, and moves from choice to choice.

A *variable* is a channel group, whose options are widths, or a layer, whose options are coefficients of its
cost; groups come first. The options of all variables lie one after another in flat tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hap_onnx.planning.cost import METRICS, N_METRICS, CostModel, CostState, Ints

Floats = NDArray[np.float64]


class Search:
    """The problem as tables.

    * ``variable`` [n_entries]: whose option an entry is; those of variable v are ``spans[v]``
    * ``losses`` [n_entries]
    * ``widths`` [n_groups, n_options] and ``tables`` [n_layers, n_options, 4, n_metrics], padded;
      ``of_groups`` and ``of_layers`` are the places of the entries in them, flattened
    * ``coefficients`` [4, n_metrics, n_entries] of the entries of layers, those of ``layer_of``
    * ``limits`` [n_metrics]: of the metrics (``columns`` of the cost) that have one
    """

    def __init__(
        self,
        losses: Sequence[Floats],
        widths: Sequence[Ints],
        tables: Sequence[Ints],
        cost: CostModel,
        budgets: Mapping[str, float | None],
    ) -> None:
        self.cost = cost
        self.n_groups, self.n_variables = len(widths), len(losses)
        self.n_options = [len(row) for row in losses]
        self.starts = np.cumsum([0, *self.n_options])
        self.spans = [slice(int(a), int(b)) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]
        self.variable = np.repeat(np.arange(self.n_variables), self.n_options)
        self.layer_starts = self.starts[self.n_groups : -1] - self.starts[self.n_groups]
        self.losses = np.concatenate([np.zeros(0), *losses])
        self.widths, self.of_groups = _pad(widths, ())
        self.tables, self.of_layers = _pad(tables, (4, N_METRICS))
        self.layer_of = np.repeat(np.arange(len(tables)), self.n_options[self.n_groups :])
        spread = np.array([row.max() - row.min() for row in losses])
        self.loss_range = float(spread.sum())
        self.tolerance = 1e-12 * max(self.loss_range, 1e-300)
        limited = [name for name in METRICS if budgets.get(name) is not None]
        self.columns = [METRICS.index(name) for name in limited]
        self.limits = np.array([float(budgets[name] or 0.0) for name in limited])
        flat = self.tables.reshape(-1, 4, N_METRICS)[self.of_layers][..., self.columns]
        self.coefficients = np.ascontiguousarray(np.moveaxis(flat, 0, -1))
        self.full = np.maximum(cost.totals(cost.sizes)[self.columns], 1).astype(np.float64)

    def split(self, choice: Ints) -> tuple[Ints, Ints]:
        """Widths [..., n_groups] and coefficients [..., n_layers, 4, n_metrics] of [..., n_variables]."""
        of_groups, of_layers = choice[..., : self.n_groups], choice[..., self.n_groups :]
        groups, layers = np.arange(self.n_groups), np.arange(self.n_variables - self.n_groups)
        return self.widths[groups, of_groups], self.tables[layers, of_layers]

    def totals(self, choice: Ints) -> Ints:
        """All costs [..., n_metrics] of choices [..., n_variables]."""
        return self.cost.totals(*self.split(choice))

    def least_loss(self) -> Ints:
        """For each variable the option of least loss; of equal ones the widest, and dense."""
        rows = [self.losses[span] for span in self.spans]
        groups, layers = rows[: self.n_groups], rows[self.n_groups :]
        widest = [len(row) - 1 - int(row[::-1].argmin()) for row in groups]
        return np.array(widest + [int(row.argmin()) for row in layers], np.int64)

    def smallest(self, weights: Floats) -> Ints:
        """The narrowest widths, and for each layer the option that costs least there.

        ``weights`` [n_metrics] say what a unit of each cost counts. No choice has a smaller weighted cost:
        whatever the options of the layers, costs fall with the widths.
        """
        choice = np.zeros(self.n_variables, np.int64)
        if len(self.of_layers):
            state = CostState(self.cost, self.widths[:, 0])
            changes = state.layer_changes(self.tables) @ weights
            choice[self.n_groups :] = changes.argmin(axis=1)
        return choice


def _pad(rows: Sequence[Ints], inner: tuple[int, ...]) -> tuple[Ints, Ints]:
    """Repeat last options until all rows are as long; return the rows and the flat places of real options."""
    longest = max((len(row) for row in rows), default=1)
    padded = np.zeros((len(rows), longest, *inner), np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)], padded[index, len(row) :] = row, row[-1]
    lengths = np.array([len(row) for row in rows], np.int64)
    return padded, np.flatnonzero(np.arange(longest) < lengths[:, None])


class Point:
    """One choice of options, its loss, and what each single change would do.

    ``changes`` [n_metrics, n_entries] are differences of the limited costs, ``gaps`` [n_entries] of the loss.
    """

    def __init__(self, search: Search, choice: Ints) -> None:
        self.search = search
        self.choice = np.array(choice, np.int64)
        widths, coefficients = search.split(self.choice)
        self.state = CostState(search.cost, widths)
        for layer, table in enumerate(coefficients):
            self.state.set_coefficients(layer, table)
        self._layer_costs = self._find_layer_costs()
        self.changes = self._find_changes()
        current = search.losses[search.starts[:-1] + self.choice]
        self.gaps = search.losses - np.repeat(current, search.n_options)
        self.loss = float(current.sum())
        self.n_moves = 0

    def copy(self) -> Point:
        """Return a point that moves independently of this one."""
        twin = object.__new__(Point)
        twin.search, twin.state = self.search, self.state.copy()
        twin.choice, twin.changes, twin.gaps = self.choice.copy(), self.changes, self.gaps.copy()
        twin._layer_costs = self._layer_costs
        twin.loss, twin.n_moves = self.loss, 0
        return twin

    def slack(self) -> Floats:
        """Return what is left of each budget; negative if it is exceeded."""
        return self.search.limits - self.state.totals[self.search.columns]

    def fits(self) -> bool:
        """Say whether all budgets are met."""
        return bool((self.slack() >= 0).all())

    def move(self, entry: int) -> None:
        """Let the variable of an entry take that option."""
        search = self.search
        variable = int(search.variable[entry])
        option = entry - int(search.starts[variable])
        self.loss += float(self.gaps[entry])
        self.gaps[search.spans[variable]] -= self.gaps[entry]
        self.choice[variable] = option
        if variable < search.n_groups:
            self.state.set_width(variable, int(search.widths[variable, option]))
            self._layer_costs = self._find_layer_costs()
        else:
            layer = variable - search.n_groups
            self.state.set_coefficients(layer, search.tables[layer, option])
        self.changes = self._find_changes()
        self.n_moves += 1

    def descend(self, prices: Floats) -> None:
        """Take the best single change of loss + prices * cost / limit until there is none."""
        scaled = prices / self.search.limits
        for _ in range(20 * len(self.choice)):
            score = self.gaps + scaled @ self.changes
            best = int(score.argmin())
            if score[best] >= -self.search.tolerance:
                return
            self.move(best)

    def fill(self) -> None:
        """Spend the slack where it lowers the loss most per cost."""
        while True:
            wins = (self.gaps < -self.search.tolerance) & (self.changes <= self.slack()[:, None]).all(axis=0)
            entries = np.flatnonzero(wins)
            if not len(entries):
                return
            relative = self.changes[:, entries] / self.search.limits[:, None]
            price = np.maximum(relative.sum(axis=0), 1e-12)
            self.move(int(entries[(self.gaps[entries] / price).argmin()]))

    def shrink(self, *, locked: int | None = None) -> bool:
        """Save cost in variables other than ``locked``, at least loss per cost, until all budgets are met."""
        while not self.fits():
            slack, limits = self.slack()[:, None], self.search.limits[:, None]
            over = slack[:, 0] < 0
            # More than what is missing is worth nothing.
            freed = np.minimum(-self.changes[over], -slack[over]) / limits[over]
            useful = freed.sum(axis=0)
            if not over.all():  # an option may save one cost and raise another: what it exceeds counts too
                useful -= (np.maximum(self.changes[~over] - slack[~over], 0) / limits[~over]).sum(axis=0)
            if locked is not None:
                useful[self.search.spans[locked]] = 0
            ratio = np.where(useful > 0, self.gaps / np.maximum(useful, 1e-300), np.inf)
            best = int(ratio.argmin())
            if not np.isfinite(ratio[best]):
                return False
            self.move(best)
        return True

    def _find_layer_costs(self) -> Ints:
        """The limited costs of every option of every layer at the current widths."""
        search = self.search
        values = self.state.layer_values().T[:, search.layer_of]
        products = search.coefficients * values[:, None]
        return products[0] + products[1] + products[2] + products[3]

    def _find_changes(self) -> Ints:
        search = self.search
        changes = self.state.changes(search.widths).reshape(-1, N_METRICS)
        of_groups = changes[search.of_groups].T[search.columns]
        if not len(search.layer_of):
            return of_groups
        chosen = search.layer_starts + self.choice[search.n_groups :]
        of_layers = self._layer_costs - self._layer_costs[:, chosen][:, search.layer_of]
        return np.concatenate([of_groups, of_layers], axis=1)

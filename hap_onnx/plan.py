"""Plan: which channels stay. Chosen here, carried out by surgery, and kept in a file.

``allocate`` turns loss curves (one per group, over its width) and budgets into widths;
``CompressionPlan`` records the decision with everything that is needed to carry it out again, and
``save_plan`` and ``load_plan`` keep it as ``PLAN.json`` and ``PLAN.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns the names of bfloat16 and the like)
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from hap_onnx.channels import Coupling
from hap_onnx.config import plan_weights_path
from hap_onnx.cost import METRICS, CostModel, CostState, Ints, removable_branches
from hap_onnx.errors import BudgetError, ModelError, UsageError, ValidationError

__all__ = [
    "CompressionPlan",
    "GroupDecision",
    "GroupOptions",
    "allocate",
    "find_options",
    "load_plan",
    "plan_hash",
    "removable_branches",
    "save_plan",
]

PLAN_SCHEMA = "hap-onnx/plan/1"

Floats = NDArray[np.float64]

# --------------------------------------------------------------- what may be chosen


@dataclass(frozen=True)
class GroupOptions:
    """The widths that a group may have: ascending, the full width last."""

    group: str
    widths: Ints

    def __post_init__(self) -> None:
        widths = np.array(self.widths, np.int64)
        if widths.ndim != 1 or not len(widths) or widths[0] < 0 or (np.diff(widths) <= 0).any():
            raise ValueError(f"{self.group}: widths must ascend from 0 or more, not {widths.tolist()}")
        widths.flags.writeable = False
        object.__setattr__(self, "widths", widths)


def find_options(
    coupling: Coupling,
    removable: Iterable[str] = (),
    *,
    align: int | str = "auto",
    min_ratio: float = 0.0,
) -> tuple[GroupOptions, ...]:
    """Return the allowed widths of each group of ``coupling``, in its order.

    Widths are multiples of ``align``, at least one of them and at least ``min_ratio`` of the group, or the
    full width, or 0 for a group of ``removable``. ``auto`` means multiples of 8 from 64 elements on, of 4
    from 16, of 2 from 8: onnxruntime computes channels in blocks, and odd widths are slow. A frozen group
    stays whole.
    """
    may_go = set(removable)
    result = []
    for group in coupling.groups:
        unit = _unit(group.size) if isinstance(align, str) else align
        least = max(unit, int(np.ceil(min_ratio * group.size - 1e-9)))
        aligned = np.arange(unit, group.size, unit)
        narrower = [0] if group.name in may_go else []
        narrower += aligned[aligned >= least].tolist()
        widths = [group.size] if group.frozen else [*narrower, group.size]
        result.append(GroupOptions(group.name, np.array(widths)))
    return tuple(result)


def _unit(size: int) -> int:
    return 8 if size >= 64 else 4 if size >= 16 else 2 if size >= 8 else 1


# --------------------------------------------------------------- choosing widths

_MAX_ENUMERATED = 100_000  # combinations of options that are simply all tried
_N_BISECTIONS = 24
_N_IMPROVED = 3  # how many of the solutions found are improved by exchange
_MAX_MOVES = 10_000  # changes of one width tried per improved solution: what bounds the time


def allocate(
    curves: Sequence[Floats],
    options: Sequence[GroupOptions],
    cost: CostModel,
    budgets: Mapping[str, float | None],
) -> Ints:
    """Choose a width for each group: least sum of losses within all budgets.

    Args:
        curves: for each group the predicted loss at each width 0..size. They are used as they are, convex and
            monotone or not.
        options: the allowed widths of each group.
        cost: prices the widths; the cost of one group depends on the widths of its neighbours.
        budgets: absolute limits by metric ("params", "macs"); None is no limit.

    Returns:
        int64 [n_groups]. Few combinations are enumerated, so the result is the optimum. Otherwise it is
        found by Lagrangian descent over a bisected price, filling the slack, and exchange until nothing
        improves; equal inputs give equal results.

    Raises:
        BudgetError: a budget cannot be reached, with the smallest fraction that can.
    """
    search = _Search(curves, options, cost, budgets)
    free = search.point(search.least_loss())
    if free.fits():
        return free.state.widths
    search.check_reachable()
    if prod(search.n_options) <= _MAX_ENUMERATED:
        return _enumerate(search)
    return _search_widths(search)


class _Search:
    """The problem as tables: ``widths`` and ``losses`` [n_groups, n_options], padded (loss infinite).

    ``limits`` [n_metrics] are those of the metrics (columns of the cost) that have one.
    """

    def __init__(
        self,
        curves: Sequence[Floats],
        options: Sequence[GroupOptions],
        cost: CostModel,
        budgets: Mapping[str, float | None],
    ) -> None:
        unknown = set(budgets) - set(METRICS)
        if unknown or not len(curves) == len(options) == len(cost.sizes):
            raise ValueError(f"{len(curves)} curves, {len(options)} options, budgets for {sorted(budgets)}")
        for curve, option, size in zip(curves, options, cost.sizes, strict=True):
            if len(curve) != size + 1 or option.widths[-1] != size or not np.isfinite(curve).all():
                raise ValueError(f"{option.group}: needs {size + 1} finite losses, and {size} as last width")
        self.cost = cost
        self.n_options = [len(option.widths) for option in options]
        width = max(self.n_options, default=1)
        padded = [[*o.widths, *[o.widths[-1]] * (width - len(o.widths))] for o in options]
        self.widths = np.array(padded, np.int64).reshape(len(options), width)
        self.losses = np.full(self.widths.shape, np.inf)
        for group, (curve, option) in enumerate(zip(curves, options, strict=True)):
            self.losses[group, : len(option.widths)] = np.asarray(curve, np.float64)[option.widths]
        finite = np.where(np.isfinite(self.losses), self.losses, -np.inf)
        self.loss_range = float((finite.max(axis=1) - self.losses.min(axis=1)).sum()) if options else 0.0
        self.tolerance = 1e-12 * max(self.loss_range, 1e-300)
        limited = [name for name in METRICS if budgets.get(name) is not None]
        self.columns = [METRICS.index(name) for name in limited]
        self.limits = np.array([float(budgets[name] or 0.0) for name in limited])
        self.full = np.maximum(cost.totals(cost.sizes)[self.columns], 1).astype(np.float64)

    def point(self, choice: Ints) -> _Point:
        return _Point(self, choice)

    def least_loss(self) -> Ints:
        """For each group the option of least loss, the widest of equal ones."""
        return self.losses.shape[1] - 1 - np.argmin(self.losses[:, ::-1], axis=1)

    def check_reachable(self) -> None:
        """Raise BudgetError if the narrowest widths do not fit: no others cost less."""
        least = self.cost.totals(self.widths[:, 0])[self.columns]
        missed = [
            f"{METRICS[column]} at {limit / full:.3g} of the original "
            f"(the least is {np.ceil(low / full * 1e4) / 1e4:g})"
            for column, limit, full, low in zip(self.columns, self.limits, self.full, least, strict=True)
            if low > limit
        ]
        if missed:
            raise BudgetError(
                f"the budget cannot be reached: {' and '.join(missed)}; keep more, or allow "
                "narrower widths with --align 1 and fewer exclusions"
            )


class _Point:
    """One choice of options, its loss, and what each single change would cost.

    ``changes`` [n_groups, n_options, n_metrics] are differences of the limited costs.
    """

    def __init__(self, search: _Search, choice: Ints) -> None:
        self.search = search
        self.choice = np.array(choice, np.int64)
        self.state = CostState(search.cost, search.widths[np.arange(len(choice)), choice])
        self.changes = self.state.changes(search.widths)[..., search.columns]
        current = search.losses[np.arange(len(choice)), self.choice]
        self.gaps = search.losses - current[:, None]
        self.loss = float(current.sum())
        self.n_moves = 0

    def copy(self) -> _Point:
        twin = object.__new__(_Point)
        twin.search, twin.state = self.search, self.state.copy()
        twin.choice, twin.changes, twin.gaps = self.choice.copy(), self.changes, self.gaps.copy()
        twin.loss, twin.n_moves = self.loss, 0
        return twin

    def slack(self) -> Floats:
        """Return what is left of each budget; negative if it is exceeded."""
        return self.search.limits - self.state.totals[self.search.columns]

    def fits(self) -> bool:
        return bool((self.slack() >= 0).all())

    def move(self, group: int, option: int) -> None:
        """Let one group take another option."""
        search = self.search
        self.loss += float(self.gaps[group, option])
        self.gaps[group] -= self.gaps[group, option]
        self.choice[group] = option
        self.state.set_width(group, int(search.widths[group, option]))
        self.changes = self.state.changes(search.widths)[..., search.columns]
        self.n_moves += 1

    def descend(self, prices: Floats) -> None:
        """Take the best single change of loss + prices * cost / limit until there is none."""
        scaled = prices / self.search.limits
        for _ in range(20 * len(self.choice)):
            score = self.gaps + self.changes @ scaled
            best = int(score.argmin())
            if score.flat[best] >= -self.search.tolerance:
                return
            self.move(*divmod(best, score.shape[1]))

    def fill(self) -> None:
        """Spend the slack where it lowers the loss most per cost."""
        while True:
            wins = (self.gaps < -self.search.tolerance) & (self.changes <= self.slack()).all(axis=-1)
            if not wins.any():
                return
            price = np.maximum((self.changes / self.search.limits).sum(axis=-1), 1e-12)
            best = int(np.where(wins, self.gaps / price, np.inf).argmin())
            self.move(*divmod(best, wins.shape[1]))

    def shrink(self, *, locked: int | None = None) -> bool:
        """Narrow groups, other than ``locked``, at least loss per cost until all budgets are met."""
        while not self.fits():
            slack = self.slack()
            over = slack < 0
            # More than what is missing is worth nothing.
            freed = np.minimum(-self.changes[..., over], -slack[over]) / self.search.limits[over]
            useful = freed.sum(axis=-1)
            if locked is not None:
                useful[locked] = 0
            ratio = np.where(useful > 0, self.gaps / np.maximum(useful, 1e-300), np.inf)
            best = int(ratio.argmin())
            if not np.isfinite(ratio.flat[best]):
                return False
            self.move(*divmod(best, ratio.shape[1]))
        return True


def _enumerate(search: _Search) -> Ints:
    """Try all combinations; of equal losses take the widest."""
    sizes = search.n_options
    n = prod(sizes)
    best, best_loss = None, np.inf
    for start in range(0, n, 16_384):
        digits = np.unravel_index(np.arange(start, min(start + 16_384, n)), sizes)
        choice = np.array(sizes) - 1 - np.stack(digits, axis=1)
        groups = np.arange(len(sizes))
        loss = search.losses[groups, choice].sum(axis=1)
        totals = search.cost.totals(search.widths[groups, choice])[:, search.columns]
        loss[(totals > search.limits).any(axis=1)] = np.inf
        first = int(loss.argmin())
        if loss[first] < best_loss:
            best, best_loss = search.widths[groups, choice[first]], loss[first]
    assert best is not None  # the narrowest widths fit
    return best


def _search_widths(search: _Search) -> Ints:
    """Find good widths when there are too many combinations to try them all."""
    found = [search.point(np.zeros(len(search.n_options), np.int64))]
    prices: list[Floats] = [np.zeros(len(search.limits))]
    straight = search.point(search.least_loss())
    if straight.shrink():
        found.append(straight)
        prices.append(np.zeros(len(search.limits)))
    for mix in _mixes(len(search.limits)):
        for point, price in _bisect(search, mix):
            found.append(point)
            prices.append(price)
    for point in found:
        point.fill()
    order = sorted(range(len(found)), key=lambda index: found[index].loss)
    price = prices[next((index for index in order if prices[index].any()), order[0])]
    distinct: dict[bytes, _Point] = {}
    for index in order:
        distinct.setdefault(found[index].choice.tobytes(), found[index])
    improved = [_exchange(point, price) for point in list(distinct.values())[:_N_IMPROVED]]
    return min(improved, key=lambda point: point.loss).state.widths


def _mixes(n_limits: int) -> list[Floats]:
    if n_limits == 1:
        return [np.ones(1)]
    return [np.array([part, 1 - part]) for part in (0.5, 0.25, 0.75, 0.0, 1.0)]


def _bisect(search: _Search, mix: Floats) -> list[tuple[_Point, Floats]]:
    """Search the price at which the budgets are just met; return all points met on the way that fit."""
    low, high = np.log(1e-6), np.log(1e6)
    scale = max(search.loss_range, 1e-300)
    below = search.point(search.least_loss())  # of the largest price known to be too small
    found = []
    for _ in range(_N_BISECTIONS):
        middle = (low + high) / 2
        prices = scale * np.exp(middle) * mix
        point = below.copy()
        point.descend(prices)
        if point.fits():
            found.append((point, prices))
            high = middle
        else:
            below, low = point, middle
    return found


def _exchange(point: _Point, prices: Floats) -> _Point:
    """Try to give one group another width and let the others make room, or take it; while it improves."""
    search = point.search
    n_moves = 0
    while True:
        best = point
        # Most promising first: the loss that a change saves, less what the budgets say its cost is worth.
        score = point.gaps + point.changes @ (prices / search.limits)
        score[np.arange(len(point.choice)), point.choice] = np.inf
        for flat in np.argsort(score, axis=None, kind="stable"):
            group, option = divmod(int(flat), score.shape[1])
            if not np.isfinite(score[group, option]) or n_moves > _MAX_MOVES:
                break
            trial = point.copy()
            trial.move(group, option)
            if trial.shrink(locked=group):
                trial.fill()
                if trial.loss < best.loss - search.tolerance:
                    best = trial
            n_moves += trial.n_moves
            if best is not point:
                break
        if best is point:
            return point
        point = best


# --------------------------------------------------------------- the decision


@dataclass(frozen=True, eq=False)
class GroupDecision:
    """Which channels of a group stay: positions 0..size-1 within the group, ascending and read-only.

    Raises ValueError unless ``keep`` and ``drop`` together are each position once.
    """

    group: str
    keep: Ints
    drop: Ints

    def __post_init__(self) -> None:
        for name in ("keep", "drop"):
            given = np.asarray(getattr(self, name))
            if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
                raise ValueError(f"{self.group}: {name} must be a list of positions")
            positions = given.astype(np.int64)
            if (np.diff(positions) <= 0).any():
                raise ValueError(f"{self.group}: {name} must ascend, without repetition")
            positions.flags.writeable = False
            object.__setattr__(self, name, positions)
        if not np.array_equal(np.sort(np.concatenate([self.keep, self.drop])), np.arange(self.size)):
            raise ValueError(f"{self.group}: keep and drop do not part the positions 0..{self.size - 1}")

    @classmethod
    def from_keep(cls, group: str, size: int, keep: Iterable[int]) -> GroupDecision:
        """Decide to keep these of ``size`` channels, in whatever order they are given."""
        kept = np.unique(np.array(list(keep), np.int64))
        if len(kept) and (kept[0] < 0 or kept[-1] >= size):
            raise ValueError(f"{group}: keeps positions beyond its {size} channels")
        return cls(group, kept, np.setdiff1d(np.arange(size), kept))

    @property
    def size(self) -> int:
        return len(self.keep) + len(self.drop)


@dataclass(frozen=True, eq=False)
class CompressionPlan:
    """All that is needed to compress one model again: no data, no training.

    Attributes:
        model_sha256: hash of the model file that the plan is for.
        version: the hap-onnx that made it.
        config: the options it was made with, JSON-ready.
        decisions: one per channel group.
        predicted_loss: the expected increase of the loss, by group.
        weights: initializers that are more than slices of the original's (refitted), by name, read-only.
        notes: why, by group.

    Raises ValueError for values that cannot be written to a plan file.
    """

    model_sha256: str
    version: str
    config: Mapping[str, Any]
    decisions: tuple[GroupDecision, ...]
    predicted_loss: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = [decision.group for decision in self.decisions]
        if len(set(groups)) != len(groups):
            raise ValueError("a group is decided twice")
        strangers = sorted({*self.predicted_loss, *self.notes} - set(groups))
        if strangers:
            raise ValueError(f"losses or notes for groups that are not decided: {', '.join(strangers)}")
        losses = {group: float(loss) for group, loss in self.predicted_loss.items()}
        weights = {name: _frozen_copy(name, array) for name, array in sorted(self.weights.items())}
        frozen: dict[str, Any] = {
            "config": json.loads(json.dumps(dict(self.config), allow_nan=False)),
            "decisions": tuple(self.decisions),
            "predicted_loss": json.loads(json.dumps(losses, allow_nan=False)),
            "weights": weights,
            "notes": dict(self.notes),
        }
        for name, value in frozen.items():
            object.__setattr__(self, name, MappingProxyType(value) if isinstance(value, dict) else value)

    def check_model(self, sha256: str) -> None:
        """Raise ModelError unless the plan was made for the model with this hash."""
        if sha256 != self.model_sha256:
            raise ModelError(
                "the plan was made for another model: it belongs to the one with SHA-256 "
                f"{self.model_sha256[:16]}..., this one has {sha256[:16]}..."
            )

    def keep_mask(self, coupling: Coupling) -> NDArray[np.bool_]:
        """Return one flag per element of ``coupling``: what ``surgery.remove_channels`` takes.

        Raises:
            ModelError: the groups of the plan are not those of the model.
        """
        decided = {decision.group: decision for decision in self.decisions}
        problems = [
            f"'{group.name}' has {group.size} channels, the plan decides "
            + (str(decided[group.name].size) if group.name in decided else "none")
            for group in coupling.groups
            if group.name not in decided or decided[group.name].size != group.size
        ]
        known = {group.name for group in coupling.groups}
        problems += [f"there is no group '{name}'" for name in decided if name not in known]
        if problems:
            raise ModelError(f"the plan does not fit the model's channel groups: {'; '.join(problems[:5])}")
        keep = np.ones(coupling.n_elements, bool)
        for group in coupling.groups:
            keep[group.elements[decided[group.name].drop]] = False
        return keep


def _frozen_copy(name: str, array: np.ndarray) -> np.ndarray:
    copy = np.array(array, order="C")
    if copy.dtype.kind in "OUSmM":
        raise ValueError(f"weight '{name}' has type {copy.dtype}, which is no number")
    copy = copy.astype(copy.dtype.newbyteorder("="), copy=False)
    copy.flags.writeable = False
    return copy


# --------------------------------------------------------------- the file


def plan_hash(plan: CompressionPlan) -> str:
    """Return 16 hex digits that tell plans apart: equal plans have equal ones."""
    content = hashlib.sha256()
    for name, array in plan.weights.items():
        for part in (name.encode(), str((array.dtype.name, array.shape)).encode(), array.tobytes()):
            content.update(len(part).to_bytes(8, "little") + part)
    text = json.dumps(_to_document(plan, content.hexdigest()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_plan(plan: CompressionPlan, path: str | Path) -> None:
    """Write ``path`` (JSON) and the weights beside it (``.safetensors``), each complete or not at all.

    Raises:
        UsageError: ``path`` is the name of the weights.
        ValidationError: the folder or the disk does not take the files.
    """
    path = Path(path)
    weights_path = plan_weights_path(path)
    if weights_path == path:
        raise UsageError(f"{path} is the name of the plan's weights: give the plan one that ends in .json")
    temporary = [target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in (weights_path, path)]
    try:
        safetensors.numpy.save_file({n: _as_storable(a) for n, a in plan.weights.items()}, temporary[0])
        document = _to_document(plan, _hash_file(temporary[0]))
        text = json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n"
        temporary[1].write_text(text, encoding="utf-8")
        for file in temporary:
            _sync(file)
        os.replace(temporary[0], weights_path)
        os.replace(temporary[1], path)  # last: a plan that is there is complete
    except (OSError, safetensors.SafetensorError) as error:
        raise ValidationError(
            f"{path} cannot be written ({getattr(error, 'strerror', None) or error}); "
            "check the folder, its permissions and the free space"
        ) from error
    finally:
        for leftover in temporary:
            with suppress(OSError):
                leftover.unlink()


def load_plan(path: str | Path) -> CompressionPlan:
    """Read a plan that ``save_plan`` wrote.

    Raises:
        ModelError: a file is missing, damaged, or does not belong to the other.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise ModelError(f"the plan {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the plan {path} is damaged: it is not valid JSON ({error})") from error
    if not isinstance(document, dict) or document.get("schema") != PLAN_SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        raise ModelError(
            f"{path} is not a plan that this version can read: its schema is {found!r}, not {PLAN_SCHEMA!r}"
        )
    try:
        _check_types(document)
        groups = document["groups"]
        decisions = tuple(
            GroupDecision.from_keep(entry["name"], _checked_size(entry), _from_runs(entry))
            for entry in groups
        )
        weights = _load_weights(plan_weights_path(path), document["weights"])
        return CompressionPlan(
            model_sha256=document["model_sha256"],
            version=document["hap_onnx"],
            config=document["config"],
            decisions=decisions,
            predicted_loss={e["name"]: e["predicted_loss"] for e in groups if "predicted_loss" in e},
            weights=weights,
            notes={e["name"]: e["note"] for e in groups if "note" in e},
        )
    except (ValueError, KeyError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"the plan {path} is damaged: {what}") from error


def _to_document(plan: CompressionPlan, weights_sha256: str) -> dict[str, Any]:
    groups = []
    for decision in plan.decisions:
        entry: dict[str, Any] = {
            "name": decision.group,
            "size": decision.size,
            "width": len(decision.keep),
            "keep": _to_runs(decision.keep),
        }
        if decision.group in plan.predicted_loss:
            entry["predicted_loss"] = plan.predicted_loss[decision.group]
        if decision.group in plan.notes:
            entry["note"] = plan.notes[decision.group]
        groups.append(entry)
    tensors = {name: f"{a.dtype.name}[{','.join(map(str, a.shape))}]" for name, a in plan.weights.items()}
    return {
        "schema": PLAN_SCHEMA,
        "hap_onnx": plan.version,
        "model_sha256": plan.model_sha256,
        "config": dict(plan.config),
        "groups": groups,
        "weights": {"sha256": weights_sha256, "tensors": tensors},
    }


_TYPES: Mapping[str, type] = MappingProxyType(
    {"hap_onnx": str, "model_sha256": str, "config": dict, "groups": list, "weights": dict}
)
_GROUP_TYPES: Mapping[str, type] = MappingProxyType({"name": str, "size": int, "width": int, "keep": str})


def _check_types(document: Mapping[str, Any]) -> None:
    for name, expected in _TYPES.items():
        if not isinstance(document[name], expected):
            raise ValueError(f"'{name}' is no {expected.__name__}")
    for entry in document["groups"]:
        if not isinstance(entry, dict):
            raise ValueError("an entry of 'groups' is no object")
        for name, expected in _GROUP_TYPES.items():
            if not isinstance(entry[name], expected) or isinstance(entry[name], bool):
                raise ValueError(f"'{name}' of a group is no {expected.__name__}")
        loss = entry.get("predicted_loss", 0.0)
        if not isinstance(loss, (int, float)) or isinstance(loss, bool):
            raise ValueError(f"'predicted_loss' of '{entry['name']}' is no number")
        if not isinstance(entry.get("note", ""), str):
            raise ValueError(f"'note' of '{entry['name']}' is no text")
    weights = document["weights"]
    if not isinstance(weights["sha256"], str) or not isinstance(weights["tensors"], dict):
        raise ValueError("'weights' needs a 'sha256' and its 'tensors'")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


_MAX_SIZE = 1 << 28  # channels of one group: a damaged number must not ask for all memory


def _checked_size(entry: Mapping[str, Any]) -> int:
    if not 0 < entry["size"] <= _MAX_SIZE:
        raise ValueError(f"'{entry['name']}' has {entry['size']} channels")
    return int(entry["size"])


def _to_runs(positions: Ints) -> str:
    """Write ascending positions for people: ``0-3,7``."""
    if not len(positions):
        return ""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    runs = np.split(positions, breaks)
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _from_runs(entry: Mapping[str, Any]) -> list[int]:
    positions: list[int] = []
    for run in entry["keep"].split(",") if entry["keep"] else []:
        first, _, last = run.partition("-")
        bounds = (first, last or first)
        if not all(bound.isascii() and bound.isdigit() and len(bound) < 10 for bound in bounds):
            raise ValueError(f"'{entry['name']}' keeps {run!r}, which is neither a position nor a range")
        start, stop = int(bounds[0]), int(bounds[1])
        if stop < start or stop >= entry["size"] or (positions and start <= positions[-1]):
            raise ValueError(f"'{entry['name']}' keeps {run!r}: out of order, or beyond its channels")
        positions.extend(range(start, stop + 1))
    if len(positions) != entry["width"]:
        raise ValueError(f"'{entry['name']}' keeps {len(positions)} channels and says {entry['width']}")
    return positions


_STORED_AS_THEY_ARE = frozenset(
    "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split()
)


def _as_storable(array: np.ndarray) -> np.ndarray:
    """View types that safetensors does not give to numpy (bfloat16 ...) as integers; the JSON names them."""
    return array if array.dtype.name in _STORED_AS_THEY_ARE else array.view(f"u{array.dtype.itemsize}")


def _load_weights(path: Path, entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
    try:
        digest = _hash_file(path)
        if digest != entry["sha256"]:
            raise ModelError(
                f"{path} does not belong to the plan beside it, or is damaged: its SHA-256 is "
                f"{digest[:16]}..., the plan says {entry['sha256'][:16]}..."
            )
        stored = safetensors.numpy.load_file(path)
    except OSError as error:
        raise ModelError(f"the plan's weights {path} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise ModelError(f"the plan's weights {path} are damaged: {error}") from error
    if set(stored) != set(entry["tensors"]):
        odd = sorted(set(stored) ^ set(entry["tensors"]))
        raise ValueError(f"the plan and its weights differ in {', '.join(odd[:5])}")
    weights = {}
    for name, array in stored.items():
        described = entry["tensors"][name]
        type_name = described.partition("[")[0] if isinstance(described, str) else ""
        try:
            dtype = np.dtype(type_name) if type_name else array.dtype
            typed = array if type_name in _STORED_AS_THEY_ARE else array.view(dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"weight '{name}' is described as {described!r}") from error
        if described != f"{typed.dtype.name}[{','.join(map(str, typed.shape))}]":
            raise ValueError(f"weight '{name}' is not {described}, as the plan says")
        weights[name] = typed
    return weights


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())

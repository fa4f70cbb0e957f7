"""From expected losses and budgets to a decision: widths of groups and implants of layers, chosen together.

Both compete in one currency, expected loss per cost. An implant of a layer is priced at the widths that the
plan leaves the layer, and these widths depend on what implants save, so the choice is repeated until widths
no longer change; of the rounds, the one with the least expected loss at its own widths is taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hap_onnx.coupling.channels import Coupling
from hap_onnx.errors import BudgetError
from hap_onnx.implants.factors import pointwise_order
from hap_onnx.implants.loss import ImplantLayer, LayerMenu, cut_layer, implant_costs, implant_menu
from hap_onnx.model.measure import constants_of
from hap_onnx.ops.linear import linear_form
from hap_onnx.ops.registry import find_macs
from hap_onnx.planning.align import Align
from hap_onnx.planning.allocate import GroupOptions, LayerOptions, allocate, find_options
from hap_onnx.planning.decide import LossModel
from hap_onnx.planning.plan import GroupDecision, NodeReplacement
from hap_onnx.prepare import PreparedModel
from hap_onnx.surgery import kept_positions
from hap_onnx.surgery.grafting import content_positions, permute_channels
from hap_onnx.twin import build_twin

Ints = NDArray[np.int64]

MAX_ROUNDS = 4


@dataclass(frozen=True)
class Choice:
    """What a plan does: which elements of each group stay, and which layers become implants.

    ``whole`` names groups that the plan was not free to narrow.
    """

    decisions: tuple[GroupDecision, ...]
    replacements: tuple[NodeReplacement, ...] = ()
    whole: frozenset[str] = frozenset()

    @property
    def shape_key(self) -> str:
        """Name the shapes of the result: which channels and weights they have does not matter."""
        widths = [(decision.group, len(decision.keep)) for decision in self.decisions]
        ranks = [(entry.node, entry.kind, entry.rank) for entry in self.replacements]
        return hashlib.sha256(repr((sorted(widths), sorted(ranks))).encode()).hexdigest()[:16]


def choose(
    prepared: PreparedModel,
    model: LossModel,
    budgets: Mapping[str, float | None],
    *,
    align: Align,
    whole: Collection[str] = (),
    kinds: Mapping[str, Mapping[str, float]],
) -> Choice:
    """Choose within absolute ``budgets``.

    Args:
        whole: groups that stay whole.
        kinds: which kinds of implants each layer may become, by node, each with the largest share of the
            layer's multiply-accumulates that it may have.

    Raises BudgetError.
    """
    options = tuple(
        GroupOptions(option.group, option.widths[-1:]) if option.group in whole else option
        for option in find_options(prepared.coupling, model.removable, align=align)
    )
    curves = [curve.loss for curve in model.curves]
    widths = np.array(model.cost.sizes, np.int64)
    tried: dict[bytes, tuple[float, Choice]] = {}
    for _ in range(MAX_ROUNDS if kinds else 1):
        # Channels become pointwise last, among those that stay: how many there are must be known.
        menus = _menus(prepared, model, widths, kinds, align=align, without=("pointwise",))
        widths = allocate(curves, options, model.cost, budgets, [_layer_options(m) for m in menus]).widths
        if widths.tobytes() in tried:
            break
        menus = _menus(prepared, model, widths, kinds, align=align)
        fixed = [GroupOptions(o.group, np.array([w])) for o, w in zip(options, widths, strict=True)]
        try:
            found = allocate(curves, fixed, model.cost, budgets, [_layer_options(m) for m in menus])
        except BudgetError:
            if not tried:
                raise
            break  # the widths have grown, and with them the steps of ranks
        loss = sum(float(curve[width]) for curve, width in zip(curves, widths, strict=True))
        loss += sum(float(m.losses[o]) for m, o in zip(menus, found.options, strict=True))
        tried[widths.tobytes()] = (
            loss,
            replace(_choice(prepared, model, widths, menus, found.options), whole=frozenset(whole)),
        )
    return min(tried.values(), key=lambda entry: entry[0])[1]


def decide_groups(
    prepared: PreparedModel, model: LossModel, widths: Sequence[int] | Ints
) -> tuple[GroupDecision, ...]:
    """Keep, of each group, as many elements as its width says: those that go last."""
    return tuple(
        GroupDecision.from_keep(group.name, group.size, ranking.order[group.size - int(width) :])
        for group, ranking, width in zip(prepared.coupling.groups, model.rankings, widths, strict=True)
    )


def _layer_options(menu: LayerMenu) -> LayerOptions:
    return LayerOptions(menu.node, menu.coefficients, menu.losses)


def _menus(
    prepared: PreparedModel,
    model: LossModel,
    widths: Ints,
    kinds: Mapping[str, Mapping[str, float]],
    *,
    align: Align,
    without: Collection[str] = (),
) -> list[LayerMenu]:
    """The menu of each layer of the cost model at these widths."""
    if not kinds:
        return []
    keep = keep_mask(prepared, decide_groups(prepared, model, widths))
    slots = Slots(prepared.coupling, keep)
    nodes = {node.name: node for node in prepared.graph.nodes}
    menus = []
    for terms in model.cost.layers:
        losses = model.implants[terms.node]
        outputs, inputs = slots.of_layer(losses.layer)
        shares = kinds.get(terms.node, {})
        allowed = {kind: share for kind, share in shares.items() if kind not in without}
        if (outputs is not None and not len(outputs)) or (inputs is not None and not len(inputs)):
            allowed = {}  # the layer is gone
            outputs = inputs = None
        menus.append(
            implant_menu(
                losses, terms, nodes[terms.node], prepared.shapes, kinds=allowed, align=align,
                times=model.times, outputs=outputs, inputs=inputs,
            )
        )  # fmt: skip
    return menus


def _choice(
    prepared: PreparedModel, model: LossModel, widths: Ints, menus: Sequence[LayerMenu], options: Ints
) -> Choice:
    decisions = decide_groups(prepared, model, widths)
    slots = Slots(prepared.coupling, keep_mask(prepared, decisions))
    replacements = []
    for menu, option in zip(menus, options, strict=True):
        chosen = menu.choices[int(option)]
        if not chosen.kind:
            continue
        layer = model.implants[menu.node].layer
        channels: Ints = np.zeros(0, np.int64)
        if chosen.kind == "pointwise":
            outputs, inputs = slots.of_layer(layer)
            cut = cut_layer(model.implants[menu.node], outputs, inputs)
            form = layer.kind("pointwise")
            assert form.tap is not None
            order = pointwise_order(cut.weight, cut.metric, taps=form.taps, tap=form.tap)
            left = np.arange(len(order)) if outputs is None else outputs
            channels = np.sort(left[order[: chosen.rank]])
        replacements.append(
            NodeReplacement(
                node=menu.node,
                kind=chosen.kind,
                rank=chosen.rank,
                channels=channels,
                predicted_loss=float(menu.predicted[int(option)]),
                expected_loss=float(menu.losses[int(option)]),
            )
        )
    return Choice(decisions, tuple(replacements))


def predicted_costs(prepared: PreparedModel, model: LossModel, choice: Choice) -> Ints:
    """Return what a choice costs, in the order of ``METRICS``, without carrying it out."""
    widths = [len(decision.keep) for decision in choice.decisions]
    implants = {entry.node: (entry.kind, entry.rank) for entry in choice.replacements}
    return costs_with(prepared, model, widths, implants)


def costs_with(
    prepared: PreparedModel,
    model: LossModel,
    widths: Sequence[int] | Ints,
    implants: Mapping[str, tuple[str, int]],
) -> Ints:
    """Return costs, in the order of ``METRICS``, at the width of each group with some layers replaced.

    ``implants`` holds kind and rank by node.
    """
    nodes = {node.name: node for node in prepared.graph.nodes}
    tables = []
    for terms in model.cost.layers:
        if terms.node not in implants:
            tables.append(terms.dense)
            continue
        layer, (kind, rank) = model.implants[terms.node].layer, implants[terms.node]
        node, form = nodes[terms.node], layer.kind(kind)
        tables.append(implant_costs(layer, form, rank, node, prepared.shapes, times=model.times))
    return model.cost.totals(widths, np.stack(tables) if tables else None)


def predicted_losses(model: LossModel, decisions: tuple[GroupDecision, ...]) -> dict[str, float]:
    """Expected loss of each decision, from the curve of its group."""
    return {
        decision.group: float(curve.loss[len(decision.keep)])
        for decision, curve in zip(decisions, model.curves, strict=True)
    }


def group_roles(prepared: PreparedModel) -> dict[str, str]:
    """Say of each group, by name, what it is: ``inner``, ``residual`` or ``heads``."""
    roles = {group.name: "inner" for group in prepared.coupling.groups}
    roles |= dict.fromkeys(residual_groups(prepared), "residual")
    return roles | dict.fromkeys(head_groups(prepared), "heads")


def residual_groups(prepared: PreparedModel) -> frozenset[str]:
    """Groups that several nodes produce: the channels of residual streams, which every later layer reads."""
    several = {group.name for group in prepared.coupling.groups if len(group.producers) > 1}
    return frozenset(several - head_groups(prepared))


def head_groups(prepared: PreparedModel) -> frozenset[str]:
    """Groups of attention heads: products of two activations run side by side, one for each element."""
    tensors, found = prepared.coupling.tensors, set()
    for node in prepared.graph.nodes:
        if find_macs(node.op, domain=node.domain or "") is None or any(True for _ in constants_of(node)):
            continue
        names = [tensor.name for tensor in (*node.inputs, *node.outputs) if tensor.name]
        if len(names) > 2 and all(name in tensors for name in names):
            found.update(set.intersection(*(set(tensors[name].ids.tolist()) for name in names)))
    return frozenset(
        group.name for group in prepared.coupling.groups if not found.isdisjoint(group.elements.tolist())
    )


# --- where channels go ---


def keep_mask(prepared: PreparedModel, decisions: Sequence[GroupDecision]) -> NDArray[np.bool_]:
    """One flag per element of the coupling, for ``surgery.remove_channels``."""
    keep = np.ones(prepared.coupling.n_elements, bool)
    for group, decision in zip(prepared.coupling.groups, decisions, strict=True):
        keep[group.elements[decision.drop]] = False
    return keep


class Slots:
    """Which positions of weights stay, and in which order, under a decision."""

    def __init__(self, coupling: Coupling, keep: NDArray[np.bool_], order: Ints | None = None) -> None:
        self._elements = {(axis.initializer, axis.axis): axis.elements for axis in coupling.weights}
        self._keep, self._order = keep, order

    def of_layer(self, layer: ImplantLayer) -> tuple[Ints | None, Ints | None]:
        """Positions of a layer's output and input axis that stay; None where the axis carries no channels."""
        return self.of(layer.weight, layer.form.out_axis), self.of(layer.weight, layer.form.in_axis)

    def of(self, initializer: str, axis: int) -> Ints | None:
        """Positions of one axis that stay, as the original counts them."""
        elements = self._elements.get((initializer, axis))
        if elements is None:
            return None
        if self._order is None:
            return kept_positions(elements, self._keep)
        # Slots are numbered as before; what lies in them has moved.
        return content_positions(elements, self._order)[kept_positions(elements, self._keep[self._order])]


def arrange(prepared: PreparedModel, choice: Choice) -> tuple[PreparedModel, NDArray[np.bool_], Ints | None]:
    """Bring channels that become pointwise to the end of what stays of their groups.

    Returns the model with its channels permuted (the same function), one keep flag per element of it, and
    the order: element e of the result is element order[e] of ``prepared``; None if nothing moved.
    """
    keep = keep_mask(prepared, choice.decisions)
    order = _order_of(prepared, choice, keep)
    if np.array_equal(order, np.arange(len(order))):
        return prepared, keep, None
    graph = permute_channels(prepared.graph, prepared.coupling, order)
    twin = build_twin(graph, device=str(prepared.twin.device or "cpu"))
    return replace(prepared, graph=graph, twin=twin), keep[order], order


def moved_tensors(prepared: PreparedModel, choice: Choice) -> frozenset[str]:
    """Return the tensors whose channels ``arrange`` brings into another order."""
    order = _order_of(prepared, choice, keep_mask(prepared, choice.decisions))
    is_moved = order != np.arange(len(order))
    return frozenset(
        name
        for name, found in prepared.coupling.tensors.items()
        if is_moved[found.ids[found.ids >= 0]].any()
    )


def _order_of(prepared: PreparedModel, choice: Choice, keep: NDArray[np.bool_]) -> Ints:
    order = np.arange(prepared.coupling.n_elements)
    nodes = {node.name: node for node in prepared.graph.nodes}
    axes = {(axis.initializer, axis.axis): axis.elements for axis in prepared.coupling.weights}
    for replacement in choice.replacements:
        if not len(replacement.channels):
            continue
        form = linear_form(nodes[replacement.node])
        assert form is not None  # or it would not have been offered
        slots = axes[nodes[replacement.node].inputs[form.weight_index].name, form.out_axis]
        is_last = np.zeros(len(slots), bool)
        is_last[replacement.channels] = True
        stays = keep[slots]
        order[slots] = np.concatenate([slots[stays & ~is_last], slots[stays & is_last], slots[~stays]])
    return order

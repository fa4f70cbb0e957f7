"""What can become of a model, and why not more: the report of ``inspect``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hap_onnx import report as reports
from hap_onnx.implants.loss import ImplantLayer, explain_refusals, find_implant_layers
from hap_onnx.model.measure import node_macs, weights_of
from hap_onnx.planning.allocate import find_options
from hap_onnx.planning.choose import group_roles
from hap_onnx.planning.cost_graph import cost_model
from hap_onnx.prepare import PreparedModel
from hap_onnx.report.summary import facts_before, frozen_nodes, installed_versions


def inspect_report(label: str, prepared: PreparedModel, align: int | str) -> reports.InspectReport:
    """All that ``inspect`` says."""
    coupling = prepared.coupling
    cost = cost_model(prepared.graph, coupling, prepared.shapes)
    options = find_options(coupling, align=align)
    before = facts_before(prepared)
    roles = group_roles(prepared)
    groups = []
    for group, option, saved in zip(coupling.groups, options, cost.savings().tolist(), strict=True):
        steps = np.diff(option.widths)
        groups.append(
            reports.GroupInfo(
                name=group.name,
                size=group.size,
                role=roles[group.name],
                multiple=int(np.gcd.reduce(steps)) if len(steps) else group.size,
                params=saved[0],
                macs=saved[1],
            )
        )
    kinds = {layer.node: layer for layer in find_implant_layers(prepared)}
    prunable = {weight.initializer for weight in coupling.weights} | set(coupling.tensors)
    implantable = {layer.weight for layer in kinds.values()}
    return reports.InspectReport(
        model=label,
        size=before,
        groups=tuple(groups),
        frozen=frozen_nodes(prepared),
        layers=_layers(prepared, kinds),
        prunable=_share(prepared, before, lambda names: not prunable.isdisjoint(names)),
        implantable=_share(prepared, before, lambda names: not implantable.isdisjoint(names)),
        fixed=_share(prepared, before, lambda names: (prunable | implantable).isdisjoint(names)),
        versions=installed_versions(),
    )


def _share(
    prepared: PreparedModel, whole: reports.ModelFacts, belongs: Callable[[set[str]], bool]
) -> reports.Share:
    """Count the initializers, and the nodes by what they read, that belong to a part of the model."""
    nodes = prepared.graph.nodes
    sizes = {
        tensor.name: tensor.values.size
        for node in nodes
        for tensor in weights_of(node)
    }
    params = sum(size for name, size in sizes.items() if belongs({name}))
    macs = sum(
        node_macs(node, prepared.shapes)
        for node in nodes
        if belongs({tensor.name for tensor in (*node.inputs, *node.outputs)})
    )
    return reports.Share(
        params_ratio=min(1.0, params / max(whole.params, 1)),
        macs_ratio=min(1.0, macs / whole.macs) if whole.macs else None,
    )


def _layers(prepared: PreparedModel, kinds: Mapping[str, ImplantLayer]) -> tuple[reports.LayerInfo, ...]:
    """Answer for each contraction with a weight what can become of it."""
    groups: dict[str, list[str]] = {}
    for group in prepared.coupling.groups:
        for node in group.producers:
            groups.setdefault(node, []).append(group.name)
    frozen = {entry.node: entry.reason for entry in prepared.coupling.frozen}
    refusals, found = explain_refusals(prepared), []
    for node in prepared.graph.nodes:
        macs = node_macs(node, prepared.shapes)
        weights = list(weights_of(node))
        if not weights or not macs:
            continue
        of_node = tuple(groups.get(node.name, ()))
        layer = kinds.get(node.name)
        found.append(
            reports.LayerInfo(
                node=node.name,
                op_type=node.op,
                params=sum(int(tensor.values.size) for tensor in weights),
                macs=macs,
                groups=of_node,
                prune="" if of_node else frozen.get(node.name, "channels are not followed through it"),
                implants=tuple(form.kind for form in layer.forms) if layer is not None else (),
                implant="" if layer is not None else refusals.get(node.name, "no kind of implant fits it"),
            )
        )
    return tuple(found)

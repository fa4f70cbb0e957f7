"""Losses and costs of implants against numpy, real forks of a linear model, and models really built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from planning_cases import Job, make_job, real_totals, slice_by_numpy
from topologies import TOPOLOGIES, Net
from torch import Tensor

from hap_onnx.implants.factors import Family, Metric, factorise, find_family, predict_loss
from hap_onnx.implants.loss import (
    ImplantLosses,
    bias_shift,
    cut_layer,
    explain_refusals,
    find_implant_layers,
    implant_menu,
    measure_implants,
    rank_coefficients,
    sole_group,
    weight_overrides,
)
from hap_onnx.model.model_io import load_model
from hap_onnx.planning.cost_graph import cost_model
from hap_onnx.planning.curves import Fork, Measured, run_forks
from hap_onnx.prepare import prepare
from hap_onnx.surgery.grafting import insert_implants
from tests.helpers import rand


def windows() -> dict[str, Net]:
    """A convolution with each kind of window in front of another one."""
    nets: dict[str, Net] = {}
    for name, options in {
        "plain": {},
        "strided": {"strides": [2, 1]},
        "unpadded": {"pads": [0, 0, 0, 0]},
        "uneven": {"pads": [2, 1, 0, 1]},
        "dilated": {"dilations": [2, 1], "pads": [2, 1, 2, 1]},
        "same": {"auto_pad": "SAME_UPPER", "strides": [2, 2], "pads": None},
        "grouped": {"group": 2},
        "pointed": {"k": 1},
        "no_bias": {"bias": False},
    }.items():
        net, given = Net(), dict(options)
        if given.get("pads", 0) is None:
            given.pop("pads")
            x = net.op("Conv", net.conv("x", 3, 12, out="a"), net.rand(10, 12, 3, 3), net.rand(10), out="b",
                       **given)  # fmt: skip
        else:
            x = net.conv(net.conv("x", 3, 12, out="a"), 12, 10, out="b", **given)
        net.conv(net.relu(x), 10, 4, out="y")
        nets[name] = net
    net = Net()
    x = net.relu(net.op("Gemm", "x", net.rand(14, 12), net.rand(12), out="b"))
    net.op("Gemm", x, net.rand(6, 12), net.rand(6), transB=1, out="y")
    nets["gemm"] = net
    net = Net()
    net.op("MatMul", net.op("MatMul", "x", net.rand(14, 12), out="b"), net.rand(12, 6), out="y")
    nets["matmul"] = net
    return nets


SHAPES: dict[str, Any] = {"gemm": {"x": ("N", 14)}, "matmul": {"x": ("N", 5, 14)}}
_JOBS: dict[str, Job] = {}


def job(name: str) -> Job:
    if name not in _JOBS:
        model = windows()[name].model("y", inputs=SHAPES.get(name)) if name in windows() else None
        _JOBS[name] = make_job(model or TOPOLOGIES[name]().model)
    return _JOBS[name]


# --- which layers ---


def names_of(net: Net, *outputs: str, **options: Any) -> dict[str, tuple[str, ...]]:
    model = net.model("y", *outputs)
    prepared = prepare(load_model(model), {"x": rand(2, 3, 6, 6)}, **options)
    layers = find_implant_layers(prepared)
    refused = explain_refusals(prepared)
    assert not {layer.node for layer in layers} & set(refused)
    return {layer.node: tuple(form.kind for form in layer.forms) for layer in layers}


ALL = ("lowrank", "spatial", "pointwise")
ANY = dict.fromkeys(ALL, 1.0)


def test_pointwise_is_offered_where_channels_can_move() -> None:
    found = names_of_topology("residual")
    assert (
        found
        == {
            "make_stem": ALL[:2],  # the stream has three producers
            "make_a1": ALL,
            "make_a2": ALL[:2],
            "make_b1": ALL,
            "make_b2": ALL[:2],
            "make_y": ALL[:2],  # outputs of the model keep their order
        }
    )
    assert not any("pointwise" in kinds for kinds in names_of_topology("gate_of_equal_parts").values())


def names_of_topology(name: str) -> dict[str, tuple[str, ...]]:
    return {node: tuple(kinds) for node, kinds in job(name).kinds.items()}


def test_weights_and_biases_that_are_not_the_layers_own_stay() -> None:
    net = Net()
    weight = net.rand(6, 6, 3, 3)
    x = net.conv("x", 3, 6, out="a")
    for name in "bc":
        x = net.relu(net.conv(x, 6, 6, weight=weight, out=name))
    net.conv(x, 6, 4, out="y")
    assert set(names_of(net)) == {"make_a", "make_y"}
    model = net.model("y")
    prepared = prepare(load_model(model), {"x": rand(2, 3, 6, 6)})
    assert explain_refusals(prepared)["make_b"] == f"its weight '{weight}' is used elsewhere, too"
    net = Net()
    broken = net.const(np.full((6, 6, 3, 3), np.inf, np.float32))
    x = net.relu(net.conv("x", 3, 6, out="a"))
    net.op("Where", net.const(np.array(True)), x, net.conv(x, 6, 6, weight=broken, out="b"), out="y")
    prepared = prepare(load_model(net.model("y")), {"x": rand(2, 3, 6, 6)})
    assert "holds NaN or infinity" in explain_refusals(prepared)["make_b"]
    net = Net()
    bias = net.rand(6)
    x = net.op("Conv", net.conv("x", 3, 6, out="a"), net.rand(6, 6, 3, 3), bias, out="b", pads=[1] * 4)
    net.conv(net.op("Add", x, net.op("Reshape", bias, net.ints(1, 6, 1, 1))), 6, 4, out="y")
    prepared = prepare(load_model(net.model("y")), {"x": rand(2, 3, 6, 6)})
    layers = {layer.node: layer for layer in find_implant_layers(prepared)}
    folded = {tensor.name for tensor in prepared.graph.tensors().values() if isinstance(tensor, gs.Constant)}
    assert layers["make_a"].bias in folded
    assert layers["make_b"].bias in (None, *folded)
    if bias in folded:
        assert (layers["make_b"].bias is None) == (
            sum(tensor.name == bias for node in prepared.graph.nodes for tensor in node.inputs) > 1
        )


def test_only_layers_that_a_plan_can_replace_are_tried() -> None:
    """A depthwise layer loses channels with what it reads: measuring implants of it would tell nothing."""
    net = Net()
    x = net.relu(net.conv("x", 3, 8, out="a"))
    x = net.relu(net.conv(x, 8, 8, group=8, out="depthwise"))
    net.conv(x, 8, 4, out="y")
    assert set(names_of(net)) == {"make_a", "make_y"}
    prepared = prepare(load_model(net.model("y")), {"x": rand(2, 3, 6, 6)})
    assert "go together with those that it reads" in explain_refusals(prepared)["make_depthwise"]
    # Where its channels stay, so do those of the layer: an implant of it is like any other.
    kept = prepare(load_model(net.model("y")), {"x": rand(2, 3, 6, 6)}, exclude=["make_a"])
    for case in (prepared, kept):
        names = {layer.node for layer in find_implant_layers(case)}
        cost = cost_model(case.graph, case.coupling, case.shapes, layers=names)
        assert {terms.node for terms in cost.layers} == names


def test_excluded_biases_are_not_shifted() -> None:
    net = Net()
    x = net.conv("x", 3, 6, out="a")
    net.conv(x, 6, 4, out="y")
    bias = net.nodes[0].input[2]
    prepared = prepare(load_model(net.model("y")), {"x": rand(2, 3, 6, 6)}, exclude=[bias])
    layers = {layer.node: layer for layer in find_implant_layers(prepared)}
    assert layers["make_a"].bias is None
    assert [form.kind for form in layers["make_a"].forms] == ["lowrank", "spatial"]
    assert layers["make_y"].bias is not None


# --- what is left of a layer ---


@pytest.mark.parametrize("name", ["plain", "grouped", "no_bias", "gemm", "matmul"])
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_cut_layer_is_a_slice(name: str, diagonal: bool) -> None:
    losses = job(name).losses.implants["make_b"]
    if diagonal:
        inputs = losses.curvature.inputs.diagonal(dim1=1, dim2=2)
        losses = replace(losses, curvature=replace(losses.curvature, inputs=inputs))
    g, n_outputs, n_features = losses.weight.shape
    n_inputs, rng = n_features // losses.layer.form.n_taps, np.random.default_rng(0)
    for _ in range(5):
        n_left = int(rng.integers(1, n_outputs, endpoint=True))
        groups = np.arange(g)
        outputs = np.concatenate(
            [group * n_outputs + rng.permutation(n_outputs)[:n_left] for group in groups]
        )
        inputs = rng.permutation(n_inputs)[: int(rng.integers(1, n_inputs, endpoint=True))]
        cut = cut_layer(losses, outputs, inputs)
        w, a, gradients, mean = slice_by_numpy(losses, outputs, inputs)
        np.testing.assert_array_equal(cut.weight.numpy(), w)
        np.testing.assert_allclose(cut.metric.inputs.numpy(), a, rtol=1e-12, atol=1e-14 * abs(a).max())
        np.testing.assert_allclose(cut.metric.gradients.numpy(), gradients, rtol=1e-12, atol=1e-18)
        has_bias = name not in ("no_bias", "matmul")
        assert (mean is not None) == (cut.mean is not None) == (has_bias and not diagonal)
        if mean is not None and cut.mean is not None:
            np.testing.assert_array_equal(cut.mean.numpy(), mean)
    whole, everything = cut_layer(losses), cut_layer(losses, np.arange(g * n_outputs), np.arange(n_inputs))
    assert torch.equal(whole.weight, everything.weight)
    torch.testing.assert_close(whole.metric.inputs, everything.metric.inputs, rtol=1e-12, atol=0)


def test_a_shifted_bias_keeps_the_mean_output() -> None:
    one = job("plain")
    losses = one.losses.implants["make_b"]
    cut = cut_layer(losses)
    assert cut.mean is not None
    dense = factorise(cut.weight, cut.metric, kind="lowrank", rank=2, taps=(9, 1)).dense
    shift = bias_shift(cut, dense)
    torch.testing.assert_close(
        (dense @ cut.mean[:, :, None])[:, :, 0] + shift, (cut.weight @ cut.mean[:, :, None])[:, :, 0]
    )
    no_bias = cut_layer(job("no_bias").losses.implants["make_b"])
    assert not bias_shift(no_bias, no_bias.weight * 2).any()


# --- predicted and measured ---


def linear_job() -> Job:
    """Linear and of one output position, so that losses are exactly quadratic."""
    net = Net()
    x = net.op("Gemm", "x", net.rand(20, 16), net.rand(16), out="a")
    x = net.op("Gemm", x, net.rand(16, 18), net.rand(18), out="b")
    net.op("Gemm", x, net.rand(18, 12), out="y")
    return make_job(net.model("y", inputs={"x": ("N", 20)}), n_samples=400)


def test_of_a_linear_model_predictions_are_what_is_measured() -> None:
    one = linear_job()
    assert {"make_a", "make_b", "make_y"} == set(one.losses.implants)
    for losses in one.losses.implants.values():
        assert len(losses.predicted) == 2
        assert (np.diff(losses.predicted) > 0).all()
        # Directions are drawn at random, 400 of them; damping adds 1 % twice, and a bit for what is small.
        assert (np.abs(np.log(losses.ratios)) < np.log(1.35)).all()


def test_measured_losses_are_those_of_models_that_compute_the_product() -> None:
    one = linear_job()
    for losses in one.losses.implants.values():
        cut = cut_layer(losses)
        form = losses.layer.kind("lowrank")
        dense = factorise(cut.weight, cut.metric, kind="lowrank", rank=3, taps=form.taps).dense
        twin, node = one.prepared.twin, one.nodes[losses.layer.node]
        overrides = weight_overrides(losses.layer, node, twin, cut, dense)
        start = next(i for i, step in enumerate(twin.steps) if step.name == node.name)
        measured = run_forks(
            twin, one.subset, [Fork(("one", 3), start, overrides)], scales=one.scales, batch_size=64
        )["one", 3].loss
        # By hand: the change of the layer, through the rest of the model, which is linear.
        x = next(iter(one.subset.batches(400))).inputs["x"].astype(np.float64)
        weights = [one.nodes[name].inputs[1].values.astype(np.float64) for name in ("make_a", "make_b")]
        biases = [one.nodes[name].inputs[2].values.astype(np.float64) for name in ("make_a", "make_b")]
        after = one.nodes["make_y"].inputs[1].values.astype(np.float64)
        rows, rest = {
            "make_a": (x, weights[1] @ after),
            "make_b": (x @ weights[0] + biases[0], after),
            "make_y": ((x @ weights[0] + biases[0]) @ weights[1] + biases[1], np.eye(12)),
        }[node.name]
        change = (dense - cut.weight)[0].numpy()
        shift = bias_shift(cut, dense)[0].numpy() if losses.layer.bias is not None else 0
        wrong = (rows @ change.T + shift) @ rest
        expected = 0.5 * one.scales["y"] ** 2 * np.square(wrong).sum(1).mean()
        assert measured == pytest.approx(expected, rel=1e-3)
        undamped = predict_loss(torch.from_numpy(change)[None], cut.metric)
        assert undamped == pytest.approx(measured, rel=0.4)


def test_ratios_are_interpolated_between_the_measured_points() -> None:
    losses = job("plain").losses.implants["make_b"]
    made = replace(losses, predicted=np.array([0.01, 1.0]), ratios=np.array([4.0, 1.0]))
    found = made.correct(np.array([0.001, 0.01, 0.1, 1.0, 10.0, 0.0, -1e-17]))
    np.testing.assert_allclose(found, [0.004, 0.04, 0.2, 1.0, 10.0, 0.0, 0.0])
    plain = replace(losses, predicted=np.zeros(0), ratios=np.zeros(0))
    np.testing.assert_array_equal(plain.correct(np.array([1.0, 2.0])), [1.0, 2.0])


def measure(one: Job, **changes: Any) -> dict[str, ImplantLosses]:
    curvature = {name: losses.curvature for name, losses in one.losses.implants.items()}
    return measure_implants(
        one.prepared.graph,
        one.prepared.twin,
        [losses.layer for losses in one.losses.implants.values()],
        {**curvature, **changes},
        one.subset,
        scales=one.scales,
        batch_size=20,
    )


def test_layers_of_which_nothing_is_known_are_left_out() -> None:
    one = job("plain")
    curvature = one.losses.implants["make_b"].curvature
    nothing = replace(curvature, gradients=curvature.gradients * np.nan)
    assert set(measure(one, make_b=nothing)) == set(one.losses.implants) - {"make_b"}
    net = Net()  # the exponential of what is large is infinite, and so is its gradient
    x = net.op("Exp", net.op("Mul", net.conv("x", 3, 6, out="a"), net.const(np.float32(40))))
    x = net.op("Clip", net.op("Log", x), net.const(np.float32(-9)), net.const(np.float32(9)))
    net.conv(x, 6, 4, out="y")
    assert set(make_job(net.model("y")).losses.implants) == {"make_y"}


def test_outputs_that_are_not_finite_are_a_huge_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    one = job("plain")
    for value in (np.nan, np.inf):
        monkeypatch.setattr(
            "hap_onnx.implants.loss.run_forks",
            lambda twin, subset, forks, value=value, **options: {fork.key: Measured(value) for fork in forks},
        )
        for losses in measure(one).values():
            found = losses.correct(losses.predicted)
            assert np.isfinite(found).all()
            assert (found > 1e10).all()


# --- what a planner may choose ---


@pytest.mark.parametrize("name", windows())
def test_options_cost_what_the_built_models_cost(name: str) -> None:
    one = job(name)
    losses = one.losses.implants["make_b"]
    terms = next(terms for terms in one.losses.cost.layers if terms.node == "make_b")
    menu = implant_menu(losses, terms, one.nodes["make_b"], one.prepared.shapes, kinds=ANY, align=3)
    assert menu.choices[0].kind == ""
    assert (menu.losses[0], menu.predicted[0]) == (0, 0)
    np.testing.assert_array_equal(menu.coefficients[0], terms.dense)
    offered = {choice.kind for choice in menu.choices[1:]}
    assert offered == {form.kind for form in losses.layer.forms} - (
        {"spatial"} if name == "pointed" else set()
    )
    full = np.array(real_totals(one, one.prepared.graph))
    _, n_outputs, n_features = losses.weight.shape
    n_in = n_features // losses.layer.form.n_taps
    lengths = np.array([n_in * n_outputs * losses.layer.form.conv_group, n_in,
                        n_outputs * losses.layer.form.conv_group, 1])  # fmt: skip
    for choice, table in zip(menu.choices[1:], menu.coefficients[1:], strict=True):
        assert choice.rank % 3 == 0
        form = losses.layer.kind(choice.kind)
        weights = [np.zeros(shape, np.float32) for shape in form.weight_shapes(choice.rank)]
        graph = insert_implants(one.prepared.graph, {"make_b": (choice.kind, weights)})
        saved = lengths @ terms.dense - lengths @ table
        assert (full - real_totals(one, graph)).tolist() == saved[:2].tolist()
        assert saved.max() > 0
    np.testing.assert_allclose(menu.losses[1:], losses.correct(menu.predicted[1:]))


def test_what_is_known_of_a_whole_layer_is_not_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one = job("plain")
    losses = replace(one.losses.implants["make_b"], known={})
    terms = next(terms for terms in one.losses.cost.layers if terms.node == "make_b")
    n_out, n_in = losses.weight.shape[1], losses.weight.shape[2] // losses.layer.form.n_taps
    asked: list[str] = []

    def find(weight: Tensor, metric: Metric, *, kind: str, **words: Any) -> Family:
        asked.append(kind)
        return find_family(weight, metric, kind=kind, **words)

    monkeypatch.setattr("hap_onnx.implants.loss.find_family", find)

    def menu(kinds: Sequence[str], **left: np.ndarray) -> list[float]:
        found = implant_menu(
            losses, terms, one.nodes["make_b"], one.prepared.shapes, kinds=dict.fromkeys(kinds, 1.0), align=1,
            **left,
        )  # fmt: skip
        return found.predicted.tolist()

    one_kind = menu(["lowrank"])
    assert one_kind == menu(["lowrank"], outputs=np.arange(n_out), inputs=np.arange(n_in))
    assert asked == ["lowrank"]
    menu(["lowrank", "pointwise"], outputs=np.arange(n_out))
    assert asked == ["lowrank", "pointwise"]
    shuffled = np.roll(np.arange(n_out), 1)
    np.testing.assert_allclose(menu(["lowrank"], outputs=shuffled), one_kind, rtol=1e-6, atol=1e-12)
    assert menu(["lowrank"], outputs=np.arange(n_out - 1)) != one_kind
    assert asked == ["lowrank", "pointwise", "lowrank", "lowrank"]


def test_menus_follow_what_is_left_of_a_layer() -> None:
    one = job("plain")
    losses = one.losses.implants["make_b"]
    terms = next(terms for terms in one.losses.cost.layers if terms.node == "make_b")

    def ranks(kind: str, outputs: int, inputs: int, align: int | str = "auto") -> list[int]:
        menu = implant_menu(
            losses, terms, one.nodes["make_b"], one.prepared.shapes, kinds={kind: 1.0}, align=align,
            outputs=np.arange(outputs), inputs=np.arange(inputs),
        )  # fmt: skip
        return [choice.rank for choice in menu.choices[1:]]

    assert ranks("lowrank", 10, 12) == [2, 4, 6, 8]
    assert ranks("lowrank", 6, 12) == [1, 2, 3, 4, 5]
    assert ranks("lowrank", 10, 12, align=5) == [5]
    # C * 3 + O * 3 weights per rank against 9 * C * O
    assert ranks("spatial", 10, 12, align=1) == list(range(1, 17))
    assert ranks("spatial", 2, 2, align=1) == [1, 2]
    assert ranks("pointwise", 10, 12, align=1) == list(range(1, 10))
    assert ranks("pointwise", 1, 12, align=1) == []
    assert ranks("fancy", 10, 12) == []


@pytest.mark.parametrize("name", ["plain", "strided", "grouped", "gemm"])
def test_menus_hold_what_is_within_the_share_of_each_kind(name: str) -> None:
    one = job(name)
    losses = one.losses.implants["make_b"]
    terms = next(terms for terms in one.losses.cost.layers if terms.node == "make_b")
    g, n_outputs, n_features = losses.weight.shape
    n_in, n_out = n_features // losses.layer.form.n_taps, g * n_outputs
    for left, read in ((n_out, n_in), (n_out - g, n_in - 1)):
        outputs = np.concatenate([group * n_outputs + np.arange(left // g) for group in range(g)])
        lengths = np.array([left * read, read, left, 1])

        def shares(
            kinds: dict[str, float], outputs: np.ndarray = outputs, lengths: np.ndarray = lengths,
            read: int = read,
        ) -> dict[tuple[str, int], float]:  # fmt: skip
            menu = implant_menu(losses, terms, one.nodes["make_b"], one.prepared.shapes, kinds=kinds, align=1,
                                outputs=outputs, inputs=np.arange(read))  # fmt: skip
            macs = menu.coefficients @ np.array([[0], [1], [0]])
            costs = np.einsum("l,nl->n", lengths, macs[:, :, 0])
            assert costs[0] == lengths @ terms.dense[:, 1]
            keys = ((choice.kind, choice.rank) for choice in menu.choices[1:])
            return dict(zip(keys, costs[1:] / costs[0], strict=True))

        kinds = {form.kind: 1.0 for form in losses.layer.forms}
        every = shares(kinds)
        assert every
        for limits in (dict.fromkeys(kinds, 0.5), dict(zip(kinds, (0.75, 0.4, 0.9), strict=False))):
            wanted = {key: share for key, share in every.items() if share <= limits[key[0]]}
            assert shares(limits) == wanted
            assert 0 < len(wanted) < len(every)
        exactly = sorted(share for (kind, _), share in every.items() if kind == "lowrank")[1]
        assert len(shares({"lowrank": exactly})) == 2  # the limit itself is allowed
        assert not shares({"lowrank": 0.0})


def test_spatial_factors_need_all_of_the_covariance() -> None:
    one = job("plain")
    losses = one.losses.implants["make_b"]
    inputs = losses.curvature.inputs.diagonal(dim1=1, dim2=2)
    diagonal = replace(losses, curvature=replace(losses.curvature, inputs=inputs))
    terms = next(terms for terms in one.losses.cost.layers if terms.node == "make_b")
    menu = implant_menu(diagonal, terms, one.nodes["make_b"], one.prepared.shapes, kinds=ANY, align=1)
    assert {choice.kind for choice in menu.choices} == {"", "lowrank", "pointwise"}
    measured = measure(one, make_b=diagonal.curvature)["make_b"]
    assert len(measured.predicted) == 2


def test_costs_are_linear_in_the_rank() -> None:
    one = job("strided")
    losses = one.losses.implants["make_b"]
    for form in losses.layer.forms:
        tables = [
            rank_coefficients(form, rank, one.nodes["make_b"], one.prepared.shapes, n_groups=1, n_taps=9)
            for rank in (1, 2, 5)
        ]
        np.testing.assert_array_equal(tables[2] - tables[0], 4 * (tables[1] - tables[0]))


def test_sole_group() -> None:
    one = job("residual")
    layers = {name: losses.layer for name, losses in one.losses.implants.items()}
    group = sole_group(one.prepared.coupling, layers["make_a1"])
    assert group is not None
    assert group.name == "make_a1"
    assert sole_group(one.prepared.coupling, layers["make_a2"]) is None
    assert sole_group(one.prepared.coupling, layers["make_y"]) is None


@pytest.mark.parametrize(("share", "step"), [(1.0, 4), (0.9, 8)])
def test_ranks_come_in_eights_where_time_counts(share: float, step: int) -> None:
    net = Net()
    x = net.relu(net.conv("x", 3, 32, out="a"))
    model = net.model(net.conv(x, 32, 32, out="b"))
    one = make_job(model)
    terms = next(entry for entry in one.losses.cost.layers if entry.node == "make_b")
    menu = implant_menu(
        one.losses.implants["make_b"], terms, one.nodes["make_b"], one.prepared.shapes,
        kinds={"spatial": share}, align="auto",
    )  # fmt: skip
    ranks = [choice.rank for choice in menu.choices[1:]]
    assert ranks == list(range(step, max(ranks) + 1, step))

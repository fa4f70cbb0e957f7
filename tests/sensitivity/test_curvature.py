"""Kronecker curvature against direct sums, dense Jacobians, and minima found another way."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hap_onnx.coupling.channels import Coupling, find_groups
from hap_onnx.data.calibration import InputSpec, Subset, open_dataset
from hap_onnx.errors import CalibrationError
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.sensitivity import curvature as module
from hap_onnx.sensitivity.curvature import (
    Consumer,
    GroupConsumers,
    LayerCurvature,
    collect_curvature,
    eliminate,
    group_consumers,
    n_at_once,
    output_directions,
    output_scales,
    refitted_weights,
)
from hap_onnx.twin import Twin, build_twin, probe_shapes
from tests.helpers import make_model, node, rand

SCALES = {"y": 0.5}


@dataclass(frozen=True)
class Case:
    graph: gs.Graph
    twin: Twin
    coupling: Coupling
    x: np.ndarray

    @property
    def subset(self) -> Subset:
        dataset = open_dataset(
            {"x": self.x}, [InputSpec("x", np.dtype(np.float32), ("N", *self.x.shape[1:]))]
        )
        return Subset(dataset, np.arange(len(self.x)))

    @property
    def nodes(self) -> Mapping[str, gs.Node]:
        return {entry.name: entry for entry in self.graph.nodes}

    def collect(self, *, batch_size: int = 4, seed: int = 0) -> dict[str, LayerCurvature]:
        return collect_curvature(
            self.graph, self.twin, self.coupling, self.subset, scales=SCALES, batch_size=batch_size, seed=seed
        )


def make_case(model: onnx.ModelProto, *, n: int = 12) -> Case:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim][1:]
    x = rand(n, *shape, seed=40)
    graph = normalise(load_model(model))
    twin = build_twin(graph)
    return Case(graph, twin, find_groups(graph, probe_shapes(twin, {"x": torch.from_numpy(x[:2])})), x)


def conv_net(*, group: int = 1, width: int | None = None) -> onnx.ModelProto:
    """Conv, Relu, Conv (padded, strided, perhaps grouped), Relu, mean over positions, Gemm."""
    width = width or 4 * group
    weights = {
        "w1": rand(width, 2, 1, 1, seed=1),
        "w2": rand(4, width // group, 3, 3, seed=2),
        "b2": rand(4, seed=3),
        "w3": rand(3, 4, seed=4),
        "b3": rand(3, seed=5),
    }
    nodes = [
        node("Conv", ["x", "w1"], ["a"]),
        node("Relu", ["a"], ["h"]),
        node("Conv", ["h", "w2", "b2"], ["c"], pads=[1, 1, 1, 1], strides=[2, 1], group=group),
        node("Relu", ["c"], ["r"]),
        node("ReduceMean", ["r"], ["p"], axes=[2, 3], keepdims=0),
        node("Gemm", ["p", "w3", "b3"], ["y"], transB=1),
    ]
    return make_model(nodes, inputs={"x": ["N", 2, 5, 4]}, outputs=["y"], weights=weights)


def test_numbers_without_a_finite_square_are_refused() -> None:
    case = make_case(conv_net())
    case.x[3, 1, 0, 0] = 1e30
    with pytest.raises(CalibrationError, match="reads is not finite, or so large"):
        case.collect()



# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("group", [1, 2])
def test_inputs_are_second_moments_of_all_patches(group: int) -> None:
    case = make_case(conv_net(group=group))
    found = case.collect()
    h = torch.relu(F.conv2d(torch.from_numpy(case.x), case.twin.constant("w1").detach()))
    rows = F.unfold(h, 3, padding=1, stride=(2, 1))  # [N, C * 9, positions]
    rows = rows.transpose(1, 2).reshape(rows.shape[0] * rows.shape[2], group, -1).transpose(0, 1).double()
    rows = torch.cat([rows, torch.ones(*rows.shape[:2], 1)], 2)
    torch.testing.assert_close(
        found["make_c"].inputs, rows.transpose(1, 2) @ rows / rows.shape[1], rtol=1e-5, atol=1e-5
    )


def test_inputs_of_a_matrix_product_are_second_moments_of_its_rows() -> None:
    case = make_case(conv_net())
    layer = case.collect()["make_y"]
    read: list[Tensor] = []

    def on_read(step, index, tensor):  # type: ignore[no-untyped-def]
        if step.name == "make_y" and index == 0:
            read.append(tensor)
        return tensor

    with torch.no_grad():
        case.twin({"x": torch.from_numpy(case.x)}, on_read=on_read)
    rows = torch.cat([read[0], torch.ones(len(case.x), 1)], 1).double()
    torch.testing.assert_close(layer.inputs[0], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_inputs_do_not_depend_on_the_batches() -> None:
    case = make_case(conv_net())
    one, other = case.collect(batch_size=12), case.collect(batch_size=5)
    for name in one:
        torch.testing.assert_close(one[name].inputs, other[name].inputs, rtol=1e-5, atol=1e-6)


def test_fewer_samples_run_at_once_where_activations_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(conv_net())
    largest = 4 * 5 * 4  # numbers of one sample: what the first convolution gives
    for numbers, expected in ((100 * largest, 12), (7 * largest, 4), (largest, 1), (1, 1)):
        monkeypatch.setattr(module, "ACTIVATION_NUMBERS", numbers)
        assert n_at_once(case.twin, case.subset, 12) == expected
    few = case.collect(batch_size=12)
    monkeypatch.setattr(module, "ACTIVATION_NUMBERS", 100 * largest)
    for name, layer in case.collect(batch_size=12).items():
        torch.testing.assert_close(layer.inputs, few[name].inputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("op_type", "expected"), [("ReduceMean", 4), ("Relu", 8)])
def test_a_batch_that_is_written_into_the_model_stays_whole(op_type: str, expected: int) -> None:
    """The mean over a batch is not that of two: the model runs batch by batch, and any other at once."""
    attributes = {"axes": [0]} if op_type == "ReduceMean" else {}
    model = make_model(
        [node(op_type, ["x"], ["m"], **attributes), node("Sub", ["x", "m"], ["y"])],
        inputs={"x": [4, 3]}, outputs=["y"], weights={},
    )  # fmt: skip
    twin = build_twin(normalise(load_model(model)))
    x = rand(12, 3)
    dataset = open_dataset({"x": x}, [InputSpec("x", np.dtype(np.float32), (4, 3))])
    twin({"x": torch.from_numpy(x[:8])})
    assert n_at_once(twin, Subset(dataset, np.arange(12)), 8) == expected


def test_gradients_of_the_output_layer_are_known_exactly() -> None:
    """The Jacobian of the last layer's output is the identity: G is scale^2 times it, in expectation."""
    case = make_case(conv_net(), n=400)
    g = case.collect(batch_size=100)["make_y"].gradients[0]
    error = 4 * SCALES["y"] ** 2 * np.sqrt(2 / 400)
    torch.testing.assert_close(g, SCALES["y"] ** 2 * torch.eye(3, dtype=torch.float64), rtol=0, atol=error)


@pytest.mark.parametrize("group", [1, 2])
def test_gradients_are_unbiased_for_the_gauss_newton_matrix(group: int) -> None:
    case = make_case(conv_net(group=group), n=6)
    # The oracle: J^T J of each sample's output with respect to the convolution's output, over positions.
    made: list[Tensor] = []

    def on_write(step, index, tensor):  # type: ignore[no-untyped-def]
        if step.name == "make_c":
            made.append(tensor)
        return tensor

    y = case.twin({"x": torch.from_numpy(case.x)}, on_write=on_write)["y"]
    expected = torch.zeros(group, 4 // group, 4 // group, dtype=torch.float64)
    for index in range(y.shape[1]):
        (j,) = torch.autograd.grad(y[:, index].sum(), made[0], retain_graph=True)
        rows = SCALES["y"] * j.flatten(2).transpose(1, 2).reshape(-1, group, 4 // group).transpose(0, 1)
        expected += (rows.transpose(1, 2) @ rows).double() / len(case.x)
    draws = torch.stack([case.collect(batch_size=6, seed=seed)["make_c"].gradients for seed in range(60)])
    error = draws.std(0) / np.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= 4 * error + 1e-9).all()
    assert error.max() < 0.3 * expected.max()


def test_the_same_seed_gives_the_same_statistics() -> None:
    case = make_case(conv_net())
    one, same, other = case.collect(seed=1), case.collect(seed=1), case.collect(seed=2)
    torch.testing.assert_close(one["make_c"].gradients, same["make_c"].gradients, rtol=0, atol=0)
    assert not torch.equal(one["make_c"].gradients, other["make_c"].gradients)


def test_directions_are_independent_per_sample_and_scaled() -> None:
    outputs = {"y": torch.zeros(2000, 3), "z": torch.zeros(2000, 2)}
    pairs = output_directions(outputs, {"y": 0.5}, torch.Generator().manual_seed(0))
    assert len(pairs) == 1
    noise = pairs[0][1]
    assert noise.std() == pytest.approx(0.5, rel=0.05)
    assert abs(torch.corrcoef(noise.T)[0, 1]) < 0.1


def test_scales_make_outputs_of_any_size_count_alike() -> None:
    x = rand(50, 6)
    batches = [{"a": x[:20], "b": 100 * x[:20], "c": np.ones((20, 2), np.float32)}]
    batches.append({"a": x[20:], "b": 100 * x[20:], "c": np.ones((30, 2), np.float32)})
    scales = output_scales(batches)
    assert set(scales) == {"a", "b"}
    assert scales["a"] == pytest.approx(100 * scales["b"], rel=1e-5)
    # The mean squared distance of an output to its own mean, summed over outputs, is 1.
    assert 2 * scales["a"] ** 2 * ((x - x.mean(0)) ** 2).sum(1).mean() == pytest.approx(1, rel=1e-4)
    assert output_scales([{"c": np.ones((3, 2), np.float32), "i": np.arange(3)}]) == {}


def test_transposed_convolutions_have_no_statistics() -> None:
    weights = {"w1": rand(4, 2, 1, 1, seed=1), "w2": rand(4, 3, 2, 2, seed=2)}
    nodes = [
        node("Conv", ["x", "w1"], ["h"]),
        node("ConvTranspose", ["h", "w2"], ["y"], strides=[2, 2]),
    ]
    case = make_case(make_model(nodes, inputs={"x": ["N", 2, 3, 3]}, outputs=["y"], weights=weights))
    assert case.collect() == {}


# ---------------------------------------------------------------- one layer as a consumer


def consumer_of(
    n_inputs: int = 6, n_outputs: int = 3, *, damping: float = 1e-2
) -> tuple[Consumer, Tensor, Tensor]:
    """A consumer with random statistics, its damped A and its G."""
    case = make_case(conv_net())
    layer = case.collect()["make_y"]
    rows = torch.from_numpy(rand(40, n_inputs, seed=8)).double()
    rows = torch.cat(
        [rows @ torch.from_numpy(rand(n_inputs, n_inputs, seed=9)).double(), torch.ones(40, 1)], 1
    )
    a = rows.T @ rows / 40
    g = torch.from_numpy(rand(n_outputs, 5, seed=10)).double()
    g = g @ g.T
    layer = LayerCurvature("n", layer.form, layer.read, a[None], g[None])
    weight, bias = (
        torch.from_numpy(rand(n_outputs, n_inputs, seed=11)),
        torch.from_numpy(rand(n_outputs, seed=12)),
    )
    damped = a + damping * a.diagonal().mean() * torch.eye(len(a), dtype=torch.float64)
    return Consumer(layer, weight, bias, 0, damping), damped, g


def loss_of(new: Tensor, old: Tensor, damped: Tensor, g: Tensor) -> float:
    change = new - old
    return 0.5 * float(torch.trace(g @ change @ damped @ change.T))


def smallest_loss(consumer: Consumer, damped: Tensor, g: Tensor, removed: list[int]) -> float:
    """The minimum of the quadratic over refits, from the normal equations of the whole Kronecker product."""
    old = consumer.weight
    n_outputs, n_inputs = old.shape
    keep = [i for i in range(n_inputs) if i not in removed]
    hessian = torch.kron(g, damped)  # of the weight, row by row
    index = torch.arange(n_outputs * n_inputs).reshape(n_outputs, n_inputs)
    free, fixed = index[:, keep].flatten(), index[:, removed].flatten()
    step = -old.flatten()[fixed]
    own = hessian[free][:, free] + 1e-12 * torch.eye(len(free), dtype=torch.float64)
    rest = -torch.linalg.solve(own, hessian[free][:, fixed] @ step)
    change = torch.zeros(n_outputs * n_inputs, dtype=torch.float64)
    change[fixed], change[free] = step, rest
    return 0.5 * float(change @ hessian @ change)


@pytest.mark.parametrize("block", [1, 2])
def test_costs_are_the_minimum_over_refits(block: int) -> None:
    consumer, damped, g = consumer_of()
    features = torch.arange(6).reshape(-1, block)
    consumer.start()
    for row, cost in zip(features.tolist(), consumer.costs(features).tolist(), strict=True):
        assert cost == pytest.approx(smallest_loss(consumer, damped, g, row), rel=1e-6)


def test_costs_after_removals_add_up_to_the_minimum() -> None:
    consumer, damped, g = consumer_of()
    consumer.start()
    total, removed = 0.0, []
    for feature in (3, 0, 5):
        total += float(consumer.costs(torch.tensor([[feature]]))[0])
        consumer.remove(torch.tensor([feature]))
        removed.append(feature)
        assert total == pytest.approx(smallest_loss(consumer, damped, g, removed), rel=1e-6)


def test_solve_is_the_constrained_optimum() -> None:
    consumer, damped, g = consumer_of()
    removed = torch.tensor([1, 4])
    solved = consumer.solve(removed)
    assert (solved[:, removed] == 0).all()
    best = loss_of(solved, consumer.weight, damped, g)
    assert best == pytest.approx(smallest_loss(consumer, damped, g, [1, 4]), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = solved + 1e-2 * torch.randn(solved.shape, generator=generator, dtype=torch.float64)
        other[:, removed] = 0
        assert loss_of(other, consumer.weight, damped, g) >= best


def test_removing_in_any_order_leads_to_the_same_weights() -> None:
    consumer, *_ = consumer_of()
    losses = set()
    for order in itertools.permutations((0, 2, 3)):
        consumer.start()
        total = 0.0
        for feature in order:
            total += float(consumer.costs(torch.tensor([[feature]]))[0])
            consumer.remove(torch.tensor([feature]))
        losses.add(round(total, 8))
    assert len(losses) == 1


# ---------------------------------------------------------------- a group


def test_duplicates_go_first_and_cost_nothing() -> None:
    model = conv_net(width=6)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    arrays["w1"][4:] = arrays["w1"][:2]
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
    case = make_case(model, n=40)
    statistics = case.collect(batch_size=20)
    group = next(g for g in case.coupling.groups if g.producers == ("make_a",))
    parts = group_consumers(group, case.nodes, case.twin, statistics, damping=1e-6)
    order, loss = eliminate(parts, group.size)
    assert sorted(order) == list(range(6))
    assert {min(int(e) % 4, int(e)) for e in order[:2]} == {0, 1}  # one of each pair
    assert loss[2] < 1e-3 * loss[3]
    assert (np.diff(loss) >= 0).all()


def test_elimination_is_greedy_by_exhaustive_search() -> None:
    case = make_case(conv_net(), n=30)
    statistics = case.collect(batch_size=30)
    group = next(g for g in case.coupling.groups if g.producers == ("make_a",))
    parts = group_consumers(group, case.nodes, case.twin, statistics)
    order, loss = eliminate(parts, group.size)
    (consumer,), (features,) = parts.consumers, parts.features
    g = consumer.gradients
    removed: list[int] = []
    for step, element in enumerate(order):
        costs = {
            e: smallest_loss(consumer, consumer.damped(), g, features[[*removed, e]].flatten().tolist())
            for e in range(group.size)
            if e not in removed
        }
        assert min(costs, key=lambda e: costs[e]) == element
        assert costs[int(element)] == pytest.approx(loss[step + 1], rel=1e-5)
        removed.append(int(element))


def test_many_elements_go_in_steps() -> None:
    consumer, *_ = consumer_of(300)
    parts = GroupConsumers((("n", 0),), (consumer,), (torch.arange(300)[:, None],))
    order, loss = eliminate(parts, 300)
    assert sorted(order) == list(range(300))
    assert len(loss) == 301
    assert (np.diff(loss) >= 0).all()


@pytest.mark.parametrize("group", [1, 2])
def test_refitted_weights_minimise_the_layers_error(group: int) -> None:
    """With G out of the way the refit is ordinary least squares of the layer's outputs on what is left."""
    case = make_case(conv_net(group=group), n=60)
    statistics = case.collect(batch_size=60)
    channels = next(g for g in case.coupling.groups if g.producers == ("make_a",))
    parts = group_consumers(channels, case.nodes, case.twin, statistics, damping=1e-9)
    new = refitted_weights(parts, [1], case.nodes, case.twin, statistics)
    assert set(new) == {("make_c", 1), ("make_c", 2)}
    weight, bias = new["make_c", 1], new["make_c", 2]
    old = case.twin.constant("w2").detach()
    assert weight.shape == old.shape
    assert weight.dtype == old.dtype
    h = torch.relu(F.conv2d(torch.from_numpy(case.x), case.twin.constant("w1").detach()))
    gone = [int(e) for e in np.flatnonzero(np.isin(case.coupling.tensors["h"].ids, channels.elements[[1]]))]
    rows = F.unfold(h, 3, padding=1, stride=(2, 1)).transpose(1, 2).double()  # [N, positions, C * 9]
    rows = rows.reshape(-1, 4 * group, 9)
    target = F.conv2d(h, old, case.twin.constant("b2").detach(), padding=1, stride=(2, 1), groups=group)
    target = target.flatten(2).transpose(1, 2).reshape(-1, group, 4 // group).double()
    got = F.conv2d(h, weight, bias, padding=1, stride=(2, 1), groups=group)
    got = got.flatten(2).transpose(1, 2).reshape(-1, group, 4 // group).double()
    for index in range(group):
        mine = [c for c in range(index * 4, (index + 1) * 4) if c not in gone]
        x = torch.cat([rows[:, mine].flatten(1), torch.ones(len(rows), 1)], 1)
        best = x @ torch.linalg.lstsq(x, target[:, index]).solution
        least = (best - target[:, index]).square().sum()
        assert (got[:, index] - target[:, index]).square().sum() <= 1.001 * least + 1e-6


def test_only_the_diagonal_is_kept_for_wide_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(conv_net())
    whole = case.collect()
    monkeypatch.setattr(module, "MAX_FEATURES", 10)
    found = case.collect()
    assert found["make_c"].inputs.shape == (1, 37)
    assert found["make_y"].inputs.shape == (1, 5, 5)
    torch.testing.assert_close(
        found["make_c"].inputs[0], whole["make_c"].inputs[0].diagonal(), rtol=1e-5, atol=1e-6
    )
    group = next(g for g in case.coupling.groups if g.producers == ("make_a",))
    parts = group_consumers(group, case.nodes, case.twin, found, damping=0.0)
    (consumer,), (features,) = parts.consumers, parts.features
    consumer.start()
    g = consumer.gradients
    costs = []
    for row in features:
        change = torch.zeros_like(consumer.weight)
        change[:, row] = -consumer.weight[:, row]
        costs.append(0.5 * float(torch.trace(g @ (change * found["make_c"].inputs[0]) @ change.T)))
    np.testing.assert_allclose(consumer.costs(features), costs, rtol=1e-6)
    order, loss = eliminate(parts, group.size)
    np.testing.assert_array_equal(order, np.argsort(costs))
    np.testing.assert_allclose(loss, np.concatenate([[0], np.cumsum(np.sort(costs))]), rtol=1e-6)
    new = refitted_weights(parts, order[:1], case.nodes, case.twin, found)["make_c", 1]
    kept = [c for c in range(4) if case.coupling.tensors["h"].ids[c] != group.elements[order[0]]]
    torch.testing.assert_close(new[:, kept], case.twin.constant("w2").detach()[:, kept])

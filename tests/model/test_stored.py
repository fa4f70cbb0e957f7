"""Weights of 8 bits: seen as numbers, written as they were, and cut exactly."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper
from quantize.cases import initializers, ops_of, outputs, to_int8
from sample_models import images, residual_cnn

from hap_onnx.model.measure import count_params, model_size
from hap_onnx.model.model_io import load_model, normalise, stored_weights, to_proto
from hap_onnx.model.weights import LargeModel, join_model, split_model
from hap_onnx.prepare import prepare
from hap_onnx.surgery import kept_positions, remove_channels, with_weights
from tests.helpers import make_model, node, rand
from tools.first_divergence import run_onnxruntime


def again(model: ModelProto) -> ModelProto:
    source = load_model(model)
    return to_proto(normalise(source), source)


def dequantizer(name: str, *, axis: int | None = None, zero: bool = True) -> onnx.NodeProto:
    inputs = [f"{name}.q", f"{name}.s", *([f"{name}.z"] if zero else [])]
    return node("DequantizeLinear", inputs, [name], **({} if axis is None else {"axis": axis}))


def stored_cnn(kind: str) -> ModelProto:
    """Return x -> Conv -> Relu -> Conv -> pool, its weights stored in one of several ways."""
    per_channel = kind in ("int8 per channel", "uint8 per channel", "no zero point", "fake")
    dtype = np.uint8 if kind.startswith("uint8") else np.int8
    weights: dict[str, np.ndarray] = {}
    nodes = []
    for index, (name, shape) in enumerate({"a": (8, 3, 3, 3), "b": (6, 8, 3, 3)}.items()):
        values = rand(*shape, seed=index)
        n = shape[0] if per_channel else 1
        scale = (0.02 + 0.01 * np.arange(n)).astype(np.float32) if per_channel else np.float32(0.03)
        zero = np.zeros(np.shape(scale), dtype) + (dtype(120) if dtype is np.uint8 else dtype(0))
        spread = np.reshape(scale, (-1, 1, 1, 1)) if per_channel else scale
        offset = np.reshape(zero, (-1, 1, 1, 1)) if per_channel else zero
        limits = np.iinfo(dtype)
        quantized = np.clip(np.rint(values / spread) + offset, limits.min, limits.max).astype(dtype)
        weights |= {f"{name}.s": scale}
        axis = 0 if per_channel else None
        if kind == "fake":
            weights |= {f"{name}.w": values, f"{name}.z": zero}
            inputs = [f"{name}.w", f"{name}.s", f"{name}.z"]
            nodes.append(node("QuantizeLinear", inputs, [f"{name}.q"], axis=0))
        else:
            weights[f"{name}.q"] = quantized
            if kind != "no zero point":
                weights[f"{name}.z"] = zero
        nodes.append(dequantizer(name, axis=axis, zero=kind != "no zero point"))
    nodes += [
        node("Conv", ["x", "a"], ["h"], pads=[1] * 4),
        node("Relu", ["h"], ["r"]),
        node("Conv", ["r", "b"], ["c"], pads=[1] * 4),
        node("GlobalAveragePool", ["c"], ["y"]),
    ]
    return make_model(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs=["y"], weights=weights)


KINDS = (
    "int8 per channel",
    "int8 per tensor",
    "uint8 per channel",
    "uint8 per tensor",
    "no zero point",
    "fake",
)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_seen_as_the_numbers_that_they_stand_for(kind):
    model = stored_cnn(kind)
    graph = normalise(load_model(model))
    assert [entry.op for entry in graph.nodes] == ["Conv", "Relu", "Conv", "GlobalAveragePool"]
    probe = ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("a", "b"))
    expected = run_onnxruntime(probe, {"x": images(2)})
    for name, tensor in (("a", graph.nodes[0].inputs[1]), ("b", graph.nodes[2].inputs[1])):
        assert tensor.name == name
        assert np.array_equal(tensor.values, expected[name])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_on_the_way_through(kind):
    model = stored_cnn(kind)
    back = again(model)
    onnx.checker.check_model(back, full_check=True)
    before, after = initializers(model), initializers(back)
    for name in after:
        if name in before:
            assert np.array_equal(after[name], before[name])
            assert after[name].dtype == before[name].dtype
    assert ops_of(back).count("QuantizeLinear") == 0
    assert np.array_equal(outputs(back, x=images(4)), outputs(model, x=images(4)))


def test_a_quantized_network_comes_back_bit_by_bit():
    model = to_int8()
    back = again(model)
    before, after = initializers(model), initializers(back)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        assert array.shape == after[name].shape
        assert array.tobytes() == after[name].tobytes()
    assert sorted(ops_of(model)) == sorted(ops_of(back))


def _cut(model: ModelProto, group: int) -> tuple[ModelProto, ModelProto]:
    """Remove half of a group's channels; the same by masking the weights that read them. Both as files."""
    source = load_model(model)
    prepared = prepare(source, {"x": images(4)})
    coupling = prepared.coupling
    members = coupling.groups[group]
    keep = np.ones(coupling.n_elements, bool)
    keep[members.elements[::2]] = False
    removed = remove_channels(prepared.graph, coupling, keep, shapes=prepared.probe_shapes)
    masks = {}
    for axis in coupling.weights:
        if axis.role == "consumer":
            gone = np.setdiff1d(np.arange(len(axis.elements)), kept_positions(axis.elements, keep))
            values = np.array(prepared.graph.tensors()[axis.initializer].values)
            values[(slice(None),) * axis.axis + (gone,)] = 0
            masks[axis.initializer] = values
    masked = with_weights(prepared.graph, masks)
    return to_proto(removed, source), to_proto(masked, source)


@pytest.mark.parametrize("kind", [*KINDS, "network"])
def test_removal_equals_masking_in_onnxruntime(kind):
    """Exactly: what is left is the same integers with the same scales."""
    model = to_int8() if kind == "network" else stored_cnn(kind)
    x = images(6, seed=11)
    n_groups = len(prepare(load_model(model), {"x": images(4)}).coupling.groups)
    assert n_groups == (4 if kind == "network" else 1)
    for group in range(n_groups):
        removed, masked = _cut(model, group)
        onnx.checker.check_model(removed, full_check=True)
        ours, expected, before = (outputs(m, x=x) for m in (removed, masked, model))
        assert np.abs(expected - before).max() > 0.05 * np.abs(before).max()
        if kind == "network":
            assert np.array_equal(ours, expected)
        else:  # sums of floats, in another order
            assert np.allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_scales_and_zero_points_are_cut_with_their_channels():
    model = stored_cnn("uint8 per channel")
    removed, _ = _cut(model, 0)
    before, after = initializers(model), initializers(removed)
    assert after["a.q"].shape == (4, 3, 3, 3)
    assert after["b.q"].shape == (6, 4, 3, 3)
    rows = [np.flatnonzero((before["a.q"] == row).all(axis=(1, 2, 3)))[0] for row in after["a.q"]]
    assert rows == sorted(rows)
    for part in ("a.s", "a.z"):
        assert np.array_equal(after[part], before[part][rows])
    assert np.array_equal(after["b.s"], before["b.s"])


@pytest.mark.parametrize("kind", KINDS)
def test_other_numbers_get_scales_of_their_own(kind):
    """As after a refit: nearest within half a step, and no more steps than before."""
    model = stored_cnn(kind)
    source = load_model(model)
    graph = normalise(source)
    new = (0.7 * np.asarray(graph.nodes[2].inputs[1].values) + 0.01 * rand(6, 8, 3, 3, seed=9)).astype(
        np.float32
    )
    written = to_proto(with_weights(graph, {"b": new}), source)
    onnx.checker.check_model(written, full_check=True)
    back = normalise(load_model(written)).nodes[2].inputs[1].values
    steps = np.maximum(initializers(written)["b.s"], initializers(model)["b.s"].min()).max()
    assert 0 < np.abs(back - new).max() <= 0.51 * steps
    assert np.array_equal(initializers(written)["b.q"].dtype, initializers(again(model))["b.q"].dtype)
    assert np.array_equal(
        normalise(load_model(written)).nodes[0].inputs[1].values, graph.nodes[0].inputs[1].values
    )


def test_a_bias_follows_the_scale_of_its_weight():
    """onnxruntime takes the integers of a bias as multiples of input scale times weight scale."""
    model = to_int8()
    source = load_model(model)
    graph = normalise(source)
    layer = next(entry for entry in graph.nodes if entry.name == "make_b1")
    weight, bias = layer.inputs[1], layer.inputs[2]
    new = (1.37 * np.asarray(weight.values) + 0.003).astype(np.float32)
    written = to_proto(
        with_weights(graph, {weight.name: new, bias.name: np.asarray(bias.values) + 0.25}), source
    )
    stored = initializers(written)
    producer = {name: entry for entry in written.graph.node for name in entry.output}
    product = stored["h1_scale"] * stored[producer[weight.name].input[1]]
    assert np.array_equal(stored[producer[bias.name].input[1]], product)
    x = images(6, seed=11)
    twin_like = to_proto(with_weights(graph, {weight.name: new}), source)
    assert np.abs(outputs(written, x=x) - outputs(twin_like, x=x)).max() > 0.01
    restored = normalise(load_model(written)).tensors()[bias.name].values
    assert np.allclose(restored, np.asarray(bias.values) + 0.25, atol=float(product.max()))


def test_what_is_shared_keeps_its_numbers_for_the_others():
    weights = {
        "q": np.arange(-24, 24, dtype=np.int8).reshape(6, 8),
        "p": np.arange(-48, 48, 2, dtype=np.int8).reshape(8, 6),
        "s": np.float32(0.1),
        "z": np.int8(0),
    }
    nodes = [
        node("DequantizeLinear", ["q", "s", "z"], ["w"]),
        node("DequantizeLinear", ["p", "s", "z"], ["v"]),
        node("MatMul", ["x", "w"], ["h"]),
        node("MatMul", ["h", "v"], ["y"]),
    ]
    model = make_model(nodes, inputs={"x": ["N", 6]}, outputs=["y"], weights=weights)
    source = load_model(model)
    graph = normalise(source)
    assert stored_weights(source) == {"w", "v"}
    changed = to_proto(with_weights(graph, {"w": rand(6, 8, seed=1)}), source)
    onnx.checker.check_model(changed, full_check=True)
    assert initializers(changed)["s"] == np.float32(0.1)
    assert np.array_equal(normalise(load_model(changed)).tensors()["v"].values, graph.tensors()["v"].values)
    assert again(model).graph.node[0].input == ["q", "s", "z"]


@pytest.mark.parametrize("why", ["two readers", "computed scale", "float16", "an output", "blocks"])
def test_what_is_stored_in_other_ways_is_left_alone(why):
    weights = {"q": np.ones((6, 8), np.int8), "s": np.float32(0.1), "z": np.int8(0)}
    nodes = [node("DequantizeLinear", ["q", "s", "z"], ["w"]), node("MatMul", ["x", "w"], ["y"])]
    outs = ["y"]
    if why == "two readers":
        nodes += [node("DequantizeLinear", ["q", "s", "z"], ["w2"]), node("MatMul", ["x", "w2"], ["y2"])]
        outs.append("y2")
    elif why == "computed scale":
        nodes.insert(0, node("Exp", ["log"], ["s"]))
        weights["log"] = weights.pop("s")
    elif why == "float16":
        weights["s"] = np.float16(0.1)
        nodes[1:] = [node("Cast", ["w"], ["f"], to=1), node("MatMul", ["x", "f"], ["y"])]
    elif why == "an output":
        outs.append("w")
    elif why == "blocks":
        nodes[0].attribute.append(helper.make_attribute("block_size", 2))
        nodes[0].attribute.append(helper.make_attribute("axis", 0))
        weights |= {"s": np.full((3, 8), 0.1, np.float32), "z": np.zeros((3, 8), np.int8)}
    model = make_model(nodes, inputs={"x": ["N", 6]}, outputs=outs, weights=weights, opset=21)
    source = load_model(model)
    assert stored_weights(source) == frozenset()
    back = to_proto(normalise(source), source)
    assert ops_of(back).count("DequantizeLinear") == ops_of(model).count("DequantizeLinear")
    assert np.array_equal(numpy_helper.to_array(back.graph.initializer[0]), weights["q"])


@pytest.mark.parametrize("kind", ["int8", "fake"])
def test_weights_beside_the_message_come_out_as_those_inside(kind):
    scale, zero = np.float32(0.05), np.int8(3)
    values = rand(6, 300)
    quantized = np.clip(np.rint(values / scale) + zero, -128, 127).astype(np.int8)
    weights = {"w.s": scale, "w.z": zero, **({"w.f": values} if kind == "fake" else {"w.q": quantized})}
    nodes = [dequantizer("w"), node("MatMul", ["x", "w"], ["y"])]
    if kind == "fake":
        nodes.insert(0, node("QuantizeLinear", ["w.f", "w.s", "w.z"], ["w.q"]))
    model = make_model(nodes, inputs={"x": ["N", 6]}, outputs=["y"], weights=weights, opset=13)
    large = split_model(model)
    assert large.weights
    source = load_model(large)
    assert stored_weights(source) == {"w"}
    graph = normalise(source)
    written = to_proto(graph, source)
    assert isinstance(written, LargeModel)
    assert np.array_equal(written.weights["w.q"], quantized)
    inside, beside = initializers(again(model)), initializers(join_model(written))
    assert beside.keys() == inside.keys() == {"w.q", "w.s", "w.z"}
    assert all(np.array_equal(beside[name], inside[name]) for name in inside)


def test_parameters_are_counted_alike_in_float_and_in_8_bits():
    for model in (residual_cnn(), to_int8()):
        assert count_params(model) == count_params(residual_cnn())
        assert model_size(normalise(load_model(model)), {}).params == count_params(residual_cnn())

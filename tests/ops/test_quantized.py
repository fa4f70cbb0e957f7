from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from quantize.cases import to_int8
from sample_models import images, residual_cnn

from hap_onnx.model.measure import model_size
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.ops.quantized import DequantizeLinear, QuantizeLinear, is_quantized, quantized_weights
from hap_onnx.prepare import prepare
from hap_onnx.twin import build_twin, probe_shapes
from tests.helpers import check_node, make_model, make_twin, node, rand

X = 3 * rand(4, 5, 6, seed=1)
READ = (("DequantizeLinear", ""),)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_quantization_equals_onnxruntime(dtype, axis):
    n = 1 if axis is None else X.shape[axis]
    scale = np.linspace(0.01, 0.04, n).astype(np.float32).reshape(() if axis is None else (n,))
    zero = (np.arange(n) % 3).astype(dtype).reshape(scale.shape)
    options = {} if axis is None else {"axis": axis}
    opset = 21 if dtype is np.int16 else 13
    check_node("QuantizeLinear", X, scale, zero, constants=(1, 2), opset=opset, tolerance=0, **options)
    quantized = np.random.default_rng(0).integers(0, 100, X.shape).astype(dtype)
    check_node("DequantizeLinear", quantized, scale, zero, constants=(1, 2), opset=opset, **options)


def test_ties_go_to_the_even_number():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 300, -300], np.float32)
    check_node("QuantizeLinear", x, np.float32(1), np.int8(0), constants=(1, 2), tolerance=0)


def test_gradients_pass_where_nothing_is_clipped():
    x = torch.tensor([0.3, -0.3, 50.0, -50.0], requires_grad=True)
    scale, zero = torch.tensor(0.1), torch.tensor(10, dtype=torch.int8)
    y = DequantizeLinear(QuantizeLinear(x, scale, zero, readers=READ), scale, zero)
    assert torch.allclose(y, torch.tensor([0.3, -0.3, 11.7, -13.8]))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_who_reads_integers_gets_integers():
    scale, zero = torch.tensor(0.1), torch.tensor(0, dtype=torch.uint8)
    assert QuantizeLinear(torch.ones(2), scale, zero).dtype == torch.uint8
    assert QuantizeLinear(torch.ones(2), scale, zero, readers=(*READ, ("Cast", ""))).dtype == torch.uint8
    assert QuantizeLinear(torch.ones(2), scale, zero, readers=READ).dtype == torch.float32


def test_the_twin_of_a_quantized_network_has_gradients_everywhere():
    model = to_int8()
    twin = make_twin(model)
    outputs = twin({"x": torch.from_numpy(images(4))})
    assert twin.opaque_nodes == ()
    parameters = {name: twin.parameter_of[name] for name in twin.parameter_of if "DequantizeLinear" in name}
    assert len(parameters) == 7
    gradients = torch.autograd.grad(outputs["scores"].square().sum(), list(parameters.values()))
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients)


def _q_linear_conv() -> onnx.ModelProto:
    """Return float -> Conv -> Relu -> [QLinearConv] -> float Conv; the integers in QOperator format."""
    scalars = {"xs": np.float32(0.05), "xz": np.uint8(3), "ys": np.float32(0.2), "yz": np.uint8(100)}
    weights = {
        "w0": rand(8, 3, 3, 3, seed=1),
        "w1": (40 * rand(6, 8, 3, 3, seed=2)).astype(np.int8),
        "ws": np.full(6, 0.01, np.float32),
        "wz": np.zeros(6, np.int8),
        "b1": np.arange(6, dtype=np.int32),
        "w2": rand(7, 6, 1, 1, seed=3),
        "w3": rand(2, 7, 1, 1, seed=4),
        **scalars,
    }
    nodes = [
        node("Conv", ["x", "w0"], ["c0"], pads=[1] * 4),
        node("Relu", ["c0"], ["r0"]),
        node("QuantizeLinear", ["r0", "xs", "xz"], ["q0"]),
        node("QLinearConv", ["q0", "xs", "xz", "w1", "ws", "wz", "ys", "yz", "b1"], ["q1"], pads=[1] * 4),
        node("DequantizeLinear", ["q1", "ys", "yz"], ["d1"]),
        node("Conv", ["d1", "w2"], ["c2"]),
        node("Conv", ["c2", "w3"], ["y"]),
    ]
    return make_model(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs=["y"], weights=weights)


def test_operators_on_integers_stay_and_are_named():
    prepared = prepare(load_model(_q_linear_conv()), {"x": images(4)})
    reasons = {entry.node: entry.reason for entry in prepared.coupling.frozen}
    assert "QLinearConv multiplies integers" in reasons["make_q1"]
    assert "QLinearConv multiplies integers" in reasons["make_c0"]
    assert [group.name for group in prepared.coupling.groups] == ["make_c2"]  # behind it, pruning goes on


def test_integers_are_counted_as_the_numbers_that_they_stand_for():
    graph = normalise(load_model(_q_linear_conv()))
    shapes = probe_shapes(build_twin(graph), {"x": torch.from_numpy(images(1))})
    size = model_size(graph, shapes)
    assert size.params == 8 * 27 + 6 * 72 + 6 + 7 * 6 + 2 * 7
    assert size.macs == 64 * (8 * 27 + 6 * 72 + 7 * 6 + 2 * 7)
    float_size = model_size(normalise(load_model(residual_cnn())), {})
    assert model_size(normalise(load_model(to_int8())), {}).params == float_size.params


def test_scales_per_channel_of_activations_follow_their_channels():
    weights = {
        "w": rand(8, 3, 3, 3, seed=1),
        "s": np.linspace(0.05, 0.1, 8).astype(np.float32),
        "z": np.arange(8, dtype=np.uint8),
        "v": rand(4, 8, 1, 1, seed=2),
    }
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("QuantizeLinear", ["c", "s", "z"], ["q"], axis=1),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=1),
        node("Conv", ["d", "v"], ["y"]),
    ]
    model = make_model(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs=["y"], weights=weights)
    prepared = prepare(load_model(model), {"x": images(4)})
    (group,) = prepared.coupling.groups
    assert {(name, axis) for name, axis, _ in group.axes} == {("w", 0), ("s", 0), ("z", 0), ("v", 1)}


def test_what_the_registry_of_quantized_operators_says():
    assert is_quantized("QuantizeLinear")
    assert is_quantized("QLinearConv", "ai.onnx")
    assert not is_quantized("Conv")
    assert not is_quantized("QuantizeLinear", "org.other")
    assert quantized_weights("QLinearConv") == (3, 8)
    assert quantized_weights("Conv") is None


def test_blocks_and_narrow_types_are_left_to_onnxruntime():
    weights = {"s": np.full((2, 1), 0.1, np.float32), "z": np.zeros((2, 1), np.uint8)}
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=0, block_size=2),
        node("Cast", ["q"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    model = make_model(
        nodes, inputs={"x": np.ones((4, 1), np.float32)}, outputs=["y"], weights=weights, opset=21
    )
    twin = make_twin(model)
    twin({"x": torch.ones(4, 1)})
    assert twin.opaque_nodes == ("make_q",)

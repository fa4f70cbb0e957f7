"""Elementwise operators against onnxruntime, and second derivatives."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch.autograd import gradgradcheck

from hap_onnx.ops.registry import find_run
from tests.helpers import check_node, rand

ANY = [
    "Abs",
    "Atan",
    "Asinh",
    "Ceil",
    "Cos",
    "Cosh",
    "Erf",
    "Exp",
    "Floor",
    "HardSwish",
    "Identity",
    "IsNaN",
    "Neg",
    "Relu",
    "Round",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Tan",
    "Tanh",
]
UNIT = ["Acos", "Asin", "Atanh"]
POSITIVE = ["Log", "Reciprocal", "Sqrt"]
SMOOTH = [
    "Cos",
    "Erf",
    "Exp",
    "HardSwish",
    "Mish",
    "Relu",
    "Sigmoid",
    "Sin",
    "Softplus",
    "Softsign",
    "Tanh",
    "Gelu",
    "Elu",
    "Celu",
    "Selu",
    "LeakyRelu",
    "HardSigmoid",
    "ThresholdedRelu",
    "Abs",
    "Swish",
]


@pytest.mark.parametrize("op_type", ANY)
def test_unary_equals_onnxruntime(op_type: str) -> None:
    check_node(op_type, rand(3, 40))


@pytest.mark.parametrize("op_type", [*UNIT, *POSITIVE, "Acosh"])
def test_unary_with_a_domain_equals_onnxruntime(op_type: str) -> None:
    low, high = {"Acosh": (1, 3)}.get(op_type, (-0.9, 0.9) if op_type in UNIT else (0.1, 3))
    check_node(op_type, np.linspace(low, high, 30, dtype=np.float32))


@pytest.mark.parametrize(
    ("op_type", "attributes", "opset"),
    [
        ("Celu", {"alpha": 0.7}, 17),
        ("Elu", {"alpha": 0.7}, 17),
        ("Gelu", {}, 20),
        ("Gelu", {"approximate": "tanh"}, 20),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, 17),
        ("HardSigmoid", {}, 17),
        ("LeakyRelu", {"alpha": 0.2}, 17),
        ("Mish", {}, 18),
        ("Selu", {}, 17),
        ("Shrink", {"bias": 0.3, "lambd": 0.4}, 17),
        ("ThresholdedRelu", {"alpha": 0.3}, 17),
        ("Clip", {"min": -0.5, "max": 0.7}, 9),
        ("Clip", {"max": 0.7}, 9),
        ("IsInf", {"detect_negative": 0}, 17),
        ("Dropout", {"ratio": 0.3}, 10),
        ("Dropout", {}, 17),
        ("Cast", {"to": onnx.TensorProto.INT64}, 17),
        ("Cast", {"to": onnx.TensorProto.BOOL}, 17),
    ],
)
def test_unary_with_attributes_equals_onnxruntime(op_type: str, attributes: dict, opset: int) -> None:
    check_node(op_type, 2 * rand(3, 40), opset=opset, **attributes)


@pytest.mark.parametrize("bounds", [(-0.5, 0.7), (None, 0.7), (-0.5, None), (None, None), (0.7, -0.5)])
@pytest.mark.parametrize("constants", [(), (1, 2)])
def test_clip_by_inputs_equals_onnxruntime(bounds: tuple, constants: tuple[int, ...]) -> None:
    low, high = (None if bound is None else np.float32(bound) for bound in bounds)
    given = tuple(position for position in constants if (low, high)[position - 1] is not None)
    check_node("Clip", rand(3, 20), low, high, constants=given)


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div", "Pow", "PRelu", "Max", "Min", "Sum", "Mean"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1), (4,), ()])
def test_binary_equals_onnxruntime(op_type: str, shape: tuple[int, ...]) -> None:
    x = np.abs(rand(2, 3, 4)) + 0.1 if op_type == "Pow" else rand(2, 3, 4)
    check_node(op_type, x, np.asarray(rand(*shape, seed=1)))


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_binary_of_integers_equals_onnxruntime(op_type: str, dtype: type) -> None:
    a = np.array([7, -7, 5, 3], dtype)
    b = np.array([2, 2, 1, 3], dtype) if op_type == "Pow" else np.array([2, 2, -3, -3], dtype)
    check_node(op_type, a, b)


def test_pow_of_mixed_types_equals_onnxruntime() -> None:
    check_node("Pow", np.abs(rand(5)), np.array([0, 1, 2, 3, 4]))
    check_node("Pow", np.array([1, 2, 3]), np.array([0.5, 2.0, 3.0], np.float32))
    check_node("Pow", rand(5), np.array(2.0, np.float32), constants=(1,))


@pytest.mark.parametrize("fmod", [0, 1])
def test_mod_equals_onnxruntime(fmod: int) -> None:
    a, b = np.array([7, -7, 7, -7]), np.array([3, 3, -3, -3])
    check_node("Mod", a, b, fmod=fmod)
    if fmod:
        check_node("Mod", a.astype(np.float32), b.astype(np.float32), fmod=1)


@pytest.mark.parametrize("op_type", ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"])
def test_comparison_equals_onnxruntime(op_type: str) -> None:
    check_node(op_type, rand(3, 4), np.concatenate([rand(2, 4), rand(1, 4, seed=1)]))


@pytest.mark.parametrize("op_type", ["And", "Or", "Xor"])
def test_logical_equals_onnxruntime(op_type: str) -> None:
    check_node(op_type, rand(3, 4) > 0, rand(4, seed=1) > 0)
    check_node("Not", rand(3, 4) > 0)


def test_where_and_variadic_equal_onnxruntime() -> None:
    check_node("Where", rand(3, 4) > 0, rand(4), rand(2, 1, 1, seed=1))
    for op_type in ("Max", "Min", "Sum", "Mean"):
        check_node(op_type, rand(3, 4), rand(4, seed=1), rand(3, 1, seed=2))


def test_cast_like_equals_onnxruntime() -> None:
    check_node("CastLike", 3 * rand(3, 4), np.zeros(1, np.int32))
    check_node("CastLike", np.arange(4), np.zeros(1, np.float32))


def test_cast_between_float_types_is_the_identity() -> None:
    cast = find_run("Cast", opset=17)
    assert cast is not None
    x = torch.randn(5)
    for to in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE):
        assert cast(x, to=to) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bit_cast_reads_the_bits_of_32(dtype: torch.dtype) -> None:
    bit_cast = find_run("BitCast", opset=26)
    assert bit_cast is not None
    x = np.array([0.0, -1.5, 3e-40, np.inf], np.float32)
    bits = bit_cast(torch.from_numpy(x).to(dtype), to=onnx.TensorProto.INT32)
    assert bits.tolist() == x.view(np.int32).tolist()
    assert bit_cast(bits, to=onnx.TensorProto.FLOAT).numpy().tobytes() == x.tobytes()
    for values, to in ((x, onnx.TensorProto.INT16), (x.view(np.int16), onnx.TensorProto.FLOAT16)):
        with pytest.raises(NotImplementedError):  # of floats of other widths the twin has no bits
            bit_cast(torch.from_numpy(values), to=to)


def test_dropout_of_nothing_is_the_identity_even_in_training() -> None:
    dropout = find_run("Dropout", opset=12)
    assert dropout is not None
    x = torch.randn(3)
    assert dropout(x, torch.tensor(0.0), torch.tensor(True)) is x
    with pytest.raises(NotImplementedError):
        dropout(x, torch.tensor(0.5), torch.tensor(True))


def test_activations_of_onnxruntime_equal_onnxruntime() -> None:
    check_node("Gelu", rand(3, 8), domain="com.microsoft")
    check_node("FastGelu", rand(3, 8), rand(8), domain="com.microsoft", tolerance=1e-4)
    check_node("BiasGelu", rand(3, 8), rand(8), domain="com.microsoft")
    check_node("QuickGelu", rand(3, 8), domain="com.microsoft")


@pytest.mark.parametrize("op_type", SMOOTH)
def test_activation_is_twice_differentiable(op_type: str) -> None:
    function = find_run(op_type, opset=24)
    assert function is not None
    torch.manual_seed(0)
    x = torch.randn(12, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(function, (x,))

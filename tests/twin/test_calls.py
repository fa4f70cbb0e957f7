"""Operators that run by the function bodies of their schemas."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from hap_onnx.ops import registry
from hap_onnx.twin.calls import BodyCall, make_body
from tests.helpers import check_model, make_model, make_twin, node, rand


def _loss_net(**attributes: str) -> onnx.ModelProto:
    """A layer and a loss that torch has no function of ours for."""
    return make_model(
        [
            node("MatMul", ["x", "w"], ["scores"]),
            node("SoftmaxCrossEntropyLoss", ["scores", "labels"], ["loss", "logp"], **attributes),
        ],
        inputs={"x": rand(3, 4), "labels": np.array([0, 2, 1])},
        outputs=["loss", "logp"],
        weights={"w": rand(4, 5, seed=1)},
    )


def _inputs() -> dict[str, np.ndarray]:
    return {"x": rand(3, 4), "labels": np.array([0, 2, 1])}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_body_equals_onnxruntime(reduction: str) -> None:
    twin = check_model(_loss_net(reduction=reduction), _inputs())
    assert twin.expanded_nodes == ("make_loss",)
    assert twin.opaque_nodes == ()
    assert [step.opaque for step in twin.steps] == [False, False]


def test_gradients_pass_through_a_body_twice() -> None:
    twin = make_twin(_loss_net()).double()
    w = twin.parameter_of["w"]
    inputs = {"x": torch.randn(3, 4, dtype=torch.float64), "labels": torch.tensor([0, 2, 1])}
    loss = twin(inputs)["loss"]
    assert loss.dtype == torch.float64
    wanted = torch.nn.functional.cross_entropy(inputs["x"] @ w, inputs["labels"])
    torch.testing.assert_close(loss, wanted)
    for ours, theirs in zip(_two_gradients(loss, w), _two_gradients(wanted, w), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().sum() > 0


def _two_gradients(loss: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (first,) = torch.autograd.grad(loss, w, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), w)
    return first, second


def _node(op_type: str, *, n_inputs: int = 1, dtype: type = np.float32, **attributes: object) -> gs.Node:
    inputs = [gs.Variable(f"x{i}", dtype=np.float32) for i in range(n_inputs)]
    return gs.Node(op_type, "n", attributes, inputs, [gs.Variable("y", dtype=dtype)])


def _body(graph_node: gs.Node, opset: int = 17) -> BodyCall | None:
    return make_body(graph_node, opsets=[onnx.helper.make_opsetid("", opset)])


@pytest.mark.parametrize(
    ("op_type", "opset"),
    [
        ("Softplus", 18),
        ("Elu", 18),
        ("Mish", 18),
        ("MeanVarianceNormalization", 13),
        ("Gelu", 20),
        ("Swish", 24),
    ],
)
def test_bodies_equal_our_own_functions(op_type: str, opset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 4, 5)
    function = registry.find_run(op_type, opset=opset)
    assert function is not None
    monkeypatch.delitem(registry._RUN, ("", op_type))
    body = _body(_node(op_type), opset)
    assert body is not None
    torch.testing.assert_close(body(x)[0], function(x), rtol=1e-5, atol=1e-6)


def test_attributes_reach_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry._RUN, ("", "Elu"))
    body = _body(_node("Elu", alpha=0.3), 18)
    assert body is not None
    x = torch.tensor([-1.0, 2.0])
    torch.testing.assert_close(body(x)[0], torch.nn.functional.elu(x, 0.3))


def test_there_is_no_body_where_torch_lacks_a_part_of_it() -> None:
    assert _body(_node("Bernoulli"), 15) is None  # random numbers
    assert _body(_node("Frobnicate")) is None
    assert _body(_node("NonMaxSuppression", n_inputs=2)) is None  # defined by words only


def test_there_is_no_body_without_a_gradient_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry._RUN, ("", "GreaterOrEqual"))
    compare = _node("GreaterOrEqual", n_inputs=2, dtype=np.bool_)
    assert _body(compare) is None
    compare.outputs[0].dtype = np.float32
    assert _body(compare) is not None

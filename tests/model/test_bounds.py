"""Bounds on what a model may ask for: what is just within passes, what is just beyond is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hostile_models import calls, function, sparse
from onnx import ModelProto

from hap_onnx.errors import ModelError
from hap_onnx.model import bounds
from hap_onnx.model.bounds import check_bounds, infer_shapes
from tests.helpers import make_model, node, rand


def chain(length: int) -> ModelProto:
    """A graph that calls the last of so many functions, each of which calls the one before."""
    functions = [function("F1"), *(function(f"F{k}", f"F{k - 1}") for k in range(2, length + 1))]
    proto = calls(f"F{length}", *functions)(None)  # type: ignore[arg-type]
    assert isinstance(proto, ModelProto)
    return proto


def test_functions_may_call_each_other_so_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_CALL_DEPTH", 5)
    check_bounds(chain(5), "it")
    with pytest.raises(ModelError, match="it: function 'f:F6' calls functions 6 deep, more than 5"):
        check_bounds(chain(6), "it")


def test_functions_may_become_so_many_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = [function("F1"), function("F2", "F1", "F1"), function("F3", "F2", "F2")]
    proto = calls("F3", *twice)(None)  # type: ignore[arg-type]
    # F1 is one node, F2 two calls and what these become, F3 likewise.
    monkeypatch.setattr(bounds, "MAX_NODES", 10)
    check_bounds(proto, "it")  # type: ignore[arg-type]
    monkeypatch.setattr(bounds, "MAX_NODES", 9)
    with pytest.raises(ModelError, match="'f:F3' becomes 10 nodes"):
        check_bounds(proto, "it")  # type: ignore[arg-type]


def test_no_tensor_may_take_more_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, weights = [node("MatMul", ["x", "w"], ["y"])], {"w": rand(4, 25)}
    model = make_model(nodes, inputs={"x": ["N", 4]}, outputs=["y"], weights=weights)
    monkeypatch.setattr(bounds, "_machine_bytes", lambda: 100)  # one sample of y
    check_bounds(model, "it")
    monkeypatch.setattr(bounds, "_machine_bytes", lambda: 99)
    with pytest.raises(ModelError, match="tensor 'y', which node 'make_y' writes, takes 1e-07 GB"):
        check_bounds(model, "it")


def test_sparse_tensors_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = sparse("s", [10, 10])(None)  # type: ignore[arg-type]
    assert isinstance(proto, ModelProto)
    monkeypatch.setattr(bounds, "MAX_DENSE_ELEMENTS", 150)
    check_bounds(proto, "it")
    other = proto.graph.sparse_initializer.add()
    other.CopyFrom(proto.graph.sparse_initializer[0])
    other.values.name = "t"
    with pytest.raises(ModelError, match="'t' has 100 elements"):
        check_bounds(proto, "it")


def shape_of_y(n_integers: int) -> list[int]:
    """Infer the shape of what is reshaped to a computed target, beside so many other integers."""
    model = make_model(
        [
            node("Concat", ["two", "three"], ["target"], axis=0),
            node("Reshape", ["x", "target"], ["y"]),
            node("Identity", ["many"], ["others"]),
        ],
        inputs={"x": [6]},
        outputs=["y", "others"],
        weights={"two": np.array([2]), "three": np.array([3]), "many": np.zeros(n_integers, np.int64)},
    )
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.ClearField("type")
    inferred = infer_shapes(model)
    return [dim.dim_value for dim in inferred.graph.output[0].type.tensor_type.shape.dim]


def test_integers_are_propagated_where_they_are_few() -> None:
    assert shape_of_y(100_000) == [2, 3]
    assert shape_of_y(100_001) != [2, 3]

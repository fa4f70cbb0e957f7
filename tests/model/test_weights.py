"""Models in two parts: the same in onnxruntime, in the checker and in the graph, and never copied."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from sample_models import images, residual_cnn, write

from hap_onnx.errors import ModelError, ValidationError
from hap_onnx.model import external_data, loading
from hap_onnx.model.loading import load_model
from hap_onnx.model.model_io import normalise, to_proto
from hap_onnx.model.weights import LargeModel, join_model, split_model, with_placeholders
from hap_onnx.runtime.session import make_session
from hap_onnx.runtime.soundness import check_model
from tests.helpers import make_model, node, rand


def test_external_weights_are_arrays_that_all_share(tmp_path: Path) -> None:
    inside = load_model(residual_cnn())
    source = load_model(write(tmp_path, external=True))
    assert source.sha256 == inside.sha256
    assert isinstance(source.model, LargeModel)
    assert join_model(source.model) == inside.proto
    assert sum(array.nbytes for array in source.weights.values()) > 0.9 * source.n_bytes
    tensors = normalise(source).tensors()
    for name, array in source.weights.items():
        assert not array.flags.writeable
        assert np.shares_memory(tensors[name].values, array)
    again = to_proto(normalise(source), source)
    assert isinstance(again, LargeModel)
    for name, array in source.weights.items():
        assert np.shares_memory(again.weights[name], array)


def test_a_model_in_two_parts_runs_alike() -> None:
    model = residual_cnn()
    sessions = [make_session(one, providers="cpu") for one in (model, split_model(model))]
    outputs = [session.run({"x": images(3)})["scores"] for session in sessions]
    np.testing.assert_array_equal(*outputs)
    assert make_session(split_model(model), providers="cpu", is_timed=False).inputs == sessions[0].inputs


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int64, np.uint8, ml_dtypes.bfloat16])
def test_onnxruntime_reads_arrays_of_all_types(dtype: type) -> None:
    weights = {"w": (10 * rand(40, 50)).astype(dtype)}
    nodes = [node("Cast", ["w"], ["f"], to=onnx.TensorProto.FLOAT), node("Add", ["f", "x"], ["y"])]
    model = make_model(nodes, inputs={"x": ["N", 50]}, outputs=["y"], weights=weights)
    large = split_model(model)
    assert list(large.weights) == ["w"]
    found = make_session(large, providers="cpu").run({"x": np.zeros((1, 50), np.float32)})["y"]
    np.testing.assert_array_equal(found, weights["w"].astype(np.float32))
    assert join_model(large).graph.initializer[0].raw_data == model.graph.initializer[0].raw_data


def test_the_checker_sees_what_is_wrong_with_a_model_in_two_parts() -> None:
    large = split_model(residual_cnn())
    assert check_model(large, reference=large) is None
    assert with_placeholders(large).ByteSize() < 5000
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    model = make_model(nodes, inputs={"x": ["N", 100]}, outputs=["y"], weights={"w": rand(100, 50)})
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 51
    with pytest.raises(ValidationError, match=r"does not pass onnx\.checker"):
        check_model(split_model(model))


def test_models_of_an_old_kind_come_back_in_two_parts(tmp_path: Path) -> None:
    """Up to IR 3 initializers are inputs, too; what compression adds must be a Constant node."""
    model = residual_cnn(opset=8)
    model.ir_version = 3
    for tensor in model.graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        model.graph.input.append(info)
    expected = make_session(model, providers="cpu").run({"x": images(2)})["scores"]
    source = load_model(write(tmp_path, model, external=True))  # which empties the model
    graph = normalise(source)
    weight = graph.tensors()["a1.w"]
    weight.name = "new"
    proto = to_proto(graph, source)
    assert isinstance(proto, LargeModel)
    assert "new" not in proto.weights
    session = make_session(proto, providers="cpu")
    np.testing.assert_allclose(session.run({"x": images(2)})["scores"], expected, rtol=1e-5)


# ---------------------------------------------------------------- files that change meanwhile


@pytest.mark.parametrize("name", ["net.onnx", "net.data"])
def test_a_model_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write(tmp_path, external=True)
    read = external_data._read

    def change(*arguments: object, **options: object) -> np.ndarray:
        os.utime(tmp_path / name, ns=(1, 1))
        return read(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(external_data, "_read", change)
    with pytest.raises(ModelError, match=rf"{name} was changed while it was read; start again"):
        load_model(path)


def test_a_model_that_changes_after_it_was_read_does_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path, external=True)
    source = load_model(path)
    for file in (path, tmp_path / "net.data"):
        file.write_bytes(b"")
    expected = make_session(residual_cnn(), providers="cpu").run({"x": images(2)})["scores"]
    session = make_session(source.model, providers="cpu")
    np.testing.assert_array_equal(session.run({"x": images(2)})["scores"], expected)
    assert loading.load_model(source.model).sha256 == source.sha256

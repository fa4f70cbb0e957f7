"""Loading and running models in onnxruntime."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from hap_onnx.errors import CalibrationError, ModelError, UsageError, ValidationError
from hap_onnx.runtime import session, soundness
from hap_onnx.runtime.session import make_session, run_outputs
from hap_onnx.runtime.soundness import check_model
from tests.runtime.cases import RNG, Batch, Samples, W, build, matmul_model, run, x_of, y_of

# --- run_outputs ---


@settings(max_examples=30, deadline=None)
@given(
    declared=st.sampled_from(["N", None, 1, 2, 5]),
    n_samples=st.integers(1, 13),
    batch_size=st.integers(1, 8),
)
def test_any_batching_gives_all_samples_in_order(
    declared: int | str | None, n_samples: int, batch_size: int
) -> None:
    x = RNG.integers(-9, 9, (n_samples, 3)).astype(np.float32)
    np.testing.assert_allclose(
        run(matmul_model(declared), x, batch_size=batch_size), x @ W, rtol=1e-5, atol=1e-5
    )


def test_a_fixed_batch_is_padded_and_cut() -> None:
    session = make_session(matmul_model(4), threads=1, providers="cpu")
    assert session.fixed_batch == 4
    outputs = run_outputs(session, Samples({"x": np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1]]}), batch_size=3)
    np.testing.assert_allclose(outputs["y"], W[[0, 1, 2, 0, 1]])


def test_a_batch_written_into_the_graph_runs_one_by_one() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    model = build(nodes, [x_of("N", 1, 3)], ["y"], {"w": W, "shape": np.array([1, 3])})
    x = RNG.standard_normal((5, 1, 3)).astype(np.float32)
    np.testing.assert_allclose(run(model, x, batch_size=4), x[:, 0] @ W, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match=r"on x \[1, 1, 2\]: .* Got: 2 Expected: 3"):
        run(model, np.ones((2, 1, 2), np.float32))


def test_outputs_without_batch_axis_get_one() -> None:
    total = build([helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], [x_of("N", 3)], ["y"])
    x = RNG.integers(0, 9, (5, 3)).astype(np.float32)
    np.testing.assert_array_equal(run(total, x, batch_size=4), x.sum(1))
    flat = build(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [x_of("N", 2, 3)],
        ["y"],
        {"shape": np.array([-1, 3])},
    )
    x = RNG.standard_normal((5, 2, 3)).astype(np.float32)
    np.testing.assert_array_equal(run(flat, x, batch_size=4), x)


def test_outputs_that_change_their_shape_are_refused() -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["i"]),
        helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
    ]
    with pytest.raises(
        ValidationError, match="output 'y' of the model changes its shape from sample to sample"
    ):
        run(build(nodes, [x_of(1, 3)], ["y"]), np.float32([[1, 0, 0], [1, 1, 0]]))


def test_a_fixed_batch_without_batch_axis_is_refused() -> None:
    total = build([helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], [x_of(2, 3)], ["y"])
    with pytest.raises(ValidationError, match=r"output 'y' .* has the shape \[\] for 2 samples"):
        run(total, np.ones((4, 3), np.float32))


@pytest.mark.parametrize(
    "dtype", [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT32]
)
def test_inputs_are_cast_to_the_declared_type(dtype: int) -> None:
    model = matmul_model(dtype=dtype)
    for source in (np.float64, np.uint8, np.int64):
        x = np.arange(6, dtype=source).reshape(2, 3)
        np.testing.assert_allclose(run(model, x), x.astype(np.float32) @ W, rtol=1e-5, atol=1e-5)


def test_missing_inputs_and_samples_are_named() -> None:
    session = make_session(matmul_model(), providers="cpu")
    with pytest.raises(
        CalibrationError, match=r"no array for the model's input 'x' float32 \[N, 3\]; it has a, b"
    ):
        run_outputs(session, [Batch({"b": np.ones((1, 3)), "a": np.ones((1, 3))})])
    with pytest.raises(CalibrationError, match="no samples"):
        run_outputs(session, [])
    with pytest.raises(CalibrationError, match="needs numbers"):
        run_outputs(session, [Batch({"x": np.array([["a", "b", "c"]])})])
    with pytest.raises(ModelError, match=r"the model does not run in onnxruntime on x \[1, 5\]"):
        run_outputs(session, [Batch({"x": np.ones((2, 5))})])


def test_an_input_without_axes_takes_a_single_number() -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "test", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    loaded = make_session(model, providers="cpu")
    assert run_outputs(loaded, [Batch({"x": np.array([1.0, 2.0])})])["y"].tolist() == [-1.0, -2.0]
    with pytest.raises(CalibrationError, match=r"takes a single number, but the data has \[1, 5\]"):
        run_outputs(loaded, [Batch({"x": np.ones((2, 5))})])


def test_entries_that_are_no_inputs_are_ignored() -> None:
    session = make_session(matmul_model(2), providers="cpu")
    batch = Batch({"x": np.ones((3, 3)), "extra": np.ones((3, 7))})
    assert run_outputs(session, [batch])["y"].shape == (3, 4)


# --- make_session ---


def test_a_model_that_does_not_load_names_the_node() -> None:
    model = build(
        [helper.make_node("Magic", ["x"], ["y"], name="trick", domain="com.example")],
        [x_of(1)],
        ["y"],
        domains={"com.example": 1},
    )
    with pytest.raises(ModelError, match=r"does not load in onnxruntime: .*Magic") as caught:
        make_session(model, label="tiny.onnx")
    assert str(caught.value).startswith("tiny.onnx")
    assert "trick" in str(caught.value) or "Magic" in str(caught.value)
    assert "onnxruntime_src" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_node_that_does_not_run_is_named() -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"], name="squeeze")]
    session = make_session(build(nodes, [x_of("N", 3)], ["y"], {"shape": np.array([7, 7])}), providers="cpu")
    with pytest.raises(ModelError, match=r"node 'squeeze' \(Reshape\)") as caught:
        run_outputs(session, [Batch({"x": np.ones((1, 3))})])
    assert "onnxruntime_src" not in str(caught.value)


def test_missing_and_damaged_files_are_model_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.onnx does not load"):
        make_session(tmp_path / "gone.onnx")
    with pytest.raises(ModelError, match="does not load"):
        make_session(b"\x08\x08broken")


def test_unknown_providers_are_usage_errors() -> None:
    with pytest.raises(
        UsageError, match=r"'NoSuchProvider' is not in this onnxruntime; choose from .*CPUExecutionProvider"
    ):
        make_session(matmul_model(), providers=["NoSuchProvider"])
    with pytest.raises(UsageError, match="no execution provider"):
        make_session(matmul_model(), providers=[])


def test_sessions_load_from_path_bytes_and_proto(tmp_path: Path) -> None:
    model = matmul_model()
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    x = Samples({"x": np.eye(3)})
    sessions = [
        make_session(m, providers="cpu") for m in (model, model.SerializeToString(), tmp_path / "m.onnx")
    ]
    for loaded in sessions:
        np.testing.assert_allclose(run_outputs(loaded, x)["y"], W)


def test_large_models_go_through_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [x_of("N", 40)],
        [y_of("N", 50)],
        {"w": np.ones((40, 50), np.float32)},
    )
    monkeypatch.setattr(session, "MAX_PROTO_BYTES", 1000)
    monkeypatch.setattr(soundness, "MAX_PROTO_BYTES", 1000)
    assert run(model, np.ones((2, 40))).sum() == 2 * 40 * 50
    check_model(model)


def test_inputs_with_contradicting_batches_are_refused() -> None:
    inputs = [x_of(2, 3), helper.make_tensor_value_info("z", TensorProto.FLOAT, [4, 3])]
    model = build([helper.make_node("Concat", ["x", "z"], ["y"], axis=0)], inputs, ["y"])
    with pytest.raises(ModelError, match=r"different sizes on their first axis \('x': 2, 'z': 4\)"):
        make_session(model)


def test_inputs_of_strange_types_are_refused() -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    model = build(
        [helper.make_node("ConcatFromSequence", ["x"], ["y"], axis=0)],
        [helper.make_value_info("x", kind)],
        ["y"],
    )
    with pytest.raises(ModelError, match=r"input 'x' of the model has the type seq\(tensor\(float\)\)"):
        make_session(model)


def test_outputs_that_are_no_tensors_are_refused() -> None:
    model = build([helper.make_node("SequenceConstruct", ["x"], ["y"])], [x_of(1, 2)], ["y"])
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    model.graph.output[0].CopyFrom(helper.make_value_info("y", kind))
    with pytest.raises(ModelError, match="output 'y' of the model is a list, but only tensors"):
        run(model, np.ones((1, 2)))


def test_sessions_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    model = matmul_model()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "unused"))
    run(model, np.ones((1, 3)))
    with pytest.raises(ModelError):
        run(model, np.ones((1, 5)))
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out == ""


SHARED = Path(os.environ.get("HAP_ONNX_SHARED", "/nonexistent"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="HAP_ONNX_SHARED is not set")
def test_a_detector_with_fixed_batch_runs_over_several_samples() -> None:
    session = make_session(SHARED / "models" / "ultraface_rfb_320.onnx", threads=1, providers="cpu")
    assert session.fixed_batch == 1
    assert [spec.name for spec in session.inputs] == ["input"]
    outputs = run_outputs(session, Samples({"input": RNG.standard_normal((3, 3, 240, 320))}), batch_size=2)
    assert {name: array.shape for name, array in outputs.items()} == {
        "scores": (3, 4420, 2),
        "boxes": (3, 4420, 4),
    }

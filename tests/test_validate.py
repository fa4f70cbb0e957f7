"""Running, checking and timing models in onnxruntime."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hap_onnx.errors import CalibrationError, ModelError, UsageError, ValidationError
from hap_onnx.validate import (
    check_finite,
    check_model,
    compare_outputs,
    latency_feed,
    make_session,
    measure_latency,
    median_interval,
    run_outputs,
)

validate = sys.modules[make_session.__module__]  # hap_onnx.validate is the public function
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Samples:
    arrays: dict[str, np.ndarray]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        n = len(next(iter(self.arrays.values())))
        for start in range(0, n, batch_size):
            yield Batch({name: array[start : start + batch_size] for name, array in self.arrays.items()})


def build(
    nodes: Sequence[NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str | onnx.ValueInfoProto],
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    domains: Mapping[str, int] | None = None,
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "test",
        list(inputs),
        [
            helper.make_tensor_value_info(o, TensorProto.FLOAT, None) if isinstance(o, str) else o
            for o in outputs
        ],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    opsets += [helper.make_opsetid(domain, version) for domain, version in (domains or {}).items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def y_of(*shape: int | str | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("y", TensorProto.FLOAT, list(shape))


def x_of(*shape: int | str | None, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("x", dtype, list(shape))


W = RNG.standard_normal((3, 4)).astype(np.float32)


def matmul_model(batch: int | str | None = "N", *, dtype: int = TensorProto.FLOAT) -> ModelProto:
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT)]
    return build(
        [*nodes, helper.make_node("MatMul", ["f", "w"], ["y"])],
        [x_of(batch, 3, dtype=dtype)],
        [y_of(batch, 4)],
        {"w": W},
    )


def run(model: ModelProto, x: np.ndarray, **options: int) -> np.ndarray:
    return run_outputs(make_session(model, threads=1, providers="cpu"), Samples({"x": x}), **options)["y"]


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
    for session in sessions:
        np.testing.assert_allclose(run_outputs(session, x)["y"], W)


def test_large_models_go_through_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [x_of("N", 40)],
        [y_of("N", 50)],
        {"w": np.ones((40, 50), np.float32)},
    )
    monkeypatch.setattr(validate, "MAX_PROTO_BYTES", 1000)
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


# --- checks ---


def test_finite_outputs_pass_and_others_are_counted() -> None:
    check_finite({"y": np.ones((2, 3)), "i": np.ones(2, np.int64)}, label="it")
    bad = np.ones((4, 3), np.float32)
    bad[1, 0], bad[3, 1], bad[3, 2] = np.nan, np.inf, -np.inf
    with pytest.raises(
        ValidationError, match=r"output 'y' of it has 3 NaN or infinite numbers \(in 2 samples\)"
    ):
        check_finite({"y": bad}, label="it")


def test_check_model_accepts_a_sound_model() -> None:
    assert check_model(matmul_model()) is None
    check_model(matmul_model(), reference=matmul_model())


def test_check_model_refuses_what_the_checker_refuses() -> None:
    model = matmul_model()
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 99]))
    with pytest.raises(ValidationError, match=r"does not pass onnx\.checker: .*99"):
        check_model(model, reference=matmul_model())
    remark = check_model(model, reference=model)  # the user's model had the flaw before
    assert remark is not None
    assert "99" in remark


def test_check_model_refuses_what_does_not_load() -> None:
    node = helper.make_node("Magic", ["x"], ["y"], domain="com.example")
    with pytest.raises(ValidationError, match=r"not usable: .*Magic"):
        check_model(build([node], [x_of(1)], [y_of(1)], domains={"com.example": 1}))


def test_check_model_refuses_new_warnings_only(capfd: pytest.CaptureFixture[str]) -> None:
    noisy = matmul_model()
    noisy.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "unused"))
    with pytest.raises(ValidationError, match=r"new warning: .*unused"):
        check_model(noisy, reference=matmul_model())
    other = matmul_model()
    other.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "another"))
    check_model(other, reference=noisy)
    assert capfd.readouterr().err == ""


def test_captured_stderr_passes_other_lines_on(capfd: pytest.CaptureFixture[str]) -> None:
    with validate._captured_stderr() as lines:
        os.write(2, b"1 [W:onnxruntime:, graph.cc:1 f] text\nprogress 50 %\n")
    sys.stderr.flush()
    assert lines == ["1 [W:onnxruntime:, graph.cc:1 f] text\n"]


def test_check_model_takes_paths(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(matmul_model().SerializeToString())
    check_model(path, reference=path)


def test_compare_outputs_by_hand() -> None:
    reference = {"y": np.float32([[1, 2], [5, 0]])}
    candidate = {"y": np.float32([[1, 2.5], [5, 0]])}
    fidelity = compare_outputs(reference, candidate)
    mean = reference["y"].mean(0)
    assert fidelity.r2 == pytest.approx(1 - 0.25 / ((reference["y"] - mean) ** 2).sum())
    assert fidelity.agreement == 1.0
    assert fidelity.max_abs_error == 0.5


# --- latency ---


def slow_model(n_layers: int) -> ModelProto:
    nodes, source = [], "x"
    for index in range(n_layers):
        nodes.append(helper.make_node("MatMul", [source, "w"], [f"m{index}"]))
        nodes.append(helper.make_node("Tanh", [f"m{index}"], ["y" if index == n_layers - 1 else f"t{index}"]))
        source = f"t{index}"
    return build(nodes, [x_of("N", 96)], ["y"], {"w": RNG.standard_normal((96, 96)).astype(np.float32) / 10})


def test_latency_tells_a_model_four_times_as_deep() -> None:
    shallow, deep = (make_session(slow_model(n), threads=1, providers="cpu") for n in (2, 16))
    feed = latency_feed(shallow, {"x": np.ones((3, 96))}, batch=8)
    comparison = measure_latency(shallow, deep, feed, rounds=25)
    assert comparison.is_slower
    assert 1.5 < comparison.ratio_low <= comparison.ratio <= comparison.ratio_high
    assert comparison.after_ms > comparison.before_ms > 0
    assert (comparison.n, comparison.threads, comparison.batch) == (25, 1, 8)
    assert comparison.provider == "CPUExecutionProvider"
    assert not measure_latency(deep, shallow, feed, rounds=25).is_slower


def test_latency_alternates_strictly() -> None:
    calls: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, *_: object) -> list[np.ndarray]:
            calls.append(self.name)
            return [np.zeros((1, 4))]

    base = make_session(matmul_model(), threads=1, providers="cpu")
    first, second = (replace(base, session=Recorder(name)) for name in "ab")
    original = validate._MIN_TIMING_S
    validate._MIN_TIMING_S = 0.0
    try:
        measure_latency(first, second, {"x": np.ones((1, 3))}, rounds=6)
    finally:
        validate._MIN_TIMING_S = original
    assert "".join(calls[-12:]) == "abbaabbaabba"


def test_latency_refuses_unlike_sessions() -> None:
    one, two = (make_session(matmul_model(), threads=n, providers="cpu") for n in (1, 2))
    with pytest.raises(UsageError, match="same threads"):
        measure_latency(one, two, {"x": np.ones((1, 3))})


def test_latency_feed_fits_the_batch() -> None:
    x = np.arange(6).reshape(2, 3)
    dynamic, fixed = (make_session(matmul_model(n), providers="cpu") for n in ("N", 5))
    np.testing.assert_array_equal(latency_feed(dynamic, {"x": x})["x"], x[:1])
    np.testing.assert_array_equal(latency_feed(fixed, {"x": x}, batch=2)["x"], x[[0, 1, 0, 1, 0]])


def test_median_interval_holds_at_least_its_confidence() -> None:
    """Exact: the interval misses iff fewer than ``index + 1`` of n values fall on one side of the median."""
    for n in range(6, 120):
        low, median, high = median_interval(np.arange(n))
        index = int(low)
        missed = 2 * sum(comb(n, k) for k in range(index + 1)) / 2**n
        assert missed <= 0.05
        tighter = 2 * sum(comb(n, k) for k in range(index + 2)) / 2**n
        assert tighter > 0.05
        assert (median, high) == ((n - 1) / 2, n - 1 - index)
    assert median_interval(np.array([2.0, 1.0])) == (1.0, 1.5, 2.0)


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

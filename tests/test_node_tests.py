"""Counting onnx's node tests by what computes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from click.testing import CliRunner
from onnx import helper, numpy_helper

from tools.node_tests import main, recorded_cases, run_case


def _record(folder: Path, op_type: str, arrays: list[np.ndarray], result: np.ndarray) -> None:
    """Write a case of one node as the packages of onnx carry it."""
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip([f"x{i}" for i in range(len(arrays))] + ["y"], [*arrays, result], strict=True)
    ]
    graph = helper.make_graph(
        [helper.make_node(op_type, [info.name for info in infos[:-1]], ["y"])], "case", infos[:-1], infos[-1:]
    )
    data = folder / "test_data_set_0"
    data.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), folder / "model.onnx")
    for index, array in enumerate(arrays):
        (data / f"input_{index}.pb").write_bytes(numpy_helper.from_array(array).SerializeToString())
    (data / "output_0.pb").write_bytes(numpy_helper.from_array(result).SerializeToString())


X = np.array([-1.0, 2.0], np.float32)


def test_cases_are_told_apart(tmp_path: Path) -> None:
    boxes, scores = np.zeros((1, 1, 4), np.float32), np.ones((1, 1, 1), np.float32)
    _record(tmp_path / "test_torch", "Relu", [X], np.maximum(X, 0))
    _record(tmp_path / "test_disputed", "Relu", [X], X)
    _record(tmp_path / "test_shape", "Relu", [X], np.maximum(X, 0)[None])
    _record(
        tmp_path / "test_body",
        "NegativeLogLikelihoodLoss",
        [X[None], np.array([1])],
        np.array(-2.0, np.float32),
    )
    _record(tmp_path / "test_opaque", "NonMaxSuppression", [boxes, scores], np.zeros((0, 3), np.int64))
    _record(tmp_path / "test_refused", "Frobnicate", [X], X)
    outcomes = {case.name: run_case(case) for case in recorded_cases(tmp_path)}
    assert {name: outcome.kind for name, outcome in outcomes.items()} == {
        "test_torch": "torch", "test_disputed": "disputed", "test_shape": "disputed", "test_body": "body",
        "test_opaque": "opaque", "test_refused": "refused",
    }  # fmt: skip
    assert "Frobnicate" in outcomes["test_refused"].reason
    assert "(2,) instead of (1, 2)" in outcomes["test_shape"].reason


def test_the_command_counts_by_kind(tmp_path: Path) -> None:
    _record(tmp_path / "test_right", "Relu", [X], np.maximum(X, 0))
    result = CliRunner().invoke(main, ["--data", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "1 cases: torch 1 (100.0%)" in result.output


def test_wrong_cases_are_listed_and_fail(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    _record(tmp_path / "test_doubtful", "Relu", [X], X)
    monkeypatch.setattr("tools.node_tests.run_onnxruntime", lambda model, feeds: {"y": X})
    result = CliRunner().invoke(main, ["--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "wrong    test_doubtful" in result.output


def test_only_float_cases_count_unless_asked(tmp_path: Path) -> None:
    _record(tmp_path / "test_half", "Relu", [X.astype(np.float16)], np.maximum(X, 0).astype(np.float16))
    _record(tmp_path / "test_index", "Identity", [np.array([1])], np.array([1]))
    _record(tmp_path / "test_single", "Relu", [X], np.maximum(X, 0))
    floats = [case.name for case in recorded_cases(tmp_path) if case.is_float]
    assert floats == ["test_single"]
    assert "3 cases" in CliRunner().invoke(main, ["--data", str(tmp_path), "--all"]).output

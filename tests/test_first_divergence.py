"""The developer tool that names the first diverging node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from hap_onnx.ops import registry
from tests.helpers import make_model, make_twin, node, rand
from tools.first_divergence import compare_nodes, main


def _chain() -> onnx.ModelProto:
    nodes = [node("Relu", ["x"], ["a"]), node("Softplus", ["a"], ["b"]), node("Neg", ["b"], ["y"])]
    return make_model(nodes, inputs={"x": ["N", 3]}, outputs=["y"])


def _break_softplus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._RUN, ("", "Softplus"), [(1, lambda x: x + 1)])


def test_every_computed_tensor_is_compared_in_order() -> None:
    errors = compare_nodes(_chain(), {"x": rand(2, 3)}, twin=make_twin(_chain()))
    assert [entry.tensor for entry in errors] == ["a", "b", "y"]
    assert not any(entry.diverges(1e-5) for entry in errors)


def test_the_tool_exits_0_when_all_agree(tmp_path: Path) -> None:
    onnx.save(_chain(), tmp_path / "model.onnx")
    np.savez(tmp_path / "inputs.npz", x=rand(2, 3))
    result = CliRunner().invoke(
        main, [str(tmp_path / "model.onnx"), "--inputs", str(tmp_path / "inputs.npz")]
    )
    assert result.exit_code == 0, result.output
    assert "all 3 tensors agree" in result.output


def test_the_tool_names_the_first_diverging_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _break_softplus(monkeypatch)
    onnx.save(_chain(), tmp_path / "model.onnx")
    result = CliRunner().invoke(main, [str(tmp_path / "model.onnx"), "--dim", "N=4"])
    assert result.exit_code == 1
    assert "first divergence: node 'make_b' (Softplus), tensor 'b'" in result.output

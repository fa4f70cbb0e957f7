"""Whole jobs on small transformers: heads and inner widths go, budgets are met, shapes stay dynamic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from sample_models import fix_speed
from topologies import Shapes
from topologies_attention import Attention

from hap_onnx import apply_plan, compress
from hap_onnx.model.model_io import load_model
from hap_onnx.report import CompressReport
from tools.first_divergence import run_onnxruntime

FAST: dict[str, Any] = {"threads": 1, "batch_size": 32}
WIDTH, HEADS, INNER, TOKENS = 24, 6, 32, 7


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    x = np.random.default_rng(3).standard_normal((90, TOKENS, WIDTH)).astype(np.float32)
    return {"x": x}


def transformer(*, packed: bool, tokens: int | str = TOKENS, inputs: Shapes | None = None) -> onnx.ModelProto:
    """Two blocks of attention with a table of positions (if their number is known), and of an MLP."""
    net = Attention()
    x = net.dense("x", WIDTH, WIDTH, out="stem")
    for _ in range(2):
        y = net.layer_norm(x, WIDTH)
        if packed:
            y = net.dense(y, WIDTH, 3 * WIDTH, out=net.name("qkv"))
            y = net.op("Reshape", y, net.op("Concat", *net.sizes_of(x, 0, 1), net.ints(3, HEADS, 4), axis=0))
            y = net.op("Transpose", y, perm=[2, 0, 3, 1, 4])
            q, k, v = (net.op("Gather", y, net.const(np.int64(i)), axis=0) for i in range(3))
        else:
            q, k, v = (net.heads(net.dense(y, WIDTH, WIDTH, out=net.name(name)), HEADS) for name in "qkv")
        bias = None
        if isinstance(tokens, int):
            index = np.arange(tokens)
            table = net.op(
                "Gather", net.rand(2 * tokens - 1, HEADS), net.const(index[:, None] - index + tokens - 1)
            )
            bias = net.op("Transpose", table, perm=[2, 0, 1])
        y = net.op("Reshape", net.attend(q, k, v, bias=bias), net.ints(0, 0, WIDTH))
        x = net.op("Add", x, net.dense(y, WIDTH, WIDTH, out=net.name("proj")))
        y = net.gelu(net.dense(net.layer_norm(x, WIDTH), WIDTH, INNER, out=net.name("up")))
        x = net.op("Add", x, net.dense(y, INNER, WIDTH, out=net.name("down")))
    x = net.op("ReduceMean", net.layer_norm(x, WIDTH), axes=[1], keepdims=0)
    net.op("Gemm", x, net.rand(WIDTH, 5), net.rand(5), out="y")
    return net.model("y", inputs=inputs or {"x": ("N", tokens, WIDTH)})


def job(folder: Path, model: onnx.ModelProto, data: dict[str, np.ndarray], **options: Any) -> CompressReport:
    onnx.save(model, folder / "net.onnx")
    return compress(folder / "net.onnx", data, **options, **FAST)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("method", ["prune", "hap"])
def test_a_budget_is_met(tmp_path: Path, data: dict[str, np.ndarray], packed: bool, method: str) -> None:
    report = job(tmp_path, transformer(packed=packed), data, keep_params=0.6, method=method)
    assert report.budget.reached["keep_params"] <= 0.6
    assert sorted(group.size for group in report.plan.groups) == [HEADS, HEADS, INNER, INNER]
    assert report.after.params == sum(
        int(np.prod(tensor.dims))
        for tensor in onnx.load(tmp_path / "net.hap.onnx").graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    )
    assert any("LayerNormalization" in entry.reason for entry in report.frozen)
    if method == "prune":
        assert any(group.kept < group.size for group in report.plan.groups if group.size == HEADS)


def test_samples_and_tokens_stay_dynamic(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = transformer(packed=True, tokens="T")
    job(tmp_path, model, data, keep_macs=0.5, method="prune")
    small = load_model(tmp_path / "net.hap.onnx").proto
    assert list(small.graph.input) == list(model.graph.input)
    for n, length in ((1, 3), (5, 11)):
        x = np.random.default_rng(0).standard_normal((n, length, WIDTH)).astype(np.float32)
        assert run_onnxruntime(small, {"x": x})["y"].shape == (n, 5)
        assert np.isfinite(run_onnxruntime(small, {"x": x})["y"]).all()


def test_a_plan_gives_the_same_bytes(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    plan = tmp_path / "plan.json"
    job(tmp_path, transformer(packed=False), data, keep_params=0.7, save_plan=plan)
    apply_plan(tmp_path / "net.onnx", plan, output=tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "net.hap.onnx").read_bytes()


def test_a_batch_that_is_written_in_is_kept(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    model = transformer(packed=False, inputs={"x": (1, TOKENS, WIDTH)})
    report = job(tmp_path, model, data, keep_params=0.6, method="prune")
    assert report.budget.reached["keep_params"] <= 0.6
    small = onnx.load(tmp_path / "net.hap.onnx")
    assert small.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert run_onnxruntime(small, {"x": data["x"][:1]})["y"].shape == (1, 5)


def test_excluded_heads_stay(tmp_path: Path, data: dict[str, np.ndarray]) -> None:
    report = job(
        tmp_path, transformer(packed=True), data, keep_macs=0.8, method="prune", exclude=["make_qkv*"]
    )
    assert [group.size for group in report.plan.groups] == [INNER, INNER]
    excluded = [entry for entry in report.frozen if "excluded by --exclude" in entry.reason]
    assert len(excluded) == 2

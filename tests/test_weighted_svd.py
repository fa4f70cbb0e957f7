"""The developer tool that compares weighted with plain SVD."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from hap_onnx.data.calibration import Dataset, InputSpec, Subset, open_dataset, split_dataset
from hap_onnx.model.model_io import load_model
from hap_onnx.prepare import prepare
from hap_onnx.sensitivity.curvature import output_scales
from tests.helpers import make_model, node, rand
from tools.weighted_svd import Comparison, compare_layers, find_layers, main, summarise

N_IN, N_OUT, N_SAMPLES = 12, 8, 200


def _gemm() -> onnx.ModelProto:
    return make_model(
        [node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
        inputs={"x": ["N", N_IN]},
        outputs=["y"],
        weights={"w": rand(N_OUT, N_IN), "b": rand(N_OUT, seed=1)},
    )


def _correlated_rows() -> np.ndarray:
    """Rows whose axes differ 30-fold in length and whose mean is not zero."""
    rows = rand(N_SAMPLES, N_IN, seed=2) * np.geomspace(3, 0.1, N_IN, dtype=np.float32)
    return rows @ rand(N_IN, N_IN, seed=3) + rand(N_IN, seed=4)


def _dataset(x: np.ndarray) -> Dataset:
    return open_dataset({"x": x}, [InputSpec("x", np.dtype(np.float32), (None, N_IN))])


def test_a_linear_model_loses_what_plain_algebra_says() -> None:
    x = _correlated_rows()
    splits = split_dataset(_dataset(x), seed=0)
    prepared = prepare(load_model(_gemm()), {"x": x[:2]})
    weight = rand(N_OUT, N_IN).astype(np.float64)
    seen, unseen = (x[part.indices].astype(np.float64) for part in (splits.calibrate, splits.report))
    scales = output_scales([{"y": seen @ weight.T}])
    layers = find_layers(prepared, splits.calibrate, scales=scales, seed=0)
    [found] = compare_layers(prepared, layers, splits.report, kind="lowrank", share=0.5, scales=scales)
    assert found.rank == round(0.5 * N_IN * N_OUT / (N_IN + N_OUT))

    left, values, right = np.linalg.svd(weight)
    plain = left[:, : found.rank] * values[: found.rank] @ right[: found.rank]
    lost = (unseen - seen.mean(0)) @ (weight - plain).T  # the bias takes up the mean of what was seen
    expected = 0.5 * scales["y"] ** 2 * np.square(lost).sum(1).mean()
    assert found.measured[1] == pytest.approx(expected, rel=1e-4)
    assert found.predicted[0] < found.predicted[1]
    assert found.ratio < 0.5


def test_full_rank_is_left_out() -> None:
    x = _correlated_rows()
    everything = Subset(_dataset(x), np.arange(N_SAMPLES))
    prepared = prepare(load_model(_gemm()), {"x": x[:2]})
    scales = {"y": 1.0}
    layers = find_layers(prepared, everything, scales=scales, seed=0)
    assert len(layers) == 1
    for kind, share in (("lowrank", 1.7), ("spatial", 0.5)):
        assert not compare_layers(prepared, layers, everything, kind=kind, share=share, scales=scales)
    assert summarise("lowrank at 1.7", []) == "lowrank at 1.7: no layer to compare"


def test_the_summary_counts_layers_and_names_the_worst() -> None:
    rows = [
        Comparison(name, (1, 2, 2), 1, (0.0, 0.0), measured)
        for name, measured in (("a", (0.1, 0.4)), ("b", (0.2, 0.1)), ("c", (0.0, 0.0)))
    ]
    line = summarise("here", rows)
    # the cube root of 1/4 * 2 * 1
    assert line == "here: geometric mean ratio 0.794, weighted better in 1 of 3 layers, worst b at 2.000"


def test_the_tool_prints_a_table_per_kind_and_share(tmp_path: Path) -> None:
    model = make_model(
        [
            node("Conv", ["x", "w", "b"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("Relu", ["a"], ["r"]),
            node("GlobalAveragePool", ["r"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "v", "c"], ["y"], transB=1),
        ],
        inputs={"x": ["N", 4, 6, 6]},
        outputs=["y"],
        weights={
            "w": rand(8, 4, 3, 3), "b": rand(8, seed=1), "v": rand(6, 8, seed=2), "c": rand(6, seed=3),
        },
    )  # fmt: skip
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=rand(40, 4, 6, 6, seed=4))
    np.savez(tmp_path / "test.npz", x=rand(10, 4, 6, 6, seed=5))
    arguments = [str(tmp_path / "model.onnx"), "--data", str(tmp_path / "calib.npz"), "--share", "0.5"]

    own = CliRunner().invoke(main, arguments)
    assert own.exit_code == 0, own.output
    assert "curvature of 24 samples, measured on 16 others" in own.output
    lines = own.output.splitlines()
    layers = [line.split(" | ")[0] for line in lines if line.startswith("| make_")]
    assert layers == ["| make_a", "| make_y", "| make_a"]  # lowrank both, spatial the Conv only
    assert lines[-2].startswith("* lowrank at 0.5 of the layer's multiply-accumulates: geometric mean ratio ")
    assert lines[-1].startswith("* spatial at 0.5 of the layer's multiply-accumulates: geometric mean ratio ")

    other = CliRunner().invoke(
        main, [*arguments, "--test", str(tmp_path / "test.npz"), "--kind", "lowrank", "--held-out", "7"]
    )
    assert other.exit_code == 0, other.output
    assert "measured on 7 others" in other.output
    assert "spatial" not in other.output

"""The tool that prints the table of the paper, on made-up images and a network that is hardly trained."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from tools import reproduce
from tools.reproduce import Files, Run, Used, run_all, show


def make_report(*, drop: float, params: int) -> dict[str, Any]:
    return {
        "before": {"params": 1000, "macs": 400, "latency_ms": 2.0},
        "after": {"params": params, "macs": 100, "latency_ms": 1.0},
        "quality": {"before": 0.9, "after": 0.9 - drop, "drop": drop},
        "seconds": {"refit": 60.0, "distill": 120.0},
        "peak_mb": 500.0 + params,
    }


def text_of(found: Sequence[tuple[Run, Any]], network: str = "preresnet29") -> str:
    stream = io.StringIO()
    Console(file=stream, width=170).print(show(network, found))
    return stream.getvalue()


def row_of(text: str, recipe: str) -> list[str]:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    (row,) = (cells for cells in rows if cells[:1] == [recipe])  # the title names the paper, too
    return row


def test_a_row_is_the_mean_of_its_seeds_with_the_spread() -> None:
    runs = [Run("preresnet29", "ours", 0.3, seed) for seed in range(3)]
    reports = [make_report(drop=drop, params=params) for drop, params in ((0.01, 290), (-0.002, 300))]
    text = text_of(list(zip(runs, [*reports, None])))
    assert "94.3 %, under 0.1 points lost" in text
    assert row_of(text, "ours") == [
        "ours", "70.5 %", "75.0 %", "90.00 %", "89.60 %",
        "0.40 (-0.20 to 1.00, 2 of 3 seeds)", "x 0.50", "3.0", "800",
    ]  # fmt: skip


def test_recipes_and_shares_have_rows_of_their_own_and_refusals_are_told() -> None:
    found = [
        (Run("vgg16", "ours", 0.3, 0), make_report(drop=0.01, params=300)),
        (Run("vgg16", "paper", 0.2, 0), None),
    ]
    text = text_of(found, "vgg16")
    assert "no figure in its abstract" in text
    assert row_of(text, "ours")[5].startswith("1.00 (1.00 to 1.00, 1 of 1")
    assert row_of(text, "paper")[1:3] == ["80 % asked", "refused"]


def test_runs_that_are_there_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Sequence[str]] = []

    def pretend(command: Sequence[str]) -> Used:
        commands.append(command)
        path = Path(command[command.index("--report") + 1])
        path.write_text(json.dumps(make_report(drop=0.0, params=300)))
        return Used(3 if "paper" in command else 0, peak_mb=123.0, cpu_s=60.0)

    monkeypatch.setattr(reproduce, "run_process", pretend)
    runs = [Run("vgg16", recipe, 0.3, 1) for recipe in ("ours", "paper")]
    files = Files(tmp_path / "m.onnx", ("--data", "d.npz"))
    for n_commands in (2, 3):  # what was refused is tried again
        (_, ours), (_, paper) = run_all(runs, files, tmp_path, ["--epochs", "2"])
        assert ours["peak_mb"] == 123.0
        assert paper is None
        assert len(commands) == n_commands
    others = ["--epochs", "3"]
    assert [entry is None for _, entry in run_all(runs, files, tmp_path, others)] == [False, True]
    assert len(commands) == 5  # other settings are other runs
    words = " ".join(commands[0])
    for part in ("--data d.npz", "--keep-params 0.3", "--seed 1", "--epochs 2", "--allow-slower"):
        assert part in words
    assert "--preset" not in words
    assert "--preset paper" in " ".join(commands[1])


@pytest.mark.slow
def test_a_network_is_trained_compressed_and_put_beside_the_paper(tmp_path: Path) -> None:
    rng, arrays, folder = np.random.default_rng(0), {}, tmp_path / "out"
    for part, n in (("train", 640), ("test", 60)):
        labels = np.arange(n) % 10
        pixels = 25 * labels[:, None, None, None] + rng.integers(0, 10, (n, 32, 32, 3))
        arrays |= {f"x_{part}": pixels.astype(np.uint8), f"y_{part}": labels}
    np.savez(tmp_path / "images.npz", **arrays)
    words = (
        "preresnet29", "--data", str(tmp_path / "images.npz"), "--folder", str(folder),
        "--keep-params", "0.6", "--seeds", "1", "--epochs", "1", "--probes", "2", "--width", "0.125",
        "--max-samples", "96", "--train-epochs", "10",
    )  # fmt: skip
    found = CliRunner().invoke(reproduce.main, list(words), catch_exceptions=False)
    assert found.exit_code == 0
    for recipe in ("ours", "paper"):
        (path,) = folder.glob(f"preresnet29-{recipe}-0.6-0-*.json")
        report = json.loads(path.read_text())
        assert report["after"]["params"] <= 0.6 * report["before"]["params"]
        assert report["quality"]["n_samples"] == 60
        assert report["quality"]["before"] > 0.5
        assert report["peak_mb"] > 100
        assert row_of(found.output, recipe)[5].startswith(f"{100 * report['quality']['drop']:.2f}")

"""Random graphs: whatever surgery takes away, the rest computes what it did before."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools import fuzz
from tools.first_divergence import run_onnxruntime
from tools.fuzz_checks import Failed, check_graph
from tools.fuzz_graphs import Replayed, Seeded, random_model
from tools.surgery_oracle import Case


@pytest.fixture(autouse=True, scope="module")
def _lean() -> Iterator[None]:
    with fuzz.lean():
        yield


class Drawn:
    """Decisions that hypothesis makes, so that it can shrink them."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))


@st.composite
def random_models(draw: st.DrawFn) -> onnx.ModelProto:
    return random_model(Drawn(draw))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(model=random_models(), seed=st.integers(0, 9))
def test_random_cuts_of_random_models_are_exact(model: onnx.ModelProto, seed: int) -> None:
    check_graph(model, seed=seed)


def test_a_seed_is_one_model_and_its_decisions_are_that_model_again() -> None:
    draws = Seeded(7)
    model = random_model(draws)
    assert random_model(Seeded(7)) == model
    replayed = Replayed(draws.drawn)
    assert random_model(replayed) == model
    assert replayed.drawn == draws.drawn
    assert random_model(Seeded(8)) != model


@pytest.mark.parametrize("drawn", [[], [1] * 5, [3, 1, 4, 1, 5, 9, 2, 6] * 9, [10**6] * 40])
def test_any_decisions_are_a_valid_model(drawn: list[int]) -> None:
    model = random_model(Replayed(drawn))
    onnx.checker.check_model(model, full_check=True)
    run_onnxruntime(model, Case(model).inputs)


def test_the_models_have_channels_to_lose() -> None:
    counts = Counter[str]()
    for seed in range(1000, 1015):
        check_graph(random_model(Seeded(seed)), seed=seed, counts=counts)
    assert counts["groups"] > 15
    assert counts["cuts"] > 36
    assert not counts["cuts refused"]


def test_a_wrong_cut_is_found_and_made_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Case.cut

    def wrong(self: Case, keep: np.ndarray) -> gs.Graph:
        """Let what Concat joins change places where something is taken away: no shape tells."""
        graph = real(self, keep)
        for node in graph.nodes:
            if node.op == "Concat" and node.attrs["axis"] and not keep.all():
                node.inputs = list(node.inputs)[::-1]
        return graph

    monkeypatch.setattr(Case, "cut", wrong)
    monkeypatch.setattr(fuzz, "MINIMISE_TRIES", 25)
    options = ["graphs", "--n", "1", "--seed", "3", "--keep", str(tmp_path), "--stop-after", "1"]
    result = CliRunner().invoke(fuzz.main, options)
    assert result.exit_code == 1, result.output
    assert "inexact 1" in result.output
    folder = next(tmp_path.iterdir())
    case = json.loads((folder / "case.json").read_text())
    found, minimal = (onnx.load(folder / f"{name}.onnx") for name in ("found", "minimal"))
    assert len(minimal.graph.node) < len(found.graph.node)
    assert random_model(Replayed(case["drawn"])) == minimal
    with pytest.raises(Failed, match="inexact"):
        check_graph(minimal, seed=case["seed"])


def test_outputs_that_are_nothing_but_rounding_are_no_failure() -> None:
    """A model whose output is x - mean(x, x, x): zero in the twin, and rounding errors in onnxruntime."""
    counts = Counter[str]()
    check_graph(random_model(Seeded(203800)), seed=203800, counts=counts)
    assert counts["cuts"]


def test_a_merge_may_go_when_another_axis_is_tried_elsewhere() -> None:
    """Two Reshapes that join channels: with the second axis of the one, the other has nothing to join."""
    drawn = [0, 0, 0, 6, 0, 4, 0, 0, 0, 3, 0, 0, 5, 0, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 0, 7, 0, 0, 28, 1]
    model = random_model(Replayed([*drawn, 0, 1, 0, 2, *[0] * 12, 28, 2]))
    assert [node.op_type for node in model.graph.node].count("Reshape") == 2
    check_graph(model, seed=505802)


def test_an_exception_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Case, keep: np.ndarray) -> gs.Graph:
        raise ZeroDivisionError("no")

    monkeypatch.setattr(Case, "cut", broken)
    with pytest.raises(Failed, match=r"exception: ZeroDivisionError at .*: no"):
        check_graph(random_model(Seeded(0)), seed=0)


def test_minimising_ends_at_what_it_takes() -> None:
    def fails(drawn: list[int]) -> bool:
        return sum(drawn) >= 7 and 5 in drawn

    assert sorted(fuzz.minimise([1, 2, 5, 9, 0, 3, 2], fails, tries=200)) in ([2, 5], [5, 9])
    assert fuzz.minimise([1, 2, 5, 9], fails, tries=0) == [1, 2, 5, 9]


def test_the_command_counts(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        fuzz.main, ["graphs", "--n", "5", "--seed", "3", "--keep", str(tmp_path / "no")]
    )
    assert result.exit_code == 0, result.output
    assert "5 graphs from seed 3" in result.output
    assert "exact 5" in result.output
    assert not (tmp_path / "no").exists()


def test_what_makes_it_quick_is_undone() -> None:
    before = torch.backends.mkldnn.enabled, torch.get_num_threads(), logging.getLogger("hap_onnx").level
    torch.backends.mkldnn.set_flags(True)
    try:
        with fuzz.lean():
            assert not torch.backends.mkldnn.enabled
        assert torch.backends.mkldnn.enabled
    finally:
        torch.backends.mkldnn.set_flags(before[0])
    after = torch.backends.mkldnn.enabled, torch.get_num_threads(), logging.getLogger("hap_onnx").level
    assert after == before

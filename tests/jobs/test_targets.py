"""Room in a file, and the search for the smallest model, against sizes and limits worked out by hand."""

from __future__ import annotations

from functools import cache
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_models import images, residual_cnn

from hap_onnx.errors import BudgetError
from hap_onnx.jobs.targets import (
    SEARCH_MARGIN,
    SEARCH_RATIOS,
    Found,
    check_can_search,
    params_within,
    search_smallest,
)
from hap_onnx.model.model_io import load_model
from hap_onnx.prepare import PreparedModel, prepare
from hap_onnx.runtime.metrics import Quality


@cache
def prepared(dtype: type = np.float32) -> PreparedModel:
    return prepare(load_model(residual_cnn(dtype=dtype)), {"x": images(2).astype(dtype)})


# ---------------------------------------------------------------- bytes

N_PARAMS = 23_781
"""Stem 448, blocks 2320 * 2 and 4640 + 9248 + 4640 (shortcut), scores 165."""


@pytest.mark.parametrize(("dtype", "per_param"), [(np.float32, 4), (np.float16, 2)])
def test_room_is_what_the_rest_of_the_file_leaves(dtype: type, per_param: int) -> None:
    n_bytes = N_PARAMS * per_param + 3000  # names, nodes and the like
    room = params_within(50_000, prepared(dtype), n_bytes, external_data=False)
    assert room == pytest.approx((50_000 - 3000 - 256) / per_param)
    # Each of the 14 tensors may start on a page of its own.
    apart = params_within(80_000, prepared(dtype), n_bytes, external_data=True)
    assert apart == pytest.approx((80_000 - 3000 - 256 - 14 * 4096) / per_param)


@pytest.mark.parametrize(("external", "least"), [(False, 3256), (True, 3256 + 14 * 4096)])
def test_a_file_without_room_for_weights_is_refused(external: bool, least: int) -> None:
    n_bytes = N_PARAMS * 4 + 3000
    assert params_within(least + 4, prepared(), n_bytes, external_data=external) == pytest.approx(1)
    with pytest.raises(BudgetError, match=f"--max-bytes {least} cannot be reached: {least} bytes are needed"):
        params_within(least, prepared(), n_bytes, external_data=external)


# ---------------------------------------------------------------- the search

FULL = {"params": 2000.0, "macs": 10_000.0}


class Trial:
    """Models as large as asked for; they lose ``drop(ratio)``, and those under ``least`` cannot be had."""

    def __init__(self, drop: Any, *, spread: float | None = 0.0, least: float = 0.0) -> None:
        self.drop, self.spread, self.least = drop, spread, least
        self.asked: list[float] = []
        self.notes: list[str] = []

    def compress_to(self, budgets: Any) -> float:
        ratios = {budgets[name] / size for name, size in FULL.items()}
        assert set(budgets) == set(FULL)
        assert max(ratios) == pytest.approx(min(ratios))
        self.asked.append(round(max(ratios), 9))
        if self.asked[-1] < self.least:
            raise BudgetError("no")
        return self.asked[-1]  # stands for a model of this size

    def measure(self, candidate: Any) -> Quality:
        drop = self.drop(candidate)
        half = None if self.spread is None else 1.96 * self.spread
        interval = None if half is None else (drop - half, drop + half)
        return Quality("accuracy", 1.0, 1.0 - drop, interval, 40)

    def search(self, limit: float) -> Found[float]:
        return search_smallest(FULL, self.compress_to, self.measure, limit=limit, note=self.notes.append)


def test_sizes_are_tried_in_steps_of_a_twentieth() -> None:
    assert SEARCH_RATIOS[0] == 0.95
    assert SEARCH_RATIOS[-1] == 0.1
    np.testing.assert_allclose(np.diff(SEARCH_RATIOS), -0.05)


@given(n_accepted=st.integers(0, len(SEARCH_RATIOS)), n_possible=st.integers(0, len(SEARCH_RATIOS)))
def test_the_smallest_model_within_the_limit_is_found(n_accepted: int, n_possible: int) -> None:
    """Losses grow as models shrink: of the 18 sizes the first so many lose little, and so many can be had."""
    ratios = [*SEARCH_RATIOS, 0.0]
    bound = (ratios[n_accepted - 1] + ratios[n_accepted]) / 2 if n_accepted else 1.0
    least = (ratios[n_possible - 1] + ratios[n_possible]) / 2 if n_possible else 1.0
    trial = Trial(lambda ratio: 0.01 if ratio > bound else 0.3, least=least)
    found = trial.search(0.1)
    n_best = min(n_accepted, n_possible)
    smallest: Any = None if n_best == 0 else pytest.approx(SEARCH_RATIOS[n_best - 1])
    assert found.accepted == smallest
    assert len(trial.asked) <= 5  # 18 sizes, halved each time
    refused = [ratio for ratio in trial.asked if least <= ratio <= bound]
    last: Any = refused[-1] if refused else None
    assert found.refused == last
    assert len(trial.notes) == sum(ratio >= least for ratio in trial.asked)


@pytest.mark.parametrize(("spread", "fits"), [(0.0, True), (0.04, True), (0.06, False), (None, True)])
def test_a_drop_must_be_within_the_limit_by_a_margin_for_chance(spread: float | None, fits: bool) -> None:
    trial = Trial(lambda ratio: 0.04, spread=spread)
    limit = 0.04 + SEARCH_MARGIN * 0.05
    found = trial.search(limit)
    assert (found.accepted == pytest.approx(0.1)) if fits else found.accepted is None
    assert (found.refused is None) == fits
    assert all(("accepted" in note) == fits for note in trial.notes)


@pytest.mark.parametrize(("spread", "limit"), [(0.0, 0.0), (0.0, 0.01), (0.0078, 0.01), (None, 0.0)])
def test_a_search_begins_where_no_change_is_within_the_limit(spread: float | None, limit: float) -> None:
    check_can_search(Trial(lambda _: 0.0, spread=spread).measure(1.0), limit=limit)


def test_a_search_that_can_find_nothing_says_so_before_it_begins() -> None:
    unchanged = Trial(lambda _: 0.0, spread=0.0224).measure(1.0)
    told = r"^the 40 samples .* 0\.01 of accuracy from chance, .* makes 0\.029: give 3 times as much data"
    with pytest.raises(BudgetError, match=told):
        check_can_search(unchanged, limit=0.01)
    with pytest.raises(BudgetError, match=r"0\.029: allow more with --max-drop, or .* --keep-macs"):
        check_can_search(unchanged, limit=0.0)


def test_the_limit_itself_is_within_it_and_nan_is_not() -> None:
    assert Trial(lambda ratio: 0.25).search(0.25).accepted == pytest.approx(0.1)
    for drop in (np.nan, inf):
        found = Trial(lambda ratio, drop=drop: drop, spread=None).search(0.25)
        assert found.accepted is None
        assert found.refused is not None


def test_each_size_that_was_tried_is_told() -> None:
    trial = Trial(lambda ratio: 0.3 if ratio < 0.5 else 0.0125, spread=0.01)
    trial.search(0.1)
    assert trial.asked[0] == 0.5
    assert trial.notes[0] == "at 50% of the size: accuracy drops by 0.0125 (+-0.0100), accepted"
    assert trial.notes[1].endswith("accuracy drops by 0.3000 (+-0.0100), refused")

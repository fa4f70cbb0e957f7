"""A loss model that is read again is the one that was written, to the last bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from planning_cases import Job, make_job
from sample_models import residual_cnn
from topologies import TOPOLOGIES

from hap_onnx.errors import ModelError
from hap_onnx.planning.choose import choose
from hap_onnx.planning.kept import load_losses, save_losses


@cache
def job(sensitivity: str = "obs") -> Job:
    return make_job(residual_cnn(), n_samples=20, sensitivity=sensitivity)


@pytest.mark.parametrize("sensitivity", ["obs", "magnitude"])
def test_all_numbers_come_back_as_they_were(tmp_path: Path, sensitivity: str) -> None:
    one = job(sensitivity)
    save_losses(one.losses, tmp_path / "l.safetensors")
    found, known = load_losses(tmp_path / "l.safetensors", one.prepared), one.losses
    assert (found.sensitivity, found.n_measured, found.removable, found.cost.terms) == (
        known.sensitivity, known.n_measured, known.removable, known.cost.terms,
    )  # fmt: skip
    for a, b in zip(found.rankings, known.rankings, strict=True):
        assert (a.group, a.score, a.score_error) == (b.group, b.score, b.score_error)
        assert a.order.tobytes() == b.order.tobytes()
        assert a.loss.tobytes() == b.loss.tobytes()
    for c, d in zip(found.curves, known.curves, strict=True):
        assert c.loss.tobytes() == d.loss.tobytes()
        assert c.measured == d.measured
    assert list(found.implants) == list(known.implants)
    for node, losses in known.implants.items():
        again = found.implants[node]
        assert (again.layer.weight, again.measured, again.measured_kind) == (
            losses.layer.weight, losses.measured, losses.measured_kind,
        )  # fmt: skip
        assert [form.kind for form in again.layer.forms] == [form.kind for form in losses.layer.forms]
        for key in ("inputs", "gradients"):
            assert torch.equal(getattr(again.curvature, key), getattr(losses.curvature, key))
        assert torch.equal(again.weight, losses.weight)
        np.testing.assert_array_equal(again.ratios, losses.ratios)
        np.testing.assert_array_equal(again.predicted, losses.predicted)
    budgets = one.budgets(macs=0.5)
    plans = [choose(one.prepared, model, budgets, align="auto", kinds=one.kinds) for model in (found, known)]
    assert plans[0].shape_key == plans[1].shape_key
    assert [path.name for path in tmp_path.iterdir()] == ["l.safetensors"]


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    one, path = job(), tmp_path / "l.safetensors"
    with pytest.raises(ModelError):
        load_losses(path, one.prepared)
    save_losses(one.losses, path)
    with pytest.raises(ModelError, match="damaged"):
        load_losses(path, make_job(TOPOLOGIES["chain"]().model).prepared)
    whole = path.read_bytes()
    for content in (whole[:1000], whole[: len(whole) // 2], b"", whole.replace(b"make_stem", b"make_blub")):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="damaged"):
            load_losses(path, one.prepared)

"""Expected losses: what is measured, on how much of the data, and what for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from planning_cases import make_job
from sample_models import images, residual_cnn

from hap_onnx.implants.loss import MEASURED_SHARES
from hap_onnx.model.measure import model_size
from hap_onnx.model.model_io import load_model
from hap_onnx.planning import decide
from hap_onnx.planning.curves import MEASURED_WIDTHS
from hap_onnx.prepare import PreparedModel, prepare


@pytest.fixture(scope="module")
def prepared() -> PreparedModel:
    return prepare(load_model(residual_cnn()), {"x": images(2)})


def test_a_small_model_is_measured_on_all_samples(prepared: PreparedModel) -> None:
    assert decide.n_measured(prepared) == decide.N_MEASURED == 256


@pytest.mark.parametrize(("scale", "least", "most"), [(1, 256, 256), (100, 60, 140), (10_000, 32, 32)])
def test_a_huge_model_is_measured_on_fewer_samples(
    prepared: PreparedModel, scale: int, least: int, most: int
) -> None:
    shapes = {
        name: (*shape[:2], *(axis * scale for axis in shape[2:])) if len(shape) == 4 else shape
        for name, shape in prepared.shapes.items()
    }
    assert least <= decide.n_measured(replace(prepared, shapes=shapes)) <= most


def test_layers_with_implants_share_the_samples(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fork runs half of the model: four widths of each group, and two ranks of each layer."""
    n_groups = len(prepared.coupling.groups)
    assert (len(MEASURED_WIDTHS), len(MEASURED_SHARES)) == (4, 2)
    shape = prepared.shapes["x"]
    macs = model_size(prepared.graph, prepared.shapes).macs / shape[0]
    for n_layers in (0, 1, 7):
        passes = (4 * n_groups + 2 * n_layers) / 2
        monkeypatch.setattr(decide, "MAX_MEASURED_MACS", 100.5 * macs * passes)
        assert decide.n_measured(prepared, n_layers=n_layers) == 100
        more = decide.n_measured(prepared, n_layers=n_layers + 4)
        assert more == int(100.5 * passes / (passes + 4))
    assert decide.n_measured(prepared) == decide.n_measured(prepared, n_layers=0)


@pytest.mark.parametrize("with_implants", [True, False])
def test_the_layers_that_are_measured_are_counted(
    monkeypatch: pytest.MonkeyPatch, with_implants: bool
) -> None:
    one = make_job(residual_cnn(width=8), n_samples=24)
    seen: list[int] = []
    subsets: list[int] = []

    def count(prepared: PreparedModel, *, n_layers: int) -> int:
        seen.append(n_layers)
        return 10

    def remember(*args: Any, **options: Any) -> Any:
        subsets.append(args[-1].n_samples)
        return real(*args, **options)

    real = decide.measure_implants
    monkeypatch.setattr(decide, "n_measured", count)
    monkeypatch.setattr(decide, "measure_implants", remember)
    decide.build_loss_model(
        one.prepared, one.subset, sensitivity="obs", scales=one.scales, batch_size=20, n_probes=1, seed=0,
        with_implants=with_implants,
    )  # fmt: skip
    assert seen == [7 if with_implants else 0]
    assert subsets == [10]


def test_a_fixed_batch_does_not_change_the_number(
    prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decide, "MAX_MEASURED_MACS", 5e8)
    fixed = prepare(load_model(residual_cnn(batch=4)), {"x": images(4)})
    assert 60 < decide.n_measured(fixed) < 140
    assert decide.n_measured(fixed) == decide.n_measured(prepared)


def test_layers_are_measured_only_where_implants_may_be_used() -> None:
    one = make_job(residual_cnn(width=8), n_samples=24)
    layers = {"make_stem", "make_a1", "make_b1", "make_a2", "make_b2", "make_s2", "make_scores"}
    assert set(one.losses.implants) == layers
    assert {terms.node for terms in one.losses.cost.layers} == layers
    assert all(len(losses.predicted) == 2 for losses in one.losses.implants.values())
    plain = decide.build_loss_model(
        one.prepared, one.subset, sensitivity="obs", scales=one.scales, batch_size=20, n_probes=1, seed=0,
        with_implants=False,
    )  # fmt: skip
    assert not plain.implants
    assert not plain.cost.layers
    for curve, same in zip(plain.curves, one.losses.curves, strict=True):
        assert curve.loss.tolist() == pytest.approx(same.loss.tolist())
    assert (
        plain.cost.totals(plain.cost.sizes).tolist() == one.losses.cost.totals(one.losses.cost.sizes).tolist()
    )

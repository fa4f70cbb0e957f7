"""Which rows of the data a layer is refitted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hap_onnx.refit import rows as module
from hap_onnx.refit.rows import Options, Rows, n_rows_to_take
from hap_onnx.refit.store import ROWS, Store
from tests.helpers import rand
from tests.refit.cases import deep_case, fit


def test_batches_do_not_matter_when_all_positions_are_used() -> None:
    case = deep_case()
    first = fit(*case, ridge=1e-3, batch_size=30)
    for batch_size in (1, 7):
        again = fit(*case, ridge=1e-3, batch_size=batch_size)
        for name, values in first.items():
            np.testing.assert_allclose(again[name], values, atol=1e-5)


def test_seed_chooses_positions() -> None:
    case = deep_case()
    results = [fit(*case, ridge=1e-3, n_positions=4, seed=seed)["w"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


@pytest.mark.parametrize("chunk", [1, 5, 6, 100])
def test_products_are_summed_over_all_rows(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    store = Store(tmp_path, 1 << 20)
    batches = [torch.from_numpy(rand(2, n, 3, seed=n)) for n in (4, 2, 9, 1)]
    for x in batches:
        store.append((ROWS, "x"), x)
        store.append((ROWS, "wanted"), x)
    rows = Rows(store, len(batches), has_added=False)
    x = torch.cat(batches, 1).double()
    assert rows.n_rows() == x.shape[1]
    torch.testing.assert_close(rows.gram(), x.mT @ x, rtol=1e-5, atol=1e-5)


def test_number_of_rows() -> None:
    options = Options(ridge=0, n_positions=64, n_relu_rounds=0, seed=0)
    assert n_rows_to_take(614, 577, 1, options) == (64, 614)
    assert n_rows_to_take(24, 577, 1, options) == (97, 24)  # four rows per feature
    assert n_rows_to_take(4096, 100, 1, options) == (16, 4096)  # 65,536 in total
    assert n_rows_to_take(100_000, 100, 1, options) == (1, 65_536)
    assert n_rows_to_take(614, 25_089, 1, options)[0] * 614 <= 2**26 // 25_089

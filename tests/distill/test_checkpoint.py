"""States of training come back as they were, or not at all."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hap_onnx.distill import checkpoint
from hap_onnx.distill.checkpoint import Progress, load_state, save_state
from hap_onnx.errors import ValidationError
from tests.helpers import rand

PROGRESS = Progress(step=7, start_score=0.5, best_score=0.125, best_step=4, rate_factor=0.25, n_rollbacks=2)
TENSORS = {
    "weight:a": torch.from_numpy(rand(2, 3)),
    "average:a": torch.from_numpy(rand(2, 3, seed=1)).t(),  # not contiguous
    "step:a": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "double": torch.from_numpy(rand(3).astype(np.float64)),
}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "now.safetensors"
    save_state(path, "key", PROGRESS, TENSORS)
    found = load_state(path, "key")
    assert found is not None
    assert found[0] == PROGRESS
    check_equal(found[1], TENSORS)
    assert names_in(tmp_path) == ["now.safetensors"]


@settings(max_examples=30, deadline=None)
@given(
    progress=st.builds(
        Progress,
        step=st.integers(0, 10**9),
        start_score=st.floats(allow_nan=False),
        best_score=st.floats(allow_nan=False),
        best_step=st.integers(0, 10**9),
        rate_factor=st.floats(0, 1),
        n_rollbacks=st.integers(0, 9),
    ),
    names=st.lists(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), max_size=4),
    key=st.text(max_size=10),
)
def test_every_state_survives_its_file(
    progress: Progress, names: list[str], key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("state") / "now.safetensors"
    tensors = {name: torch.full((index, 2), float(index)) for index, name in enumerate(names)}
    save_state(path, key, progress, tensors)
    found = load_state(path, key)
    assert found is not None
    assert found[0] == progress
    check_equal(found[1], tensors)
    assert load_state(path, key + "?") is None


def test_parameters_are_kept_without_their_gradients(tmp_path: Path) -> None:
    path = tmp_path / "now.safetensors"
    parameter = torch.nn.Parameter(torch.ones(3))
    save_state(path, "key", PROGRESS, {"w": parameter})
    found = load_state(path, "key")
    assert found is not None
    assert not found[1]["w"].requires_grad


def test_a_later_state_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    path = tmp_path / "now.safetensors"
    save_state(path, "key", PROGRESS, TENSORS)
    later = Progress(8, 0.5, 0.1, 8)
    save_state(path, "key", later, {"w": torch.ones(1)})
    found = load_state(path, "key")
    assert found is not None
    assert found[0] == later
    assert set(found[1]) == {"w"}
    assert names_in(tmp_path) == ["now.safetensors"]


def test_what_belongs_to_other_work_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "now.safetensors"
    save_state(path, "key", PROGRESS, TENSORS)
    with caplog.at_level(logging.WARNING):
        assert load_state(path, "other") is None
        assert load_state(tmp_path / "none.safetensors", "key") is None
        assert load_state(tmp_path, "key") is None
    assert not caplog.records  # that is nothing to warn of
    assert load_state(path, "key") is not None  # and it stays


def test_files_that_others_wrote_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "now.safetensors"
    for metadata in (None, {"hap_onnx": "{}"}, {"other": "text"}):
        safetensors.torch.save_file({"w": torch.ones(1)}, path, metadata=metadata)
        assert load_state(path, "key") is None


def damage_metadata(path: Path, text: str) -> None:
    safetensors.torch.save_file({"w": torch.ones(1)}, path, metadata={"hap_onnx": text})


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"key": "key"}', '{"key": "key", "step": 1}',
        json.dumps({"key": "key", "step": 1, "start_score": 1, "best_score": 1, "best_step": 1, "more": 2}),
    ],
)  # fmt: skip
def test_damaged_entries_are_not_used_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "now.safetensors"
    damage_metadata(path, text)
    with caplog.at_level(logging.WARNING):
        assert load_state(path, "key") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "damaged" in caplog.text


@pytest.mark.parametrize("n_left", [0, 1, 7, 8, 50, 200, -1])
def test_a_truncated_file_is_not_used_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, n_left: int
) -> None:
    path = tmp_path / "now.safetensors"
    save_state(path, "key", PROGRESS, TENSORS)
    path.write_bytes(path.read_bytes()[:n_left])
    with caplog.at_level(logging.WARNING):
        assert load_state(path, "key") is None
    assert "now.safetensors is damaged and not used" in caplog.text


def test_a_folder_that_is_not_there_is_a_validation_error(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="the state of training cannot be written to"):
        save_state(tmp_path / "none" / "now.safetensors", "key", PROGRESS, TENSORS)
    assert names_in(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files")
def test_a_folder_that_takes_no_files_is_a_validation_error() -> None:
    with pytest.raises(ValidationError, match="cannot be written"):
        save_state(Path("/proc/now.safetensors"), "key", PROGRESS, TENSORS)


def test_nothing_half_written_is_left_and_the_older_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "now.safetensors"
    save_state(path, "key", PROGRESS, TENSORS)
    older = path.read_bytes()

    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(ValidationError, match="No space left on device"):
            save_state(path, "key", Progress(9, 1, 1, 9), TENSORS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            save_state(path, "key", Progress(9, 1, 1, 9), TENSORS)
    assert names_in(tmp_path) == ["now.safetensors"]
    assert path.read_bytes() == older
    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", fail)
    with pytest.raises(ValidationError, match="check the folder and free space"):
        save_state(path, "key", Progress(9, 1, 1, 9), TENSORS)
    assert path.read_bytes() == older


@pytest.mark.parametrize("text", ["3", '"key"', "null"])
def test_entries_that_are_no_objects_are_not_used_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "now.safetensors"
    damage_metadata(path, text)
    with caplog.at_level(logging.WARNING):
        assert load_state(path, "key") is None
    assert "damaged" in caplog.text

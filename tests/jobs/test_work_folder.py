"""What a job may go on from: found under the same words, and under no others."""

from __future__ import annotations

import logging
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hap_onnx.config import CompressConfig
from hap_onnx.data.calibration import InputSpec, Splits, open_dataset, split_dataset
from hap_onnx.errors import ValidationError
from hap_onnx.jobs.work_folder import Keys, WorkFolder, work_keys
from hap_onnx.planning.plan import CompressionPlan, GroupDecision, plan_hash
from tests.helpers import rand

VERSIONS = {"hap_onnx": "0.1.0", "torch": "2.4"}


def open_splits(arrays: dict[str, np.ndarray], *, seed: int = 0, with_val: bool = False) -> Splits:
    spec = InputSpec("x", np.dtype(np.float32), ("N", *arrays["x"].shape[1:]))
    val = open_dataset({"x": rand(9, 4)}, [spec]) if with_val else None
    return split_dataset(open_dataset(arrays, [spec]), seed=seed, val=val)


X = rand(60, 4)


@cache
def splits() -> Splits:
    return open_splits({"x": X})


def key_of(
    config: CompressConfig | None = None,
    parts: Splits | None = None,
    *,
    sha256: str = "ab" * 32,
    versions: dict[str, str] = VERSIONS,
    **more: Any,
) -> str:
    return keys_of(config, parts, sha256=sha256, versions=versions, **more).job


def keys_of(
    config: CompressConfig | None = None,
    parts: Splits | None = None,
    *,
    sha256: str = "ab" * 32,
    versions: dict[str, str] = VERSIONS,
    **more: Any,
) -> Keys:
    config = config or CompressConfig(keep_macs=0.5)
    return work_keys(config, parts or splits(), sha256, versions, **{"threads": 1, **more})


# Another value than the default for each option.
OTHERS: dict[str, Any] = {
    "metric": "r2", "method": "prune", "preset": "paper", "sensitivity": "magnitude", "probes": 5,
    "recover": "none", "epochs": 7, "rounds": 2, "augment": "none", "align": 4, "exclude": ["a*"],
    "only": ["b*"], "preprocess": "unit", "max_samples": 50, "batch_size": 16, "device": "cpu",
    "providers": "CPUExecutionProvider", "threads": 3, "seed": 5, "allow_slower": True,
}  # fmt: skip
NO_MATTER: dict[str, Any] = {
    "output": "o.onnx", "report": "r.json", "save_plan": "p.json", "work_dir": "w", "dry_run": True,
    "json": True, "html": "r.html", "html_images": True, "summary": "s.md",
    "keep_rejected": True, "val": "v.npz", "max_drop": 0.3, "keep_params": 0.3,
    "keep_macs": 0.3, "keep_latency": 0.3, "max_bytes": 12345, "latency_table": "t.json",
    "objective": "macs", "then": "int8", "sweep": True, "dist_timeout": 60,
}  # fmt: skip


def test_every_option_is_thought_of() -> None:
    assert {option.name for option in fields(CompressConfig)} == set(OTHERS) | set(NO_MATTER)


@pytest.mark.parametrize("name", OTHERS)
def test_what_candidates_depend_on_changes_the_key(name: str) -> None:
    key = key_of(CompressConfig(**{"keep_macs": 0.5, name: OTHERS[name]}))
    assert key != key_of()
    assert key == key_of(CompressConfig(**{"keep_macs": 0.5, name: OTHERS[name]}))


@pytest.mark.parametrize("name", NO_MATTER)
def test_files_budgets_and_gates_do_not_change_the_key(name: str) -> None:
    base = {} if name in ("objective", "sweep") else {"keep_macs": 0.5}  # that is for jobs without a budget
    base |= {"html": "p.html"} if name == "html_images" else {}
    assert key_of(CompressConfig(**{**base, name: NO_MATTER[name]})) == key_of()


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ({"keep_macs": 0.3, "recover": "none", "method": "implant", "align": 4, "allow_slower": True}, True),
        ({"sensitivity": "magnitude"}, False),
        ({"preset": "paper"}, False),  # which has a ranking of its own
        ({"method": "prune"}, False),  # for which layers are not measured
        ({"seed": 3}, False),
        ({"probes": 3}, False),
        ({"batch_size": 3}, False),
        ({"exclude": ["a*"]}, False),
        ({"only": ["a*"]}, False),
    ],
    ids=str,
)
def test_sensitivities_are_shared_by_jobs_that_need_the_same(words: dict[str, Any], same: bool) -> None:
    other = keys_of(CompressConfig(**{"keep_macs": 0.5, **words}))
    assert (other.losses == keys_of().losses) == same
    assert keys_of(sha256="cd" * 32).losses != keys_of().losses
    changed = X.copy()
    changed[splits().choose.indices] += 1  # they come from the calibrate part
    assert keys_of(parts=open_splits({"x": changed})).losses == keys_of().losses
    changed[splits().calibrate.indices[:1]] += 1
    assert keys_of(parts=open_splits({"x": changed})).losses != keys_of().losses


def test_the_key_is_a_short_name() -> None:
    key = key_of()
    assert len(key) == 16
    assert set(key) <= set("0123456789abcdef")


def test_model_versions_and_machine_change_the_key() -> None:
    keys = [
        key_of(),
        key_of(sha256="cd" * 32),
        key_of(versions={**VERSIONS, "torch": "2.5"}),
        key_of(versions={**VERSIONS, "hap_onnx": "0.2.0"}),
        key_of(threads=2),
    ]
    assert len(set(keys)) == len(keys)


def test_data_and_labels_change_the_key() -> None:
    labels = np.arange(60) % 3
    others = labels.copy()
    first = splits().calibrate.indices[0]
    others[first] = (others[first] + 1) % 3
    brighter = X.copy()
    brighter[first] += 1
    keys = [
        key_of(parts=open_splits(arrays, **options))
        for arrays, options in [
            ({"x": X}, {}),
            ({"x": brighter}, {}),
            ({"x": X[:50]}, {}),
            ({"x": X.reshape(60, 2, 2)}, {}),
            ({"x": X[::-1].copy()}, {}),
            ({"x": X, "labels": labels}, {}),
            ({"x": X, "labels": others}, {}),
            ({"x": X}, {"seed": 1}),
            ({"x": X}, {"with_val": True}),  # more is left for the other parts
        ]
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(parts=open_splits({"x": X.copy()})) == keys[0]


def test_what_is_reported_only_does_not_change_the_key() -> None:
    changed = X.copy()
    changed[splits().report.indices] += 1
    assert key_of(parts=open_splits({"x": changed})) == key_of()


# --- what is kept ---


def make_plan(version: str = "0.1.0") -> CompressionPlan:
    return CompressionPlan(
        "ab" * 32, version, {}, (GroupDecision.from_keep("a", 3, [0, 2]),), weights={"w": rand(2, 3)}
    )


def test_plans_are_found_under_their_name_and_key(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "deep" / "work", "key")
    assert folder.load("one") is None
    folder.save("one", make_plan())
    folder.save("two", make_plan("0.2.0"))
    again = WorkFolder(tmp_path / "deep" / "work", "key")
    for name, version in (("one", "0.1.0"), ("two", "0.2.0")):
        found = again.load(name)
        assert found is not None
        assert plan_hash(found) == plan_hash(make_plan(version))
    assert again.load("three") is None
    assert WorkFolder(tmp_path / "deep" / "work", "other").load("one") is None


def test_a_later_plan_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path, "key")
    for version in ("0.1.0", "0.2.0"):
        folder.save("one", make_plan(version))
    found = folder.load("one")
    assert found is not None
    assert found.version == "0.2.0"
    assert len(list((tmp_path / "key").iterdir())) == 2


def test_without_a_path_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = WorkFolder(None, "key")
    folder.save("one", make_plan())
    folder.drop_training("one")
    assert folder.load("one") is None
    assert folder.training("one") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "what", ["json cut", "json empty", "weights cut", "weights gone", "weights of another"]
)
def test_damaged_plans_are_not_used_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    folder = WorkFolder(tmp_path, "key")
    folder.save("one", make_plan())
    plan, weights = tmp_path / "key" / "one.json", tmp_path / "key" / "one.safetensors"
    if what == "json cut":
        plan.write_text(plan.read_text()[:-20])
    elif what == "json empty":
        plan.write_text("")
    elif what == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-3])
    elif what == "weights gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.WARNING):
        assert folder.load("one") is None
    assert caplog.text.count("not used") == 1
    folder.save("one", make_plan())
    assert folder.load("one") is not None


def test_the_state_of_training_goes_when_it_is_over(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path, "key")
    path = folder.training("one")
    assert path is not None
    folder.drop_training("one")  # nothing there
    path.mkdir(parents=True)
    (path / "training.safetensors").write_bytes(b"x")
    other = folder.training("two")
    assert other is not None
    assert other != path
    other.mkdir()
    folder.drop_training("one")
    assert not path.exists()
    assert other.exists()


def test_a_folder_that_cannot_be_made_is_a_validation_error(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a file")
    with pytest.raises(ValidationError, match="key"):
        WorkFolder(tmp_path, "key").save("one", make_plan())


def test_two_runs_of_one_job_are_not_at_work_at_once(tmp_path: Path) -> None:
    first, second, other = WorkFolder(tmp_path, "key"), WorkFolder(tmp_path, "key"), WorkFolder(tmp_path, "2")
    with first.lock():
        with pytest.raises(ValidationError, match=r"another run .* at work in .*key; wait"), second.lock():
            raise AssertionError("both have the lock")
        with other.lock():
            pass
    with second.lock():
        pass
    with WorkFolder(None, "key").lock(), WorkFolder(None, "key").lock():
        assert not list(tmp_path.rglob("*.safetensors"))


def test_every_sample_changes_the_key() -> None:
    x = rand(400, 4)
    parts = open_splits({"x": x})
    for part in (parts.calibrate, parts.choose):
        changed = x.copy()
        changed[part.indices[-1]] += 1
        assert key_of(parts=open_splits({"x": changed})) != key_of(parts=parts)

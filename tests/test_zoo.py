"""The zoo: its files are what they claim to be, and its checks can fail."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tools import zoo, zoo_checks
from tools.zoo_models import FILES, NETWORKS, export, make_inputs, randomise


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for sub in ("models", "results", "logs"):
        (tmp_path / sub).mkdir()
    return tmp_path


def _export(folder: Path, name: str) -> Path:
    path = folder / "models" / f"{name}.onnx"
    export(*FILES[name], path)
    return path


def test_the_zoo_has_the_architectures_and_variants_of_the_survey() -> None:
    variants = [variant for _, variant in FILES.values()]
    assert len(NETWORKS) == 91
    assert {name: variants.count(name) for name in ("main", "dynB", "bn")} == {
        "main": 91, "dynB": 22, "bn": 5,
    }  # fmt: skip
    assert variants.count("dynamo") >= 16


def test_random_weights_tell_channels_apart() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LayerNorm(8 * 36))
    randomise(model, [torch.randn(4, 3, 8, 8)])
    norm, layer = model[1], model[3]
    for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias, layer.weight, model[0].bias):
        assert len(torch.unique(values.detach())) == values.numel()
    again = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LayerNorm(8 * 36))
    randomise(again, [torch.randn(4, 3, 8, 8)])
    assert torch.equal(again[0].weight, model[0].weight)  # by the seed, whatever there was


@pytest.mark.parametrize("name", ["multi_in_out_siamese", "dscnn_kws__dynB"])
def test_a_file_goes_through_all_stages(folder: Path, name: str) -> None:
    _export(folder, name)
    zoo.check_file(folder, name, zoo.STAGES, samples=40, keep=0.6, options=["--recover", "none"])
    record = zoo.read_record(folder, name)
    done = record["compress"]
    assert record["twin"]["ok"]
    assert record["inspect"]["prunable_params"] > 0.9
    assert record["inspect"]["half"]["exact"]
    assert record["inspect"]["half"]["moved"] > 0.01
    assert (done["exit"], done["valid"], done["exact"], done["met"]) == (0, True, True, True)
    assert done["moved"] > 0.01  # or exactness would say nothing
    assert done.get("dynamic") is (True if "dynB" in name else None)
    row = dict(zip(zoo.COLUMNS, zoo.table_rows([record])[0]))
    assert (row["twin"], row["exact"], row["valid"], row["exit"]) == ("yes", "yes", "yes", "0")
    assert f"{zoo.summarise([record])[2]}".startswith("compress, architectures: ")


def test_variants_are_what_their_names_say(folder: Path) -> None:
    kept = onnx.load(_export(folder, "unet_deconv__bn"))
    folded = onnx.load(_export(folder, "unet_deconv"))
    assert sum(node.op_type == "BatchNormalization" for node in kept.graph.node) == 14
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph.node)
    both = onnx.load(_export(folder, "unet_bilinear_dynHW")).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param for dim in both] == ["batch", "", "height", "width"]


def test_inputs_are_the_same_for_the_same_seed_and_differ_between_samples() -> None:
    inputs = make_inputs(NETWORKS["hf_bert"], 4, seed=1)
    again = make_inputs(NETWORKS["hf_bert"], 4, seed=1)
    assert all(np.array_equal(values, again[name]) for name, values in inputs.items())
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert len({row.tobytes() for row in inputs["input_ids"]}) == 4


# --- the checks can fail ---


def test_a_wrong_number_a_wrong_shape_and_a_nan_are_seen() -> None:
    right = {"y": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}
    wrong = {"y": right["y"].copy()}
    wrong["y"][1, 2] += 0.01
    assert zoo_checks.worst_excess(right, right) == (0.0, 0.0)
    error, excess = zoo_checks.worst_excess(wrong, right)
    assert error == pytest.approx(0.01, rel=1e-3)
    assert excess > 1
    assert zoo_checks.worst_excess({"y": right["y"].T}, right)[1] == float("inf")
    wrong["y"][0, 0] = np.nan
    assert zoo_checks.worst_excess(wrong, right)[1] == float("inf")


def test_a_changed_interface_and_a_batch_that_was_fixed_are_seen(folder: Path) -> None:
    path, data = _export(folder, "mlp__dynB"), make_inputs(NETWORKS["mlp"], 8)
    facts = zoo_checks.check_valid(path, path, data)
    assert facts["valid"]
    assert facts["dynamic"]
    assert (
        facts["params_before"] == facts["params_after"] == 34509
    )  # those of the layers, 512 of BatchNormalization, 3 of GELU
    changed = onnx.load(path)
    changed.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    onnx.save(changed, folder / "changed.onnx")
    assert not zoo_checks.check_valid(path, folder / "changed.onnx", data)["valid"]


def test_a_cut_that_takes_other_channels_than_were_masked_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = _export(folder, "mlp"), make_inputs(NETWORKS["mlp"], 8)
    assert zoo_checks.check_inspect(path, data)["ok"]
    right = zoo_checks.masked_reads
    monkeypatch.setattr(zoo_checks, "masked_reads", lambda coupling, keep: right(coupling, np.roll(keep, 1)))
    facts = zoo_checks.check_inspect(path, data)
    assert not facts["ok"]
    assert facts["half"]["exact_error"] > 0.01


def test_a_process_that_hangs_dies_or_raises_is_reported(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def fail() -> None:
        raise ValueError("no such thing")

    assert zoo.run_apart(lambda: None, log, 60) is None
    assert zoo.run_apart(lambda: time.sleep(60), log, 0.5) == "time limit of 0 s"
    assert zoo.run_apart(fail, log, 60) == "ValueError: no such thing"


def test_what_is_done_is_not_done_again(folder: Path) -> None:
    record = {"name": "mlp", "mtime": 1.0, "twin": {"ok": True}, "inspect": {"ok": False}}
    zoo.write_record(folder, record)
    assert json.loads((folder / "results" / "mlp.json").read_text()) == zoo.read_record(folder, "mlp")

    def wanted(**changed: bool | float) -> list[str]:
        words = {"again": False, "failed": False, "mtime": 1.0, **changed}
        return zoo._wanted_stages(record, "compress", **words)

    assert wanted() == ["compress"]
    record["compress"] = {"ok": False, "exit": 143}
    assert wanted() == ["compress"]
    assert wanted(failed=True) == ["inspect", "compress"]
    assert wanted(again=True) == wanted(mtime=2.0) == ["twin", "inspect", "compress"]

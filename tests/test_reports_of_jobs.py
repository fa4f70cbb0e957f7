"""Reports for people, of real jobs: what is written, when, and that it changes no model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sample_models import fix_speed, images, residual_cnn, with_labels, write

import hap_onnx
from hap_onnx import cli
from hap_onnx.errors import GateError, UsageError
from hap_onnx.jobs import rounds
from tests.helpers import make_model, node, rand

DATA = with_labels(images(120))


@pytest.fixture(autouse=True)
def _speed(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("sensitivities were there already")

    monkeypatch.setattr(rounds, "build_loss_model", fail)


def test_pages_and_summaries_change_no_byte_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write(tmp_path)
    options = {"keep_macs": 0.5, "allow_slower": True, "method": "prune"}
    plain = hap_onnx.compress(model, DATA, output=tmp_path / "a.onnx", **options)
    assert plain.analysis is None
    assert plain.worst == ()
    work = tmp_path / "work"
    analysed = hap_onnx.analyze(model, DATA, work_dir=work, method="prune")
    forbid(monkeypatch)  # compress starts from what analyze has found
    again = hap_onnx.analyze(model, DATA, work_dir=work, method="prune")
    assert again.analysis == analysed.analysis
    report = hap_onnx.compress(
        model, DATA, output=tmp_path / "b.onnx", work_dir=work, html=tmp_path / "p.html", html_images=True,
        summary=tmp_path / "s.md", report=tmp_path / "r.json", **options,
    )  # fmt: skip
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()
    assert report.analysis is not None
    assert report.analysis.sizes == analysed.analysis.sizes
    assert [group.kept for group in report.analysis.groups] == [group.kept for group in report.plan.groups]
    assert report.analysis.chosen is not None
    assert report.before.macs is not None
    assert report.after.macs is not None
    assert report.analysis.chosen.macs_ratio == pytest.approx(report.after.macs / report.before.macs)
    assert len(report.worst) == 10
    far = [sample.distance for sample in report.worst]
    assert far == sorted(far, reverse=True)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 10
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["analysis"]["groups"][0]["name"] == report.analysis.groups[0].name
    assert len(written["worst"]) == 10
    assert "b.onnx" in (tmp_path / "s.md").read_text(encoding="utf-8")


def test_a_refused_model_has_a_page_and_a_summary_too(tmp_path: Path) -> None:
    files = {"html": tmp_path / "p.html", "summary": tmp_path / "s.md", "report": tmp_path / "r.json"}
    with pytest.raises(GateError):
        hap_onnx.compress(
            write(tmp_path), {"x": DATA["x"]}, keep_macs=0.2, max_drop=0.0, metric="r2", allow_slower=True,
            recover="none", method="prune", output=tmp_path / "o.onnx", **files,
        )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "p.html", "r.json", "s.md"]
    assert "Nothing was written" in files["summary"].read_text(encoding="utf-8")
    assert "max-drop" in files["summary"].read_text(encoding="utf-8")


def test_a_sweep_and_a_comparison_have_pages(tmp_path: Path) -> None:
    model = write(tmp_path)
    files = {"html": tmp_path / "p.html", "summary": tmp_path / "s.md"}
    hap_onnx.sweep(
        model, DATA, sweep=(0.8, 0.5), allow_slower=True, recover="none", method="prune",
        output=tmp_path / "f", **files,
    )  # fmt: skip
    texts = [path.read_text(encoding="utf-8") for path in files.values()]
    hap_onnx.validate(model, model, DATA, **files)
    for path, text in zip(files.values(), texts, strict=True):
        assert path.read_text(encoding="utf-8") != text
        assert "net.onnx" in text


def test_analyze_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    np.savez("calib.npz", x=DATA["x"][:60])
    command = ["analyze", "net.onnx", "--data", "calib.npz", "--work-dir", "w", "--method", "prune"]
    assert cli.main([*command, "--report", "r.json", "--summary", "s.md", "--html", "p.html"]) == 0
    out = capfd.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert "make_stem" in out
    assert out.splitlines()[-1].startswith("next: hap-onnx compress net.onnx --data calib.npz ")
    assert cli.main([*command, "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert list(printed) == [
        "schema", "model", "size", "analysis", "frozen", "seconds", "seed", "versions",
    ]  # fmt: skip
    assert printed["schema"] == "hap-onnx/analyze/1"
    assert list(printed["analysis"]) == [
        "sensitivity", "n_samples", "objective", "groups", "layers", "sizes", "chosen",
    ]  # fmt: skip
    assert list(printed["analysis"]["groups"][0]) == [
        "name", "role", "size", "nodes", "params", "macs", "score", "std_error", "curve", "kept",
    ]  # fmt: skip
    point = ["keep", "predicted", "expected", "measured", "std_error"]
    assert list(printed["analysis"]["groups"][0]["curve"][0]) == point
    assert printed["analysis"] == json.loads(Path("r.json").read_text())["analysis"]
    assert cli.main([*command, "-q"]) == 0
    assert "next:" not in capfd.readouterr().out
    assert cli.main([*command[:4], "--html", "calib.npz"]) == 2
    assert cli.main([*command[:4], "--keep-macs", "0.5"]) == 2


def test_a_model_without_anything_to_remove_has_an_analysis(tmp_path: Path) -> None:
    model = make_model(
        [node("Relu", ["x"], ["y"])], inputs={"x": ["N", 4]}, outputs=["y"], weights={}
    )
    report = hap_onnx.analyze(model, {"x": rand(20, 4)})
    assert (report.analysis.groups, report.analysis.layers, report.analysis.sizes) == ((), (), ())


def test_two_runs_tell_the_same() -> None:
    model = residual_cnn()
    words = {"method": "prune", "sensitivity": "hutchinson", "probes": 8}
    one, other = (hap_onnx.analyze(model, DATA, **words) for _ in range(2))
    assert one.analysis == other.analysis
    assert one.analysis.sensitivity == "hutchinson"
    assert all(group.std_error is not None and group.std_error > 0 for group in one.analysis.groups)


def test_pictures_need_a_page() -> None:
    with pytest.raises(UsageError, match="--html"):
        hap_onnx.CompressConfig(html_images=True)
    with pytest.raises(UsageError, match="--html-images away"):
        hap_onnx.CompressConfig(html_images=True, html="p.html", sweep=True)

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from hap_onnx.config import (
    COMMAND_OPTIONS,
    DEFAULT_EPOCHS,
    SWEEP_RATIOS,
    CompressConfig,
    check_folder,
    check_options,
    check_outputs,
    default_folder,
    default_output,
    describe_options,
    files_of,
    point_name,
    read_config,
    rejected_path,
    resolve_max_drop,
)
from hap_onnx.errors import UsageError, ValidationError
from tests.forks import run_fork


def test_defaults_are_those_of_the_contract():
    config = CompressConfig()
    assert config.drop_limit == 0.01
    assert config.method == "hap"
    assert config.sensitivity == "auto"
    assert config.probes == 300
    assert config.recover == "refit"
    assert config.align == "auto"
    assert config.metric == "auto"
    assert config.seed == 0
    assert not config.has_budget


@pytest.mark.parametrize("budget", [{"keep_params": 0.5}, {"keep_macs": 0.5}, {"max_bytes": 1000}])
def test_a_budget_switches_the_gate_off_unless_it_is_asked_for(budget):
    assert CompressConfig(**budget).drop_limit is None
    assert CompressConfig(**budget, max_drop=0.02).drop_limit == 0.02
    assert CompressConfig(**budget, max_drop="none").drop_limit is None


def test_no_budget_and_no_gate_leaves_nothing_to_aim_at():
    with pytest.raises(UsageError, match="nothing to aim at"):
        CompressConfig(max_drop="none")
    assert resolve_max_drop("none", has_budget=False) is None  # `validate` may go without a gate


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keep_params", 0), ("keep_params", 1.0001), ("keep_macs", -0.5), ("keep_macs", "half"),
        ("keep_macs", float("nan")), ("keep_macs", True), ("max_bytes", 0), ("max_bytes", 1.5),
        ("max_bytes", 10**400), ("max_drop", -0.01), ("max_drop", "all"), ("max_drop", float("inf")),
        ("metric", "acuracy"), ("metric", "module:"), ("metric", 3), ("method", "implants"),
        ("preset", "papers"), ("preset", 1),
        ("sensitivity", "hessian"), ("probes", 0), ("recover", "finetune"), ("epochs", 0),
        ("epochs", 1.5), ("epochs", True), ("rounds", 0), ("rounds", "many"), ("augment", "flip"),
        ("align", 0), ("align", "big"),
        ("align", 2.5), ("exclude", [1]), ("exclude", [""]), ("exclude", 5), ("preprocess", "imagnet"),
        ("preprocess", "x.json"), ("device", "gpu"), ("providers", ""), ("providers", [1]), ("seed", -1),
        ("seed", None), ("batch_size", 0), ("max_samples", 0), ("threads", 0), ("report", ""), ("output", 3),
        ("dry_run", "yes"), ("json", 1), ("sweep", ""), ("sweep", "0.5,"), ("sweep", []), ("sweep", [0.5, 0]),
        ("sweep", 2), ("sweep", "yes"), ("sweep", {"a": 0.5}),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_usage_errors_that_name_the_option(name, value):
    with pytest.raises(UsageError, match="^--" + name.replace("_", "-")) as caught:
        CompressConfig(**{name: value})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_text_from_a_shell_becomes_the_same_values_as_python():
    text = CompressConfig(
        keep_macs="0.5", max_bytes="1000", max_drop="0.02", align="8", seed="3", exclude="a*",
        output="o.onnx", providers="CUDAExecutionProvider, CPUExecutionProvider",
    )  # fmt: skip
    python = CompressConfig(
        keep_macs=0.5, max_bytes=1000, max_drop=0.02, align=8, seed=3, exclude=["a*"], output=Path("o.onnx"),
        providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    )  # fmt: skip
    assert text == python
    assert hash(text) == hash(python)
    assert isinstance(text.seed, int)
    assert isinstance(text.align, int)


def test_numpy_numbers_are_numbers():
    config = CompressConfig(keep_macs=np.float32(0.5), seed=np.int64(4))
    assert type(config.keep_macs) is float
    assert type(config.seed) is int


def test_arrays_are_taken_as_validation_data():
    data = {"input": np.zeros((4, 3), np.float32)}
    config = CompressConfig(val=data)
    assert config.val is data
    assert config.to_dict()["val"] == "dict"


def test_a_user_metric_is_a_function_in_a_module():
    assert CompressConfig(metric="my.package:score").metric == "my.package:score"


def test_config_is_frozen_and_plain_when_written_down(tmp_path):
    config = CompressConfig(output=tmp_path / "o.onnx", exclude=("a", "b"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    plain = config.to_dict()
    assert plain["output"] == str(tmp_path / "o.onnx")
    assert plain["exclude"] == ["a", "b"]


@pytest.mark.parametrize("command", COMMAND_OPTIONS)
def test_every_option_of_every_command_has_help(command):
    for option in describe_options(command):
        assert option.metadata["help"].endswith((".", ").")), option.name


def test_unknown_words_are_refused_with_the_nearest_right_one():
    with pytest.raises(UsageError, match=r"no option 'keep_mac' \(did you mean 'keep_macs'\?\)"):
        CompressConfig.from_options({"keep_mac": 0.5})
    with pytest.raises(UsageError, match="inspect has no option 'keep_macs'"):
        check_options({"keep_macs": 0.5}, command="inspect")
    with pytest.raises(UsageError, match="did you mean 'hutchinson'"):
        CompressConfig(sensitivity="hutchison")


@pytest.mark.parametrize("word", ["teacher"])
def test_options_of_later_releases_are_not_accepted(word):
    with pytest.raises(UsageError, match="no option"):
        CompressConfig.from_options({word: 1})


def test_what_comes_after_compression():
    assert CompressConfig().then is None
    assert [CompressConfig(then=word).then for word in ("int8", "fp16")] == ["int8", "fp16"]
    with pytest.raises(UsageError, match=r"--then must be one of int8, fp16, not 'int4'"):
        CompressConfig(then="int4")


def test_methods_and_the_preset():
    assert [CompressConfig(method=word).method for word in ("hap", "prune", "implant")] == [
        "hap", "prune", "implant",
    ]  # fmt: skip
    assert CompressConfig().preset is None
    assert CompressConfig().ranking == "auto"
    assert CompressConfig(preset="paper").ranking == "hutchinson"
    assert CompressConfig(preset="paper", sensitivity="magnitude").ranking == "magnitude"
    with pytest.raises(UsageError, match="--preset paper has widths of its own: leave --align away"):
        CompressConfig(preset="paper", align=8)
    with pytest.raises(UsageError, match="--preset paper prunes: leave --method implant away"):
        CompressConfig(preset="paper", method="implant")
    for method in ("prune", "hap"):
        assert CompressConfig(preset="paper", method=method).method == method


def test_epochs_mean_training():
    assert CompressConfig().recover == "refit"
    assert (
        CompressConfig(epochs=3).recover == CompressConfig(epochs="3", recover="refit").recover == "distill"
    )
    assert CompressConfig(epochs=3).n_epochs == 3
    assert CompressConfig(recover="distill").epochs is None
    assert CompressConfig(recover="distill").n_epochs == DEFAULT_EPOCHS
    assert CompressConfig(epochs=3, recover="distill") == CompressConfig(epochs=3)
    with pytest.raises(UsageError, match="--epochs trains the model, --recover none forbids it"):
        CompressConfig(epochs=3, recover="none")


def test_rounds_need_something_to_approach():
    assert CompressConfig().rounds == 1
    for budget in ({"keep_macs": 0.5}, {"keep_params": 0.5}, {"max_bytes": 1000}):
        assert CompressConfig(**budget, rounds=3).rounds == 3
    with pytest.raises(UsageError, match="--rounds needs a budget"):
        CompressConfig(rounds=2)
    with pytest.raises(UsageError, match="--rounds needs a budget"):
        CompressConfig(rounds=2, max_drop=0.1)


@pytest.mark.parametrize("value", ["0.5, 0.7,0.50", [0.7, 0.5], (0.5, 0.7, 0.7), np.array([0.5, 0.7])])
def test_the_points_of_a_sweep_come_in_falling_order_and_once(value):
    assert CompressConfig(sweep=value).sweep == (0.7, 0.5)


def test_a_sweep_is_a_switch_too():
    assert CompressConfig().sweep is None
    assert CompressConfig(sweep=False).sweep is None
    assert CompressConfig(sweep=True).sweep == SWEEP_RATIOS
    assert CompressConfig(sweep=0.5).sweep == (0.5,)


@pytest.mark.parametrize(
    ("objective", "swept"), [(None, "keep_macs"), ("params", "keep_params"), ("latency", "keep_latency")]
)
def test_a_point_of_a_sweep_is_the_job_with_its_budget(tmp_path, objective, swept):
    words = {"seed": 3, "max_drop": 0.1, "method": "prune"}
    files = {"keep_rejected": True, "report": tmp_path / "r.json"}
    config = CompressConfig(sweep=True, objective=objective, **files, **words)
    point = config.at_point(0.5, tmp_path)
    name = f"{swept.replace('_', '-')}-0.50.onnx"
    assert point == CompressConfig(**{swept: 0.5}, output=tmp_path / name, **words)
    assert point.needs_times == config.needs_times  # sensitivities are shared
    assert config.drop_limit == point.drop_limit


@pytest.mark.parametrize(
    ("ratio", "name"), [(0.5, "0.50"), (1.0, "1.00"), (0.125, "0.125"), (1e-7, "1e-07"), (1 / 3, repr(1 / 3))]
)
def test_points_have_names_that_differ(ratio, name):
    assert point_name("keep_macs", ratio) == f"keep-macs-{name}"


def test_a_sweep_may_go_without_a_gate():
    assert CompressConfig(sweep=True, max_drop="none").at_point(0.5, Path()).drop_limit is None
    assert CompressConfig(sweep=True).at_point(0.5, Path()).drop_limit is None


def test_checked_options_are_complete():
    options = check_options({"max_drop": "none"}, command="validate")
    assert set(options) == set(COMMAND_OPTIONS["validate"])
    assert options["max_drop"] == "none"
    assert options["batch_size"] == 32


# ---------------------------------------------------------------- hap.toml


def write(folder, text):
    path = folder / "hap.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_takes_both_spellings_and_paths_start_at_the_file(tmp_path):
    path = write(
        tmp_path,
        'keep-macs = 0.5\nmax_drop = "none"\nexclude = ["a*", "b"]\nonly = "c"\noutput = "out/o.onnx"\n'
        'dry-run = true\npreprocess = "unit"\nval = "val.npz"\ndata = "calib"\n',
    )
    assert read_config(path, also=("data",)) == {
        "keep_macs": 0.5, "max_drop": "none", "exclude": ("a*", "b"), "only": ("c",), "dry_run": True,
        "output": tmp_path / "out/o.onnx", "preprocess": "unit", "val": tmp_path / "val.npz",
        "data": tmp_path / "calib",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep-mac = 0.5", "unknown option 'keep-mac' .did you mean 'keep-macs'"),
        ("keep-macs = 2.0", "keep-macs must be a fraction"),
        ("keep-macs = 0.5\nkeep_macs = 0.4", "twice"),
        ("keep-macs = ", "not valid TOML"),
        ("[compress]\nkeep-macs = 0.5", r"no sections, but \[compress\] begins one"),
        ("keep.macs = 0.5", r"no sections, but \[keep\] begins one"),
        ("[keep-macs]\na = 1", "keep-macs must be a fraction"),
        ("[[exclude]]\na = 1", "exclude must be a pattern or a list"),
        ("keep-macs = [0.5]", "keep-macs must be a fraction"),
        ("keep-macs = true", "keep-macs must be a fraction"),
        ("sweep = [[0.5]]", "sweep must be a list of fractions"),
        ("seed = 2020-01-01", "seed must be a whole number"),
        ("max-drop = nan", "max-drop must be a number"),
        ("output = 3", "output must be a path"),
        ("val = 3", "val must be a path"),
        ('val = ["a", "b"]', "val must be a path"),
        ("val = {a = 1}", "val must be a path"),
        ('val = ""', "val must be a path"),
        ('data = "x"', "unknown option 'data'"),
    ],
)
def test_a_wrong_config_file_is_one_sentence_that_names_the_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UsageError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not valid TOML"):
        read_config(tmp_path / "binary.toml")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("model", "output"),
    [("a/net.onnx", "a/net.hap.onnx"), ("net.v1.ONNX", "net.v1.hap.onnx"), ("net", "net.hap.onnx")],
)
def test_default_output_lies_beside_the_model(model, output):
    assert default_output(Path(model)) == Path(output)


def test_the_default_folder_of_a_sweep_lies_beside_the_model():
    assert default_folder(Path("a/net.v1.onnx")) == Path("a/net.v1.hap.sweep")


def test_a_sweep_has_a_folder_of_its_own(tmp_path):
    check_folder(tmp_path / "new", {})
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty", {})
    with pytest.raises(UsageError, match="holds other files"):
        check_folder(tmp_path, {})
    for name in ("sweep.svg", ".sweep.md.4711.tmp"):  # after a kill before the index was there
        (tmp_path / "empty" / name).write_text("unfinished")
    check_folder(tmp_path / "empty", {})
    (tmp_path / "empty" / "sweep.txt").write_text("of the user")
    with pytest.raises(UsageError, match="holds other files"):
        check_folder(tmp_path / "empty", {})
    (tmp_path / "empty" / "sweep.json").write_text("{}")
    (tmp_path / "empty" / "small.onnx").write_text("that was written from a plan")
    check_folder(tmp_path / "empty", {})
    with pytest.raises(UsageError, match="is a file"):
        check_folder(tmp_path / "empty" / "sweep.json", {})
    with pytest.raises(ValidationError, match="there is no folder"):
        check_folder(tmp_path / "none" / "family", {})
    with pytest.raises(UsageError, match="too long for a path"):
        check_folder(tmp_path / ("a" * 5000), {})
    assert files_of(CompressConfig(sweep=True, keep_rejected=True), output=tmp_path) == {}


def test_all_files_of_a_job_are_known_before_it_starts(tmp_path):
    config = CompressConfig(save_plan=tmp_path / "p.json", keep_rejected=True, report=tmp_path / "r.json")
    output = tmp_path / "o.onnx"
    files = set(files_of(config, output=output).values())
    assert files == {
        output, rejected_path(output), tmp_path / "p.json", tmp_path / "p.safetensors", tmp_path / "r.json",
    }  # fmt: skip
    assert files_of(CompressConfig(dry_run=True, keep_rejected=True), output=output) == {}


def test_an_output_never_is_an_input_even_through_links(tmp_path):
    model = tmp_path / "m.onnx"
    model.write_bytes(b"x")
    (tmp_path / "soft.onnx").symlink_to(model)
    os.link(model, tmp_path / "hard.onnx")
    (tmp_path / "sub").mkdir()
    for same in (model, tmp_path / "soft.onnx", tmp_path / "hard.onnx", tmp_path / "sub" / ".." / "m.onnx"):
        with pytest.raises(UsageError, match="same file as MODEL"):
            check_outputs({"--output": same}, inputs={"MODEL": model})
    check_outputs({"--output": tmp_path / "o.onnx"}, inputs={"MODEL": model, "--data": {"x": np.zeros(1)}})


def test_two_outputs_are_two_files(tmp_path):
    same = tmp_path / "o.onnx"
    with pytest.raises(UsageError, match=r"--report .* is the same file as --output"):
        check_outputs({"--output": same, "--report": same}, inputs={})


def test_an_output_is_not_the_work_folder_but_may_lie_in_it(tmp_path):
    """Else the folder is made first, and minutes later the file cannot be written."""
    work = tmp_path / "work"
    for _ in range(2):
        with pytest.raises(UsageError, match=r"--html .* is the same as --work-dir"):
            check_outputs({"--html": tmp_path / "x" / ".." / "work"}, inputs={}, work_dir=work)
        work.mkdir(exist_ok=True)
    (work / "page.html").write_text("an earlier one")
    check_outputs({"--html": work / "page.html"}, inputs={}, work_dir=work)


def test_outputs_that_cannot_be_written_are_refused_at_once(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        check_outputs({"--output": tmp_path}, inputs={})
    with pytest.raises(ValidationError, match="there is no folder"):
        check_outputs({"--output": tmp_path / "no" / "o.onnx"}, inputs={})


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and devices")
def test_devices_and_pipes_are_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    for path in (pipe, link, Path("/dev/null"), Path("/dev/stdout"), Path("/dev/o.onnx")):
        with pytest.raises(UsageError, match=rf"--report {path} is a device or a pipe"):
            check_outputs({"--report": path}, inputs={})
    link.unlink()
    link.symlink_to(tmp_path / "missing.onnx")  # will be replaced
    check_outputs({"--output": link}, inputs={})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="permissions bind ordinary users only")
def test_protected_files_and_folders_are_refused_at_once():
    with tempfile.TemporaryDirectory() as name:  # that of pytest is closed to others
        check_protected(Path(name))


def check_protected(folder):
    old = folder / "o.onnx"
    old.write_bytes(b"precious")
    old.chmod(0o444)
    closed = folder / "closed"
    closed.mkdir(mode=0o555)

    def check():
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(ValidationError, match="the file that is there is protected; give another name"):
            check_outputs({"--output": old}, inputs={})
        with pytest.raises(ValidationError, match="no permission in"):
            check_outputs({"--output": closed / "o.onnx"}, inputs={})

    folder.chmod(0o777)
    ended = run_fork(check)
    assert ended.code == 0, ended.err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions bind ordinary users only")
def test_a_read_only_folder_is_refused_at_once(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ValidationError, match="no permission"):
            check_outputs({"--output": tmp_path / "o.onnx"}, inputs={})
    finally:
        tmp_path.chmod(0o755)

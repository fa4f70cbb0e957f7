from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from sample_reports import QUALITY, compress_report, inspect_report, sweep_report, validate_report

from hap_onnx import cli
from hap_onnx.config import COMMAND_OPTIONS, SWEEP_RATIOS, flag_of
from hap_onnx.errors import BudgetError, CalibrationError, GateError, ModelError, ValidationError
from hap_onnx.events import Event
from hap_onnx.interrupts import hold_signals


class Library:
    """Stands in for hap_onnx.pipeline: remembers its calls, returns or raises what it is told."""

    def __init__(self):
        self.calls = []
        self.result = None

    def _call(self, name, default):
        def function(*args, on_event, **options):
            self.calls.append((name, args, options))
            on_event(Event("refit", "note", message="a note"))
            if isinstance(self.result, BaseException):
                raise self.result
            return self.result or default

        return function

    def __getattr__(self, name):
        reports = {"inspect": inspect_report(), "validate": validate_report(), "sweep": sweep_report()}
        return self._call(name, reports.get(name, compress_report()))


@pytest.fixture
def library(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "present").write_text("a file")
    stub = Library()
    monkeypatch.setattr(cli.Session, "load_pipeline", lambda self: stub)
    return stub


# ---------------------------------------------------------------- what reaches the library


@pytest.mark.parametrize("given", [None, "0"])
def test_onnxruntime_keeps_no_records_unless_asked(given, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {} if given is None else {"ORT_DISABLE_TELEMETRY": given})
    assert cli.main(["--version"]) == 0
    assert os.environ["ORT_DISABLE_TELEMETRY"] == (given or "1")


def test_compress_passes_what_was_given_and_nothing_else(library, capsys):
    arguments = (
        "compress net.onnx --data calib.npz --keep-macs 0.5 --max-drop none --exclude a* --exclude b "
        "--align 8 --allow-slower --providers A,B -o small.onnx"
    )
    code = cli.main(arguments.split())
    assert code == 0
    assert library.calls == [
        (
            "compress",
            (Path("net.onnx"), Path("calib.npz")),
            {
                "keep_macs": 0.5, "max_drop": "none", "exclude": ("a*", "b"), "align": 8,
                "allow_slower": True, "providers": ("A", "B"), "output": Path("small.onnx"),
            },
        )
    ]  # fmt: skip
    out, err = capsys.readouterr()
    assert "parameters" in out
    assert err == "a note\n"


def test_an_interrupted_analysis_says_how_it_goes_on(library, monkeypatch, capsys):
    def stop(*_, **__):
        raise cli.Stop(signal.SIGINT)

    monkeypatch.setattr(library, "analyze", stop, raising=False)
    assert cli.main("analyze net.onnx --data calib.npz --work-dir work".split()) == 130
    told = "hap-onnx: interrupted; nothing was written; the same command goes on from work\n"
    assert capsys.readouterr().err == told
    assert cli.main("analyze net.onnx --data calib.npz".split()) == 130
    assert capsys.readouterr().err == "hap-onnx: interrupted; nothing was written\n"


def test_the_default_output_lies_beside_the_model(library, tmp_path):
    assert cli.main(["compress", str(tmp_path / "net.onnx"), "--data", "x"]) == 0
    assert library.calls[0][2] == {"output": tmp_path / "net.hap.onnx"}


def test_the_command_line_beats_the_config_file(library, tmp_path):
    (tmp_path / "hap.toml").write_text(
        'keep-macs = 0.5\nseed = 3\ndry-run = true\ndata = "calib"\nexclude = ["a"]\njson = true\n'
    )
    arguments = "compress net.onnx --config hap.toml --keep-macs 0.7 --no-dry-run --exclude b --no-json"
    assert cli.main(arguments.split()) == 0
    _, (_, data), options = library.calls[0]
    assert data == Path("calib")
    assert options == {
        "keep_macs": 0.7, "seed": 3, "dry_run": False, "exclude": ("b",), "output": Path("net.hap.onnx"),
    }  # fmt: skip
    assert cli.main("compress net.onnx --config hap.toml --data other".split()) == 0
    assert library.calls[1][1][1] == Path("other")


def test_the_other_commands_call_their_functions(library):
    assert cli.main(["inspect", "net.onnx", "--align", "4"]) == 0
    assert cli.main(["inspect", "net.onnx", "--data", "x.npz"]) == 0
    assert cli.main(["apply", "net.onnx", "plan.json"]) == 0
    assert cli.main("validate a.onnx b.onnx --data x.npz --max-drop none --report r.json".split()) == 0
    assert library.calls == [
        ("inspect", (Path("net.onnx"), None), {"align": 4}),
        ("inspect", (Path("net.onnx"), Path("x.npz")), {}),
        ("apply_plan", (Path("net.onnx"), Path("plan.json")), {"output": Path("net.hap.onnx")}),
        (
            "validate",
            (Path("a.onnx"), Path("b.onnx"), Path("x.npz")),
            {"max_drop": "none", "report": Path("r.json")},
        ),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        "compress m.onnx --data d", "compress m.onnx --data d --sweep", "inspect m.onnx",
        "apply m.onnx p.json", "validate a.onnx b.onnx --data d",
    ],
)
def test_json_prints_the_report_only(library, capsys, arguments):
    assert cli.main([*arguments.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"].startswith("hap-onnx/")
    assert "json" not in library.calls[0][2]


@pytest.mark.parametrize(
    ("words", "ratios", "folder"),
    [
        ("--sweep", SWEEP_RATIOS, "net.hap.sweep"),
        ("--sweep --objective params -o family", SWEEP_RATIOS, "family"),
        ("--sweep 0.5,0.7", (0.7, 0.5), "net.hap.sweep"),
    ],
)
def test_a_sweep_is_another_call_with_a_folder(library, capsys, words, ratios, folder):
    assert cli.main(["compress", "net.onnx", "--data", "x", *words.split()]) == 0
    ((name, _, options),) = library.calls
    assert name == "sweep"
    assert (options["sweep"], options["output"]) == (ratios, Path(folder))
    assert "keep-macs-0.50.json" in capsys.readouterr().out


def test_a_config_file_may_ask_for_a_sweep(library, tmp_path):
    for text, ratios in (("true", SWEEP_RATIOS), ("[0.4, 0.6]", (0.6, 0.4)), ('"0.4"', (0.4,))):
        (tmp_path / "hap.toml").write_text(f"sweep = {text}\n")
        assert cli.main("compress net.onnx --data x --config hap.toml".split()) == 0
        assert library.calls[-1][2]["sweep"] == ratios
    (tmp_path / "hap.toml").write_text("sweep = false\n")
    assert cli.main("compress net.onnx --data x --config hap.toml".split()) == 0
    assert library.calls[-1][0] == "compress"


def test_quiet_silences_notes(library, capsys):
    assert cli.main("compress net.onnx --data x -q".split()) == 0
    out, err = capsys.readouterr()
    assert "parameters" in out
    assert err == ""


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelError("net.onnx is not an ONNX file"), 1),
        (CalibrationError("the data is empty"), 1),
        (ValidationError("no space"), 1),
        (BudgetError("keep-macs 0.01 cannot be reached"), 3),
        (GateError("accuracy drops"), 3),
    ],
)
def test_errors_of_the_library_are_one_line_and_their_exit_code(library, capsys, error, code):
    library.result = error
    assert cli.main("compress net.onnx --data x -q".split()) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"hap-onnx: error: {error}\n"


def test_a_refused_model_shows_its_numbers(library, capsys):
    library.result = GateError("accuracy drops")
    library.result.report = compress_report(output=None)
    assert cli.main("compress net.onnx --data x --json".split()) == 3
    assert json.loads(capsys.readouterr().out)["output"] is None


def test_an_unexpected_error_is_one_line_and_a_traceback_on_request(library, capsys):
    library.result = ZeroDivisionError("two\nlines")
    assert cli.main("compress net.onnx --data x -q".split()) == 1
    err = capsys.readouterr().err
    assert err == (
        "hap-onnx: error: unexpected ZeroDivisionError: two lines (run with -v for the traceback)\n"
    )
    assert cli.main("compress net.onnx --data x -q -v".split()) == 1
    assert "Traceback" in capsys.readouterr().err


def test_out_of_memory_says_what_to_do(library, capsys):
    library.result = MemoryError()
    assert cli.main(["inspect", "net.onnx"]) == 1
    assert "--batch-size" in capsys.readouterr().err


def test_a_failed_validation_is_not_a_success(library, capsys):
    library.result = validate_report(slower=True, passed=False)
    assert cli.main("validate a.onnx b.onnx --data x".split()) == 3
    out, err = capsys.readouterr()
    assert "slower than the reference" in out
    assert "fails the gate: it takes 1.720 ms, the reference 2.410 ms" in err
    quality = type(QUALITY)("accuracy", 0.9, 0.8, 0.1, (0.0, 0.2), 10, 0.01, False)
    library.result = validate_report(quality=quality, passed=False)
    assert cli.main("validate a.onnx b.onnx --data x".split()) == 3
    assert "accuracy drops by 0.1000, allowed 0.01" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compress net.onnx", "Missing option '--data'"),
        ("compress --data x", "Missing argument 'MODEL'"),
        ("compress net.onnx --data x --keep-macs 1.5", "--keep-macs must be a fraction"),
        ("compress net.onnx --data x --keep-macs 0", "--keep-macs must be a fraction"),
        ("compress net.onnx --data x --max-drop -1", "--max-drop must be a number of at least 0"),
        ("compress net.onnx --data x --max-drop none", "nothing to aim at"),
        ("compress net.onnx --data x --keep-mac 0.5", "--keep-macs"),
        ("compress net.onnx --data x --epoch 3", "--epochs"),
        ("compress net.onnx --data x --epochs 0", "--epochs must be a whole number of at least 1"),
        ("compress net.onnx --data x --epochs 3 --recover none", "--recover none forbids it"),
        ("compress net.onnx --data x --rounds 2", "--rounds needs a budget"),
        ("compress net.onnx --data x --sweep 0.5,1.5", "--sweep must be a list of fractions"),
        ("compress net.onnx --data x --sweep half", "--sweep must be a list of fractions"),
        ("compress net.onnx --data x --sweep --keep-macs 0.5", "leave --keep-macs away"),
        ("compress net.onnx --data x --sweep --rounds 2", "leave one away"),
        ("compress net.onnx --data x --sweep --dry-run", "leave --dry-run away"),
        ("compress net.onnx --data x --sweep --save-plan p.json", "leave --save-plan away"),
        ("compress net.onnx --data x --sweep --then int8", "leave --then int8 away"),
        ("compress net.onnx --data x --sweep -o .", "holds other files"),
        ("compress net.onnx --data x --sweep -o present", "is a file"),
        ("compress net.onnx --data x --recover finetune", "finetune"),
        ("compress net.onnx --data x --augment flip", "flip"),
        ("compress net.onnx --data x --sensitivity taylor", "taylor"),
        ("compress net.onnx --data x -o net.onnx", "same file as MODEL"),
        ("compress net.onnx --data x --report net.onnx", "same file as MODEL"),
        ("compress net.onnx --data x --report x", "same file as --data"),
        ("compress net.onnx --data x --save-plan net.hap.onnx", "same file as --output"),
        ("compress net.onnx --data x --config none.toml", "cannot read none.toml"),
        ("inspect net.onnx --keep-macs 0.5", "--keep-macs"),
        ("apply net.onnx plan.json -o plan.safetensors", "same file as PLAN.safetensors"),
        ("validate a.onnx b.onnx", "Missing option '--data'"),
        ("squash net.onnx", "squash"),
    ],
)
def test_usage_errors_are_told_before_any_work(library, capsys, arguments, message):
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert library.calls == []


def test_signals_are_given_back(library):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    cli.main(["inspect", "net.onnx"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_during_an_import_waits_for_its_end():
    finished = []

    def load():
        with cli.Signals(), hold_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            finished.append(True)

    with pytest.raises(cli.Stop):
        load()
    assert finished


# ---------------------------------------------------------------- help


def run(*arguments, code=0):
    command = [sys.executable, "-m", "hap_onnx", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code, result.stderr
    return result


@pytest.mark.parametrize("command", COMMAND_OPTIONS)
def test_help_lists_every_option_once_and_teaches_by_example(command):
    text = run(command, "--help").stdout
    entries = text[re.search(r"^(Target|Method|Data|Output):$", text, re.MULTILINE).start() :]
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", entries, re.MULTILINE)
    assert set(map(flag_of, COMMAND_OPTIONS[command])) <= set(listed)
    assert len(listed) == len(set(listed))
    assert f"hap-onnx {command} model.onnx" in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_and_version_answer_at_once():
    start = time.perf_counter()
    text = run("--help").stdout
    assert all(command in text for command in COMMAND_OPTIONS)
    assert run("--version").stdout.startswith("hap-onnx, version ")
    assert time.perf_counter() - start < 5  # some 0.2 s; importing torch twice takes longer than that
    code = "import sys, hap_onnx.cli as c; c.main(['compress', '-h']); print({'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("set()")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("hap-onnx an", "analyze"),
        ("hap-onnx compress net.onnx --html", "--html-images"),
        ("hap-onnx compress net.onnx --sensitivity hu", "hutchinson"),
        ("hap-onnx analyze net.onnx --objective la", "latency"),
    ],
)
def test_shells_complete_commands_options_and_choices(words, offered):
    environment = {
        **os.environ, "_HAP_ONNX_COMPLETE": "bash_complete", "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }  # fmt: skip
    command = [sys.executable, "-m", "hap_onnx"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"plain,{offered}" in done.stdout.splitlines()
    source = {**os.environ, "_HAP_ONNX_COMPLETE": "bash_source"}
    done = subprocess.run(command, env=source, capture_output=True, text=True, check=True)
    assert "_HAP_ONNX_COMPLETE=bash_complete" in done.stdout


# ---------------------------------------------------------------- real processes


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["compress", "net.onnx", "--data", "x", "--keep-macs", "2"], 2),
        (["compress", "net.onnx", "--data", "x", "-o", "./net.onnx"], 2),
        (["compress", "net.onnx", "--data", "x", "-o", "no/such/folder/o.onnx"], 1),
        (["nonsense"], 2),
        ([], 2),
    ],
)
def test_exit_codes_of_the_process(arguments, code):
    result = run(*arguments, code=code)
    assert result.stdout == ""
    assert result.stderr


SLOW_JOB = textwrap.dedent(
    """
    import sys, time, types
    from pathlib import Path
    import hap_onnx.cli as cli

    def compress(model, data, *, on_event, output, **options):
        part = Path(output).with_suffix(".part")
        part.write_text("half")
        try:
            print("started", flush=True)
            time.sleep(60)
        finally:
            part.unlink()

    cli.Session.load_pipeline = lambda self: types.SimpleNamespace(compress=compress)
    sys.exit(cli.main())
    """
)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_leave_nothing_half_written(tmp_path, number, code, word):
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-c", SLOW_JOB, "compress", "net.onnx", "--data", "x"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err == f"hap-onnx: {word}; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_crash():
    command = f"{sys.executable} -m hap_onnx compress --help | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.startswith("Usage:")
    assert result.stderr == ""

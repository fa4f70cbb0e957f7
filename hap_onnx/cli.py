"""The command line: options become one library call, its result a table or JSON, its errors an exit code.

Exit codes: 0 done, 1 the model or the data cannot be processed, 2 usage, 3 a budget or gate was not met,
130 and 143 after Ctrl-C and SIGTERM. What is slow to import (torch, onnxruntime, rich) is imported when a
command needs it, so ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import Field, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import click

from hap_onnx import __version__
from hap_onnx.config import (
    SWEEP_INDEX,
    CompressConfig,
    check_folder,
    check_options,
    check_outputs,
    default_folder,
    default_output,
    describe_options,
    files_of,
    flag_of,
    plan_weights_path,
    read_config,
    reports_of,
)
from hap_onnx.crashes import speak_of_crashes
from hap_onnx.errors import (
    GateError,
    HapOnnxError,
    TargetError,
    TeamError,
    UsageError,
    ValidationError,
    is_out_of_memory,
)
from hap_onnx.interrupts import hold_signals
from hap_onnx.place import Place, find_place
from hap_onnx.report.printable import one_line, printable

if TYPE_CHECKING:
    from hap_onnx.events import Event, OnEvent
    from hap_onnx.report import Report, ValidateReport

PROGRAM = "hap-onnx"
SECTIONS = ("Target", "Method", "Data", "Machine", "Output")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


# ---------------------------------------------------------------- signals


class Stop(BaseException):
    """Ctrl-C or SIGTERM; not an Exception, so that nothing but clean-up code sees it pass."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        self.word = "interrupted" if number == signal.SIGINT else "terminated"


class Signals:
    """Turn Ctrl-C and SIGTERM into ``Stop``, so that each ``finally`` runs and nothing half-written stays."""

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._over = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as set by nohup: stays ignored
                    self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        is_first = number not in self._seen
        self._seen.add(number)
        if is_first and not self._over:
            raise Stop(number)
        # A second SIGTERM must not break the clean-up after the first; a second Ctrl-C may.
        if not is_first and number == signal.SIGINT:
            raise KeyboardInterrupt

    def end(self) -> None:
        """Ignore signals from now on: the results are being named, in less time than it takes to stop."""
        self._over = True


# ---------------------------------------------------------------- one invocation


@dataclass
class Session:
    """What one invocation knows beside its options."""

    verbose: int = 0
    quiet: bool = False
    left: str = "nothing was written"  # how things stand after an interruption
    hint: str = ""  # and what to do then
    place: Place = field(default_factory=Place)
    stderr: TextIO | None = None  # of a process that only helps, which says nothing unless it has to
    signals: Signals = field(default_factory=Signals)

    def load_pipeline(self) -> Any:
        """Import the library proper; takes seconds.

        Signals wait: raising in the middle of importing a C extension can crash the interpreter.
        """
        with hold_signals():
            from hap_onnx import pipeline
        return pipeline

    def load_views(self, *, plot: bool = False, html: bool = False) -> None:
        """Import what draws, which else would be done in the middle of a job."""
        with hold_signals():
            if plot:
                import hap_onnx.report.plot
            if html:
                import hap_onnx.report.html.pages  # noqa: F401  (the package itself imports nothing slow)

    @contextmanager
    def events(self) -> Iterator[OnEvent]:
        """Yield the ``on_event`` that draws bars and prints notes on stderr."""
        from hap_onnx.report.render import EventPrinter

        with EventPrinter(sys.stderr, quiet=self.quiet) as printer:

            def on_event(event: Event) -> None:
                if event.kind == "commit":
                    self.signals.end()
                printer(event)

            with _logging(self.verbose, printer.log_handler()):
                yield on_event

    def show(
        self, report: Report, *, as_json: bool, data: Any = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """Print a report on stdout, and what to run next after a command with this data and these options."""
        from hap_onnx.report.advice import next_step
        from hap_onnx.report.render import render_json, render_report

        advice = None if self.quiet else next_step(report, data=data, options=options)
        text = render_json(report) if as_json else render_report(report, sys.stdout, advice=advice)
        try:
            click.echo(text, nl=False)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ValidationError(
                f"the report cannot be printed ({error.strerror or error}); what was to be written is "
                "written; check where stdout goes"
            ) from error


@contextmanager
def _logging(verbose: int, handler: logging.Handler) -> Iterator[None]:
    """Send the library's log to ``handler``: warnings always, facts with -v, details with -vv."""
    logger = logging.getLogger("hap_onnx")
    level, propagate = logger.level, logger.propagate
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; ``args`` defaults to those of the process."""
    _open_streams()
    # From 1.31 on onnxruntime keeps records of its use in the home folder and in that of temporary files.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if args is None:  # the process is ours
        speak_of_crashes(PROGRAM)
    session = Session()
    try:
        with session.signals, _one_voice(session):
            try:
                return _run(args, session)
            except Stop as stop:  # caught inside, where a second signal is still ours
                _complain(session, f"{stop.word}; {session.left}{session.hint}")
                return stop.exit_code
    except KeyboardInterrupt:
        return 130


@contextmanager
def _one_voice(session: Session) -> Iterator[None]:
    """Let only the first of several processes speak, which does it for all."""
    try:
        session.place = find_place()
    except UsageError:  # said when options are read
        yield
        return
    if session.place.size > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what torch says of lost connections, we say
    if session.place.rank == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        session.stderr = sys.stderr
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


def _open_streams() -> None:
    """Open the standard streams that the caller has closed, to nowhere.

    Else the next files to be opened get their numbers, and what native code prints ends up in a model.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115  (open to the end)


def _run(args: Sequence[str] | None, session: Session) -> int:
    try:
        code = cli.main(args=args, prog_name=PROGRAM, standalone_mode=False, obj=session)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except TeamError as error:
        _complain(session, f"error: {error}; {session.left}{session.hint}", speaker=error.speaker)
        return error.exit_code
    except HapOnnxError as error:
        _complain(session, f"error: {error}")
        return error.exit_code
    except BrokenPipeError:  # such as `hap-onnx inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if is_out_of_memory(error):
            where = f" {error}" if isinstance(error, MemoryError) and str(error).startswith("at ") else ""
            advice = "try a smaller --batch-size or --max-samples, or a machine with more memory"
            _complain(session, f"error: out of memory{where}; {advice}")
            return 1
        # A bug: one line for the user, the rest for whoever asks.
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _complain(session, f"error: unexpected {what} (run with -v for the traceback)")
        return 1
    return code if isinstance(code, int) else 0


def _complain(session: Session, message: str, *, speaker: int = 0) -> None:
    """Say on stderr what is wrong; of several processes, ``speaker`` does."""
    if session.place.rank != speaker:
        return
    if session.verbose and sys.exc_info()[0] is not None:
        click.echo(printable(traceback.format_exc(), keep="\n"), file=session.stderr or sys.stderr, nl=False)
    click.echo(f"{PROGRAM}: {one_line(message)}", file=session.stderr or sys.stderr)


# ---------------------------------------------------------------- options, generated from CompressConfig


class _Option(click.Option):
    """An option that knows its section in the help."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        # The --no-... twin of a switch exists to overrule hap.toml; it needs no place in the help.
        return record and (record[0].split(" / ")[0], record[1])


class _Command(click.Command):
    """A command whose help groups options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                section = getattr(param, "section", "Output")
                records.setdefault(section, []).append(record)
        for section in SECTIONS:
            if section in records:
                with formatter.section(section):
                    formatter.write_dl(records[section])


def _make_option(option: Field[Any]) -> _Option:
    facts = option.metadata
    text = facts["help"]
    shown = option.default if isinstance(option.default, (str, int)) and option.default is not False else None
    if shown is not None:
        text += f"  [default: {shown}]"
    flag = flag_of(option.name)
    common: dict[str, Any] = {"section": facts["section"], "help": text, "default": None}
    if isinstance(option.default, bool):
        return _Option([option.name, f"{flag}/--no-{flag[2:]}"], is_flag=True, **common)
    declarations = [option.name, *(facts["flags"] or (flag,))]
    if facts["alone"] is not None:
        common |= {"is_flag": False, "flag_value": facts["alone"]}
    if facts["choices"]:
        return _Option(declarations, type=click.Choice(facts["choices"]), **common)
    if facts["repeatable"]:
        return _Option(declarations, metavar=facts["metavar"], multiple=True, **{**common, "default": ()})
    return _Option(declarations, metavar=facts["metavar"], **common)


def _remember(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        setattr(ctx.find_object(Session), name, value)

    return callback


def _command(name: str, *, summary: str, examples: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a click command with the options that the library's function of this name takes."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        options = [_make_option(option) for option in describe_options(name)]
        talk = [
            _Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_remember("quiet"),
                    section="Output", help="No progress and no notes."),
            _Option(["-v", "--verbose"], count=True, expose_value=False, callback=_remember("verbose"),
                    section="Output", help="Say more, with tracebacks of errors; -vv says all."),
        ]  # fmt: skip
        text = f"{summary}\n\n\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples.splitlines())
        make = click.command(name, cls=_Command, context_settings=CONTEXT, help=text)
        command = make(click.pass_obj(function))
        command.params.extend([*options, *talk])
        return command

    return decorate


def _data_option(*, required: bool, text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--data", cls=_Option, section="Data", metavar="DATA", type=click.Path(path_type=Path),
        required=required, help=text,
    )  # fmt: skip


def _given(options: Mapping[str, Any], *, command: str) -> dict[str, Any]:
    """Return the options that were given, checked; defaults stay the library's."""
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    checked = check_options(given, command=command)
    return {name: checked[name] for name in given}


DATA_HELP = (
    "Representative inputs: an .npz with one array per model input (batch first, optionally 'labels'), a "
    "folder of .npz or .npy files, or a folder of images, flat or with one subfolder per class."
)


# ---------------------------------------------------------------- commands


@click.group(
    context_settings=CONTEXT,
    help="Make trained ONNX models smaller and faster, without their training code.\n\n"
    "\b\nThe usual way:\n"
    "  hap-onnx inspect  model.onnx                         what can shrink, and what cannot\n"
    "  hap-onnx analyze  model.onnx --data calib/           what shrinking would cost, and where\n"
    "  hap-onnx compress model.onnx --data calib/           the smallest model within one point\n"
    "  hap-onnx compress model.onnx --data calib/ --keep-macs 0.5\n"
    "  hap-onnx validate model.onnx model.hap.onnx --data test/\n\n"
    "Each command explains itself with --help.",
    epilog="Exit codes: 0 done; 1 the model or the data cannot be processed; 2 usage; 3 a budget cannot be "
    "reached or a gate is not met, nothing is written; 130 Ctrl-C; 143 SIGTERM.",
)
@click.version_option(__version__, "-V", "--version", prog_name=PROGRAM)
def cli() -> None:
    """Collect the commands."""


_MODEL = click.argument("model", type=click.Path(path_type=Path), metavar="MODEL")


@_command(
    "compress",
    summary="Write a smaller, faster MODEL that onnxruntime has already run.\n\n"
    "Without a budget, searches the smallest model that loses at most --max-drop; with --keep-params, "
    "--keep-macs or --max-bytes, meets all of them at the least loss. Labels are not needed. The quality "
    "that is reported was measured on data that was used for nothing else.\n\n"
    "With --sweep, plans several models of falling cost from sensitivities that are found once, and shows "
    "what each loses and gains; 'hap-onnx apply' writes those that you choose.",
    examples="hap-onnx compress model.onnx --data calib.npz\n"
    "hap-onnx compress model.onnx --data photos/ --preprocess imagenet --keep-macs 0.5\n"
    "hap-onnx compress model.onnx --data calib/ --keep-params 0.4 --max-drop 0.02 -o small.onnx\n"
    "hap-onnx compress model.onnx --data calib/ --keep-macs 0.5 --exclude 'head.*' --dry-run\n"
    "hap-onnx compress model.onnx --data calib/ --sweep 0.8,0.6,0.4 --objective params\n"
    "hap-onnx compress model.onnx --config hap.toml --report report.json",
)
@_MODEL
@_data_option(required=False, text=DATA_HELP + "  [required]")
@click.option(
    "--config", cls=_Option, section="Data", metavar="FILE.toml", type=click.Path(path_type=Path),
    help="Take options from a TOML file; the command line beats it.",
)  # fmt: skip
def compress(session: Session, model: Path, data: Path | None, config: Path | None, **options: Any) -> None:
    given = {**(read_config(config, also=("data",)) if config else {}), **_given(options, command="compress")}
    data = data or given.pop("data", None)
    given.pop("data", None)
    if data is None:
        raise click.UsageError("Missing option '--data'.", click.get_current_context())
    find_place()
    wanted = CompressConfig.from_options(given)
    is_sweep = wanted.sweep is not None
    output = wanted.output or (default_folder(model) if is_sweep else default_output(model))
    inputs = {"MODEL": model, "--data": data, "--val": wanted.val}
    files = files_of(wanted, output=output)
    if is_sweep:
        check_folder(output, {**files, "--work-dir": wanted.work_dir})
    check_outputs(files, inputs=inputs, work_dir=wanted.work_dir)
    words = {name: value for name, value in given.items() if name != "json"}
    if wanted.work_dir is not None:
        session.left += f" at {output}"
        session.hint = _goes_on_from(wanted.work_dir)
    pipeline = session.load_pipeline()
    session.load_views(plot=is_sweep, html=wanted.html is not None)
    function = pipeline.sweep if is_sweep else pipeline.compress
    try:
        with session.events() as on_event:
            tell = _counting(session, output, on_event) if is_sweep else on_event
            report = function(model, data, on_event=tell, **{**words, "output": output})
    except TargetError as error:
        if error.report is not None:  # the numbers behind the refusal
            session.show(error.report, as_json=wanted.json)
        raise
    session.show(report, as_json=wanted.json, data=data, options=given)


def _goes_on_from(work_dir: Path) -> str:
    return f"; the same command goes on from {work_dir}"


def _counting(session: Session, folder: Path, on_event: OnEvent) -> OnEvent:
    """Let the session know how much of a sweep is done, and what of it would stay."""
    n_done = 0

    def tell(event: Event) -> None:
        nonlocal n_done
        if event.stage == "sweep" and event.kind == "advance":
            n_done += 1
            if (folder / SWEEP_INDEX).is_file():  # not while all points were refused
                session.left = f"{folder} holds what is done, {n_done} of the sweep's points"
        on_event(event)

    return tell


@_command(
    "inspect",
    summary="Show size, multiply-accumulates and channel groups of MODEL, and what is frozen and why.\n\n"
    "Fast, and changes nothing. --data is needed only where the shapes of the inputs are not in the model.",
    examples="hap-onnx inspect model.onnx\nhap-onnx inspect model.onnx --data calib.npz --json",
)
@_MODEL
@_data_option(required=False, text=DATA_HELP)
def inspect(session: Session, model: Path, data: Path | None, **options: Any) -> None:
    _report_only(session, "inspect", (model, data), options, inputs={"MODEL": model, "--data": data})


@_command(
    "analyze",
    summary="Show how sensitive MODEL is to each channel group and layer, and what sizes would cost.\n\n"
    "Changes nothing: channels are removed and layers replaced for trial only, one at a time, and the "
    "outputs compared. With the same --work-dir, data and seed, 'hap-onnx compress' starts from what was "
    "found here.",
    examples="hap-onnx analyze model.onnx --data calib.npz\n"
    "hap-onnx analyze model.onnx --data calib/ --html sensitivity.html --work-dir work\n"
    "hap-onnx analyze model.onnx --data calib/ --sensitivity hutchinson --objective params --json",
)
@_MODEL
@_data_option(required=True, text=DATA_HELP)
def analyze(session: Session, model: Path, data: Path, **options: Any) -> None:
    inputs = {"MODEL": model, "--data": data}
    _report_only(session, "analyze", (model, data), options, inputs=inputs, in_team=True)


@_command(
    "apply",
    summary="Write the model that a saved plan describes: no data, no training, the same bytes.\n\n"
    "PLAN.json comes from 'hap-onnx compress ... --save-plan PLAN.json' and belongs to that very MODEL; its "
    ".safetensors file must lie beside it.",
    examples="hap-onnx apply model.onnx plan.json -o small.onnx",
)
@_MODEL
@click.argument("plan", type=click.Path(path_type=Path), metavar="PLAN.json")
def apply(session: Session, model: Path, plan: Path, **options: Any) -> None:
    options["output"] = options["output"] or default_output(model)
    inputs = {"MODEL": model, "PLAN.json": plan, "PLAN.safetensors": plan_weights_path(plan)}
    _report_only(session, "apply", (model, plan), options, inputs=inputs)


@_command(
    "validate",
    summary="Compare two models on DATA: quality, fidelity, size and latency.\n\n"
    "The gate is that of compress: exit code 3 when CANDIDATE loses more than --max-drop or is slower.",
    examples="hap-onnx validate model.onnx model.hap.onnx --data test.npz\n"
    "hap-onnx validate model.onnx model.int8.onnx --data test/ --max-drop 0.02 --allow-slower",
)
@click.argument("reference", type=click.Path(path_type=Path), metavar="REFERENCE")
@click.argument("candidate", type=click.Path(path_type=Path), metavar="CANDIDATE")
@_data_option(required=True, text=DATA_HELP)
def validate(session: Session, reference: Path, candidate: Path, data: Path, **options: Any) -> int:
    inputs = {"REFERENCE": reference, "CANDIDATE": candidate, "--data": data}
    report = _report_only(session, "validate", (reference, candidate, data), options, inputs=inputs)
    if not report.passed:
        _complain(session, "error: the candidate fails the gate: " + explain_failure(report))
        return GateError.exit_code
    return 0


_LIBRARY_NAMES = {
    "inspect": "inspect", "analyze": "analyze", "apply": "apply_plan", "validate": "validate",
}  # fmt: skip


def _report_only(
    session: Session,
    command: str,
    positional: tuple[Any, ...],
    options: Mapping[str, Any],
    *,
    inputs: Mapping[str, Any],
    in_team: bool = False,
) -> Any:
    """Call the library's function of a command, show its report and return it.

    Raises UsageError for several processes, unless the command is done ``in_team``.
    """
    if find_place().size > 1 and not in_team:
        raise UsageError(f"{command} runs in one process: start it without torchrun")
    given = _given(options, command=command)
    as_json = given.pop("json", False)
    outputs = {flag_of(name): given[name] for name in ("output", "latency_table") if name in given}
    check_outputs({**outputs, **reports_of(given)}, inputs=inputs, work_dir=given.get("work_dir"))
    if "work_dir" in given:
        session.hint = _goes_on_from(given["work_dir"])
    function = getattr(session.load_pipeline(), _LIBRARY_NAMES[command])
    session.load_views(html="html" in given)
    with session.events() as on_event:
        report = function(*positional, on_event=on_event, **given)
    session.show(report, as_json=as_json, data=inputs.get("--data"), options=given)
    return report


def explain_failure(report: ValidateReport) -> str:
    """Say in one phrase which gates a comparison fails."""
    reasons = []
    quality = report.quality
    if not quality.passed:
        reasons.append(f"{quality.metric} drops by {quality.drop:.4f}, allowed {quality.max_drop}")
    if report.slower:
        before, after = report.before.latency_ms, report.after.latency_ms
        reasons.append(f"it takes {after:.3f} ms, the reference {before:.3f} ms")
    return "; ".join(reasons) or "see the report"


for _each in (compress, inspect, analyze, apply, validate):
    cli.add_command(_each)

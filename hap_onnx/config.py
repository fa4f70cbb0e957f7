"""The options of hap-onnx: each is named, explained and checked once, here.

The command line, ``hap.toml`` and the Python functions share these words. A value may come as text
(from a shell) or as a Python value; the check of its field turns both into the same thing or raises
``UsageError`` with what was expected.
"""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hap_onnx.errors import UsageError, ValidationError
from hap_onnx.text_files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the backport has the same interface
    import tomli as tomllib

METRICS = ("auto", "accuracy", "agreement", "r2")
METHODS = ("hap", "prune", "implant")
OBJECTIVES = ("params", "macs", "latency")
PRESETS = ("paper",)
SENSITIVITIES = ("auto", "obs", "hutchinson", "gauss-newton", "gate", "magnitude", "random")
RECOVERIES = ("none", "refit", "distill")
AUGMENTATIONS = ("auto", "none")
PREPROCESSES = ("imagenet", "unit", "signed", "raw")
THENS = ("int8", "fp16")
DEVICES = ("auto", "cpu", "cuda")

BUDGETS = ("keep_params", "keep_macs", "keep_latency", "max_bytes")
"""The options that say how small the result is to be."""

SWEEP_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""The fractions that a sweep keeps when none are named."""
SWEEP_INDEX = "sweep.json"
"""The file in a sweep's folder that lists its points."""
SWEEP_VIEWS = ("sweep.md", "sweep.svg")
"""What shows them; the index is written last."""

REPORTS = ("report", "html", "summary")
"""The options that name a file which the report goes to."""

DEFAULT_MAX_DROP = 0.01
DEFAULT_EPOCHS = 20

# ---------------------------------------------------------------- checks: (option name, value) -> value


@dataclass(frozen=True)
class Check:
    """What an option may be: ``check(name, value)`` returns the value or raises UsageError.

    ``schema`` says the same of what a TOML file holds, as JSON schema. It wants numbers where the check also
    takes the text that a shell gives for them.
    """

    function: Callable[[str, Any], Any]
    schema: Mapping[str, Any]

    def __call__(self, name: str, value: Any) -> Any:
        return self.function(name, value)


def _accepts(**schema: Any) -> Callable[[Callable[[str, Any], Any]], Check]:
    return lambda function: Check(function, schema)


def flag_of(name: str) -> str:
    """Return the command-line spelling of an option: ``keep_params`` is ``--keep-params``."""
    return "--" + name.replace("_", "-")


def _wrong(name: str, expected: str, value: Any) -> UsageError:
    return UsageError(f"{flag_of(name)} must be {expected}, not {value!r}")


def _number(name: str, value: Any, expected: str) -> float:
    if isinstance(value, bool):
        raise _wrong(name, expected, value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _wrong(name, expected, value) from None
    if not math.isfinite(number):
        raise _wrong(name, expected, value)
    return number


_FRACTION = {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "title": "a fraction"}


@_accepts(**_FRACTION)
def _check_fraction(name: str, value: Any) -> float:
    expected = "a fraction of the original in (0, 1]"
    number = _number(name, value, expected)
    if not 0.0 < number <= 1.0:
        raise _wrong(name, expected, value)
    return number


MAX_THREADS = 1024


def _whole(minimum: int, maximum: int = 2**53) -> Check:
    @_accepts(type="integer", minimum=minimum, maximum=maximum)
    def check(name: str, value: Any) -> int:
        expected = f"a whole number of at least {minimum}"
        number = _number(name, value, expected)
        if number > maximum:
            raise _wrong(name, f"a whole number of at most {maximum}", value)
        if number != int(number) or number < minimum:
            raise _wrong(name, expected, value)
        return int(number)

    return check


@_accepts(anyOf=[{"type": "number", "minimum": 0}, {"const": "none"}])
def _check_max_drop(name: str, value: Any) -> float | str:
    if value == "none":
        return "none"
    expected = "a number of at least 0 (0.01 is one point of accuracy) or 'none'"
    number = _number(name, value, expected)
    if number < 0.0:
        raise _wrong(name, expected, value)
    return number


@_accepts(anyOf=[{"const": "auto"}, {"type": "integer", "minimum": 1}])
def _check_align(name: str, value: Any) -> int | str:
    if value == "auto":
        return "auto"
    expected = "'auto' or a whole number of at least 1"
    number = _number(name, value, expected)
    if number != int(number) or number < 1:
        raise _wrong(name, expected, value)
    return int(number)


def _one_of(choices: tuple[str, ...]) -> Check:
    @_accepts(enum=list(choices))
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            hint = _nearest(str(value), choices)
            raise UsageError(f"{flag_of(name)} must be one of {', '.join(choices)}, not {value!r}{hint}")
        return value

    return check


_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_FUNCTION_WORD = {"type": "string", "pattern": f"^{_FUNCTION.pattern}$", "title": "package.module:function"}


@_accepts(anyOf=[{"enum": list(METRICS)}, _FUNCTION_WORD])
def _check_metric(name: str, value: Any) -> str:
    if isinstance(value, str) and (value in METRICS or _FUNCTION.fullmatch(value)):
        return value
    hint = _nearest(str(value), METRICS)
    raise UsageError(
        f"{flag_of(name)} must be one of {', '.join(METRICS)}, or package.module:function, "
        f"not {value!r}{hint}"
    )


_PATH = {"type": "string", "minLength": 1}


@_accepts(**_PATH)
def _check_path(name: str, value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise _wrong(name, "a path", value)
    return Path(value)


_RECIPE_FILE = {"type": "string", "pattern": r".\.toml$", "title": "a .toml file"}


@_accepts(anyOf=[{"enum": list(PREPROCESSES)}, _RECIPE_FILE])
def _check_preprocess(name: str, value: Any) -> str | Path:
    if isinstance(value, str) and value in PREPROCESSES:
        return value
    if isinstance(value, (str, Path)) and Path(value).suffix == ".toml":
        return Path(value)
    hint = _nearest(str(value), PREPROCESSES)
    raise UsageError(
        f"{flag_of(name)} must be one of {', '.join(PREPROCESSES)}, or a .toml file, not {str(value)!r}{hint}"
    )


@_accepts(**_PATH)
def _check_data(name: str, value: Any) -> Any:
    # Arrays and iterables are checked when they are opened.
    return _check_path(name, value) if isinstance(value, str) else value


@_accepts(type="boolean")
def _check_switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


_WORD = {"type": "string", "minLength": 1}
_WORDS = {"anyOf": [_WORD, {"type": "array", "items": _WORD}]}


@_accepts(**_WORDS)
def _check_globs(name: str, value: Any) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else value
    if not isinstance(globs, Iterable) or isinstance(globs, (bytes, Mapping)):
        raise _wrong(name, "a pattern or a list of patterns", value)
    globs = tuple(globs)
    if not all(isinstance(glob, str) and glob for glob in globs):
        raise _wrong(name, "a pattern or a list of patterns", value)
    return globs


@_accepts(anyOf=[{"type": "boolean"}, _FRACTION, {"type": "array", "items": _FRACTION, "minItems": 1}])
def _check_sweep(name: str, value: Any) -> tuple[float, ...] | None:
    """Return fractions in descending order; a switch stands for the usual ones."""
    if isinstance(value, bool):
        return SWEEP_RATIOS if value else None
    expected = "a list of fractions of the original in (0, 1], such as 0.9,0.7,0.5"
    entries = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, Iterable) or isinstance(entries, (bytes, Mapping)):
        entries = (entries,)
    try:
        ratios = [_check_fraction(name, entry) for entry in entries]
    except UsageError:
        raise _wrong(name, expected, value) from None
    if not ratios:
        raise _wrong(name, expected, value)
    return tuple(sorted(set(ratios), reverse=True))


@_accepts(**_WORDS)
def _check_providers(name: str, value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, Iterable) or isinstance(names, (bytes, Mapping)):
        raise _wrong(name, "a comma-separated list of onnxruntime execution providers", value)
    cleaned = tuple(entry.strip() if isinstance(entry, str) else entry for entry in names)
    if not all(isinstance(entry, str) and entry for entry in cleaned):
        raise _wrong(name, "a comma-separated list of onnxruntime execution providers", value)
    return cleaned


# ---------------------------------------------------------------- the options


def _words(ratios: Iterable[float]) -> str:
    return ",".join(map(str, ratios))


def _option(
    default: Any,
    check: Check,
    help: str,
    *,
    section: str,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    flags: tuple[str, ...] = (),
    repeatable: bool = False,
    is_path: bool = False,
    alone: str | None = None,
    compare: bool = True,
) -> Any:
    """Declare one option; ``help`` is what ``--help`` shows and the documentation of the field.

    ``alone`` is what the option means on a command line that gives it no value.
    """
    metadata = {
        "check": check,
        "help": help,
        "section": section,
        "metavar": metavar,
        "choices": choices,
        "flags": flags,
        "repeatable": repeatable,
        "is_path": is_path,
        "alone": alone,
    }
    return field(default=default, metadata=metadata, compare=compare)


def _choice(default: str, choices: tuple[str, ...], help: str, *, section: str) -> Any:
    return _option(default, _one_of(choices), help, section=section, choices=choices)


def _switch(help: str, *, section: str) -> Any:
    return _option(False, _check_switch, help, section=section)


@dataclass(frozen=True)
class CompressConfig:
    """All options of ``compress``, checked. What each means: ``describe_options()`` or ``--help``.

    ``None`` means "not given": the default then depends on the model, the data or the machine.
    Raises UsageError for a value that makes no sense.
    """

    output: Path | None = _option(
        None, _check_path, "The compressed model. Default: MODEL's name with .hap.onnx, beside it; of a "
        "sweep, a folder that ends in .hap.sweep.",
        section="Output", metavar="OUT", flags=("-o", "--output"), is_path=True,
    )  # fmt: skip

    keep_params: float | None = _option(
        None, _check_fraction, "Budget: keep at most this fraction of the parameters, in (0, 1].",
        section="Target", metavar="R",
    )  # fmt: skip
    keep_macs: float | None = _option(
        None, _check_fraction, "Budget: keep at most this fraction of the multiply-accumulates, in (0, 1].",
        section="Target", metavar="R",
    )  # fmt: skip
    keep_latency: float | None = _option(
        None, _check_fraction, "Budget: take at most this fraction of the original's time, in (0, 1]; it is "
        "measured in onnxruntime on this machine.",
        section="Target", metavar="R",
    )  # fmt: skip
    max_bytes: int | None = _option(
        None, _whole(1), "Budget: the file, with its external data, has at most N bytes.",
        section="Target", metavar="N",
    )  # fmt: skip
    max_drop: float | str | None = _option(
        None, _check_max_drop,
        "Largest acceptable loss of the quality metric, absolute (0.01: one point of accuracy); 'none' "
        f"switches the gate off. Default: {DEFAULT_MAX_DROP}; with a budget none, and the drop is reported.",
        section="Target", metavar="D|none",
    )  # fmt: skip
    objective: str | None = _option(
        None, _one_of(OBJECTIVES), "What the search makes small when no budget is given, and what --sweep "
        "keeps fractions of. Default: params and macs alike; of a sweep, macs.",
        section="Target", choices=OBJECTIVES,
    )  # fmt: skip
    sweep: tuple[float, ...] | None = _option(
        None, _check_sweep, "In place of one model, a folder with the plans of several, and with table and "
        "plot of what they lose and gain; 'hap-onnx apply' then writes any of them. The fractions of "
        f"--objective to keep, comma-separated; --sweep alone is {_words(SWEEP_RATIOS)}.",
        section="Target", metavar="[R,R,...]", alone=_words(SWEEP_RATIOS),
    )  # fmt: skip
    metric: str = _option(
        "auto", _check_metric,
        "Quality metric: auto, accuracy (needs labels), agreement (same top class as the original), r2, or "
        "your own package.module:function(reference, candidate, labels) -> float, larger is better: it is "
        "imported and called, the only code from outside that runs.",
        section="Target", metavar="NAME",
    )  # fmt: skip

    method: str = _choice(
        "hap", METHODS, "What may be done to the model: prune removes channels, implant replaces layers by "
        "cheaper low-rank ones, hap chooses both together, layer by layer.", section="Method",
    )  # fmt: skip
    preset: str | None = _option(
        None, _one_of(PRESETS), "A recipe as a whole. paper: that of the HAP paper, one threshold on the "
        "relative Hessian trace, the top tenth of what falls below it becomes 1x1 implants.",
        section="Method", choices=PRESETS,
    )  # fmt: skip
    sensitivity: str = _choice(
        "auto", SENSITIVITIES, "How channels are ranked; hutchinson is the paper's relative Hessian trace, "
        "auto is the one that does best in our benchmark.", section="Method",
    )  # fmt: skip
    probes: int = _option(
        300, _whole(1), "Largest number of random probes of the hutchinson ranking.",
        section="Method", metavar="N",
    )  # fmt: skip
    recover: str = _choice(
        "refit", RECOVERIES, "What repairs the model: refit solves for the weights behind what was taken "
        "away, in closed form; distill then also trains the model to do what the original does. No labels "
        "are needed.", section="Method",
    )  # fmt: skip
    epochs: int | None = _option(
        None, _whole(1), "Train for N passes over the data, in each round and for each candidate of a "
        f"search; implies --recover distill. Default there: {DEFAULT_EPOCHS}.", section="Method", metavar="N",
    )  # fmt: skip
    rounds: int = _option(
        1, _whole(1), "Compress in N steps, with recovery and new sensitivities in between. Needs a budget.",
        section="Method", metavar="N",
    )  # fmt: skip
    augment: str = _choice(
        "auto", AUGMENTATIONS, "Whether training may flip and shift images; auto: what the original hardly "
        "notices.", section="Method",
    )  # fmt: skip
    align: int | str = _option(
        "auto", _check_align, "Keep channels in multiples of N; auto: of 8 in wide layers, finer in narrow.",
        section="Method", metavar="auto|N",
    )  # fmt: skip
    then: str | None = _option(
        None, _one_of(THENS), "What becomes of the compressed model in the end: int8 quantizes it with the "
        "calibration part of the data, fp16 stores and computes with 16 bits. --max-drop is about the final "
        "file.", section="Method", choices=THENS,
    )  # fmt: skip
    latency_table: Path | None = _option(
        None, _check_path, "Where times are kept; with the same table a job plans the same. Default: in "
        "--work-dir, else in the user's cache folder, where times of single layers only are kept.",
        section="Machine", metavar="FILE.json", is_path=True,
    )  # fmt: skip
    exclude: tuple[str, ...] = _option(
        (), _check_globs, "Leave alone nodes or initializers whose name matches; may be repeated.",
        section="Method", metavar="GLOB", repeatable=True,
    )  # fmt: skip
    only: tuple[str, ...] = _option(
        (), _check_globs, "Touch only nodes or initializers whose name matches; may be repeated.",
        section="Method", metavar="GLOB", repeatable=True,
    )  # fmt: skip

    preprocess: str | Path | None = _option(
        None, _check_preprocess, "How images become inputs: imagenet (default for 3-channel image folders), "
        "unit (0..1), signed (-1..1), raw (0..255), or a .toml file.",
        section="Data", metavar="NAME|FILE.toml", is_path=True,
    )  # fmt: skip
    val: Any = _option(
        None, _check_data, "Data of the final report. Default: a fifth of --data, used for nothing else.",
        section="Data", metavar="DATA", is_path=True, compare=False,
    )  # fmt: skip
    max_samples: int | None = _option(
        None, _whole(1), "Use at most N samples of --data, drawn by the seed.", section="Data", metavar="N"
    )
    batch_size: int = _option(32, _whole(1), "Samples per batch.", section="Data", metavar="N")

    device: str = _choice("auto", DEVICES, "Where gradients and statistics are computed.", section="Machine")
    providers: tuple[str, ...] = _option(
        (), _check_providers, "onnxruntime execution providers that validate and time the model, "
        "comma-separated. Default: CPUExecutionProvider.", section="Machine", metavar="LIST",
    )  # fmt: skip
    threads: int | None = _option(
        None, _whole(1, MAX_THREADS),
        "Threads of torch and of onnxruntime. Default: torch chooses, onnxruntime uses one.",
        section="Machine", metavar="N",
    )  # fmt: skip
    dist_timeout: int = _option(
        1800, _whole(1, 10**6), "Under torchrun: seconds that a process waits for another one before all "
        "give up; that one has ended is noticed at once.", section="Machine", metavar="SECONDS",
    )  # fmt: skip
    seed: int = _option(
        0, _whole(0), "Same seed, inputs and threads: the same bytes.", section="Machine", metavar="N"
    )

    report: Path | None = _option(
        None, _check_path, "Write the report as JSON.", section="Output", metavar="FILE.json", is_path=True
    )
    html: Path | None = _option(
        None, _check_path, "Write the report as one page for a browser, with the sensitivities that the plan "
        "goes by.", section="Output", metavar="FILE.html", is_path=True,
    )  # fmt: skip
    html_images: bool = _switch(
        "Show in --html, as small pictures, the images that the two models differ most on.", section="Output"
    )
    summary: Path | None = _option(
        None, _check_path, "Write the report as Markdown, for a job summary or a comment on a pull request.",
        section="Output", metavar="FILE.md", is_path=True,
    )  # fmt: skip
    save_plan: Path | None = _option(
        None, _check_path, "Write the plan, with a .safetensors file beside it, for 'hap-onnx apply'.",
        section="Output", metavar="FILE.json", is_path=True,
    )  # fmt: skip
    work_dir: Path | None = _option(
        None, _check_path, "Where large intermediate results go, and what an interrupted job has finished: "
        "the same command goes on from there. Default: a temporary folder.",
        section="Output", metavar="DIR", is_path=True,
    )  # fmt: skip
    dry_run: bool = _switch("Stop after the plan: report it and write no model.", section="Output")
    json: bool = _switch("Print the report as JSON in place of the table.", section="Output")
    allow_slower: bool = _switch(
        "Accept a model that onnxruntime runs slower than the original.", section="Target"
    )
    keep_rejected: bool = _switch(
        "Write a model that fails a gate to OUT.rejected.onnx (the exit code stays 3).", section="Output"
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            object.__setattr__(self, option.name, _check(option, value))
        if self.html_images and self.html is None:
            raise UsageError("--html-images shows pictures in a page: give it a name with --html")
        if self.sweep is not None:
            self._check_sweep_alone()
        elif self.max_drop == "none" and not self.has_budget:
            raise UsageError(
                "--max-drop none without a budget leaves nothing to aim at: give --keep-params, --keep-macs, "
                "--keep-latency or --max-bytes, or a largest drop"
            )
        if self.objective is not None and self.has_budget:
            raise UsageError(
                "--objective says what is searched for where no budget is given: leave it away, or the budget"
            )
        if self.preset is not None and self.needs_times:
            raise UsageError(f"--preset {self.preset} knows nothing of time: give another budget")
        if self.epochs is not None:
            if self.recover == "none":
                raise UsageError("--epochs trains the model, --recover none forbids it: leave one away")
            object.__setattr__(self, "recover", "distill")
        if self.rounds > 1 and not self.has_budget:
            raise UsageError(
                "--rounds needs a budget: give --keep-params, --keep-macs, --keep-latency or --max-bytes"
            )
        if self.rounds > 1 and self.method == "implant":
            raise UsageError(
                "--rounds has nothing to do after the first one with --method implant, which replaces a "
                "layer only once: leave one away"
            )
        if self.preset is not None and self.align != "auto":
            raise UsageError(f"--preset {self.preset} has widths of its own: leave --align away")
        if self.preset is not None and self.method == "implant":
            raise UsageError(f"--preset {self.preset} prunes: leave --method implant away")

    def _check_sweep_alone(self) -> None:
        """Refuse what makes no sense for several models at once."""
        given = [flag_of(name) for name in BUDGETS if getattr(self, name) is not None]
        if given:
            raise UsageError(f"--sweep has budgets of its own: leave {given[0]} away")
        if self.rounds > 1:
            raise UsageError("--sweep looks at sensitivities once, --rounds does anew: leave one away")
        if self.html_images:
            raise UsageError("--sweep compares no single samples: leave --html-images away")
        for name in ("dry_run", "save_plan"):
            if getattr(self, name):
                raise UsageError(f"--sweep writes plans, and only plans: leave {flag_of(name)} away")
        if self.then is not None:
            raise UsageError(
                f"--sweep plans models in float32: leave --then {self.then} away, and give it to 'hap-onnx "
                "compress' with the budget that you choose"
            )

    @property
    def swept(self) -> str:
        """The budget that a sweep lowers from point to point."""
        return f"keep_{self.objective or 'macs'}"

    def at_point(self, ratio: float, folder: Path) -> CompressConfig:
        """Return the config of the job that is one point of the sweep in ``folder``."""
        words: dict[str, Any] = {self.swept: ratio, **dict.fromkeys(("sweep", "objective", *REPORTS))}
        output = folder / f"{point_name(self.swept, ratio)}.onnx"
        return replace(self, output=output, keep_rejected=False, **words)

    @property
    def ranking(self) -> str:
        """The sensitivity that ranks channels: that of the preset, unless another is named."""
        return "hutchinson" if self.preset == "paper" and self.sensitivity == "auto" else self.sensitivity

    @property
    def n_epochs(self) -> int:
        """How long to train where training was asked for."""
        return self.epochs or DEFAULT_EPOCHS

    @property
    def has_budget(self) -> bool:
        """Whether a size was asked for."""
        return any(getattr(self, name) is not None for name in BUDGETS)

    @property
    def needs_times(self) -> bool:
        """Whether plans are priced in time, too."""
        return self.keep_latency is not None or self.objective == "latency"

    @property
    def drop_limit(self) -> float | None:
        """The quality gate: largest drop of the metric, or None for no gate."""
        return resolve_max_drop(self.max_drop, has_budget=self.has_budget)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> CompressConfig:
        """Build a config from words; an unknown word is a UsageError that names the nearest one."""
        return cls(**check_options(options, command="compress"))

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON-ready values (paths as text, data other than a path as its type)."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: _json_ready(value) for name, value in values.items()}


def resolve_max_drop(max_drop: float | str | None, *, has_budget: bool) -> float | None:
    """Return the quality gate that ``max_drop`` stands for: a number, or None for no gate."""
    if max_drop is None:
        return None if has_budget else DEFAULT_MAX_DROP
    return None if isinstance(max_drop, str) else max_drop


# Which of the words above the other commands take.
COMMAND_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "compress": tuple(option.name for option in fields(CompressConfig)),
    "inspect": (
        "align", "exclude", "only", "preprocess", "max_samples", "batch_size", "seed", "report", "json",
    ),
    "analyze": (
        "objective", "metric", "method", "sensitivity", "probes", "align", "latency_table", "exclude", "only",
        "preprocess", "max_samples", "batch_size", "device", "providers", "threads", "dist_timeout", "seed",
        *REPORTS, "work_dir", "json",
    ),
    "apply": ("output", "report", "json"),
    "validate": (
        "max_drop", "metric", "allow_slower", "preprocess", "max_samples", "batch_size", "providers",
        "threads", "seed", *REPORTS, "json",
    ),
}  # fmt: skip

_FIELDS: Mapping[str, Field[Any]] = {option.name: option for option in fields(CompressConfig)}


def describe_options(command: str = "compress") -> tuple[Field[Any], ...]:
    """Return the fields of ``CompressConfig`` that a command takes; ``.metadata`` holds help and choices."""
    return tuple(_FIELDS[name] for name in COMMAND_OPTIONS[command])


def check_options(options: Mapping[str, Any], *, command: str) -> dict[str, Any]:
    """Return all options of ``command``, checked and with defaults filled in.

    Raises UsageError for an unknown word or a value that makes no sense.
    """
    known = COMMAND_OPTIONS[command]
    for name in options:
        if name not in known:
            raise UsageError(f"{command} has no option {name!r}{_nearest(name, known)}")
    return {name: _check(_FIELDS[name], options.get(name, _FIELDS[name].default)) for name in known}


def read_config(path: str | Path, *, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read options from a TOML file, with ``-`` or ``_`` in their names; relative paths start at the file.

    ``also`` names words that are allowed though no field of ``CompressConfig``; their values are paths.
    Raises UsageError for an unreadable file, an unknown word or a value that makes no sense.
    """
    path = Path(path)
    try:
        table = tomllib.loads(read_text(path))
    except OSError as error:
        raise UsageError(f"--config: cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # also too many digits, and lists inside of lists
        raise UsageError(f"--config: {path} is not valid TOML: {error}") from error
    known = COMMAND_OPTIONS["compress"] + also
    options: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known and isinstance(value, dict):
            raise UsageError(
                f"{path}: there are no sections, but [{key}] begins one: options stand at the top of the file"
            )
        if name not in known:
            spelt = tuple(word.replace("_", "-") for word in known)
            raise UsageError(f"{path}: unknown option {key!r}{_nearest(key, spelt)}")
        if name in options:
            raise UsageError(f"{path}: option {key!r} is given twice")
        try:
            is_data = name in also or _FIELDS[name].metadata["check"] is _check_data  # in a file, a path
            value = _check_path(name, value) if is_data else _check(_FIELDS[name], value)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
        is_path = name in also or _FIELDS[name].metadata["is_path"]
        options[name] = path.parent / value if is_path and isinstance(value, Path) else value
    return options


# ---------------------------------------------------------------- the files a job reads and writes


def default_output(model: Path) -> Path:
    """Return where the compressed model goes when nothing is said: ``x.onnx`` gives ``x.hap.onnx``."""
    stem = model.name[: -len(".onnx")] if model.name.lower().endswith(".onnx") else model.name
    return model.with_name(stem + ".hap.onnx")


def default_folder(model: Path) -> Path:
    """Return where a sweep goes when nothing is said: ``x.onnx`` gives ``x.hap.sweep``."""
    return default_output(model).with_suffix(".sweep")


def point_name(budget: str, ratio: float) -> str:
    """Return the name of one point of a sweep, such as ``keep-macs-0.50``."""
    short = f"{ratio:.2f}"
    return f"{budget.replace('_', '-')}-{short if float(short) == ratio else repr(ratio)}"


def rejected_path(output: Path) -> Path:
    """Return where ``keep_rejected`` puts a model that fails a gate."""
    return output.with_name(output.name + ".rejected.onnx")


def plan_weights_path(plan: Path) -> Path:
    """Return the file beside a saved plan that holds its weights."""
    return plan.with_suffix(".safetensors")


def reports_of(options: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files that the report goes to, by the option that asks for them."""
    return {flag_of(name): options[name] for name in REPORTS if options.get(name) is not None}


def files_of(config: CompressConfig, *, output: Path | None) -> dict[str, Path]:
    """Return all files that a job with this config may write, by the option that asks for them.

    ``output`` is None where there is to be no model.

    The folder of a sweep is not among them: ``check_folder``.
    """
    is_model = not config.dry_run and config.sweep is None and output is not None
    files = {"--output": output if is_model else None}
    files |= reports_of({name: getattr(config, name) for name in REPORTS})
    if config.keep_rejected and is_model and output is not None:
        files["--keep-rejected"] = rejected_path(output)
    if config.save_plan is not None:
        files["--save-plan"] = config.save_plan
        files["--save-plan (weights)"] = plan_weights_path(config.save_plan)
    if config.latency_table is not None:
        files["--latency-table"] = config.latency_table
    return {option: path for option, path in files.items() if path is not None}


def check_outputs(
    outputs: Mapping[str, Path], *, inputs: Mapping[str, Any], work_dir: Path | None = None
) -> None:
    """Refuse, before any work is done, what could not be written or would overwrite an input.

    Both map what the user calls a file to its path; inputs that are not paths are passed over. Links
    of both kinds are seen through. (A link at an output's place is replaced by the file.) Outputs may lie in
    ``work_dir``, but not in its place. Raises UsageError
    for a collision and for what is no regular file, ValidationError for a folder that is missing and for
    what is not writable.
    """
    taken = {name: Path(path) for name, path in inputs.items() if isinstance(path, (str, Path))}
    for name, path in (*taken.items(), *outputs.items()):
        _check_possible(name, path)
    for option, path in outputs.items():
        for other, known in taken.items():
            if _same_file(path, known):
                raise UsageError(f"{option} {path} is the same file as {other} {known}: choose another name")
            if known.is_dir() and path.exists() and path.resolve().is_relative_to(known.resolve()):
                raise UsageError(
                    f"{option} {path} would overwrite a file of {other} {known}: choose another name"
                )
        if work_dir is not None and _same_file(path, work_dir):
            raise UsageError(f"{option} {path} is the same as --work-dir {work_dir}: choose another name")
        if path.is_dir():
            raise UsageError(f"{option} {path} is a folder: give the name of a file")
        if (path.exists() and not path.is_file()) or os.path.realpath(path.parent) == "/dev":
            raise UsageError(
                f"{option} {path} is a device or a pipe, which a file would replace: give the name of a file"
            )
        if not path.parent.is_dir():
            raise ValidationError(f"{option} {path} cannot be written: there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise ValidationError(f"{option} {path} cannot be written: no permission in {path.parent}")
        if path.exists() and not os.access(path, os.W_OK):
            raise ValidationError(
                f"{option} {path} cannot be written: the file that is there is protected; give another name"
            )
        taken[option] = path


def _check_possible(name: str, path: Path) -> None:
    """Refuse a path that no file can have: too long, or with a zero in it."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            shown = f"{str(path)[:60]}..."
            raise UsageError(f"{name} {shown} is too long for a path: choose another name") from error
    except ValueError as error:
        raise UsageError(f"{name} {str(path)!r} cannot be a path ({error}): choose another name") from error


def check_folder(folder: Path, others: Mapping[str, Path | None]) -> None:
    """Refuse, before any work is done, a folder that a sweep could not or must not write to.

    ``others`` maps what the user calls all else that the job writes to its path.

    Raises UsageError for one with other files in it, now or later, ValidationError for one that is not
    writable.
    """
    _check_possible("--output", folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file: a sweep needs the name of a folder")
    if folder.is_dir() and not (folder / SWEEP_INDEX).is_file() and any(_others_in(folder)):
        raise UsageError(f"--output {folder} holds other files: give a sweep a folder of its own")
    for option, path in others.items():
        if path is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise UsageError(f"{option} {path} lies in the folder of the sweep: choose another place")
    if not folder.parent.is_dir():
        raise ValidationError(f"--output {folder} cannot be made: there is no folder {folder.parent}")
    if not os.access(folder if folder.is_dir() else folder.parent, os.W_OK):
        raise ValidationError(f"--output {folder} cannot be written: no permission")


def _others_in(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder apart from what a sweep that was killed at its first point has left."""
    for path in folder.iterdir():
        is_temporary = any(path.name.startswith(f".{name}.") for name in (SWEEP_INDEX, *SWEEP_VIEWS))
        if not is_temporary and path.name not in SWEEP_VIEWS:
            yield path


def _same_file(first: Path, second: Path) -> bool:
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        return os.path.samefile(first, second)
    except OSError:  # one of them does not exist, so they are not the same
        return False


def _check(option: Field[Any], value: Any) -> Any:
    if value is None and option.default is None:
        return None
    return option.metadata["check"](option.name, value)


def _nearest(word: str, known: Iterable[str]) -> str:
    """Return a "did you mean" ending, or nothing when no known word is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _json_ready(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else type(value).__name__

"""What hap-onnx says about a job, as data; ``to_dict()`` is ready for strict JSON.

The keys are a contract that other programs read. Rendering for people is the command line's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hap_onnx.report.analysis import Analysis, WorstSample

COMPRESS_SCHEMA = "hap-onnx/compress/1"
INSPECT_SCHEMA = "hap-onnx/inspect/1"
VALIDATE_SCHEMA = "hap-onnx/validate/1"
SWEEP_SCHEMA = "hap-onnx/sweep/1"
ANALYZE_SCHEMA = "hap-onnx/analyze/1"


@dataclass(frozen=True)
class ModelFacts:
    """Size, cost and quality of one model.

    ``params``: elements of float initializers, shared ones once. ``macs``: multiply-accumulates of one
    run at the data's input shape, for one sample; None when the shape is not known. ``bytes``: the
    file with its external data. ``latency_ms``: median milliseconds of one run in onnxruntime.
    ``metric``: the quality metric. None where it was not measured.
    """

    params: int
    macs: int | None
    bytes: int
    latency_ms: float | None = None
    metric: float | None = None


@dataclass(frozen=True)
class Quality:
    """The gate: the metric of both models on the report part of the data.

    ``drop`` is ``before - after``; ``interval`` its 95 % interval; ``max_drop`` None means no gate.
    """

    metric: str
    before: float
    after: float
    drop: float
    interval: tuple[float, float]
    n_samples: int
    max_drop: float | None
    passed: bool


@dataclass(frozen=True)
class Fidelity:
    """How near the outputs are to the original's; ``agreement`` is None without class scores."""

    r2: float | None
    agreement: float | None
    max_abs_error: float | None


@dataclass(frozen=True)
class GroupKept:
    """One channel group in a plan: ``kept`` of ``size`` channels stay, and why."""

    name: str
    size: int
    kept: int
    why: str | None = None


@dataclass(frozen=True)
class MeasuredLoss:
    """One implant of a layer that was tried: the loss that its curvature predicted, and the measured one."""

    kind: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class ImplantUsed:
    """A cheaper replacement of (part of) a node; ``kind`` is pointwise, lowrank or spatial.

    ``predicted_loss`` is what the curvature of the layer says; ``expected_loss`` that, corrected by what was
    ``measured`` on the layer.
    """

    node: str
    kind: str
    rank: int | None
    predicted_loss: float | None = None
    expected_loss: float | None = None
    measured: tuple[MeasuredLoss, ...] = ()


@dataclass(frozen=True)
class LayerChosen:
    """What became of one layer, and why.

    ``choice`` is dense (as it is), removed (with its branch) or the kind of its implant.
    """

    node: str
    choice: str
    why: str


@dataclass(frozen=True)
class PlanSummary:
    """What a plan does; ``removed_branches`` names the last node of each residual branch that goes.

    ``layers`` says of every layer what was chosen and why, those with ``implants`` included.
    """

    groups: tuple[GroupKept, ...] = ()
    implants: tuple[ImplantUsed, ...] = ()
    removed_branches: tuple[str, ...] = ()
    layers: tuple[LayerChosen, ...] = ()


TRAINING_FACTS = ("epochs", "best_epoch", "start_score", "best_score", "rollbacks", "augmentations")


@dataclass(frozen=True)
class RoundRecovered:
    """How the result of one round was repaired: ``method`` is none, refit or distill.

    The rest is None without training. Scores are distances to the original (and to labels) on samples set
    aside, before training and at best; ``best_epoch`` says when that was, 0 for before; ``rollbacks`` how
    often training failed and was taken up again with half the rate.
    """

    method: str
    epochs: int | None = None
    best_epoch: float | None = None
    start_score: float | None = None
    best_score: float | None = None
    rollbacks: int | None = None
    augmentations: tuple[str, ...] | None = None


@dataclass(frozen=True)
class FrozenNode:
    """A node whose channels cannot be removed, and why, in words for a user."""

    node: str
    reason: str


@dataclass(frozen=True)
class Budget:
    """Budgets by option name, such as ``keep_macs`` or ``max_bytes``: asked for and reached.

    ``reached`` may tell more than was asked.
    """

    asked: Mapping[str, float] = field(default_factory=dict)
    reached: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """What ``--then`` did, by model: ``original``, ``compressed``, the original converted in the same way
    (``quantized``; None where it was not tried or cannot be), and ``both``, the final file.

    ``kind`` is int8 or fp16. ``settings`` of int8: ``calibration`` (how ranges were taken: minmax or
    percentile) and ``weight_bits``. ``left`` names the layers that stay in float32. Latencies are times on
    this machine: that of float16 says little where the provider has no kernels for it.
    """

    kind: str
    settings: Mapping[str, str | int]
    original: ModelFacts
    compressed: ModelFacts
    quantized: ModelFacts | None
    both: ModelFacts
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Latency:
    """The two models timed in turn on this machine: medians, and the ratio after / before of each round.

    ``interval`` is the 95 % interval of ``ratio``, its median over ``n_rounds`` rounds.
    """

    before_ms: float
    after_ms: float
    ratio: float
    interval: tuple[float, float]
    n_rounds: int
    threads: int | None
    provider: str
    batch: int


@dataclass(frozen=True)
class CompressReport:
    """The result of ``compress``, and of ``apply`` (there without quality and fidelity).

    ``output`` is None when no model was written (a dry run); ``seconds`` is per stage; ``recovery`` has one
    entry per round; ``latency`` is None where nothing was timed. With ``--then``, ``after``, ``quality``,
    ``fidelity`` and ``latency`` are those of the final file, and ``then`` tells the steps apart; it is None
    without. ``analysis`` and ``worst`` are there where a report for people was asked for.
    """

    model: str
    output: str | None
    before: ModelFacts
    after: ModelFacts
    quality: Quality | None
    fidelity: Fidelity | None
    plan: PlanSummary
    frozen: tuple[FrozenNode, ...]
    budget: Budget
    seconds: Mapping[str, float]
    seed: int
    versions: Mapping[str, str]
    recovery: tuple[RoundRecovered, ...] = ()
    latency: Latency | None = None
    then: Conversion | None = None
    analysis: Analysis | None = None
    worst: tuple[WorstSample, ...] = ()
    schema: str = COMPRESS_SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Return the report with plain types only; numbers that are not finite become None."""
        return _to_dict(self)


@dataclass(frozen=True)
class GroupInfo:
    """One channel group that may shrink.

    ``role`` says what it is: ``inner``, ``residual`` (a stream that several layers add to) or ``heads``
    (of attention); channels go in steps of
    ``multiple``; ``params`` and ``macs`` are what removing all of it could save at most.
    """

    name: str
    size: int
    role: str
    multiple: int = 1
    params: int | None = None
    macs: int | None = None


@dataclass(frozen=True)
class Share:
    """A part of the model in [0, 1]; ``macs_ratio`` is None where nothing is counted."""

    params_ratio: float
    macs_ratio: float | None


@dataclass(frozen=True)
class LayerInfo:
    """What can be done to one layer, and if nothing can, why.

    ``groups`` are those whose channels it makes, ``prune`` says why these are none; ``implants`` are the
    kinds that can take its place, ``implant`` says why these are none. A reason that is not needed is "".
    """

    node: str
    op_type: str
    params: int
    macs: int
    groups: tuple[str, ...]
    prune: str
    implants: tuple[str, ...]
    implant: str


@dataclass(frozen=True)
class InspectReport:
    """The result of ``inspect``: size, channel groups, and what is frozen and why.

    ``prunable`` belongs to groups that may shrink, ``implantable`` to layers that implants can replace, and
    ``fixed`` to neither.
    """

    model: str
    size: ModelFacts
    groups: tuple[GroupInfo, ...]
    frozen: tuple[FrozenNode, ...]
    layers: tuple[LayerInfo, ...]
    prunable: Share
    implantable: Share
    fixed: Share
    versions: Mapping[str, str]
    schema: str = INSPECT_SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Return the report with plain types only; numbers that are not finite become None."""
        return _to_dict(self)


@dataclass(frozen=True)
class ValidateReport:
    """The result of ``validate``: two models compared on the same data.

    ``slower`` tells whether the candidate is slower than the reference beyond noise; ``passed``
    whether all gates hold.
    """

    reference: str
    candidate: str
    before: ModelFacts
    after: ModelFacts
    quality: Quality
    fidelity: Fidelity
    slower: bool
    passed: bool
    seconds: Mapping[str, float]
    seed: int
    versions: Mapping[str, str]
    latency: Latency | None = None
    schema: str = VALIDATE_SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Return the report with plain types only; numbers that are not finite become None."""
        return _to_dict(self)


@dataclass(frozen=True)
class SweepPoint:
    """One model of a sweep: the smallest loss that was found for its budget.

    ``keep`` is the fraction that was asked for. ``plan`` is the file in the sweep's folder from which
    ``apply`` writes the model, None where none was kept; ``refused`` says why a point is none to choose. A
    point without a model has no figures. ``reached`` holds fractions by budget, see ``Budget``; ``best``
    tells whether no other point is at least as good and at least as cheap, and better in one of the two.
    """

    keep: float
    plan: str | None
    refused: str | None = None
    after: ModelFacts | None = None
    quality: Quality | None = None
    fidelity: Fidelity | None = None
    latency: Latency | None = None
    reached: Mapping[str, float] = field(default_factory=dict)
    best: bool = False


@dataclass(frozen=True)
class SweepReport:
    """The result of ``sweep``: a family of models of falling cost, in the order of ``asked``.

    ``output`` is the folder with their plans, None where nothing was written; ``objective`` is the cost that
    falls: params, macs or latency; ``before`` was measured with the first model. A sweep that was interrupted
    is not ``complete``: it holds the points that were finished.
    """

    model: str
    output: str | None
    objective: str
    asked: tuple[float, ...]
    complete: bool
    before: ModelFacts
    points: tuple[SweepPoint, ...]
    seconds: Mapping[str, float]
    seed: int
    versions: Mapping[str, str]
    schema: str = SWEEP_SCHEMA

    @property
    def budget(self) -> str:
        """The name of the budget that falls, as in ``SweepPoint.reached``."""
        return f"keep_{self.objective}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report with plain types only; numbers that are not finite become None."""
        return _to_dict(self)


@dataclass(frozen=True)
class AnalyzeReport:
    """The result of ``analyze``: how sensitive the model is to each group and layer; nothing is removed."""

    model: str
    size: ModelFacts
    analysis: Analysis
    frozen: tuple[FrozenNode, ...]
    seconds: Mapping[str, float]
    seed: int
    versions: Mapping[str, str]
    schema: str = ANALYZE_SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Return the report with plain types only; numbers that are not finite become None."""
        return _to_dict(self)


ReportForPeople = CompressReport | SweepReport | ValidateReport | AnalyzeReport
"""Those that come as a page and as a summary, too."""
Report = ReportForPeople | InspectReport


def _to_dict(report: Report) -> dict[str, Any]:
    plain: dict[str, Any] = _plain(report)
    return {"schema": plain.pop("schema"), **plain}  # schema first: a reader looks there before anything else


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    number = value.item() if hasattr(value, "item") else value  # numpy scalars
    if isinstance(number, float) and not math.isfinite(number):
        return None
    if isinstance(number, (bool, int, float)):
        return number
    raise TypeError(f"a report cannot hold {type(value).__name__}")

"""What is known of a model's sensitivities, as data: the part of a report that says why a plan is as it is.

All losses are distances of the outputs to the original's, per sample, in the planner's currency: 0 is no
change, 0.5 outputs that are their own mean, and about 1 outputs that have nothing to do with their input (see
``output_distance``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossPoint:
    """One way to make a group or layer cheaper: what it is ``predicted`` to cost, and what it is.

    ``keep`` is the share that stays, in [0, 1]: of a group's channels, or of a layer's multiply-accumulates.
    ``predicted`` is what the curvature says; ``measured`` the mean over samples, with its ``std_error``, None
    where that point was not measured; ``expected`` is what the planner reckons with, after both.
    """

    keep: float
    predicted: float
    expected: float
    measured: float | None = None
    std_error: float | None = None


@dataclass(frozen=True)
class GroupSensitivity:
    """How sensitive the model is to one channel group, in the order of the model.

    ``score`` is the sensitivity per channel. With ``obs``, which has no score of a single channel, it is the
    measured loss with half of the group's channels gone and their readers refitted, shared out among those
    that go; ``std_error`` is how far its mean over samples errs, the order of removal taken as given. With
    any other sensitivity it is the mean score of the group's channels, in the unit of that sensitivity, and
    ``std_error`` the mean of their standard errors: the error of the mean is that at most, since channels
    share random vectors. The score is infinite where nothing is known, such as where no gradient reaches a
    channel; the error is None where there is none.

    ``kept`` is what the plan leaves of ``size`` channels, None without a plan. ``nodes`` make its channels,
    or pass each on by itself (depthwise layers). ``params`` and ``macs`` are what the group could save at
    most. ``curve`` ascends in width.
    """

    name: str
    role: str
    size: int
    nodes: tuple[str, ...]
    params: int
    macs: int
    score: float
    std_error: float | None
    curve: tuple[LossPoint, ...]
    kept: int | None = None


@dataclass(frozen=True)
class ImplantCurve:
    """What one kind of implant costs in one layer with all its channels, from the cheapest to the dearest."""

    kind: str
    points: tuple[LossPoint, ...]


@dataclass(frozen=True)
class LayerSensitivity:
    """How sensitive the model is to one layer that implants could replace, in the order of the model.

    ``score`` is the expected loss of an implant that takes about half of the layer's multiply-accumulates (a
    quarter to three quarters), at best over kinds; infinite where there is none. ``std_error`` is that
    of the nearest loss that was measured on the layer, over samples and relative to that loss (None where
    nothing was measured): it knows nothing of how wrong the correction is in between. ``chosen`` is dense,
    removed or the kind that the plan puts there, None without a plan.
    """

    node: str
    op_type: str
    params: int
    macs: int
    score: float
    std_error: float | None
    curves: tuple[ImplantCurve, ...]
    chosen: str | None = None


@dataclass(frozen=True)
class SizePoint:
    """The plan of least expected loss for one budget; ratios are fractions of the original.

    ``loss`` is the sum of what the choices are expected to cost; ``latency_ratio`` is None where no times are
    known.
    """

    asked: float
    params_ratio: float
    macs_ratio: float
    loss: float
    latency_ratio: float | None = None


@dataclass(frozen=True)
class Analysis:
    """What was found out about a model before anything was removed.

    ``sensitivity`` names the estimator; ``n_samples`` is what losses were measured on. ``sizes`` are plans
    from large to small, by the budget that ``objective`` names (params, macs or latency); ``chosen`` is the
    point of the plan that was carried out, None without one.
    """

    sensitivity: str
    n_samples: int
    objective: str
    groups: tuple[GroupSensitivity, ...]
    layers: tuple[LayerSensitivity, ...]
    sizes: tuple[SizePoint, ...]
    chosen: SizePoint | None = None


@dataclass(frozen=True)
class WorstSample:
    """A sample of the report part on which the two models differ most, first ones first.

    ``index`` counts in the order of the data, ``source`` is the file's name within the data (None for
    arrays); ``distance`` is that of the outputs; ``before`` and ``after`` are what the models say (the top
    class), ``label`` what is right; None where there are no classes.
    """

    index: int
    source: str | None
    distance: float
    label: str | None = None
    before: str | None = None
    after: str | None = None

"""Reports as a job would return them."""

from __future__ import annotations

import math

from hap_onnx.report import (
    AnalyzeReport,
    Budget,
    CompressReport,
    Fidelity,
    FrozenNode,
    GroupInfo,
    GroupKept,
    ImplantUsed,
    InspectReport,
    Latency,
    LayerChosen,
    LayerInfo,
    MeasuredLoss,
    ModelFacts,
    PlanSummary,
    Quality,
    RoundRecovered,
    Share,
    SweepPoint,
    SweepReport,
    ValidateReport,
)
from hap_onnx.report.analysis import (
    Analysis,
    GroupSensitivity,
    ImplantCurve,
    LayerSensitivity,
    LossPoint,
    SizePoint,
    WorstSample,
)

BEFORE = ModelFacts(855_770, 125_485_706, 3_434_567, 2.41, 0.9272)
AFTER = ModelFacts(402_113, 62_000_000, 1_643_567, 1.72, 0.919)
QUALITY = Quality("accuracy", 0.9272, 0.919, 0.0082, (0.001, 0.015), 1017, 0.01, True)
FIDELITY = Fidelity(0.98, 0.961, 1.2)


def compress_report(**changes):
    facts = {
        "model": "models/net.onnx", "output": "models/net.hap.onnx", "before": BEFORE, "after": AFTER,
        "quality": QUALITY, "fidelity": FIDELITY,
        "plan": PlanSummary(
            (GroupKept("a", 16, 8, "half is copies"), GroupKept("b", 32, 32)),
            (ImplantUsed("c", "lowrank", 4, 0.25, 0.5, (MeasuredLoss("spatial", 0.125, 0.25),)),),
            ("add_3",),
            (LayerChosen("c", "lowrank", "it fits"),),
        ),
        "frozen": (FrozenNode("Gemm_1", "feeds a graph output"),),
        "budget": Budget({"keep_macs": 0.5, "max_bytes": 2e6}, {"keep_macs": 0.494, "max_bytes": 1_643_567}),
        "seconds": {"load": 1.2, "refit": 31.0}, "seed": 0, "versions": {"hap-onnx": "0.1.0"}, **changes,
    }  # fmt: skip
    return CompressReport(**facts)


def inspect_report():
    groups = tuple(GroupInfo(f"layer{i}/conv1", 64, "inner", 8, 1000 * i, 10**i) for i in range(1, 9))
    frozen = tuple(FrozenNode(f"node_{i}", "feeds a graph output") for i in range(5))
    layers = (
        LayerInfo("node_0", "Conv", 100, 10**6, (), "feeds a graph output", ("lowrank", "spatial"), ""),
        LayerInfo("layer1/conv1", "Gemm", 100, 10**6, ("layer1/conv1",), "", (), "it is excluded"),
    )
    shares = Share(0.9, None), Share(0.5, 0.25), Share(0.05, 0.125)
    return InspectReport("net.onnx", BEFORE, groups, frozen, layers, *shares, {})


def validate_report(**changes):
    facts = {
        "reference": "a.onnx", "candidate": "b.onnx", "before": BEFORE, "after": AFTER, "quality": QUALITY,
        "fidelity": FIDELITY, "slower": False, "passed": True, "seconds": {}, "seed": 0, "versions": {},
        **changes,
    }  # fmt: skip
    return ValidateReport(**facts)


def sweep_report(*, objective="macs", **changes):
    """Two points that are best, one that another beats, one that fails its gate, one without a model."""

    def point(keep, macs, after, *, latency, best=False, refused=None):
        drop = 0.9272 - after
        quality = Quality("accuracy", 0.9272, after, drop, (drop - 0.0062, drop + 0.0058), 1017, None, True)
        timed = Latency(2.4, 2.4 * latency, latency, (latency - 0.01, latency + 0.01), 99, 1, "CPU", 1)
        reached = {"keep_macs": macs, "keep_params": macs + 0.05, "keep_latency": latency}
        plan = None if refused else f"keep-{objective}-{keep:.2f}.json"
        return SweepPoint(keep, plan, refused, AFTER, quality, FIDELITY, timed, reached, best)

    facts = {
        "model": "models/net.onnx", "output": "models/net.hap.sweep", "objective": objective,
        "asked": (0.9, 0.7, 0.5, 0.3, 0.0001), "complete": True, "before": BEFORE,
        "points": (
            point(0.9, 0.895, 0.926, latency=0.8, best=True),
            point(0.7, 0.69, 0.924, latency=0.7),
            point(0.5, 0.499, 0.925, latency=0.6, best=True),
            point(0.3, 0.298, 0.8, latency=0.5, refused="accuracy drops by 0.1272"),
            SweepPoint(0.0001, None, "the budget cannot be reached"),
        ),
        "seconds": {"load": 1.2, "compress": 31.0}, "seed": 0, "versions": {"hap-onnx": "0.1.0"}, **changes,
    }  # fmt: skip
    return SweepReport(**facts)


def analyze_report():
    """Two groups, the more sensitive one first, a layer that an implant could replace, two sizes."""
    curve = (LossPoint(0.5, 0.2, 0.25, 0.25, 0.02), LossPoint(1.0, 0.0, 0.0))
    groups = (
        GroupSensitivity("wide", "residual", 64, ("conv_1", "conv_2"), 4000, 8000, 0.5, None, curve),
        GroupSensitivity("narrow", "inner", 32, ("conv_3",), 1000, 2000, 0.125, 0.01, curve),
    )
    layer = LayerSensitivity("conv_3", "Conv", 900, 1800, 0.3, 0.05, (ImplantCurve("lowrank", curve),))
    sizes = (SizePoint(0.9, 0.92, 0.9, 0.05), SizePoint(0.5, 0.6, 0.5, 0.25, 0.7))
    analysis = Analysis("gauss-newton", 512, "macs", groups, (layer,), sizes)
    frozen = (FrozenNode("Gemm_1", "feeds a graph output"),)
    seconds, versions = {"load": 1.2}, {"hap_onnx": "0.1.0"}
    return AnalyzeReport("models/net.onnx", BEFORE, analysis, frozen, seconds, 0, versions)


def layer_name(place):
    """As exporters name the layers of a residual network."""
    return f"/layer{1 + place // 18}/layer{1 + place // 18}.{place // 2 % 9}/conv{1 + place % 2}/Conv"


def analysis(n_groups=28, n_layers=55, *, planned=True):
    """Sensitivities that span some decades, with every second layer replaced and most groups narrower."""

    def score(place):
        return 10 ** (-3 + 1.2 * math.sin(place) - place / 80)

    def curve(scale):
        points = []
        for place, keep in enumerate((0.25, 0.5, 0.75)):
            predicted = scale * (1 - keep) ** 2 * 8
            measured = None if place == 1 else predicted * (1.5 + math.sin(scale * 1e5 + place))
            error = None if measured is None else measured / 8
            points.append(LossPoint(keep, predicted, 1.1 * predicted, measured, error))
        return tuple(points)

    groups = tuple(
        GroupSensitivity(
            layer_name(2 * place), "inner", 16, (layer_name(2 * place),), 4608, 4_718_592, score(place),
            score(place) / 5, curve(score(place)), (16, 12, 8, 4)[place % 4] if planned else None,
        )
        for place in range(n_groups)
    )  # fmt: skip
    layers = tuple(
        LayerSensitivity(
            layer_name(place), "Conv", 2304, 2_359_296, score(place + 0.5), score(place + 0.5) / 3,
            (ImplantCurve("lowrank", curve(score(place))), ImplantCurve("spatial", curve(2 * score(place)))),
            ("dense", "lowrank", "dense", "spatial")[place % 4] if planned else None,
        )
        for place in range(n_layers)
    )  # fmt: skip
    sizes = tuple(
        SizePoint(keep / 20, keep / 20 + 0.01, keep / 20, 0.3 * (1 - keep / 20) ** 3)
        for keep in range(20, 3, -1)
    )
    chosen = SizePoint(0.5, 0.51, 0.494, 0.04) if planned else None
    return Analysis("gauss-newton", 512, "macs", groups, layers, sizes, chosen)


def frozen_nodes(n):
    reasons = (
        "feeds a graph output",
        "LayerNormalization normalises over the channels",
        "Add joins what must stay",
    )
    return tuple(FrozenNode(f"/head/part.{place}/Gemm", reasons[min(place % 4, 2)]) for place in range(n))


WORST = (
    WorstSample(17, "cat/0017.png", 1.32, "cat", "cat", "dog"),
    WorstSample(3, "dog/0003.png", 0.91, "dog", "cat", "dog"),
    WorstSample(250, "owl/0250.png", 0.5, "owl", "owl", "owl"),
)


def full_report(n_groups=28, n_layers=55, **changes):
    """All that a report of ``compress`` can hold, but for ``then``."""
    known = analysis(n_groups, n_layers)
    plan = PlanSummary(
        tuple(GroupKept(group.name, group.size, group.kept or 0, "measured") for group in known.groups),
        tuple(
            ImplantUsed(
                layer.node, layer.chosen, 8, 0.001, 0.0012, (MeasuredLoss(layer.chosen, 0.001, 0.0012),)
            )
            for layer in known.layers
            if layer.chosen not in ("dense", None)
        ),
        (layer_name(7),),
        tuple(LayerChosen(layer.node, layer.chosen, "it loses least per cost") for layer in known.layers),
    )
    facts = {
        "plan": plan, "analysis": known, "worst": WORST, "frozen": frozen_nodes(30),
        "latency": Latency(2.41, 1.72, 0.714, (0.70, 0.73), 101, 1, "CPUExecutionProvider", 1),
        "recovery": (RoundRecovered("distill", 20, 17.0, 0.12, 0.08, 1, ("flip", "shift")),),
        "seconds": {"load": 0.3, "prepare": 1.9, "sensitivity": 61.2, "compress": 48.0,
        "train": 310.0, "write": 0.2},
        "versions": {"hap_onnx": "0.1.0", "onnx": "1.23.2", "onnxruntime": "1.31.1", "torch": "2.13.0",
                     "python": "3.11.2"},
        **changes,
    }  # fmt: skip
    return compress_report(**facts)


def full_analysis(n_groups=28, n_layers=55, **changes):
    """A report of ``analyze`` on a model of many layers."""
    facts = {
        "model": "models/net.onnx", "size": BEFORE, "analysis": analysis(n_groups, n_layers, planned=False),
        "frozen": frozen_nodes(5), "seconds": {"load": 0.3, "sensitivity": 61.2}, "seed": 0,
        "versions": {"hap_onnx": "0.1.0"}, **changes,
    }  # fmt: skip
    return AnalyzeReport(**facts)

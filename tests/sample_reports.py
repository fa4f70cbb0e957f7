"""Reports as a job would return them."""

from __future__ import annotations

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

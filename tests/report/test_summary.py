"""The sentences that say why: each fits its cause, and numbers beside them are those of the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from planning_cases import Job, make_job
from sample_reports import compress_report
from topologies import TOPOLOGIES, Net

from hap_onnx.jobs.carry_out import compress_layers, cut_model
from hap_onnx.model.model_io import load_model, to_proto
from hap_onnx.planning.choose import Choice, choose
from hap_onnx.planning.paper import choose_by_threshold
from hap_onnx.planning.plan import CompressionPlan, GroupDecision, NodeReplacement
from hap_onnx.prepare import prepare
from hap_onnx.report import MeasuredLoss
from hap_onnx.report.summary import (
    explain_groups,
    explain_layers,
    plan_summary,
    recovery_summary,
    with_measured,
)
from hap_onnx.report.words import plan_lines

UNUSED = "as it is: the method does not use implants"
COSTLY = "as it is: an implant that is cheaper loses more per cost than what was done elsewhere"
SLOW = "as it is: no implant of it saved enough time in onnxruntime"


@cache
def job(*, exclude: tuple[str, ...] = (), sensitivity: str = "obs") -> Job:
    return make_job(TOPOLOGIES["residual"]().model, exclude=exclude, sensitivity=sensitivity)


def make_choice(one: Job, widths: Mapping[str, int], *replacements: NodeReplacement, **facts: Any) -> Choice:
    """Keep the first so many elements of the groups named here, and all of the others."""
    decisions = (
        GroupDecision.from_keep(group.name, group.size, range(widths.get(group.name, group.size)))
        for group in one.prepared.coupling.groups
    )
    return Choice(tuple(decisions), replacements, **facts)


def make_plan(choice: Choice, **facts: Any) -> CompressionPlan:
    """Return a plan with a choice; the summary reads no more of the rest than ``facts``."""
    return CompressionPlan(
        **{
            "model_sha256": "",
            "version": "",
            "config": {},
            "decisions": choice.decisions,
            "replacements": choice.replacements,
            **facts,
        }
    )


def layers_of(one: Job, choice: Choice, kinds: Mapping[str, Any], **options: Any) -> dict[str, str]:
    cut = cut_model(one.prepared, choice, one.losses.implants)
    left = {node.name for node in compress_layers(cut).graph.nodes}
    return explain_layers(one.prepared, one.losses, choice, kinds, left=left, **options)


# --- groups ---


def test_widths_are_explained_by_what_they_are_expected_to_lose() -> None:
    one = job()
    curves = {curve.group: curve for curve in one.losses.curves}
    assert {4} < set(curves["make_a1"].measured)
    assert 5 not in curves["make_b1"].measured
    notes = explain_groups(one.losses, make_choice(one, {"make_a1": 4, "make_b1": 5}))
    assert notes == {
        "make_stem": "whole: removing channels here loses more per cost than elsewhere",
        "make_a1": f"2 channels go: expected loss {curves['make_a1'].loss[4]:.3g} (measured)",
        "make_b1": f"1 channels go: expected loss {curves['make_b1'].loss[5]:.3g} "
        "(interpolated between measured widths)",
    }
    assert explain_groups(one.losses, make_choice(one, {"make_b1": 0}))["make_b1"] == (
        f"the whole branch goes: expected loss {curves['make_b1'].loss[0]:.3g} (measured)"
    )


def test_groups_that_a_plan_leaves_alone_are_not_said_to_be_costly() -> None:
    one = job()
    choice = make_choice(one, {"make_a1": 4}, whole=frozenset({"make_stem"}))
    notes = explain_groups(one.losses, choice)
    assert notes["make_stem"] == "whole: this plan leaves it alone, and does better than one that does not"
    assert notes["make_b1"] == "whole: removing channels here loses more per cost than elsewhere"
    choice = make_choice(one, {}, whole=frozenset({"make_stem", "make_a1", "make_b1"}))
    assert set(explain_groups(one.losses, choice, method="implant").values()) == {
        "whole: the method does not remove channels"
    }
    assert set(explain_groups(one.losses, choice, method="hap").values()) == {
        "whole: this plan leaves it alone, and does better than one that does not"
    }


def test_widths_of_the_papers_recipe_are_explained_by_the_threshold() -> None:
    one = job()
    curves = {curve.group: curve for curve in one.losses.curves}
    notes = explain_groups(one.losses, make_choice(one, {"make_a1": 4}), preset="paper")
    assert notes == {
        "make_stem": "whole: all its channels are above the threshold",
        "make_a1": f"2 channels go, below the threshold: expected loss {curves['make_a1'].loss[4]:.3g}",
        "make_b1": "whole: all its channels are above the threshold",
    }


# --- layers ---


def implant(node: str = "make_b2") -> NodeReplacement:
    return NodeReplacement(node, "lowrank", 3, predicted_loss=0.25, expected_loss=0.5)


def test_layers_with_implants_tell_both_losses_and_how_they_are_known() -> None:
    one = job()
    assert len(one.losses.implants["make_b2"].predicted) == 2
    choice = make_choice(one, {}, implant())
    notes = layers_of(one, choice, one.kinds)
    assert notes.pop("make_b2") == (
        "lowrank of rank 3: loses less per cost than other ranks and narrower widths; predicted loss 0.25, "
        "expected 0.5 (corrected by 2 measurements of spatial here)"
    )
    assert set(notes) == {"make_stem", "make_a1", "make_a2", "make_b1", "make_y"}
    assert set(notes.values()) == {COSTLY}


def test_an_implant_whose_layer_was_not_measured_says_so() -> None:
    net = Net()
    x = net.relu(net.conv("x", 3, 1, k=1, out="a"))
    net.conv(x, 1, 4, out="y")
    one = make_job(net.model("y"))
    empty = np.zeros(0)
    implants = {
        name: replace(losses, predicted=empty, ratios=empty) for name, losses in one.losses.implants.items()
    }
    losses = replace(one.losses, implants=implants)
    replacement = NodeReplacement("make_y", "spatial", 1, predicted_loss=0.25, expected_loss=0.25)
    choice = make_choice(one, {}, replacement)
    left = {"make_a", "make_y"}
    notes = explain_layers(one.prepared, losses, choice, one.kinds, left=left)
    assert notes["make_y"].endswith("predicted loss 0.25, expected 0.25 (not measured)")
    assert with_measured(losses, choice.replacements)[0].measured == ()


def test_the_cause_that_comes_first_is_told() -> None:
    """A layer that is gone is not slow, and one that is excluded has no implant whose time could count."""
    one = job(exclude=("make_b2",))
    choice = make_choice(one, {})
    slow = {name: ({} if name == "make_a2" else shares) for name, shares in one.kinds.items()}
    assert layers_of(one, choice, slow) == {
        "make_stem": COSTLY,
        "make_a1": COSTLY,
        "make_a2": SLOW,
        "make_b1": COSTLY,
        "make_b2": "as it is: it is excluded",
        "make_y": COSTLY,
    }
    one = job()
    gone = layers_of(one, make_choice(one, {"make_b1": 0}), {name: {} for name in one.kinds})
    assert {name for name, why in gone.items() if why == "gone: its branch is removed"} == {
        "make_b1", "make_b2",
    }  # fmt: skip
    assert {why for name, why in gone.items() if "_b" not in name} == {SLOW}


def test_without_implants_layers_stay_because_of_the_method() -> None:
    one = job()
    assert set(layers_of(one, make_choice(one, {"make_a1": 3}), {}, method="prune").values()) == {UNUSED}
    notes = layers_of(one, make_choice(one, {"make_b1": 0}), {}, method="prune")
    assert notes["make_b2"] == "gone: its branch is removed"
    assert notes["make_a2"] == UNUSED


def test_a_model_in_which_nothing_fits_is_not_blamed_on_the_method() -> None:
    one = job(exclude=("make_*",))
    assert not one.kinds
    for method in ("hap", "implant"):
        notes = layers_of(one, make_choice(one, {}), {}, method=method)
        assert set(notes.values()) == {"as it is: it is excluded"}


def test_layers_that_no_implant_fits_say_why() -> None:
    net = Net()
    weight = net.rand(6, 6, 3, 3)
    x = net.conv("x", 3, 6, out="a")
    for name in "bc":
        x = net.relu(net.conv(x, 6, 6, weight=weight, out=name))
    x = net.conv(x, 6, 6, group=6, out="depthwise")
    net.conv(x, 6, 4, out="y")
    one = make_job(net.model("y"))
    notes = layers_of(one, make_choice(one, {}), one.kinds)
    shared = f"as it is: its weight '{weight}' is used elsewhere, too"
    assert notes["make_b"] == notes["make_c"] == shared
    assert notes["make_a"] == notes["make_y"] == COSTLY
    assert "channels go together with those that it reads" in notes["make_depthwise"]
    assert (notes["make_depthwise"] == COSTLY) == ("make_depthwise" in one.kinds)


def test_layers_of_the_papers_recipe_are_explained_by_the_threshold() -> None:
    one = job(sensitivity="hutchinson")
    choice = choose_by_threshold(one.prepared, one.losses, one.budgets(macs=0.6), kinds=one.kinds)
    notes = layers_of(one, choice, one.kinds, preset="paper")
    assert choice.replacements
    for r in choice.replacements:
        assert notes.pop(r.node) == (
            f"pointwise of rank {r.rank}: its channels are the most sensitive below the threshold; "
            f"expected loss {r.expected_loss:.3g}"
        )
    assert set(notes.values()) == {
        "as it is: none of its channels is among the most sensitive of those below the threshold"
    }
    pruned = choose_by_threshold(one.prepared, one.losses, one.budgets(macs=0.6), kinds={})
    notes = layers_of(one, pruned, {}, method="prune", preset="paper")
    assert set(notes.values()) == {UNUSED}


# --- the summary as a whole ---


def test_measured_losses_stand_beside_what_was_predicted_there() -> None:
    one = job()
    choice = make_choice(one, {}, implant("make_a2"), implant("make_b2"))
    found = with_measured(one.losses, choice.replacements)
    assert [replacement.node for replacement in found] == ["make_a2", "make_b2"]
    for replacement in found:
        losses = one.losses.implants[replacement.node]
        same = (replacement.kind, replacement.rank, replacement.predicted_loss, replacement.expected_loss)
        assert same == ("lowrank", 3, 0.25, 0.5)
        assert len(replacement.measured) == 2
        for entry, predicted, ratio in zip(
            replacement.measured, losses.predicted, losses.ratios, strict=True
        ):
            kind, first, second = entry
            assert kind == "spatial"
            assert first == predicted
            assert second == pytest.approx(predicted * ratio)
            # What the planner expects of an implant as bad as this one is what was measured.
            assert losses.correct(np.array([predicted]))[0] == pytest.approx(second)


def test_a_summary_tells_of_groups_implants_and_branches() -> None:
    one = job()
    measured = (("spatial", 0.125, 0.25),)
    used = replace(implant("make_a2"), measured=measured)
    choice = make_choice(one, {"make_a1": 4, "make_b1": 0}, used)
    notes = layers_of(one, choice, one.kinds)
    plan = plan_summary([one.prepared], make_plan(choice, notes={"make_a1": "because"}, layer_notes=notes))
    assert [(entry.name, entry.size, entry.kept, entry.why) for entry in plan.groups] == [
        ("make_stem", 8, 8, None), ("make_a1", 6, 4, "because"), ("make_b1", 6, 0, None),
    ]  # fmt: skip
    (told,) = plan.implants
    assert (told.node, told.kind, told.rank, told.predicted_loss, told.expected_loss) == (
        "make_a2", "lowrank", 3, 0.25, 0.5,
    )  # fmt: skip
    assert told.measured == (MeasuredLoss("spatial", 0.125, 0.25),)
    assert plan.removed_branches == ("make_b2",)
    assert {entry.node: entry.choice for entry in plan.layers} == {
        **dict.fromkeys(notes, "dense"), "make_a2": "lowrank", "make_b1": "removed", "make_b2": "removed",
    }  # fmt: skip
    assert {entry.node: entry.why for entry in plan.layers} == notes
    told_lines = plan_lines(compress_report(plan=plan))
    assert told_lines[0].endswith("1 implant (1 lowrank), 1 residual branch removed (2 layers)")
    bare = plan_summary([one.prepared], make_plan(make_choice(one, {}, implant())))
    assert bare.implants[0].measured == ()
    assert bare.layers == ()


def test_rounds_are_summed_up_as_what_became_of_the_original() -> None:
    """Round 1 narrows a1 from 6 to 4 and replaces a2; round 2 narrows a1 to 3, the implant and removes b1."""
    one = job()
    first = make_choice(one, {"make_a1": 4}, implant("make_a2"))
    cut = compress_layers(cut_model(one.prepared, first, one.losses.implants))
    proto = to_proto(cut.finished(), one.prepared.source)
    second = prepare(load_model(proto), one.prepared.probe)
    sizes = {group.name: group.size for group in second.coupling.groups}
    (rank_group,) = set(sizes) - {"make_stem", "make_a1", "make_b1"}
    assert sizes == {"make_stem": 8, "make_a1": 4, "make_b1": 6, rank_group: 3}
    widths = {"make_a1": 3, "make_b1": 0, rank_group: 2}
    decisions = tuple(
        GroupDecision.from_keep(name, size, range(widths.get(name, size))) for name, size in sizes.items()
    )
    notes = layers_of(one, first, one.kinds)
    later = {node.name: "later" for node in second.graph.nodes if node.op == "Conv"}
    plan = CompressionPlan(
        "",
        "",
        {},
        decisions,
        layer_notes=later,
        notes={"make_a1": "again"},
        earlier=(make_plan(first, layer_notes=notes, notes={"make_a1": "once", "make_stem": "whole"}),),
    )
    found = plan_summary([one.prepared, second], plan)
    assert [(entry.name, entry.size, entry.kept, entry.why) for entry in found.groups] == [
        ("make_stem", 8, 8, None), ("make_a1", 6, 3, "again"), ("make_b1", 6, 0, None),
        (rank_group, 3, 2, None),
    ]  # fmt: skip
    assert [(used.node, used.kind, used.rank) for used in found.implants] == [("make_a2", "lowrank", 3)]
    assert found.removed_branches == ("make_b2",)
    choices = {entry.node: entry for entry in found.layers}
    assert choices["make_a2"].choice == "lowrank"
    assert choices["make_a2"].why == notes["make_a2"]  # the later round knows its factors only
    assert {name for name, entry in choices.items() if entry.why == "later"} == set(later) - {"make_a2"}
    assert set(choices) == set(notes) | set(later)


def test_every_round_tells_how_it_was_repaired() -> None:
    one = job()
    facts = {
        "epochs": 4, "best_epoch": 2.5, "start_score": 0.5, "best_score": 0.25, "rollbacks": 1,
        "augmentations": ["flip"],
    }  # fmt: skip
    choice = make_choice(one, {})
    first = make_plan(choice, config={"recover": "refit"})
    plan = make_plan(choice, config={"recover": "distill"}, training=facts, earlier=(first,))
    assert [(entry.method, entry.epochs) for entry in recovery_summary(plan)] == [
        ("refit", None), ("distill", 4),
    ]  # fmt: skip
    entry = recovery_summary(plan)[1]
    assert entry.augmentations is not None
    found = {name: getattr(entry, name) for name in facts}
    assert {**found, "augmentations": [*entry.augmentations]} == facts
    assert recovery_summary(make_plan(choice))[0].method == "refit"  # of plans that do not say


@pytest.mark.parametrize("method", ["prune", "implant", "hap"])
def test_every_group_and_every_layer_of_a_real_plan_has_its_sentence(method: str) -> None:
    one = job()
    whole = frozenset(group.name for group in one.prepared.coupling.groups) if method == "implant" else ()
    kinds = {} if method == "prune" else one.kinds
    choice = choose(one.prepared, one.losses, one.budgets(macs=0.6), align=1, whole=whole, kinds=kinds)
    groups = explain_groups(one.losses, choice, method=method)
    layers = layers_of(one, choice, kinds, method=method)
    for decision in choice.decisions:
        assert groups[decision.group].startswith("whole: ") == (len(decision.keep) == decision.size)
    used = {replacement.node for replacement in choice.replacements}
    assert {node for node, why in layers.items() if " of rank " in why} == used
    assert set(layers) == {"make_stem", "make_a1", "make_a2", "make_b1", "make_b2", "make_y"}

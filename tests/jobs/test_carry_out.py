"""Carrying out a choice: any cut, permutation and implants together are what the matrices say."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from planning_cases import (
    Job,
    check_carried_out,
    check_operators,
    make_job,
    priced_totals,
    random_choice,
    real_totals,
)
from topologies import TOPOLOGIES, Net

from hap_onnx.distill.learned import find_learned
from hap_onnx.errors import ModelError, SurgeryError
from hap_onnx.jobs import carry_out
from hap_onnx.jobs.carry_out import compress_layers, cut_model, from_plan_weights, refit_layers
from hap_onnx.model.model_io import to_proto
from hap_onnx.planning.choose import Choice
from hap_onnx.planning.curves import output_distance
from hap_onnx.planning.plan import CompressionPlan, NodeReplacement, load_plan, save_plan
from tools.first_divergence import compare_tensors

NAMES = """residual option_a_shortcut concat dense_block squeeze_and_excitation depthwise_multiplied
    grouped_wide grouped_narrow shuffle_net_units flatten_to_gemm_flatten other_rank_conv1d other_rank_conv3d
    gemm_residual matmul_of_sequences channels_last fixed_batch siamese two_inputs_two_outputs""".split()


@cache
def job(name: str) -> Job:
    return make_job(TOPOLOGIES[name]().model)


@pytest.mark.parametrize("name", NAMES)
def test_any_cut_with_any_implants_computes_the_dense_products(name: str) -> None:
    one, rng = job(name), np.random.default_rng(0)
    kinds: set[str] = set()
    for _ in range(4):
        choice = random_choice(one, rng)
        kinds |= {replacement.kind for replacement in choice.replacements}
        compressed = compress_layers(cut_model(one.prepared, choice, one.losses.implants))
        check_carried_out(one, choice, compressed)
    assert kinds


@pytest.mark.parametrize("name", ["residual", "grouped_wide", "other_rank_conv3d", "gemm_residual"])
def test_at_full_rank_nothing_changes(name: str) -> None:
    one, rng = job(name), np.random.default_rng(1)
    for kinds in (["lowrank"], ["lowrank", "spatial"]):
        choice = random_choice(one, rng, kinds=kinds, full_rank=True, narrow=False)
        assert choice.replacements
        compressed = compress_layers(cut_model(one.prepared, choice, one.losses.implants))
        before, after = one.run(one.prepared.graph), one.run(compressed.finished())
        for name, values in before.items():
            error, problem = compare_tensors(after[name], values)
            assert not problem
            # Spatial factors end where their alternation does.
            assert error < (1e-4 if kinds == ["lowrank"] else 1e-2)


@pytest.mark.parametrize("name", ["residual", "dense_block", "shuffle_net_units", "flatten_to_gemm_flatten"])
@pytest.mark.parametrize("recover", ["none", "refit"])
def test_a_plan_file_gives_the_same_bytes(name: str, recover: str, tmp_path) -> None:
    one, rng = job(name), np.random.default_rng(2)
    for _ in range(3):
        choice = random_choice(one, rng)
        cut = cut_model(one.prepared, choice, one.losses.implants)
        compressed = compress_layers(cut)
        if recover == "refit":
            compressed = refit_layers(cut, one.subset, batch_size=20, seed=0)
            check_operators(one, choice, compressed.finished())
            assert real_totals(one, compressed.finished()) == priced_totals(one, choice)
        plan = CompressionPlan(
            "ab" * 32, "1", {}, choice.decisions, weights=compressed.plan_weights(),
            replacements=choice.replacements,
        )  # fmt: skip
        save_plan(plan, tmp_path / "p.json")
        saved = load_plan(tmp_path / "p.json")
        again = Choice(saved.decisions_for(one.prepared.coupling), saved.replacements)
        result = from_plan_weights(one.prepared, again, saved.weights)
        expected = to_proto(compressed.finished(), one.prepared.source).SerializeToString()
        assert to_proto(result.finished(), one.prepared.source).SerializeToString() == expected


def check_trained(name: str, kinds: list[str], seed: int) -> None:
    """Assert that other values for all that training may change end where they belong, and survive a plan."""
    one, rng = job(name), np.random.default_rng(seed)
    for _ in range(3):
        choice = random_choice(one, rng, kinds=kinds)
        compressed = compress_layers(cut_model(one.prepared, choice, one.losses.implants))
        graph = compressed.finished()
        before = {n: t.values for n, t in graph.tensors().items() if isinstance(t, gs.Constant)}
        values = {
            name: rng.standard_normal(before[name].shape).astype(np.float32) for name in find_learned(graph)
        }
        trained = compressed.with_trained(values)
        again = from_plan_weights(one.prepared, choice, trained.plan_weights())
        for found in (trained.finished(), again.finished()):
            after = {n: t.values for n, t in found.tensors().items() if isinstance(t, gs.Constant)}
            assert list(after) == list(before)
            for name, array in after.items():
                np.testing.assert_array_equal(array, values.get(name, before[name]))


@pytest.mark.parametrize("name", NAMES)
def test_trained_values_end_where_they_belong(name: str) -> None:
    check_trained(name, ["lowrank", "spatial"], 6)


def test_refit_repairs_what_cut_and_implants_lost() -> None:
    one, rng = job("residual"), np.random.default_rng(3)
    for _ in range(3):
        choice = random_choice(one, rng)
        cut = cut_model(one.prepared, choice, one.losses.implants)
        distances = []
        for compressed in (compress_layers(cut), refit_layers(cut, one.subset, batch_size=20, seed=0)):
            outputs, expected = (
                {name: torch.from_numpy(values) for name, values in one.run(graph).items()}
                for graph in (compressed.finished(), one.prepared.graph)
            )
            distances.append(output_distance(outputs, expected, one.scales))
        assert distances[1] < distances[0]


def test_nearly_constant_inputs_have_a_covariance_that_is_not_only_rounding() -> None:
    """Second moments of 100 and variances of 1e-7: their difference in float32 may be negative."""
    net = Net()
    net.weights["b"] = np.full(8, 10, np.float32)
    weight = net.const(1e-4 * net.rng.standard_normal((8, 3, 3, 3)).astype(np.float32))
    x = net.relu(net.op("Conv", "x", weight, "b", out="a", pads=[0] * 4))
    net.conv(net.relu(net.conv(x, 8, 8, out="c", pads=[0] * 4)), 8, 4, out="y", pads=[0] * 4)
    one, rng = make_job(net.model("y", inputs={"x": ("N", 3, 10, 10)})), np.random.default_rng(4)
    for _ in range(3):
        choice = random_choice(one, rng)
        cut = cut_model(one.prepared, choice, one.losses.implants)
        check_carried_out(one, choice, compress_layers(cut))
        refitted = refit_layers(cut, one.subset, batch_size=20, seed=0).finished()
        assert np.isfinite(one.run(refitted)["y"]).all()


def first_choice(one: Job, kind: str) -> Choice:
    rng = np.random.default_rng(5)
    while True:
        choice = random_choice(one, rng, kinds=[kind])
        if choice.replacements:
            return choice


def with_replacement(choice: Choice, **changes: object) -> Choice:
    first, *others = choice.replacements
    return replace(choice, replacements=(replace(first, **changes), *others))


def test_a_plan_that_does_not_fit_the_model_is_refused() -> None:
    one = job("residual")
    choice = first_choice(one, "lowrank")
    weights = compress_layers(cut_model(one.prepared, choice, one.losses.implants)).plan_weights()
    relu = next(node.name for node in one.prepared.graph.nodes if node.op == "Relu")
    lacking = dict(weights)
    lacking.pop(next(name for name in weights if name.endswith(":1")))
    for broken, given, message in (
        (with_replacement(choice, node="make_nothing"), weights, "'make_nothing', which the model does not"),
        (with_replacement(choice, rank=choice.replacements[0].rank + 1), weights, "other shapes than rank"),
        (with_replacement(choice, node=relu), weights, "Relu 'make_[a-z0-9]*' cannot become a lowrank"),
        (choice, lacking, "lacks the weights"),
    ):
        with pytest.raises(ModelError, match=message):
            from_plan_weights(one.prepared, broken, given)
    pointwise = first_choice(one, "pointwise")
    weights = compress_layers(cut_model(one.prepared, pointwise, one.losses.implants)).plan_weights()
    n_channels = pointwise.replacements[0].rank
    beyond = np.arange(900, 900 + n_channels)
    with pytest.raises(ModelError, match="pointwise that are not there"):
        from_plan_weights(one.prepared, with_replacement(pointwise, channels=beyond), weights)
    of_group = {decision.group: decision for decision in pointwise.decisions}
    for replacement in pointwise.replacements:
        gone = of_group[replacement.node].drop
        if len(gone):
            changed = NodeReplacement(replacement.node, "pointwise", len(gone), gone)
            with pytest.raises(ModelError, match="pointwise that are not there"):
                from_plan_weights(one.prepared, replace(pointwise, replacements=(changed,)), weights)
            break
    else:
        raise AssertionError("no group was cut")
    output = NodeReplacement("make_y", "pointwise", 1, np.array([0]))  # its channels cannot move
    with pytest.raises(ModelError, match="not there"):
        from_plan_weights(one.prepared, replace(pointwise, replacements=(output,)), weights)


def test_a_cut_that_is_not_exact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = job("residual")
    monkeypatch.setattr(carry_out, "try_cut", lambda prepared, keep: "the output 'y' differs by 1")
    with pytest.raises(SurgeryError, match="the planned cut is not exact: the output 'y' differs by 1"):
        cut_model(one.prepared, Choice(first_choice(one, "lowrank").decisions), {})


def test_factors_and_initializers_of_the_same_name_stay_apart() -> None:
    one = job("residual")
    choice = first_choice(one, "lowrank")
    compressed = compress_layers(cut_model(one.prepared, choice, one.losses.implants))
    node = choice.replacements[0].node
    clash = f"{one.losses.implants[node].layer.weight}_hap_first"
    with_clash = replace(compressed, weights={**compressed.weights, clash: np.ones(3, np.float32)})
    kept = with_clash.plan_weights()
    assert np.array_equal(kept[clash], np.ones(3))
    again = from_plan_weights(one.prepared, choice, kept)
    assert again.implants.keys() == compressed.implants.keys()
    for name, (kind, arrays) in again.implants.items():
        assert kind == compressed.implants[name][0]
        assert all(map(np.array_equal, arrays, compressed.implants[name][1]))


@pytest.mark.parametrize("name", ["residual", "dense_block", "other_rank_conv1d"])
def test_trained_values_of_pointwise_implants_end_where_they_belong(name: str) -> None:
    """The bias of such a layer is in two initializers of the finished graph."""
    check_trained(name, ["pointwise"], 6)

"""Preparing a model: patterns, made-up probes, and the proof by trial that surgery is exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from sample_models import residual_cnn
from topologies import TOPOLOGIES
from topologies_attention import Attention

from hap_onnx import prepare as module
from hap_onnx.coupling.channels import Frozen
from hap_onnx.errors import ModelError, UsageError
from hap_onnx.model.input_spec import InputSpec
from hap_onnx.model.model_io import load_model
from hap_onnx.prepare import (
    CutTrial,
    NoProofError,
    PreparedModel,
    freeze_groups,
    make_probe,
    prepare,
    try_cut,
)
from hap_onnx.surgery import remove_channels
from tests.helpers import make_model, node, rand

FLOAT = np.dtype(np.float32)
PROBE = {"x": rand(4, 3, 8, 8)}


def prepared(model: onnx.ModelProto | None = None, **options: Any) -> PreparedModel:
    return prepare(load_model(model or residual_cnn()), PROBE, **options)


def groups_of(result: PreparedModel) -> set[str]:
    return {group.name for group in result.coupling.groups}


def reason_for(result: PreparedModel, name: str) -> str:
    return next(entry.reason for entry in result.coupling.frozen if entry.node == name)


ALL = {"make_stem", "make_a1", "make_a2", "make_b2"}

# ---------------------------------------------------------------- what is known of a model


def test_shapes_are_those_of_one_sample_and_of_two() -> None:
    result = prepared()
    assert groups_of(result) == ALL
    assert result.shapes["stem"] == (1, 16, 8, 8)
    assert result.probe_shapes["stem"] == (2, 16, 8, 8)
    assert len(result.probe["x"]) == 2
    assert result.n_params == sum(int(np.prod(t.dims)) for t in residual_cnn().graph.initializer)


def test_parameters_are_counted_without_what_is_computed_beforehand() -> None:
    model = make_model(
        [
            node("ConstantOfShape", ["size"], ["zeros"], value=onnx.numpy_helper.from_array(rand(1))),
            node("Add", ["x", "zeros"], ["a"]),
            node("MatMul", ["a", "w"], ["h"]),
            node("Relu", ["h"], ["r"]),
            node("MatMul", ["r", "v"], ["y"]),
        ],
        inputs={"x": ["N", 10, 30]},
        outputs=["y"],
        weights={"size": np.array([1, 10, 30]), "w": rand(30, 8), "v": rand(8, 2)},
    )
    result = prepare(load_model(model), {"x": rand(2, 10, 30)})
    assert result.n_params == 1 + 30 * 8 + 8 * 2  # and not 300 for the table


def test_a_model_that_runs_sample_by_sample_is_probed_with_one() -> None:
    model = make_model(
        [
            node("Conv", ["x", "w"], ["a"]),
            node("ReduceMean", ["a"], ["m"], axes=[0], keepdims=1),
            node("Mul", ["a", "m"], ["s"]),
            node("Conv", ["s", "v"], ["y"]),
        ],
        inputs={"x": [1, 3, 4, 4]},
        outputs=["y"],
        weights={"w": rand(8, 3, 1, 1), "v": rand(2, 8, 1, 1)},
    )
    result = prepare(load_model(model), {"x": rand(2, 3, 4, 4)})
    assert result.twin.batch_limit == 1
    assert result.probe_shapes["x"] == (1, 3, 4, 4)
    assert result.probe_shapes["a"] == (1, 8, 4, 4)
    assert [group.size for group in result.coupling.groups] == [8]


def test_a_declared_batch_is_the_probe() -> None:
    result = prepared(residual_cnn(batch=4))
    assert groups_of(result) == ALL
    assert len(result.probe["x"]) == 4
    assert result.shapes["stem"] == result.probe_shapes["stem"] == (4, 16, 8, 8)


def test_literals_that_hold_a_batch_of_one_and_heads_follow_the_heads() -> None:
    net = Attention()
    parts = []
    for wide in net.qkv("x"):
        parts.append(net.op("Reshape", wide, net.ints(3, 5, 4)))  # one sample, three heads
    scores = net.op("MatMul", parts[0], net.op("Transpose", parts[1], perm=[0, 2, 1]))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), parts[2])
    mixed = net.op("Reshape", mixed, net.ints(1, 3, 5, 4))
    y = net.finish(net.op("Transpose", mixed, perm=[0, 2, 1, 3]))
    model = net.done(y, inputs={"x": [1, 5, 12]})
    result = prepare(load_model(model), {"x": rand(2, 5, 12)})
    assert result.probe_shapes["x"] == (2, 5, 12)
    assert {3} <= {group.size for group in result.coupling.groups}
    assert not [entry for entry in result.coupling.frozen if "trial" in entry.reason]


def test_a_batch_of_one_is_probed_with_two() -> None:
    result = prepared(residual_cnn(batch=1))
    assert groups_of(result) == ALL
    assert result.probe_shapes["stem"] == (2, 16, 8, 8)


@pytest.mark.parametrize("name", ["heads_in_the_batch_written", "keys_transposed_in_the_batch"])
def test_heads_beside_a_written_batch_are_proved(name: str) -> None:
    """The model is written for one sample and probed with two, on the axis that has the heads as well."""
    result = prepare(load_model(TOPOLOGIES[name]().model), {"x": rand(4, 5, 12)})
    assert [group.size for group in result.coupling.groups] == [3]
    assert result.probe_shapes != result.shapes or result.twin.batch_limit == 1
    assert all("trial" not in entry.reason for entry in result.coupling.frozen)


# ---------------------------------------------------------------- patterns


def test_an_excluded_node_keeps_its_inputs_and_its_outputs() -> None:
    result = prepared(exclude=["make_b1"])
    # It reads the channels of make_a1 and adds its own to the stem's.
    assert groups_of(result) == {"make_a2", "make_b2"}
    for name in ("make_a1", "make_stem", "make_b1"):
        assert "excluded by --exclude 'make_b1'" in reason_for(result, name)


def test_an_excluded_initializer_keeps_its_channels() -> None:
    assert groups_of(prepared(exclude=["a1.w"])) == {"make_a2", "make_b2"}
    assert groups_of(prepared(exclude=["a1.b"])) == ALL - {"make_a1"}


def test_patterns_are_globs_and_may_be_many() -> None:
    assert groups_of(prepared(exclude=["make_[ab]2", "make_head", "a1.*"][:1])) == {"make_a1"}
    assert groups_of(prepared(exclude=["make_a1", "make_a2"])) == {"make_b2"}
    assert groups_of(prepared(exclude=["a1.b", "a2.b"])) == {"make_stem", "make_b2"}


def test_only_freezes_all_groups_that_nothing_named_produces() -> None:
    result = prepared(only=["make_a?"])
    assert groups_of(result) == {"make_a1", "make_a2"}
    assert "--only" in reason_for(result, "make_stem")
    assert groups_of(prepared(only=["a1.w"])) == {"make_a1"}
    assert groups_of(prepared(only=["make_b1"])) == {"make_stem"}  # one producer of the stream is enough


def test_only_and_exclude_go_together() -> None:
    assert groups_of(prepared(only=["make_a?"], exclude=["a2.b"])) == {"make_a1"}


@pytest.mark.parametrize("options", [{"exclude": ["make_a1", "nothing*"]}, {"only": ["nothing*"]}], ids=str)
def test_a_pattern_that_matches_nothing_is_a_usage_error(options: dict[str, list[str]]) -> None:
    with pytest.raises(UsageError, match=r"'nothing\*' matches no node and no initializer"):
        prepared(**options)


# ---------------------------------------------------------------- probes


def test_a_probe_is_made_up_from_declared_shapes() -> None:
    specs = [
        InputSpec("image", FLOAT, ("N", 3, 8)),
        InputSpec("half", np.dtype(np.float16), (None, 2)),
        InputSpec("ids", np.dtype(np.int64), ("N", 5)),
        InputSpec("threshold", FLOAT, ()),
    ]
    probe = make_probe(specs)
    assert {name: (array.shape, array.dtype) for name, array in probe.items()} == {
        "image": ((2, 3, 8), FLOAT),
        "half": ((2, 2), np.float16),
        "ids": ((2, 5), np.int64),
        "threshold": ((), FLOAT),
    }
    assert probe["image"].std() > 0.5
    assert (probe["image"][0] != probe["image"][1]).any()
    assert not probe["ids"].any()
    np.testing.assert_array_equal(make_probe(specs)["image"], probe["image"])


def test_a_probe_has_the_declared_batch_but_two_samples_at_least() -> None:
    assert make_probe([InputSpec("x", FLOAT, (4, 3))])["x"].shape == (4, 3)
    assert make_probe([InputSpec("x", FLOAT, (1, 3))])["x"].shape == (2, 3)


def test_known_sizes_are_taken_as_they_are() -> None:
    specs = [InputSpec("x", FLOAT, ("N", 3, "H", None)), InputSpec("y", FLOAT, ("N", 2))]
    probe = make_probe(specs, sizes={"x": (2, 3, 9, 7)})
    assert probe["x"].shape == (2, 3, 9, 7)
    assert probe["y"].shape == (2, 2)


def test_open_sizes_ask_for_data() -> None:
    with pytest.raises(UsageError, match="--data"):
        make_probe([InputSpec("x", FLOAT, ("N", 3, "H", 4))])


@pytest.mark.parametrize("shape", [("N", 2**40), (2**31, 2**31, 2**31), (2**62, 2**62)])
def test_sizes_beyond_all_reason_are_refused(shape: tuple[int | str, ...]) -> None:
    with pytest.raises(ModelError, match=r"the input .* numbers, more than can be made up"):
        make_probe([InputSpec("x", FLOAT, shape)])


def test_an_input_without_axes_is_the_same_for_all_samples() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Mul", ["h", "t"], ["s"]),
        node("MatMul", ["s", "v"], ["y"]),
    ]
    weights = {"w": rand(4, 6), "v": rand(6, 3)}
    model = make_model(nodes, inputs={"x": ["N", 4], "t": []}, outputs=["y"], weights=weights)
    probe = {"x": rand(3, 4), "t": np.float32(0.5).reshape(())}
    prepared = prepare(load_model(model), probe)
    assert {name: array.shape for name, array in prepared.probe.items()} == {"x": (2, 4), "t": ()}
    assert [group.size for group in prepared.coupling.groups] == [6]


# ---------------------------------------------------------------- proof by trial


def hidden_width(op_type: str, number: int) -> onnx.ModelProto:
    """Flatten the 64 positions of 8 channels to a width computed at run time from the 512 numbers."""
    weights = {
        "w1": rand(8, 3, 1, 1, seed=1),
        "w2": rand(8, 8, 1, 1, seed=2),
        "w3": rand(8, 5, seed=3),
        "start": np.array([1], np.int64),
        "stop": np.array([4], np.int64),
        "number": np.array([number], np.int64),
        "target": np.array([0, 8], np.int64),
    }
    nodes = [
        node("Conv", ["x", "w1"], ["a"]),
        node("Relu", ["a"], ["h"]),
        node("Conv", ["h", "w2"], ["b"]),
        node("Relu", ["b"], ["r"]),
        node("Shape", ["r"], ["s"]),
        node("Slice", ["s", "start", "stop"], ["chw"]),
        node("ReduceProd", ["chw"], ["numbers"], keepdims=1),
        node(op_type, ["numbers", "number"], ["n_positions"]),
        node("Concat", ["target", "n_positions"], ["shape"], axis=0),
        node("Reshape", ["r", "shape"], ["flat"]),
        node("ReduceMean", ["flat"], ["p"], axes=[2], keepdims=0),
        node("MatMul", ["p", "w3"], ["y"]),
    ]
    return make_model(nodes, inputs={"x": ["N", 3, 8, "W"]}, outputs=["y"], weights=weights)


def test_a_channel_count_in_a_computed_shape_follows() -> None:
    result = prepared(hidden_width("Div", 8))
    assert groups_of(result) == {"make_a", "make_b"}
    keep = np.ones(result.coupling.n_elements, bool)
    keep[[group.elements[0] for group in result.coupling.groups]] = False
    assert try_cut(result, keep) is None


def test_a_channel_count_that_hides_in_a_computed_shape_freezes_its_group() -> None:
    result = prepared(hidden_width("Sub", 448))
    assert groups_of(result) == {"make_a"}
    assert "computed in an unknown way" in reason_for(result, "make_b")
    keep = np.ones(result.coupling.n_elements, bool)
    keep[result.coupling.groups[0].elements[:3]] = False
    assert try_cut(result, keep) is None


def test_float_noise_is_told_from_errors() -> None:
    """The last bit of a sum decides the sine of a million times it: only double precision proves a cut."""
    weights = {"w1": rand(8, 300, seed=1), "w2": rand(300, 5, seed=2), "big": np.float32(1e6)}
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("MatMul", ["a", "w2"], ["b"]),
        node("Mul", ["b", "big"], ["c"]),
        node("Sin", ["c"], ["y"]),
    ]
    result = prepared(make_model(nodes, inputs={"x": ["N", 3, 8, 8]}, outputs=["y"], weights=weights))
    assert groups_of(result) == {"make_a"}
    assert result.twin.dtype == torch.float32


def test_a_frozen_group_leaves_all_others_as_they_were() -> None:
    before = prepared()
    after = freeze_groups(before.coupling, {"make_a1": "because"})
    assert after.n_elements == before.coupling.n_elements - 16
    assert {group.name for group in after.groups} == ALL - {"make_a1"}
    assert np.array_equal(
        np.sort(np.concatenate([g.elements for g in after.groups])), np.arange(after.n_elements)
    )
    assert Frozen("make_a1", "because") in after.frozen
    assert "h1" not in after.tensors
    assert not {(w.initializer, w.axis) for w in after.weights} & {("a1.w", 0), ("a1.b", 0), ("b1.w", 1)}
    assert ("a1.w", 1) in {(w.initializer, w.axis) for w in after.weights}
    keep = np.ones(after.n_elements, bool)
    for group in after.groups:
        keep[group.elements[::3]] = False
    assert try_cut(replace(before, coupling=after), keep) is None
    assert freeze_groups(before.coupling, dict.fromkeys(ALL, "all")).n_elements == 0


def test_what_fails_on_trial_is_frozen_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.try_cut

    def refuse(candidate: PreparedModel, keep: np.ndarray) -> str | None:
        for group in candidate.coupling.groups:
            if group.name == "make_a1" and not keep[group.elements].all():
                return "the output 'scores' differs by 1"
        return real(candidate, keep)

    monkeypatch.setattr(module, "try_cut", refuse)
    result = prepared()
    assert groups_of(result) == ALL - {"make_a1"}
    assert reason_for(result, "make_a1") == "cutting it for trial failed: the output 'scores' differs by 1"


def test_what_fails_only_together_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(candidate: PreparedModel, keep: np.ndarray) -> str | None:
        n_cut = sum(not keep[group.elements].all() for group in candidate.coupling.groups)
        return "together they differ" if n_cut > 1 else None

    monkeypatch.setattr(module, "try_cut", refuse)
    result = prepared()
    assert groups_of(result) == set()
    assert "together they differ" in reason_for(result, "make_a1")


def test_a_trial_cut_says_what_is_wrong() -> None:
    result = prepared()
    keep = np.ones(result.coupling.n_elements, bool)
    keep[result.coupling.groups[0].elements[:4]] = False
    assert try_cut(result, keep) is None
    graph = remove_channels(result.graph, result.coupling, keep, shapes=result.probe_shapes)
    keep[result.coupling.groups[0].elements[4]] = False
    trial = CutTrial(result, keep, graph)
    complaint = "node 'make_stem' (Conv): 'stem' has shape [2, 12, 8, 8] instead of [2, 11, 8, 8]"
    assert trial.find_fault(result.probe) == complaint


def test_a_trial_cut_names_the_first_node_that_differs() -> None:
    result = prepared()
    keep = np.ones(result.coupling.n_elements, bool)
    keep[result.coupling.groups[0].elements[:4]] = False
    graph = remove_channels(result.graph, result.coupling, keep, shapes=result.probe_shapes)
    bias = next(t for t in graph.tensors().values() if t.name == "b2.b")
    bias.values = bias.values + np.float32(0.1)
    complaint = CutTrial(result, keep, graph).find_fault(result.probe)
    assert complaint is not None
    assert "the output 'scores' differs by" in complaint
    assert complaint.endswith("; node 'make_b2' (Conv) is the first to differ")


def test_inputs_that_the_model_does_not_take_prove_nothing() -> None:
    result = prepared()
    keep = np.ones(result.coupling.n_elements, bool)
    keep[result.coupling.groups[0].elements[:4]] = False
    graph = remove_channels(result.graph, result.coupling, keep, shapes=result.probe_shapes)
    with pytest.raises(NoProofError, match="does not run"):
        CutTrial(result, keep, graph).find_fault({"x": rand(2, 4, 8, 8)})


def test_a_difference_beyond_rounding_is_noticed() -> None:
    result = prepared()
    keep = np.ones(result.coupling.n_elements, bool)
    keep[result.coupling.groups[0].elements[:4]] = False
    with torch.no_grad():
        bias = result.twin.parameter_of["head.b"]
        bias.data = bias + 1.0  # it shares memory with the graph, which is not to be changed
    complaint = "the output 'scores' differs by 1; node 'make_scores' (Gemm) is the first to differ"
    assert try_cut(result, keep) == complaint


def test_a_model_that_does_not_fit_its_data_is_refused() -> None:
    weights = {"w": rand(4, 3, 1, 1), "v": rand(5, 100)}
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Flatten", ["c"], ["f"]),
        node("Gemm", ["f", "v"], ["y"], transB=1),
    ]
    model = make_model(nodes, inputs={"x": ["N", 3, 8, "W"]}, outputs=["y"], weights=weights)
    with pytest.raises(ModelError, match="make_y"):
        prepared(model)

"""The twin: execution, hooks, parameters, opaque nodes, errors, batches; whole models if there are any."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from hap_onnx import twin as twin_module
from hap_onnx.errors import CalibrationError, ModelError
from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.twin import Step, Twin, build_twin, probe_shapes, unfix_batch
from tests.helpers import check_model, make_model, make_twin, node, rand

SHARED = os.environ.get("HAP_ONNX_SHARED")


def small_net(*, batch: int | str = "N", target: list[int] | None = None) -> onnx.ModelProto:
    """Conv, Relu, a residual Add, pooling, Reshape and Gemm."""
    return make_model(
        [
            node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
            node("Relu", ["c1"], ["r1"]),
            node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1]),
            node("Add", ["c2", "r1"], ["sum"]),
            node("GlobalAveragePool", ["sum"], ["pool"]),
            node("Reshape", ["pool", "target"], ["flat"]),
            node("Gemm", ["flat", "w3", "b3"], ["y"], transB=1),
        ],
        inputs={"x": [batch, 3, 8, 8]},
        outputs=["y"],
        weights={
            "w1": rand(4, 3, 3, 3),
            "b1": rand(4, seed=1),
            "w2": rand(4, 4, 3, 3, seed=2),
            "target": np.array(target or [0, -1]),
            "w3": rand(5, 4, seed=3),
            "b3": rand(5, seed=4),
        },
    )


def split_net() -> onnx.ModelProto:
    """One initializer used twice, an output nobody reads, an input that is an output."""
    return make_model(
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("MatMul", ["a", "w"], ["b"]),
            node("Split", ["b", "sizes"], ["left", "right"], axis=1),
            node("Neg", ["left"], ["y"]),
        ],
        inputs={"x": ["N", 4]},
        outputs=["y", "a"],
        weights={"w": rand(4, 4), "sizes": np.array([1, 3])},
    )


# --- execution ---


def test_twin_equals_onnxruntime_on_small_nets() -> None:
    check_model(small_net(), {"x": rand(2, 3, 8, 8)})
    check_model(split_net(), {"x": rand(3, 4)})


def test_steps_are_ordered_and_name_what_can_be_freed() -> None:
    twin = make_twin(split_net())
    assert [step.op_type for step in twin.steps] == ["MatMul", "MatMul", "Split", "Neg"]
    assert [step.last_use for step in twin.steps] == [("x",), (), ("b", "right"), ("left",)]
    assert twin.input_names == ("x",)
    assert twin.output_names == ("y", "a")


def test_activations_are_freed_after_their_last_use() -> None:
    twin = make_twin(small_net())
    alive: dict[str, weakref.ref[Tensor]] = {}
    seen: dict[str, set[str]] = {}

    def note(step: Step, index: int, tensor: Tensor) -> Tensor:
        seen[step.outputs[index]] = {name for name, ref in alive.items() if ref() is not None}
        alive[step.outputs[index]] = weakref.ref(tensor)
        return tensor

    with torch.no_grad():
        twin({"x": torch.from_numpy(rand(1, 3, 8, 8))}, on_write=note)
    assert "c1" not in seen["c2"]
    assert seen["sum"] == {"c2", "r1"}
    assert seen["pool"] == {"sum"}


def test_nodes_out_of_order_are_sorted() -> None:
    graph = normalise(load_model(split_net()))
    graph.nodes.reverse()
    assert [step.op_type for step in build_twin(graph).steps] == ["MatMul", "MatMul", "Split", "Neg"]


def test_twin_leaves_the_graph_and_the_inputs_alone() -> None:
    graph = normalise(load_model(small_net()))
    before = {
        name: np.array(tensor.values) for name, tensor in graph.tensors().items() if hasattr(tensor, "values")
    }
    twin = build_twin(graph)
    x = torch.from_numpy(rand(2, 3, 8, 8))
    copy = x.clone()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    twin({"x": x})
    assert torch.equal(x, copy)
    after = {
        name: np.array(tensor.values) for name, tensor in graph.tensors().items() if hasattr(tensor, "values")
    }
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_probe_shapes_names_every_tensor() -> None:
    shapes = probe_shapes(make_twin(small_net()), {"x": torch.zeros(2, 3, 8, 8)})
    assert shapes["x"] == (2, 3, 8, 8)
    assert shapes["pool"] == (2, 4, 1, 1)
    assert shapes["y"] == (2, 5)
    assert shapes["w2"] == (4, 4, 3, 3)


# --- hooks and single steps ---


def test_hooks_see_and_replace_every_tensor() -> None:
    twin = make_twin(split_net())
    x = torch.from_numpy(rand(3, 4))
    read: list[tuple[str, str]] = []

    def on_read(step: Step, index: int, tensor: Tensor) -> Tensor:
        read.append((step.name, step.inputs[index]))
        return tensor * 0 if step.inputs[index] == "a" else tensor

    def on_write(step: Step, index: int, tensor: Tensor) -> Tensor:
        return tensor + 1 if step.outputs[index] == "y" else tensor

    outputs = twin({"x": x}, on_read=on_read, on_write=on_write)
    assert torch.equal(outputs["y"], torch.ones(3, 1))
    assert torch.allclose(outputs["a"], x @ twin.constant("w"))
    assert read == [("make_a", "x"), ("make_a", "w"), ("make_b", "a"), ("make_b", "w"),
                    ("make_left", "b"), ("make_left", "sizes"), ("make_y", "left")]  # fmt: skip


def test_run_step_in_lock_step_equals_forward() -> None:
    twin = make_twin(small_net())
    x = torch.from_numpy(rand(2, 3, 8, 8))
    values = {"x": x}
    with torch.no_grad():
        for step in twin.steps:
            values.update(zip(step.outputs, twin.run_step(step, values), strict=True))
        assert torch.equal(values["y"], twin({"x": x})["y"])


# --- parameters ---


def test_a_shared_initializer_is_one_parameter() -> None:
    twin = make_twin(split_net())
    assert list(twin.parameter_of) == ["w"]
    assert [parameter is twin.parameter_of["w"] for parameter in twin.parameters()] == [True]
    twin({"x": torch.ones(1, 4)})["y"].sum().backward()
    assert twin.parameter_of["w"].grad is not None


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_compute_in_float32(dtype: type) -> None:
    x = rand(2, 4).astype(dtype)
    weights = {"a.b/w": rand(4, 3).astype(dtype)}
    model = make_model(
        [node("MatMul", ["x", "a.b/w"], ["y"])], inputs={"x": x}, outputs=["y"], weights=weights
    )
    twin = check_model(model, {"x": x}, tolerance=2e-3) if dtype is np.float64 else make_twin(model)
    output = twin({"x": torch.from_numpy(x)})["y"]
    assert output.dtype == twin.constant("a.b/w").dtype == torch.float32
    assert torch.allclose(output, torch.from_numpy(x).float() @ twin.constant("a.b/w"))


def test_a_double_twin_computes_in_double_and_keeps_integers_where_they_are() -> None:
    twin = make_twin(small_net()).double()
    assert twin({"x": torch.from_numpy(rand(1, 3, 8, 8))})["y"].dtype == torch.float64
    assert twin.constant("target").dtype == torch.int64
    assert make_twin(small_net()).to("meta").constant("target").device.type == "cpu"


def test_twin_is_twice_differentiable() -> None:
    twin = make_twin(small_net()).double()
    x = torch.from_numpy(rand(2, 3, 8, 8))
    weights = [twin.parameter_of[name] for name in ("w1", "w2", "w3")]
    loss = twin({"x": x})["y"].square().sum()
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    product = torch.autograd.grad(sum(g.square().sum() for g in gradients), weights)
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in product)


# --- opaque nodes ---


def if_net(*, opaque: bool = True) -> onnx.ModelProto:
    """An If whose branches read a weight, an activation and an integer of the graph around them.

    Torch knows all that is in them, but for a sequence if they are to be opaque.
    """
    branches = []
    for op_type, other in (("Mul", "w"), ("Add", "r")):
        local = numpy_helper.from_array(np.float32(2.0), "two")
        nodes = [helper.make_node(op_type, ["r", other], ["m"]), helper.make_node("Mul", ["m", "two"], ["n"]),
                 helper.make_node("Reshape", ["n", "target"], [f"out_{op_type}"])]  # fmt: skip
        if opaque:
            nodes[2].output[0] = "shaped"
            nodes.append(helper.make_node("SequenceConstruct", ["shaped"], ["parts"]))
            nodes.append(helper.make_node("ConcatFromSequence", ["parts"], [f"out_{op_type}"], axis=0))
        info = helper.make_tensor_value_info(f"out_{op_type}", TensorProto.FLOAT, None)
        branches.append(helper.make_graph(nodes, op_type, [], [info], [local]))
    return make_model(
        [
            node("Relu", ["x"], ["r"]),
            node("If", ["flag"], ["picked"], then_branch=branches[0], else_branch=branches[1]),
            node("Mul", ["picked", "w2"], ["y"]),
            node("Reshape", ["r", "target"], ["z"]),
            node("Mul", ["x", "w"], ["v"]),
        ],
        inputs={"x": rand(2, 3), "flag": np.array(True)},
        outputs=["y", "z", "v"],
        weights={"w": rand(2, 3, seed=1), "w2": rand(1, seed=2), "target": np.array([3, 2])},
    )


@pytest.mark.parametrize("flag", [True, False])
def test_control_flow_runs_opaquely_with_its_captures_as_inputs(flag: bool) -> None:
    twin = check_model(if_net(), {"x": rand(2, 3), "flag": np.array(flag)})
    assert twin.opaque_nodes == ("make_picked",)
    step = next(step for step in twin.steps if step.opaque)
    assert step.inputs[0] == "flag"
    assert sorted(step.inputs[1:]) == ["r", "target", "w"]


@pytest.mark.parametrize("flag", [True, False])
def test_control_flow_that_torch_knows_passes_gradients(flag: bool) -> None:
    twin = check_model(if_net(opaque=False), {"x": rand(2, 3), "flag": np.array(flag)})
    assert twin.opaque_nodes == ()
    twin = twin.double()
    inputs = {"x": torch.randn(2, 3, dtype=torch.float64), "flag": torch.tensor(flag)}
    w, w2 = twin.parameter_of["w"], twin.parameter_of["w2"]
    r = torch.relu(inputs["x"])
    wanted = 2 * (r * w if flag else r + r).reshape(3, 2) * w2
    y = twin(inputs)["y"]
    torch.testing.assert_close(y, wanted)
    gradients = [torch.autograd.grad(z.square().sum(), (w, w2), materialize_grads=True) for z in (y, wanted)]
    torch.testing.assert_close(*gradients)
    assert (gradients[0][0].abs().sum() > 0) == flag


def test_an_opaque_node_reads_the_parameters_as_they_are_now() -> None:
    twin = make_twin(if_net())
    inputs = {"x": torch.ones(2, 3), "flag": torch.tensor(True)}
    before = twin(inputs)["y"].detach()
    with torch.no_grad():
        twin.parameter_of["w"].mul_(3)
    assert torch.allclose(twin(inputs)["y"], 3 * before)


def test_sequences_equal_onnxruntime() -> None:
    nodes = [
        node("SplitToSequence", ["x"], ["parts"], axis=0),
        node("SequenceAt", ["parts", "one"], ["part"]),
        node("Neg", ["part"], ["y"]),
    ]
    model = make_model(nodes, inputs={"x": rand(3, 4)}, outputs=["y"], weights={"one": np.array(1)})
    assert len(check_model(model, {"x": rand(3, 4)}).opaque_nodes) == 2


def test_a_constant_of_a_type_that_torch_lacks_is_left_to_onnxruntime() -> None:
    eight_bits = helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, [3], [1.0, 2.0, -0.5])
    model = make_model(
        [node("Cast", ["w"], ["c"], to=TensorProto.FLOAT), node("Add", ["x", "c"], ["y"])],
        inputs={"x": [2, 3]},
        outputs=["y"],
        opset=19,
    )
    model.graph.initializer.append(eight_bits)
    twin = check_model(model, {"x": rand(2, 3)})
    assert twin.opaque_nodes == ("make_c",)


def test_a_variant_that_torch_lacks_falls_back_to_onnxruntime() -> None:
    x = np.array([[3, 200, 7]], np.uint16)
    twin = make_twin(make_model([node("Mod", ["x", "x"], ["y"])], inputs={"x": x}, outputs=["y"]))
    assert twin.opaque_nodes == ()
    assert twin({"x": torch.from_numpy(x)})["y"].tolist() == [[0, 0, 0]]


def test_an_opaque_step_blocks_gradients_and_twin_still_trains_behind_it() -> None:
    twin = make_twin(if_net())
    twin({"x": torch.ones(2, 3), "flag": torch.tensor(True)})["y"].sum().backward()
    assert twin.parameter_of["w2"].grad is not None
    assert twin.parameter_of["w"].grad is None


# --- errors ---


def test_all_nodes_that_nothing_can_run_are_listed_at_once() -> None:
    graph = normalise(load_model(split_net()))
    graph.nodes[0].op = "Frobnicate"
    graph.nodes[3].op, graph.nodes[3].domain = "Whirl", "my.domain"
    with pytest.raises(ModelError, match=r"2 node.*make_a.*Frobnicate.*opset 17.*make_y.*Whirl.*my\.domain"):
        build_twin(graph)


def test_an_unknown_attribute_is_refused_by_name() -> None:
    graph = normalise(load_model(split_net()))
    graph.nodes[3].attrs["flavour"] = 3
    with pytest.raises(ModelError, match=r"make_y.*Neg.*flavour"):
        build_twin(graph)


def test_wrong_inputs_are_refused_by_name() -> None:
    twin = make_twin(split_net())
    with pytest.raises(CalibrationError, match=r"missing \['x'\], unknown \['X'\]"):
        twin({"X": torch.zeros(1, 4)})
    with pytest.raises(CalibrationError, match=r"'x'.*\(4,\).*2 axes"):
        twin({"x": torch.zeros(4)})


def test_a_tensor_that_no_memory_holds_is_refused_before_anything_computes_with_it() -> None:
    """torch repeats a number without storing it, so that nothing else ends this in time."""
    nodes = [node("Expand", ["x", "shape"], ["big"]), node("ReduceMax", ["big"], ["y"], keepdims=0)]
    shape = np.array([2**40, 2**10], np.int64)  # an input, or the model would be refused as it is loaded
    model = make_model(nodes, inputs={"x": np.ones(1, np.float32), "shape": shape}, outputs=["y"])
    with pytest.raises(ModelError, match=r"'make_big' \(Expand\) .* shape \[1099511627776, 1024\]"):
        make_twin(model)({"x": torch.ones(1), "shape": torch.from_numpy(shape)})


def test_a_node_that_fails_is_named() -> None:
    with pytest.raises(ModelError, match=r"make_a.*MatMul.*\(1, 5\)"):
        make_twin(split_net())({"x": torch.zeros(1, 5)})


# --- batches ---


def _compare_with_single_runs(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> Twin:
    """Assert that a batch equals its samples one by one, as onnxruntime computes them."""
    twin = make_twin(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options)
    n = len(next(iter(inputs.values())))
    singles = [
        session.run(None, {name: array[i : i + 1] for name, array in inputs.items()}) for i in range(n)
    ]
    with torch.no_grad():
        outputs = twin({name: torch.from_numpy(array) for name, array in inputs.items()})
    for index, name in enumerate(twin.output_names):
        expected = np.concatenate([single[index] for single in singles])
        np.testing.assert_allclose(outputs[name].numpy(), expected, rtol=1e-4, atol=1e-5)
    return twin


@pytest.mark.parametrize("batch", [1, "N"])
@pytest.mark.parametrize("target", [[1, 4], [1, -1], [-1, 4], [0, -1]])
def test_a_written_batch_of_one_takes_any_batch(batch: int | str, target: list[int]) -> None:
    twin = _compare_with_single_runs(small_net(batch=batch, target=target), {"x": rand(5, 3, 8, 8)})
    assert twin.batch_limit is None


def attention_net() -> onnx.ModelProto:
    """A class token is joined, heads are split through literals, and the sequence comes first in between."""
    return make_model(
        [
            node("Concat", ["token", "x"], ["tokens"], axis=1),
            node("Transpose", ["tokens"], ["first"], perm=[1, 0, 2]),
            node("Reshape", ["first", "heads"], ["h"]),
            node("Transpose", ["h"], ["q"], perm=[1, 0, 2]),
            node("Transpose", ["h"], ["k"], perm=[1, 2, 0]),
            node("MatMul", ["q", "k"], ["scores"]),
            node("Softmax", ["scores"], ["p"], axis=-1),
            node("MatMul", ["p", "q"], ["mixed"]),
            node("Transpose", ["mixed"], ["back"], perm=[1, 0, 2]),
            node("Reshape", ["back", "joined"], ["out"]),
            node("Transpose", ["out"], ["y"], perm=[1, 0, 2]),
        ],
        inputs={"x": [1, 4, 6]},
        outputs=["y"],
        weights={"token": rand(1, 1, 6), "heads": np.array([5, 2, 3]), "joined": np.array([5, 1, 6])},
    )


def samples_that_meet(how: str) -> onnx.ModelProto:
    """A dynamic batch, a literal of one sample beside it, and outputs in which samples meet."""
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "zero"], ["n"], axis=0),
        node("Concat", ["one", "n", "width"] if how == "mean" else ["n", "one", "width"], ["target"], axis=0),
        node("Expand", ["token", "target"], ["tokens"]),
        node("Unsqueeze", ["x", "zero" if how == "mean" else "one"], ["rows"]),
        node("Add", ["tokens", "rows"], ["sums"]),
        node("Squeeze", ["sums", "zero" if how == "mean" else "one"], ["a"]),
    ]
    if how == "mean":  # over the batch
        nodes += [node("ReduceMean", ["a"], ["mean"], axes=[0]), node("Sub", ["a", "mean"], ["y"])]
    else:  # the similarity of all pairs
        nodes += [node("Transpose", ["a"], ["b"], perm=[1, 0]), node("MatMul", ["x", "b"], ["y"])]
    weights = {
        "zero": np.array([0]), "one": np.array([1]), "width": np.array([6]), "token": rand(1, 1, 6),
    }  # fmt: skip
    return make_model(nodes, inputs={"x": ["N", 6]}, outputs=["y"], weights=weights, opset=17)


@pytest.mark.parametrize("how", ["mean", "pairs"])
def test_a_dynamic_batch_in_which_samples_meet_is_run_as_it_is(how: str) -> None:
    model = samples_that_meet(how)
    twin = make_twin(model)
    session = ort.InferenceSession(model.SerializeToString())
    for n in (3, 1, 4):
        x = rand(n, 6, seed=n)
        with torch.no_grad():
            found = twin({"x": torch.from_numpy(x)})["y"].numpy()
        np.testing.assert_allclose(found, session.run(None, {"x": x})[0], rtol=1e-4, atol=1e-5)
    assert twin.batch_limit is None
    assert unfix_batch(make_twin(model), {"x": torch.from_numpy(rand(1, 6))})


def test_attention_with_written_shapes_takes_any_batch() -> None:
    assert _compare_with_single_runs(attention_net(), {"x": rand(4, 4, 6)}).batch_limit is None


def test_resize_with_written_sizes_takes_any_batch() -> None:
    model = make_model(
        [node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear")],
        inputs={"x": [1, 2, 4, 4]},
        outputs=["y"],
        weights={"sizes": np.array([1, 2, 8, 6])},
    )
    assert _compare_with_single_runs(model, {"x": rand(3, 2, 4, 4)}).batch_limit is None


def test_a_recurrent_layer_with_a_written_state_takes_any_batch() -> None:
    model = make_model(
        [
            node("Transpose", ["x"], ["first"], perm=[1, 0, 2]),
            node("GRU", ["first", "w", "r", "", "", "h"], ["all", "last"], hidden_size=3),
            node("Squeeze", ["last", "zero"], ["y"]),
        ],
        inputs={"x": [1, 4, 2]},
        outputs=["y"],
        weights={"w": rand(1, 9, 2), "r": rand(1, 9, 3), "h": rand(1, 1, 3), "zero": np.array([0])},
    )
    assert _compare_with_single_runs(model, {"x": rand(3, 4, 2)}).batch_limit is None


def test_a_batch_that_cannot_be_unfixed_runs_sample_by_sample() -> None:
    mixing = make_model(
        [
            node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
            node("Sub", ["x", "m"], ["s"]),
            node("Add", ["s", "x"], ["y"]),
        ],
        inputs={"x": [1, 4]},
        outputs=["y"],
    )
    choosing = make_model(
        [node("NonMaxSuppression", ["boxes", "scores", "most"], ["y"])],
        inputs={"boxes": [1, 6, 4], "scores": [1, 2, 6]},
        outputs=["y"],
        weights={"most": np.array([1])},
    )
    assert _compare_with_single_runs(mixing, {"x": rand(3, 4)}).batch_limit == 1
    boxes = np.sort(rand(3, 6, 4), -1)
    assert _compare_with_single_runs(choosing, {"boxes": boxes, "scores": rand(3, 2, 6)}).batch_limit == 1


@pytest.mark.parametrize("mask", [[[1, 1, 1]] * 2, [[0, 0, 0]] * 2, [[7, 7, 7]] * 2])
def test_integers_that_are_the_same_in_the_first_samples_do_not_hide_what_reads_them(mask: object) -> None:
    model = make_model(
        [
            node("Gather", ["mask", "zero"], ["m"], axis=0),  # of the first sample, whatever the batch
            node("Cast", ["m"], ["f"], to=onnx.TensorProto.FLOAT),
            node("Mul", ["x", "f"], ["y"]),
        ],
        inputs={"x": [1, 3]},
        outputs=["y"],
        weights={"zero": np.array(0)},
    )
    model.graph.input.append(onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.INT64, [1, 3]))
    first = np.array(mask, np.int64)
    twin = _compare_with_single_runs(model, {"x": rand(2, 3), "mask": first})
    assert twin.batch_limit == 1
    later = {"x": torch.from_numpy(rand(2, 3)), "mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}
    assert torch.equal(twin(later)["y"], later["x"] * later["mask"])


def test_rounding_that_floats_cannot_tell_from_errors_does_not_fix_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = twin_module._close
    monkeypatch.setattr(
        twin_module, "_close", lambda ours, expected: ours.dtype == torch.float64 and right(ours, expected)
    )
    x = torch.from_numpy(rand(2, 4, 6))
    twin = make_twin(attention_net())
    before = {name: parameter.detach().clone() for name, parameter in twin.parameter_of.items()}
    assert unfix_batch(twin, {"x": x})
    assert twin.dtype == torch.float32
    assert all(torch.equal(parameter, before[name]) for name, parameter in twin.parameter_of.items())
    mixing = make_model(
        [node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1), node("Sub", ["x", "m"], ["y"])],
        inputs={"x": [1, 4, 6]},
        outputs=["y"],
    )
    assert not unfix_batch(make_twin(mixing), {"x": x})


def test_unfix_batch_says_before_whether_any_batch_runs() -> None:
    twin = make_twin(attention_net())
    assert unfix_batch(twin, {"x": torch.from_numpy(rand(1, 4, 6))})
    assert twin.batch_limit is None
    with torch.no_grad():
        x = torch.from_numpy(rand(3, 4, 6))
        values = {"x": x}
        for step in twin.steps:
            values.update(zip(step.outputs, twin.run_step(step, values), strict=True))
        assert torch.equal(values["y"], twin({"x": x})["y"])


def test_inputs_with_different_batches_are_refused() -> None:
    model = make_model(
        [node("Concat", ["a", "b"], ["y"], axis=1)], inputs={"a": [1, 2], "b": [1, 3]}, outputs=["y"]
    )
    with pytest.raises(CalibrationError, match="batches"):
        make_twin(model)({"a": torch.zeros(2, 2), "b": torch.zeros(3, 3)})


# --- whole models ---

MODELS = sorted(Path(SHARED, "models").glob("*.onnx")) if SHARED else []


@pytest.mark.skipif(not MODELS, reason="HAP_ONNX_SHARED is not set")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_whole_models_equal_onnxruntime(path: Path) -> None:
    source = load_model(path)
    (entry,) = make_twin(source.proto).input_names
    declared = next(i for i in source.proto.graph.input if i.name == entry).type.tensor_type.shape.dim
    x = rand(*[dim.dim_value or 2 for dim in declared])
    twin = check_model(source.proto, {entry: x}, tolerance=1e-4)
    assert twin.opaque_nodes == ()


@pytest.mark.skipif(not MODELS, reason="HAP_ONNX_SHARED is not set")
def test_the_old_detector_takes_any_batch() -> None:
    source = load_model(next(path for path in MODELS if "ultraface" in path.name))
    del source.proto.graph.input[1:]  # initializers listed as inputs make onnxruntime warn
    assert _compare_with_single_runs(source.proto, {"input": rand(3, 3, 240, 320)}).batch_limit is None

"""The self-check of results: what is sound passes, and each fault is named, with all that shows it kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper
from sample_models import images, residual_cnn

import hap_onnx
from hap_onnx.errors import HapOnnxError, SurgeryError, ValidationError
from hap_onnx.jobs import self_check
from hap_onnx.jobs.carry_out import from_plan_weights
from hap_onnx.jobs.machine import write_proto
from hap_onnx.jobs.self_check import Feed, Result, check_result, make_feeds
from hap_onnx.model.input_spec import InputSpec
from hap_onnx.model.model_io import load_model
from hap_onnx.planning.choose import Choice
from hap_onnx.planning.plan import CompressionPlan, GroupDecision
from hap_onnx.prepare import Arrays, prepare
from hap_onnx.runtime.session import Session, make_session
from tests.helpers import make_model, node, rand

SAMPLES = {"x": images(5)}


def free_cnn() -> ModelProto:
    """Return a network for images of any size, which does not say how many classes it knows."""
    model = residual_cnn()
    for axis, name in ((2, "H"), (3, "W")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "C"
    return model


def load(model: ModelProto) -> Session:
    return make_session(model, providers="cpu", threads=1)


def make_result(model: ModelProto | None = None, samples: Arrays = SAMPLES) -> tuple[Result, Session]:
    """Return the result of a plan that keeps half of each group, and the original's session."""
    source = load_model(model or free_cnn())
    prepared = prepare(source, samples)
    decisions = tuple(
        GroupDecision.from_keep(group.name, group.size, range(group.size // 2))
        for group in prepared.coupling.groups
    )
    shapes = {name: [2, *array.shape[1:]] for name, array in samples.items()}
    plan = CompressionPlan(source.sha256, hap_onnx.__version__, {"input_shapes": shapes}, decisions)
    graph = from_plan_weights(prepared, Choice(decisions), {}).finished()
    proto = write_proto(graph, source, plan)
    return Result(proto, graph, plan, [prepared], samples), load(source.proto)


@pytest.fixture(scope="module")
def sound() -> tuple[Result, Session]:
    return make_result()


def broken(result: Result, change: Callable[[ModelProto], None]) -> Result:
    proto = ModelProto()
    proto.CopyFrom(result.proto)
    change(proto)
    return replace(result, proto=proto)


# ---------------------------------------------------------------- what is sound


def test_a_sound_result_passes_without_a_word(
    sound: tuple[Result, Session], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result, original = sound
    tried: list[str] = []
    compare = self_check._compare_outputs
    monkeypatch.setattr(
        self_check, "_compare_outputs", lambda *args: (tried.append(str(args[-1])), compare(*args))
    )
    assert check_result(result, original, load, work_dir=tmp_path) is None
    assert not list(tmp_path.iterdir())
    assert tried[:3] == [f"x [{batch}, 3, 8, 8]" for batch in (1, 2, 5)]
    assert {"x [1, 3, 4, 8]", "x [1, 3, 16, 8]", "x [1, 3, 8, 9]", "x [1, 3, 4, 16]"} <= set(tried)


def test_what_the_checker_says_of_the_original_already_is_a_remark() -> None:
    model = residual_cnn()
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 77
    remark = check_result(*make_result(model), load)
    assert remark is not None
    assert "the input model does not pass onnx.checker" in remark


def spec(*shape: int | str | None, name: str = "x") -> InputSpec:
    return InputSpec(name, np.dtype(np.float32), shape)


def shapes_of(specs: list[InputSpec], samples: Arrays, *, fixed_batch: int | None = None) -> list[str]:
    session = Session(tuple(specs), ("y",), fixed_batch, "cpu", 1, None, "a model")  # type: ignore[arg-type]
    return [str(feed) for feed in make_feeds(session, samples)]


def test_sizes_that_are_written_in_the_model_are_not_changed() -> None:
    assert shapes_of([spec("N", 3, 4)], {"x": rand(5, 3, 4)}) == ["x [1, 3, 4]", "x [2, 3, 4]", "x [5, 3, 4]"]
    assert shapes_of([spec(2, 3)], {"x": rand(2, 3)}, fixed_batch=2) == ["x [2, 3]"]


def test_open_sizes_of_one_name_change_together() -> None:
    specs = [spec("N", "T", name="a"), spec("N", "T", name="b")]
    found = shapes_of(specs, {"a": rand(5, 40), "b": rand(5, 40)})
    assert found[3:] == ["a [1, 8], b [1, 8]", "a [1, 72], b [1, 72]", "a [1, 41], b [1, 41]"]


def test_inputs_do_not_grow_without_bound() -> None:
    found = shapes_of([spec("N", *"ABCDE")], {"x": rand(1, *[2] * 5)})
    assert found
    assert all(np.prod(eval(text.removeprefix("x "))) <= 4 * 5 * 32 for text in found)


def test_numbers_stay_of_their_kind() -> None:
    ids = np.array([[3, 1, 4, 1, 5]])
    for feed in make_feeds(
        Session((spec("N", "T"),), ("y",), None, "cpu", 1, None, "a model"), {"x": ids}  # type: ignore[arg-type]
    ):
        assert np.isin(feed.inputs["x"], ids).all()


# ---------------------------------------------------------------- what is not


def give_nan(proto: ModelProto) -> None:
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name == "b1.b")
    values = numpy_helper.to_array(bias).copy()
    values[0] = np.nan
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))


def fix_the_batch(proto: ModelProto) -> None:
    flatten = next(node for node in proto.graph.node if node.op_type == "Flatten")
    flatten.op_type = "Reshape"
    flatten.input.append("two_rows")
    proto.graph.initializer.append(numpy_helper.from_array(np.array([2, -1]), "two_rows"))


def fix_the_size(proto: ModelProto) -> None:
    """Equal to the pool over everything on images of 8 by 8 alone."""
    pool = next(node for node in proto.graph.node if node.op_type == "GlobalAveragePool")
    pool.op_type = "AveragePool"
    pool.attribute.append(helper.make_attribute("kernel_shape", [4, 4]))


def add_a_class(proto: ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("head."):
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.concatenate([values, values[:1]]), tensor.name))


def change_a_weight(proto: ModelProto) -> None:
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "b1.w")
    values = numpy_helper.to_array(weight) * np.float32(1.1)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))


def lie_about_a_shape(proto: ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (lie_about_a_shape, ValidationError, ["does not pass onnx.checker", "make_scores", "(5) vs (4)"]),
        (give_nan, ValidationError, ["NaN", "'scores'", "x [1, 3, 8, 8]"]),
        (fix_the_batch, ValidationError, ["x [1, 3, 8, 8]", "the result does not", "'make_scores' (Gemm)"]),
        (fix_the_size, ValidationError, ["x [1, 3, 4, 8]", "the result does not", "(AveragePool)"]),
        (add_a_class, SurgeryError, ["'make_scores' (Gemm)", "[1, 6]", "[1, 5]"]),
        (change_a_weight, SurgeryError, ["twin", "'scores'", "'make_b1' (Conv)"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_fault_is_named_and_kept(
    sound: tuple[Result, Session],
    tmp_path: Path,
    change: Callable[[ModelProto], None],
    kind: type[HapOnnxError],
    says: list[str],
) -> None:
    result = broken(sound[0], change)
    with pytest.raises(kind) as caught:
        check_result(result, sound[1], load, work_dir=tmp_path)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert caught.value.exit_code == 1
    (folder,) = tmp_path.iterdir()
    for words in (*says, "a bug in hap-onnx", "please report", str(folder)):
        assert words in message
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.txt", "inputs.npz", "original.onnx", "plan.json", "plan.safetensors", "result.onnx",
    ]  # fmt: skip
    assert onnx.load(folder / "result.onnx") == result.proto
    assert onnx.load(folder / "original.onnx") == result.source.proto
    text = (folder / "README.txt").read_text()
    assert all(words in text for words in says)
    with np.load(folder / "inputs.npz") as stored:
        assert str(Feed({"x": stored["x"]})) in text


def test_what_is_kept_makes_the_result_again(sound: tuple[Result, Session], tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        check_result(broken(sound[0], fix_the_batch), sound[1], load, work_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    # The plan is innocent here, so that it makes what should have come out.
    hap_onnx.apply_plan(folder / "original.onnx", folder / "plan.json", output=tmp_path / "again.onnx")
    assert onnx.load(tmp_path / "again.onnx") == sound[0].proto


def test_without_a_work_folder_the_message_says_how_to_get_one(sound: tuple[Result, Session]) -> None:
    with pytest.raises(ValidationError, match=r"please report it with the model \(with --work-dir"):
        check_result(broken(sound[0], fix_the_batch), sound[1], load)


def test_a_folder_that_takes_nothing_does_not_hide_the_fault(
    sound: tuple[Result, Session], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValidationError, match=r"the result does not: .* cannot be made"):
        check_result(broken(sound[0], fix_the_batch), sound[1], load, work_dir=tmp_path / "file")


def test_a_plan_that_makes_another_model_is_refused(sound: tuple[Result, Session]) -> None:
    plan = replace(sound[0].plan, weights={"head.b": rand(5, seed=7)})
    with pytest.raises(SurgeryError, match=r"makes another model: the weight 'head\.b' differs"):
        check_result(replace(sound[0], plan=plan), sound[1], load)


def test_a_cut_that_is_not_exact_is_refused(
    sound: tuple[Result, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = self_check.remove_channels

    def cut_wrongly(*args: object, **options: object) -> object:
        graph = cut(*args, **options)
        bias = graph.tensors()["b1.b"]
        bias.values = bias.values + np.float32(0.1)
        return graph

    monkeypatch.setattr(self_check, "remove_channels", cut_wrongly)
    with pytest.raises(SurgeryError, match=r"not exact on x \[1, .*'make_b1' \(Conv\) is the first"):
        check_result(sound[0], sound[1], load)


def test_an_original_that_runs_on_nothing_proves_nothing(sound: tuple[Result, Session]) -> None:
    with pytest.raises(SurgeryError, match="ran on none of the inputs"):
        check_result(replace(sound[0], samples={"x": rand(5, 4, 8, 8)}), sound[1], load)


def test_outputs_whose_shape_depends_on_numbers_are_known() -> None:
    model = make_model(
        [
            node("Gemm", ["x", "w"], ["h"]),
            node("Gemm", ["h", "v"], ["y"]),
            node("NonZero", ["y"], ["places"]),
        ],
        inputs={"x": ["N", 4]},
        outputs=["y", "places"],
        weights={"w": rand(4, 8), "v": rand(8, 3)},
    )
    samples = {"x": rand(5, 4)}
    result, _ = make_result(model, samples)
    assert self_check._depends_on_numbers(result, "places", (2, 15), Feed(samples))
    assert not self_check._depends_on_numbers(result, "y", (5, 3), Feed(samples))

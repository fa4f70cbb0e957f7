from __future__ import annotations

import logging
import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from quantize.cases import (
    feeds,
    initializers,
    int8_recipe,
    lost_variance,
    ops_of,
    outputs,
    to_int8,
    two_inputs,
)
from sample_models import images, residual_cnn

from hap_onnx.errors import ModelError
from hap_onnx.quantize import Recipe, carry_out, check_model_for, preview, upgrade_note
from hap_onnx.quantize.int8 import calibrate
from hap_onnx.quantize.recipe import CALIBRATIONS
from hap_onnx.runtime.session import make_session
from hap_onnx.runtime.soundness import check_model
from tests.helpers import make_model, node, rand


def interface(model: onnx.ModelProto) -> list[bytes]:
    return [value.SerializeToString() for value in (*model.graph.input, *model.graph.output)]


@pytest.mark.parametrize("batch", ["N", 1, 4])
def test_the_model_computes_nearly_the_same_and_keeps_its_interface(batch):
    model = residual_cnn(batch=batch)
    size = 20 if batch == "N" else batch
    quantized = carry_out(model, int8_recipe(model, feeds(60, size=size)))
    check_model(quantized, reference=model)
    assert interface(quantized) == interface(model)
    assert (quantized.producer_name, quantized.domain, quantized.doc_string) == (
        "tests", "org.example", "a small network",
    )  # fmt: skip
    assert [(entry.key, entry.value) for entry in quantized.metadata_props] == [("author", "nobody")]
    assert (quantized.ir_version, quantized.opset_import) == (model.ir_version, model.opset_import)
    assert ops_of(quantized).count("Conv") == ops_of(model).count("Conv")
    x = images(max(size, 4), seed=8)
    if batch == 1:
        ours, expected = (np.concatenate([outputs(m, x=row[None]) for row in x]) for m in (quantized, model))
        assert lost_variance(ours, expected) < 0.05
        return
    assert lost_variance(outputs(quantized, x=x), outputs(model, x=x)) < 0.05


def test_weights_have_one_scale_per_channel_and_activations_one():
    stored = initializers(to_int8())
    weight, scale = stored["a1.w_quantized"], stored["a1.w_scale"]
    assert weight.dtype == np.int8
    assert scale.shape == (16,)
    restored = weight.astype(np.float32) * scale[:, None, None, None]
    original = initializers(residual_cnn())["a1.w"]
    assert np.abs(restored - original).max() <= 0.51 * scale.max()
    assert stored["x_scale"].shape == ()
    assert stored["x_zero_point"].dtype == np.uint8


def test_seven_bits_leave_room_in_sums_of_sixteen():
    largest = np.abs(initializers(to_int8(weight_bits=7))["a1.w_quantized"].astype(int)).max()
    assert 32 < largest <= 64


def test_calibration_looks_at_all_samples():
    model = residual_cnn()
    data = feeds(60)
    data[-1]["x"][-1, 0, 0, 0] = 100.0
    low, high = calibrate(model, data, method="minmax")["x"]
    assert high == 100.0
    assert low == min(feed["x"].min() for feed in data)
    assert calibrate(model, data, method="percentile")["x"][1] <= 100.0


@pytest.mark.parametrize("method", CALIBRATIONS)
@pytest.mark.parametrize("n_feeds", [3, 8, 64, 70])
def test_no_sample_is_lost_when_they_come_one_by_one(method, n_feeds):
    data = feeds(n_feeds, size=1)
    data[0]["x"][0, 0, 0, 0] = 50.0
    low, high = calibrate(residual_cnn(batch=1), data, method=method)["x"]
    if method == "minmax":
        assert (low, high) == (min(feed["x"].min() for feed in data), 50.0)
    else:
        assert 4 < high <= 50.0


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_feeds_may_differ_in_size(method):
    together = calibrate(residual_cnn(), feeds(48, size=48), method=method)
    apart = calibrate(residual_cnn(), feeds(48, size=32), method=method)
    assert apart.keys() == together.keys()
    for name, bounds in together.items():
        assert apart[name] == pytest.approx(bounds, rel=0.02, abs=0.02)


def test_percentiles_leave_out_what_is_rare():
    x = rand(1200, 3, 8, 8, seed=1)
    x[0, 0, 0, 0] = 1e4
    data = [{"x": x[start : start + 60]} for start in range(0, 1200, 60)]
    assert calibrate(residual_cnn(), data, method="minmax")["x"][1] == 1e4
    assert calibrate(residual_cnn(), data, method="percentile")["x"][1] < 100


def test_several_inputs_of_several_types():
    model = two_inputs()
    data = [{"x": rand(32, 12, seed=4), "ids": np.arange(32, dtype=np.int64) % 5}]
    quantized = carry_out(model, int8_recipe(model, data))
    check_model(quantized, reference=model)
    assert interface(quantized) == interface(model)
    assert lost_variance(outputs(quantized, **data[0]), outputs(model, **data[0])) < 0.02


def test_an_old_opset_is_raised_and_that_is_said():
    model = residual_cnn(opset=11)
    assert upgrade_note(model, "int8") == "the final file is raised from opset 11 to 13, which int8 needs"
    assert upgrade_note(model, "fp16") == upgrade_note(residual_cnn(), "int8") == ""
    quantized = to_int8(model)
    check_model(quantized, reference=model)
    assert quantized.opset_import[0].version == 13
    assert interface(quantized) == interface(model)
    x = images(20, seed=8)
    assert lost_variance(outputs(quantized, x=x), outputs(model, x=x)) < 0.05


def test_weights_that_are_listed_as_inputs_are_quantized_too():
    model = residual_cnn()
    listed = onnx.ModelProto()
    listed.CopyFrom(model)
    listed.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in model.graph.initializer
    )
    quantized = to_int8(listed)
    assert "a1.w_quantized" in initializers(quantized)
    left = [value.name for value in quantized.graph.input if value.name not in initializers(quantized)]
    assert left == ["x"]
    onnx.checker.check_model(quantized, full_check=True)
    make_session(quantized, providers="cpu")


def test_what_cannot_be_quantized_stays_in_float32():
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Erf", ["a"], ["b"]),
        node("Softplus", ["b"], ["c"]),
        node("GlobalAveragePool", ["c"], ["y"]),
    ]
    model = make_model(
        nodes, inputs={"x": ["N", 3, 8, 8]}, outputs=["y"], weights={"w": 0.3 * rand(8, 3, 3, 3, seed=5)}
    )
    quantized = to_int8(model)
    assert {"Erf", "Softplus", "QuantizeLinear"} <= set(ops_of(quantized))
    x = images(20, seed=8)
    assert lost_variance(outputs(quantized, x=x), outputs(model, x=x)) < 0.05


def test_only_the_named_nodes_are_quantized():
    quantized = to_int8(nodes=("make_a1",))
    assert [name for name in initializers(quantized) if name.endswith(".w_quantized")] == ["a1.w_quantized"]


def test_a_preview_is_as_large_as_the_real_file():
    model = residual_cnn()
    sizes = [len(m.SerializeToString()) for m in (to_int8(), preview(model, "int8"), preview(model, "fp16"))]
    assert abs(sizes[0] - sizes[1]) < 1500  # an activation that clipping replaces may stay
    assert sizes[2] == len(carry_out(model, Recipe("fp16")).SerializeToString())


def test_names_that_quantization_adds_must_be_free():
    model = residual_cnn()
    model.graph.node[1].output[0] = "x_scale"
    for entry in model.graph.node:
        for index, name in enumerate(entry.input):
            if name == "r0":
                entry.input[index] = "x_scale"
    with pytest.raises(ModelError, match="'x_scale'"):
        to_int8(model)


def test_activations_that_are_not_finite_are_refused():
    data = feeds(60)
    data[0]["x"][0] = np.inf
    with pytest.raises(ModelError, match=r"not finite|cannot be found"):
        calibrate(residual_cnn(), data, method="minmax")


def test_nothing_is_printed_and_logging_goes_on(capfd, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_int8()
        calibrate(residual_cnn(), feeds(), method="percentile")
    assert capfd.readouterr() == ("", "")
    with caplog.at_level(logging.WARNING):
        logging.getLogger("tests").warning("still here")
    assert "still here" in caplog.text


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [
        ("int8", to_int8, "quantized already"),
        ("fp16", to_int8, "quantized already"),
        ("int8", lambda: residual_cnn(dtype=np.float16), "float32 model"),
        ("fp16", lambda: residual_cnn(dtype=np.float16), "no float32 weights"),
    ],
)
def test_models_that_have_few_bits_already_are_refused(kind, make, message):
    with pytest.raises(ModelError, match=message):
        check_model_for(kind, make())


def test_a_float_model_may_become_either():
    for kind in ("int8", "fp16"):
        check_model_for(kind, residual_cnn())


def test_types_of_large_weights_are_inferred_without_their_numbers():
    model = residual_cnn(width=32)
    assert TensorProto.FLOAT in {t.data_type for t in model.graph.initializer}
    names = set(calibrate(model, feeds(), method="minmax"))
    assert {"x", "stem", "a1", "b1", "sum1", "scores"} <= names

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from quantize.cases import lost_variance, outputs
from sample_models import images, residual_cnn

from hap_onnx.quantize import Recipe, carry_out
from hap_onnx.runtime.soundness import check_model
from tests.helpers import make_model, node, rand


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("batch", ["N", 4])
def test_numbers_have_half_the_bits_and_the_interface_stays(batch, opset):
    model = residual_cnn(batch=batch, opset=opset)
    half = carry_out(model, Recipe("fp16"))
    check_model(half, reference=model)
    assert {tensor.data_type for tensor in half.graph.initializer} == {TensorProto.FLOAT16}
    assert len(half.SerializeToString()) < 0.6 * len(model.SerializeToString())
    for ours, before in zip(
        (*half.graph.input, *half.graph.output), (*model.graph.input, *model.graph.output), strict=True
    ):
        assert ours == before
    assert half.opset_import == model.opset_import
    assert half.metadata_props == model.metadata_props
    x = images(4, seed=8)
    assert lost_variance(outputs(half, x=x), outputs(model, x=x)) < 1e-4


def test_numbers_out_of_range_are_clipped_without_a_warning():
    weights = {"w": np.array([[1e6, -1e-9], [1.0, 2.0]], np.float32)}
    product = [node("MatMul", ["x", "w"], ["y"])]
    model = make_model(product, inputs={"x": ["N", 2]}, outputs=["y"], weights=weights)
    half = carry_out(model, Recipe("fp16"))
    values = onnx.numpy_helper.to_array(half.graph.initializer[0])
    assert np.isfinite(values).all()
    assert values[0, 0] > 9e3


def test_operators_of_other_domains_stay_in_float32():
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Gelu", ["h"], ["g"], domain="com.microsoft"),
        node("MatMul", ["g", "v"], ["y"]),
    ]
    model = make_model(
        nodes,
        inputs={"x": ["N", 6]},
        outputs=["y"],
        weights={"w": rand(6, 8, seed=1), "v": rand(8, 3, seed=2)},
        domains={"com.microsoft": 1},
    )
    half = carry_out(model, Recipe("fp16"))
    check_model(half, reference=model)
    x = rand(9, 6, seed=3)
    assert lost_variance(outputs(half, x=x), outputs(model, x=x)) < 1e-4

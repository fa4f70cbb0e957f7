from __future__ import annotations

import json

import numpy as np
import pytest

from hap_onnx.quantize import Recipe


def test_a_recipe_survives_json_bit_by_bit():
    low, high = (float(bound) for bound in np.float32([-0.1, 1 / 3]))
    recipe = Recipe("int8", "percentile", 7, {"x": (low, high)}, ("conv", "fc"))
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again.to_dict() == recipe.to_dict()
    assert np.float32(again.ranges["x"][1]) == np.float32(1 / 3)
    assert again.nodes == ("conv", "fc")


def test_fp16_needs_nothing_else():
    assert Recipe("fp16").to_dict() == {"kind": "fp16"}
    assert Recipe.from_dict({"kind": "fp16"}) == Recipe("fp16")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"kind": "int4"},
        {"kind": "int8", "weight_bits": 6},
        {"kind": "int8", "calibration": "guess"},
        {"kind": "int8", "ranges": {"x": [1.0, 0.0]}},
        {"kind": "int8", "ranges": {"x": [0.0, float("inf")]}},
        {"kind": "int8", "ranges": {"x": [0.0]}},
        {"kind": "int8", "ranges": {"x": ["a", "b"]}},
        {"kind": "int8", "ranges": []},
        {"kind": "int8", "nodes": "conv"},
        {"kind": "int8", "nodes": [1]},
    ],
    ids=str,
)
def test_what_no_recipe_says_is_refused(values):
    with pytest.raises(ValueError, match=r"is none of|range|'ranges'|node"):
        Recipe.from_dict(values)

"""The last step: the compressed model in fewer bits (``--then int8`` or ``fp16``).

``choose_recipe`` looks at the data and decides; ``carry_out`` follows a recipe without data, so that a saved
plan gives the same bytes again. Both conversions are onnxruntime's own; ours are the choice, the guarantees
of the output (names, types, versions and metadata stay) and the refusals.
"""

from __future__ import annotations

from onnx import ModelProto, TensorProto

from hap_onnx.errors import ModelError
from hap_onnx.quantize.fp16 import convert_to_fp16
from hap_onnx.quantize.int8 import LEAST_OPSET, preview_ranges, quantize_to_int8
from hap_onnx.quantize.protos import HALF_TYPES, find_quantized, float_weight_types, with_opset
from hap_onnx.quantize.recipe import Recipe

__all__ = ["BYTES_PER_PARAM", "Recipe", "carry_out", "check_model_for", "preview", "upgrade_note"]

BYTES_PER_PARAM = {"int8": 1.0, "fp16": 2.0}
"""About how many bytes of the final file belong to a parameter."""


def check_model_for(kind: str, model: ModelProto) -> None:
    """Raise ModelError if a model cannot be given ``--then kind``, before any work is done."""
    quantized = find_quantized(model)
    if quantized is not None:
        raise ModelError(
            f"the model is quantized already (at node '{quantized}'), so --then {kind} has nothing to do: "
            "leave it away"
        )
    types = set(float_weight_types(model))
    if kind == "int8" and types & {TensorProto.DOUBLE, *HALF_TYPES}:
        raise ModelError("--then int8 starts from a float32 model, and this one has other float types")
    if kind == "fp16" and TensorProto.FLOAT not in types:
        raise ModelError("--then fp16 starts from a float32 model, and this one has no float32 weights")


def carry_out(model: ModelProto, recipe: Recipe) -> ModelProto:
    """Return the final model, with the interface, the metadata and, if possible, the versions of ``model``.

    Raises:
        ModelError: the model cannot be converted, or the recipe is for another one.
    """
    return convert_to_fp16(model) if recipe.kind == "fp16" else quantize_to_int8(model, recipe)


def preview(model: ModelProto, kind: str) -> ModelProto:
    """Return a model of the final one's size, before anything is known of its data."""
    ranges = preview_ranges(model) if kind == "int8" else {}
    return carry_out(model, Recipe(kind, ranges=ranges))


def upgrade_note(model: ModelProto, kind: str) -> str:
    """Say what versions the final model needs beyond those of ``model``; "" if none."""
    return with_opset(model, LEAST_OPSET)[1] if kind == "int8" else ""

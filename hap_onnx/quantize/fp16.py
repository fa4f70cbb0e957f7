"""Numbers of 16 bits, by onnxruntime's own converter."""

from __future__ import annotations

import warnings

from onnx import ModelProto
from onnxruntime.transformers.float16 import convert_float_to_float16

from hap_onnx.errors import ModelError
from hap_onnx.model.protos import DEFAULT_DOMAINS
from hap_onnx.quantize.protos import with_header_of, with_types


def convert_to_fp16(model: ModelProto) -> ModelProto:
    """Return the model with weights and activations in float16; inputs and outputs keep their types.

    Operators of other domains stay in float32, between casts. Weights beyond its range are clipped.

    Raises:
        ModelError: the converter does not know how.
    """
    foreign = [node.name for node in model.graph.node if node.domain not in DEFAULT_DOMAINS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clipped weights; the quality that is measured tells
        try:
            converted = convert_float_to_float16(
                with_types(model), keep_io_types=True, disable_shape_infer=True, node_block_list=foreign
            )
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            raise ModelError(f"the model cannot be converted to float16: {error}") from error
    return with_header_of(model, converted)

"""The node tests that come with onnx, all through the twin: against their recorded outputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from onnx import TensorProto

from tools.node_tests import NodeCase, generated_cases, run_case

# What torch does not compute, by the operators in the model: how such a case ends instead, and why. An opaque
# node runs in onnxruntime, where no gradient passes; a refused model raises an error that names the node. All
# other cases must run by torch functions of ours or by the function bodies of the operators' schemas.
OPERATORS = {
    # optional values, boxes, text, trees
    "OptionalGetElement": ("opaque", "optional values"),
    "OptionalHasElement": ("opaque", "optional values"),
    "NonMaxSuppression": ("opaque", "a choice of boxes has no gradient"),
    "TfIdfVectorizer": ("opaque", "text"),
    "ImageDecoder": ("refused", "compressed images"),
    "MelWeightMatrix": ("opaque", "it makes a constant"),
    "ArrayFeatureExtractor": ("opaque", "classical machine learning"),
    "Binarizer": ("opaque", "classical machine learning"),
    "TreeEnsemble": ("opaque", "classical machine learning"),
    # products of integers
    "ConvInteger": ("opaque", "quantized"),
    "MatMulInteger": ("opaque", "quantized"),
    "QLinearConv": ("opaque", "quantized"),
    "QLinearMatMul": ("opaque", "quantized"),
    # training, random numbers, and what the newest onnxruntime does not know
    "Adagrad": ("refused", "an optimizer"),
    "Adam": ("refused", "an optimizer"),
    "Momentum": ("refused", "an optimizer"),
    "Bernoulli": ("refused", "random; onnxruntime has no kernel for opset 22"),
    "RandomUniformLike": ("refused", "random; onnxruntime has no kernel for opset 22"),
    "CausalConvWithState": ("refused", "opset 27"),
    "LinearAttention": ("refused", "opset 27"),
    "SwiGLU": ("refused", "opset 28"),
}
# The same for single cases, by name. The outputs of disputed ones are onnxruntime's, not the recorded ones.
CASES = {
    "test_ai_onnx_ml_tree_ensemble_single_tree": ("refused", "a tree of doubles"),
    "test_bitcast_float64_to_int64": ("refused", "the twin computes in 32 bits"),
    "test_bitcast_int64_to_float64": ("opaque", "the twin computes in 32 bits"),
    "test_dequantizelinear_blocked": ("opaque", "scales in blocks"),
    "test_quantizelinear_blocked_asymmetric": ("opaque", "scales in blocks"),
    "test_quantizelinear_blocked_symmetric": ("opaque", "scales in blocks"),
    "test_convinteger_with_padding": ("refused", "onnxruntime refuses it too"),
    "test_flexattention_causal_mask": ("refused", "a preview, with a graph inside"),
    "test_flexattention_prob_mod": ("refused", "a preview, with a graph inside"),
    "test_flexattention_relative_positional": ("refused", "a preview, with a graph inside"),
    "test_flexattention_score_mod": ("refused", "a preview, with a graph inside"),
    "test_flexattention_soft_cap": ("refused", "a preview, with a graph inside"),
    "test_scan_sum": ("opaque", "the Scan of opset 8, over batches"),
    "test_training_dropout": ("disputed", "random numbers"),
    "test_training_dropout_default": ("disputed", "random numbers"),
    "test_training_dropout_default_mask": ("disputed", "random numbers"),
    "test_training_dropout_mask": ("disputed", "random numbers"),
    "test_maxunpool_export_with_output_shape": ("disputed", "indices count in the whole output"),
    "test_resize_downsample_scales_cubic_align_corners": ("disputed", "the sizes are rounded first"),
    "test_resize_downsample_scales_linear_align_corners": ("disputed", "the sizes are rounded first"),
}
# What torch and our harness hold. Text, sequences, and types of other widths are not the twin's business.
_TYPES = {
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT8,
    TensorProto.INT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.UINT8,
    TensorProto.BOOL,
}


def _cases() -> Iterator[NodeCase]:
    for case in generated_cases():
        values = [*case.model.graph.input, *case.model.graph.output]
        kinds = {value.type.WhichOneof("value") for value in values}
        if kinds == {"tensor_type"} and {value.type.tensor_type.elem_type for value in values} <= _TYPES:
            yield case


ALL = list(_cases())


def _exception(case: NodeCase) -> tuple[str, str] | None:
    """Return how a case ends that torch does not compute, and why; None for all others."""
    if case.name in CASES:
        return CASES[case.name]
    entries = [OPERATORS[node.op_type] for node in case.model.graph.node if node.op_type in OPERATORS]
    return max(entries, default=None)  # one refused node is enough to refuse a model


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_case_of_onnx(case: NodeCase) -> None:
    outcome, exception = run_case(case), _exception(case)
    if exception is None:
        assert outcome.kind in ("torch", "body"), outcome.reason
        return
    kind, why = exception
    assert outcome.kind == kind, (why, outcome.reason)
    if kind == "refused":
        assert any(node.op_type in outcome.reason for node in case.model.graph.node)


def test_float_cases_run_in_torch_but_for_few() -> None:
    cases = [case for case in ALL if case.is_float]
    assert sum(_exception(case) is None for case in cases) >= 0.9 * len(cases) > 1000


def test_every_exception_is_needed() -> None:
    assert set(CASES) <= {case.name for case in ALL}
    assert set(OPERATORS) <= {node.op_type for case in ALL for node in case.model.graph.node}

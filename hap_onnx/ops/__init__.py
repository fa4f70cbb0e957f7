"""The operators, one module per family; importing this package registers them all."""

from hap_onnx.ops import (
    attention,
    concat,
    conv,
    conv_implants,
    elementwise,
    fused,
    index,
    matmul,
    norm,
    pool,
    recurrent,
    reduce,
    resize,
    sample,
    shape,
    signal,
)

__all__ = [
    "attention",
    "concat",
    "conv",
    "conv_implants",
    "elementwise",
    "fused",
    "index",
    "matmul",
    "norm",
    "pool",
    "recurrent",
    "reduce",
    "resize",
    "sample",
    "shape",
    "signal",
]

"""The operators, one module per family; importing this package registers them all."""

from hap_onnx.ops import (
    attention_heads,
    concat,
    conv,
    conv_implants,
    elementwise,
    index,
    matmul,
    norm,
    pool,
    reduce,
    resize,
    shape,
)

__all__ = [
    "attention_heads",
    "concat",
    "conv",
    "conv_implants",
    "elementwise",
    "index",
    "matmul",
    "norm",
    "pool",
    "reduce",
    "resize",
    "shape",
]

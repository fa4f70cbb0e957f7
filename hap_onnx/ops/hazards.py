"""Numbers on which onnxruntime divides by zero: that ends the process, so they are looked for beforehand.

What it refuses with a message of its own need not be here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto

_DOMAINS = ("", "ai.onnx", "com.microsoft")
_COUNTS = frozenset(["blocksize", "group", "kv_num_heads", "num_groups", "num_heads", "q_num_heads"])
"""Attributes that count something; the standard asks for at least 1 of each."""


def constants_read(node: NodeProto) -> list[str]:
    """Return the names of the inputs whose numbers ``find_hazard`` wants to see."""
    return list(node.input[1:2]) if node.op_type in ("Div", "Mod", "SplitToSequence") else []


def find_hazard(node: NodeProto, constants: Mapping[str, TensorProto]) -> str | None:
    """Say what would crash onnxruntime, None if nothing is known.

    ``constants`` holds the constants of the graph around the node by name, checked and in memory.
    """
    if node.domain not in _DOMAINS:
        return None
    for attribute in node.attribute:
        if attribute.name in _COUNTS and attribute.type == AttributeProto.INT and attribute.i < 1:
            return f"has the {attribute.name} {attribute.i}, but at least 1 is needed"
    for name in constants_read(node):
        divisor = constants.get(name)
        if divisor is None or divisor.data_type not in (TensorProto.INT32, TensorProto.INT64):
            continue
        values = np.asarray(onnx.numpy_helper.to_array(divisor))
        if node.op_type == "SplitToSequence":
            if values.ndim == 0 and values < 1:
                return f"splits into parts of {values}, but at least 1 is needed"
        elif (values == -1).any():
            return "divides integers by -1, which overflows for the smallest; export it with a Neg"
    return None

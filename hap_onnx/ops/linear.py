"""Contractions as matrix products: what statistics, ranking and refit work on.

A contraction computes, for each sample and each output position, ``y = W x + b`` with the same W at every
position. ``LinearForm`` brings the inputs of a node into rows x, its outputs into rows y and its weight into
the matrix W, for every kind of convolution and matrix product alike. Features are ordered channel by channel,
the taps of a kernel within. The rules are beside the operators (``conv``, ``matmul``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_graphsurgeon as gs
from torch import Tensor

from hap_onnx.ops.registry import find_linear


@dataclass(frozen=True)
class LinearForm:
    """The matrix form of one node.

    Shapes, with g conv groups, P output positions per sample, F features and O outputs per conv group:

    * ``patches(x, positions)``: the node's data input -> [g, N * n_positions, F]
    * ``outputs(y, positions)``: the node's output -> [g, N * n_positions, O]
    * ``to_matrix(w)``: the weight -> [g, O, F]; ``to_weight(matrix, shape)`` is its inverse
    * ``n_taps``: features per position of the weight's input axis ``in_axis``

    ``positions`` is an int64 tensor of indices below ``n_positions(y)``.
    """

    data_index: int
    weight_index: int
    bias_index: int | None
    conv_group: int
    n_taps: int
    in_axis: int
    out_axis: int
    channel_axis: int  # of the data input and of the output
    patches: Callable[[Tensor, Tensor], Tensor]
    outputs: Callable[[Tensor, Tensor], Tensor]
    n_positions: Callable[[Tensor], int]
    to_matrix: Callable[[Tensor], Tensor]
    to_weight: Callable[[Tensor, tuple[int, ...]], Tensor]


def linear_form(node: gs.Node) -> LinearForm | None:
    """Return the matrix form of a node, or None if it has none."""
    rule = find_linear(node.op, domain=node.domain or "")
    return None if rule is None else rule(node)

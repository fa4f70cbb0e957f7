"""Temporary home of the flow and edit rules; moved to the families."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from typing import TYPE_CHECKING

from hap_onnx.ops.registry import edit_op, flow_op

if TYPE_CHECKING:
    from hap_onnx.channels import Flow, Ids
    from hap_onnx.surgery import Cut

# =============================================================== conv


@flow_op("Conv")
def _flow_conv(node: gs.Node, flow: Flow) -> None:
    x, weight = node.inputs[:2]
    out = node.outputs[0]
    conv_group = int(node.attrs.get("group", 1))
    if not isinstance(weight, gs.Constant):
        flow.freeze(flow.ids(x), node, "its weight is computed by other nodes")
        return
    if _on_other_axis(node, flow, x, 1):
        return
    n_out, width = weight.shape[0], weight.shape[1]
    if conv_group == 1:
        ids = flow.fresh(n_out)
        found = flow.ids(x)
        if found is not None:
            flow.bind(weight, 1, found.ids, "consumer", node)
            flow.read(node, 0)
        flow.bind(weight, 0, ids, "producer", node)
        _bind_bias(node, flow, 2, ids)
        flow.put(out, 1, ids)
        return
    _flow_grouped(node, flow, conv_group, in_width=width, out_width=n_out // conv_group)


def _flow_grouped(node: gs.Node, flow: Flow, conv_group: int, *, in_width: int, out_width: int) -> None:
    """Grouped convolution: either whole groups go, or the same positions of every group.

    1. Whole groups: the ids of the input are joined within each group and pass through to the output.
    2. Positions: the ids of the input are joined across the groups; the output gets its own ids, one per
       position within a group.
    """
    x, weight = node.inputs[:2]
    out = node.outputs[0]
    found = flow.ids(x)
    ids = flow.fresh(out_width)  # made in either case, so that ids keep their numbers from pass to pass
    if found is None:
        # Groups of something that cannot go: positions of the output still can.
        flow.bind(weight, 0, np.tile(ids, conv_group), "producer", node)
        _bind_bias(node, flow, 2, np.tile(ids, conv_group))
        flow.put(out, 1, np.tile(ids, conv_group))
        return
    if in_width == 1:
        whole, by_group = True, found.ids
    else:
        axis, merged = flow.merge(node, found.ids.reshape(conv_group, in_width))
        whole = axis == 0
        by_group = merged
    if whole:
        repeated = np.repeat(by_group, out_width)
        flow.bind(weight, 0, repeated, "follower", node)
        _bind_bias(node, flow, 2, repeated)
        flow.put(out, 1, repeated)
    else:
        flow.bind(weight, 1, by_group, "consumer", node)
        flow.read(node, 0)
        tiled = np.tile(ids, conv_group)
        flow.bind(weight, 0, tiled, "producer", node)
        _bind_bias(node, flow, 2, tiled)
        flow.put(out, 1, tiled)


@edit_op("Conv", "ConvTranspose")
def _edit_conv(node: gs.Node, cut: Cut) -> None:
    conv_group = int(node.attrs.get("group", 1))
    kept = cut.kept(node.inputs[0])
    if conv_group == 1 or kept is None:
        return
    channels = cut.shape(node.inputs[0])[1]
    # Whole groups went if the weight's width per group is as before.
    weight = node.inputs[1]
    width_axis = 1 if node.op == "Conv" else 0
    if node.op == "Conv":
        whole = cut.shape(weight)[width_axis] == weight.shape[width_axis]
        if whole:
            node.attrs["group"] = len(kept.positions) // weight.shape[1]
    else:
        node.attrs["group"] = conv_group * len(kept.positions) // channels


@flow_op("ConvTranspose")
def _flow_conv_transpose(node: gs.Node, flow: Flow) -> None:
    x, weight = node.inputs[:2]
    conv_group = int(node.attrs.get("group", 1))
    if not isinstance(weight, gs.Constant):
        flow.freeze(flow.ids(x), node, "its weight is computed by other nodes")
        return
    if _on_other_axis(node, flow, x, 1):
        return
    found = flow.ids(x)
    ids = flow.fresh(weight.shape[1])
    if conv_group == 1:
        if found is not None:
            flow.bind(weight, 0, found.ids, "consumer", node)
            flow.read(node, 0)
        flow.bind(weight, 1, ids, "producer", node)
        _bind_bias(node, flow, 2, ids)
        flow.put(node.outputs[0], 1, ids)
        return
    if found is None:
        return
    # Grouped: whole groups go, input and output together.
    in_width = weight.shape[0] // conv_group
    by_group = found.ids.reshape(conv_group, in_width)
    flow.join(np.repeat(by_group[:, 0], in_width), by_group.ravel())
    group_ids = np.ascontiguousarray(by_group[:, 0])
    flow.bind(weight, 0, np.repeat(group_ids, in_width), "follower", node)
    repeated = np.repeat(group_ids, weight.shape[1])
    _bind_bias(node, flow, 2, repeated)
    flow.put(node.outputs[0], 1, repeated)


def _on_other_axis(node: gs.Node, flow: Flow, tensor: gs.Tensor, axis: int) -> bool:
    """Freeze channels that do not lie on the axis that the operator works on; say whether that was so."""
    found = flow.ids(tensor)
    if found is None or found.axis == axis:
        return False
    flow.freeze(found, node, f"its input's channels lie on axis {found.axis}, not {axis}")
    return True


def _bind_bias(node: gs.Node, flow: Flow, index: int, ids: Ids) -> None:
    if len(node.inputs) <= index or not node.inputs[index].name:
        return
    bias = node.inputs[index]
    if isinstance(bias, gs.Constant):
        if bias.shape and bias.shape[-1] == len(ids):
            flow.bind(bias, len(bias.shape) - 1, ids, "follower", node)
        else:  # one number for all channels
            flow.use(bias, node)
    else:
        flow.freeze(ids, node, "its bias is computed by other nodes")


# =============================================================== matmul


@flow_op("Gemm")
def _flow_gemm(node: gs.Node, flow: Flow) -> None:
    a, b = node.inputs[:2]
    found = flow.ids(a)
    if not isinstance(b, gs.Constant) or int(node.attrs.get("transA", 0)):
        for tensor in node.inputs:
            flow.freeze(flow.ids(tensor), node, "Gemm with a computed or transposed operand")
        return
    if _on_other_axis(node, flow, a, 1):
        return
    in_axis, out_axis = (1, 0) if int(node.attrs.get("transB", 0)) else (0, 1)
    ids = flow.fresh(b.shape[out_axis])
    if found is not None:
        flow.bind(b, in_axis, found.ids, "consumer", node)
        flow.read(node, 0)
    flow.bind(b, out_axis, ids, "producer", node)
    _bind_bias(node, flow, 2, ids)
    flow.put(node.outputs[0], 1, ids)


@flow_op("MatMul")
def _flow_matmul(node: gs.Node, flow: Flow) -> None:
    a, b = node.inputs
    weight, data = (b, a) if isinstance(b, gs.Constant) else (a, b)
    found = flow.ids(data)
    if not isinstance(weight, gs.Constant) or isinstance(data, gs.Constant):
        for tensor in node.inputs:
            flow.freeze(flow.ids(tensor), node, "a product of two computed tensors (attention) stays whole")
        return
    if len(weight.shape) != 2 or len(flow.shape(data)) < 2:
        flow.freeze(found, node, "MatMul with a weight that is not a matrix")
        return
    on_right = weight is b
    ndim = len(flow.shape(data))
    contracted, made = (ndim - 1, ndim - 1) if on_right else (ndim - 2, ndim - 2)
    in_axis, out_axis = (0, 1) if on_right else (1, 0)
    flow.use(weight, node)
    ids = flow.fresh(weight.shape[out_axis])
    if found is not None and found.axis != contracted:
        # The channels pass through, so the columns that the weight makes have to stay.
        flow.put(node.outputs[0], found.axis, found.ids)
        return
    if found is not None:
        flow.bind(weight, in_axis, found.ids, "consumer", node)
        flow.read(node, 0 if on_right else 1)
    flow.bind(weight, out_axis, ids, "producer", node)
    flow.put(node.outputs[0], made, ids)


# =============================================================== elementwise and norm


def _flow_elementwise(node: gs.Node, flow: Flow) -> None:
    """Join the channels of all inputs; constants lose what the channels lose."""
    out_shape = flow.shape(node.outputs[0])
    ndim = len(out_shape)
    inputs = [tensor for tensor in node.inputs if tensor.name]
    carrying = [(tensor, found) for tensor in inputs if (found := flow.ids(tensor)) is not None]
    if not carrying:
        for tensor in inputs:
            if isinstance(tensor, gs.Constant):
                flow.use(tensor, node)
        return
    # Axes are counted from the right: shapes are broadcast that way.
    first, found = next(
        ((t, f) for t, f in carrying if len(f.ids) == out_shape[f.axis + ndim - len(flow.shape(t))]),
        carrying[0],
    )
    axis = found.axis + ndim - len(flow.shape(first))
    ids = found.ids
    for tensor in inputs:
        shape = flow.shape(tensor)
        own_axis = axis - (ndim - len(shape))
        own = flow.ids(tensor)
        size = shape[own_axis] if own_axis >= 0 else 1
        if own is not None and own.axis == own_axis and size == len(ids):
            flow.join(ids, own.ids)
        elif own is not None:
            flow.freeze(own, node, f"{node.op} combines channels on different axes")
            if size == len(ids) > 1:
                flow.freeze(ids, node, f"{node.op} combines channels on different axes")
        elif isinstance(tensor, gs.Constant):
            flow.use(tensor, node)
            if size == len(ids) and (size > 1 or len(shape) > 0) and own_axis >= 0:
                if size > 1:
                    flow.bind(tensor, own_axis, ids, "follower", node)
            elif size > 1:
                flow.freeze(ids, node, f"{node.op} spreads one channel over several")
        elif size == len(ids) and size > 1:
            flow.freeze(ids, node, f"{node.op} joins them with '{tensor.name}', whose channels must stay")
        elif size > len(ids):
            flow.freeze(ids, node, f"{node.op} spreads one channel over several")
    if len(ids) == out_shape[axis]:
        for output in node.outputs:
            if output.name:
                flow.put(output, axis, ids)


for (
    _op
) in """Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast
    CastLike Ceil Celu Clip Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid
    HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow
    Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh
    ThresholdedRelu Where Xor""".split():
    flow_op(_op)(_flow_elementwise)


@flow_op("BatchNormalization", "InstanceNormalization")
def _flow_channel_norm(node: gs.Node, flow: Flow) -> None:
    x = node.inputs[0]
    found = flow.ids(x)
    if found is None:
        for tensor in node.inputs[1:]:
            flow.use(tensor, node)
        return
    if _on_other_axis(node, flow, x, 1):
        return
    if int(node.attrs.get("training_mode", 0)):
        flow.freeze(found, node, "BatchNormalization in training mode")
        return
    for tensor in node.inputs[1:]:
        if not isinstance(tensor, gs.Constant):
            flow.freeze(found, node, f"its statistic '{tensor.name}' is computed by other nodes")
            return
        flow.bind(tensor, 0, found.ids, "follower", node)
    flow.put(node.outputs[0], 1, found.ids)


@flow_op("Softmax", "LogSoftmax", "Hardmax")
def _flow_softmax(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    ndim = len(flow.shape(node.inputs[0]))
    flat = flow.graph.opset < 13  # before, all axes from `axis` on were normalised together
    axis = int(node.attrs.get("axis", 1 if flat else -1)) % ndim
    if found.axis == axis or (flat and found.axis > axis):
        flow.freeze(found, node, f"{node.op} normalises over the channels")
    else:
        flow.put(node.outputs[0], found.axis, found.ids)


@flow_op("LayerNormalization", "LpNormalization", "RMSNormalization")
def _flow_normalised_axes(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    axis = int(node.attrs.get("axis", -1)) % len(flow.shape(node.inputs[0]))
    if found.axis >= axis:
        flow.freeze(found, node, f"{node.op} normalises over the channels")
    else:
        flow.put(node.outputs[0], found.axis, found.ids)
        for tensor in node.inputs[1:]:
            flow.use(tensor, node)


# =============================================================== pool, resize, reduce


@flow_op("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _flow_pool(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    if found.axis > 1:
        flow.freeze(found, node, f"{node.op} mixes positions of axis {found.axis}")
        return
    if len(node.outputs) > 1 and node.outputs[1].name:
        flow.freeze(found, node, "its second output counts positions across channels")
        return
    flow.put(node.outputs[0], found.axis, found.ids)


@flow_op("Resize", "Upsample")
def _flow_resize(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    for tensor in node.inputs[1:]:
        if isinstance(tensor, gs.Constant):
            flow.use(tensor, node)
    if found is None:
        return
    if flow.shape(node.outputs[0])[found.axis] != len(found.ids):
        flow.freeze(found, node, f"{node.op} changes the number of channels")
        return
    flow.put(node.outputs[0], found.axis, found.ids)


@edit_op("Resize")
def _edit_resize(node: gs.Node, cut: Cut) -> None:
    kept = cut.kept(node.outputs[0])
    if kept is not None and len(node.inputs) > 3 and node.inputs[3].name and "axes" not in node.attrs:
        cut.edit_shape_input(node, 3)


def _flow_reduce(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    for tensor in node.inputs[1:]:
        flow.use(tensor, node)
    if found is None:
        return
    ndim = len(flow.shape(node.inputs[0]))
    axes = _ints(node, flow, 1, "axes")
    if axes is None:
        flow.freeze(found, node, f"{node.op} over axes that are computed")
        return
    if not axes and int(node.attrs.get("noop_with_empty_axes", 0)):
        flow.put(node.outputs[0], found.axis, found.ids)
        return
    reduced = {axis % ndim for axis in axes} or set(range(ndim))
    if found.axis in reduced:
        flow.freeze(found, node, f"{node.op} runs over the channels")
        return
    keepdims = int(node.attrs.get("keepdims", 1))
    axis = found.axis if keepdims else found.axis - sum(a < found.axis for a in reduced)
    flow.put(node.outputs[0], axis, found.ids)


for (
    _op
) in """ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceSumSquare""".split():
    flow_op(_op)(_flow_reduce)


@flow_op("ArgMax", "ArgMin")
def _flow_arg(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    axis = int(node.attrs.get("axis", 0)) % len(flow.shape(node.inputs[0]))
    if found.axis == axis:
        flow.freeze(found, node, f"{node.op} counts positions of the channel axis")
        return
    keepdims = int(node.attrs.get("keepdims", 1))
    flow.put(node.outputs[0], found.axis - int(not keepdims and axis < found.axis), found.ids)


def _ints(node: gs.Node, flow: Flow, index: int, attribute: str) -> list[int] | None:
    """Integers from a constant input or an attribute; [] if neither is there, None if they are computed."""
    if attribute in node.attrs:
        value = node.attrs[attribute]
        return [int(v) for v in value] if isinstance(value, (list, tuple, np.ndarray)) else [int(value)]
    if len(node.inputs) > index and node.inputs[index].name:
        tensor = node.inputs[index]
        if not isinstance(tensor, gs.Constant):
            return None
        flow.use(tensor, node)
        return [int(v) for v in np.asarray(tensor.values).ravel()]
    return []


# =============================================================== concat, split, shape


@flow_op("Concat")
def _flow_concat(node: gs.Node, flow: Flow) -> None:
    ndim = len(flow.shape(node.outputs[0]))
    axis = int(node.attrs["axis"]) % ndim
    found = [flow.ids(tensor) for tensor in node.inputs]
    for tensor in node.inputs:
        if isinstance(tensor, gs.Constant):
            flow.use(tensor, node)
    if all(f is None for f in found):
        return
    axes = {f.axis for f in found if f is not None}
    if len(axes) > 1:
        for f in found:
            flow.freeze(f, node, "Concat of tensors whose channels lie on different axes")
        return
    channel_axis = axes.pop()
    if channel_axis == axis:
        parts = []
        for tensor, f in zip(node.inputs, found, strict=True):
            parts.append(np.zeros(flow.shape(tensor)[axis], np.int64) if f is None else f.ids)
        flow.put(node.outputs[0], axis, np.concatenate(parts))
        return
    first = next(f for f in found if f is not None)
    for tensor, f in zip(node.inputs, found, strict=True):
        if f is None:
            flow.freeze(first, node, f"Concat beside '{tensor.name}', whose channels must stay")
        else:
            flow.join(first.ids, f.ids)
    flow.put(node.outputs[0], channel_axis, first.ids)


@flow_op("Split")
def _flow_split(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    axis = int(node.attrs.get("axis", 0)) % len(flow.shape(node.inputs[0]))
    if len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
        flow.use(node.inputs[1], node)
    start = 0
    for output in node.outputs:
        if axis == found.axis:
            size = flow.shape(output)[axis]
            flow.put(output, axis, found.ids[start : start + size])
            start += size
        else:
            flow.put(output, found.axis, found.ids)


@edit_op("Split")
def _edit_split(node: gs.Node, cut: Cut) -> None:
    axis = int(node.attrs.get("axis", 0)) % len(cut.shape(node.inputs[0]))
    kept = [cut.kept(output) for output in node.outputs]
    if not any(k is not None and k.axis == axis for k in kept):
        return
    sizes = [
        cut.shape(output)[axis] if k is None else len(k.positions)
        for output, k in zip(node.outputs, kept, strict=True)
    ]
    node.attrs.pop("num_outputs", None)
    cut.set_ints(node, 1, "split", sizes, as_attribute=cut.opset < 13)


@flow_op("Slice")
def _flow_slice(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    bounds = _slice_bounds(node, flow.shape(node.inputs[0]), lambda i, name: _ints(node, flow, i, name))
    if found is None:
        return
    if bounds is None:
        if flow.shape(node.outputs[0])[found.axis] == len(found.ids):
            flow.freeze(found, node, "Slice with computed bounds")
        else:
            flow.freeze(found, node, "Slice of the channels with computed bounds")
        return
    if found.axis in bounds:
        start, stop, step = bounds[found.axis]
        if step != 1:
            if len(range(start, stop, step)) == len(found.ids) and step == 1:
                flow.put(node.outputs[0], found.axis, found.ids)
                return
            flow.freeze(found, node, "Slice of the channels with a step")
            return
        flow.put(node.outputs[0], found.axis, found.ids[start:stop])
        return
    flow.put(node.outputs[0], found.axis, found.ids)


def _slice_bounds(node, shape, read) -> dict[int, tuple[int, int, int]] | None:  # type: ignore[no-untyped-def]
    """Map each sliced axis to its clamped (start, stop, step), or None if any is computed."""
    starts, ends, axes, steps = (
        read(1, "starts"),
        read(2, "ends"),
        read(3, "axes"),
        read(4, "steps"),
    )
    if starts is None or ends is None or axes is None or steps is None:
        return None
    axes = axes or list(range(len(starts)))
    steps = steps or [1] * len(starts)
    result = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= len(shape)
        result[axis] = slice(start, end if step > 0 or end >= -shape[axis] else None, step).indices(
            shape[axis]
        )
    return result


@edit_op("Slice")
def _edit_slice(node: gs.Node, cut: Cut) -> None:
    kept_in, kept_out = cut.kept(node.inputs[0]), cut.kept(node.outputs[0])
    if kept_in is None:
        return
    axis = kept_in.axis
    bounds = _slice_bounds(node, cut.shape(node.inputs[0]), lambda i, name: cut.ints(node, i, name))
    if bounds is None or axis not in bounds:
        return
    start, stop, _ = bounds[axis]
    if (start, stop) == (0, cut.shape(node.inputs[0])[axis]):
        new = (0, len(kept_in.positions))
    else:
        new = (int((kept_in.positions < start).sum()), int((kept_in.positions < stop).sum()))
    n_out = cut.shape(node.outputs[0])[axis] if kept_out is None else len(kept_out.positions)
    if new[1] - new[0] != n_out:
        raise AssertionError(f"{node.name}: slice {new} for {n_out} channels")
    starts, ends = cut.ints(node, 1, "starts"), cut.ints(node, 2, "ends")
    axes = cut.ints(node, 3, "axes") or list(range(len(starts or [])))
    assert starts is not None and ends is not None
    index = [a % len(cut.shape(node.inputs[0])) for a in axes].index(axis)
    starts[index], ends[index] = new
    as_attribute = "starts" in node.attrs
    cut.set_ints(node, 1, "starts", starts, as_attribute=as_attribute)
    cut.set_ints(node, 2, "ends", ends, as_attribute=as_attribute)


@flow_op("Pad")
def _flow_pad(node: gs.Node, flow: Flow) -> None:
    x = node.inputs[0]
    found = flow.ids(x)
    pads = _pads(node, len(flow.shape(x)), lambda i, name: _ints(node, flow, i, name))
    if len(node.inputs) > 2 and isinstance(node.inputs[2], gs.Constant):
        flow.use(node.inputs[2], node)
    if found is None:
        return
    if pads is None:
        flow.freeze(found, node, "Pad with computed amounts")
        return
    begin, end = pads[found.axis]
    if begin == end == 0:
        flow.put(node.outputs[0], found.axis, found.ids)
        return
    mode = node.attrs.get("mode", "constant")
    if mode != "constant" or begin < 0 or end < 0:
        flow.freeze(found, node, f"Pad of the channels in mode '{mode}' or by a negative amount")
        return
    ids = np.concatenate([flow.fresh(begin), found.ids, flow.fresh(end)])
    flow.put(node.outputs[0], found.axis, ids)


def _pads(node, ndim, read) -> list[tuple[int, int]] | None:  # type: ignore[no-untyped-def]
    """(begin, end) for each axis, or None if the amounts are computed."""
    pads = read(1, "pads")
    axes = read(3, "axes")
    if pads is None or axes is None:
        return None
    axes = [axis % ndim for axis in axes] or list(range(ndim))
    half = len(pads) // 2
    result = [(0, 0)] * ndim
    for axis, begin, end in zip(axes, pads[:half], pads[half:], strict=True):
        result[axis] = (begin, end)
    return result


@edit_op("Pad")
def _edit_pad(node: gs.Node, cut: Cut) -> None:
    kept = cut.kept(node.outputs[0])
    if kept is None:
        return
    ndim = len(cut.shape(node.inputs[0]))
    pads = _pads(node, ndim, lambda i, name: cut.ints(node, i, name))
    if pads is None or pads[kept.axis] == (0, 0):
        return
    begin, end = pads[kept.axis]
    total = cut.shape(node.outputs[0])[kept.axis]
    new = (int((kept.positions < begin).sum()), int((kept.positions >= total - end).sum()))
    raw = cut.ints(node, 1, "pads")
    assert raw is not None
    axes = [axis % ndim for axis in (cut.ints(node, 3, "axes") or range(ndim))]
    index = axes.index(kept.axis)
    raw[index], raw[index + len(raw) // 2] = new
    cut.set_ints(node, 1, "pads", raw, as_attribute="pads" in node.attrs)


@flow_op("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _flow_reshape(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    for tensor in node.inputs[1:]:
        if isinstance(tensor, gs.Constant):
            flow.use(tensor, node)
    if found is None:
        return
    old, new = flow.shape(node.inputs[0]), flow.shape(node.outputs[0])
    if prod(old) == 0:
        flow.freeze(found, node, f"{node.op} of an empty tensor")
        return
    in_axes, out_axes = _block_of(old, new, found.axis)
    if not out_axes:  # the axis of size one vanished
        flow.freeze(found, node, f"{node.op} drops the channel axis")
        return
    spread = found.ids.reshape([-1 if axis == found.axis else 1 for axis in in_axes])
    spread = np.broadcast_to(spread, [old[axis] for axis in in_axes]).reshape(
        [new[axis] for axis in out_axes]
    )
    axis, ids = flow.merge(node, spread)
    flow.put(node.outputs[0], out_axes[axis], ids)


def _block_of(old: tuple[int, ...], new: tuple[int, ...], axis: int) -> tuple[list[int], list[int]]:
    """Find the smallest run of axes around ``axis`` that a reshape maps to a run of new axes."""
    cuts_old = np.cumprod((1, *old)).tolist()
    cuts_new = np.cumprod((1, *new)).tolist()
    shared = set(cuts_old) & set(cuts_new)
    begin = max(cut for cut in shared if cut <= cuts_old[axis])
    end = min(cut for cut in shared if cut >= cuts_old[axis + 1])
    in_axes = [
        a
        for a in range(len(old))
        if cuts_old[a] >= begin and cuts_old[a + 1] <= end and (old[a] > 1 or a == axis)
    ]
    out_axes = [a for a in range(len(new)) if cuts_new[a] >= begin and cuts_new[a + 1] <= end and new[a] > 1]
    return in_axes, out_axes


@edit_op("Reshape")
def _edit_reshape(node: gs.Node, cut: Cut) -> None:
    if cut.kept(node.outputs[0]) is not None or cut.kept(node.inputs[0]) is not None:
        cut.edit_shape_input(node, 1)


@flow_op("Expand")
def _flow_expand(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if isinstance(node.inputs[1], gs.Constant):
        flow.use(node.inputs[1], node)
    if found is None:
        return
    shape, out = flow.shape(node.inputs[0]), flow.shape(node.outputs[0])
    axis = found.axis + len(out) - len(shape)
    if out[axis] != len(found.ids):
        flow.freeze(found, node, "Expand spreads one channel over several")
        return
    flow.put(node.outputs[0], axis, found.ids)


@edit_op("Expand")
def _edit_expand(node: gs.Node, cut: Cut) -> None:
    if cut.kept(node.outputs[0]) is not None:
        cut.edit_shape_input(node, 1, ones_stay=True)


@flow_op("Tile")
def _flow_tile(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if isinstance(node.inputs[1], gs.Constant):
        flow.use(node.inputs[1], node)
    if found is None:
        return
    repeats = flow.shape(node.outputs[0])[found.axis] // len(found.ids)
    flow.put(node.outputs[0], found.axis, np.tile(found.ids, repeats))


@flow_op("Transpose")
def _flow_transpose(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None:
        return
    ndim = len(flow.shape(node.inputs[0]))
    perm = list(node.attrs.get("perm", range(ndim - 1, -1, -1)))
    flow.put(node.outputs[0], perm.index(found.axis), found.ids)


@flow_op("Gather")
def _flow_gather(node: gs.Node, flow: Flow) -> None:
    x, indices = node.inputs
    found = flow.ids(x)
    if isinstance(indices, gs.Constant):
        flow.use(indices, node)
    if flow.ids(indices) is not None:
        flow.freeze(flow.ids(indices), node, "channels are used as indices")
    if found is None:
        return
    axis = int(node.attrs.get("axis", 0)) % len(flow.shape(x))
    n_index_axes = len(flow.shape(indices))
    if axis != found.axis:
        flow.put(node.outputs[0], found.axis + (n_index_axes - 1 if axis < found.axis else 0), found.ids)
        return
    if not isinstance(indices, gs.Constant) or n_index_axes != 1:
        flow.freeze(found, node, "Gather of channels by computed indices, or by a single one")
        return
    flow.put(node.outputs[0], axis, found.ids[np.asarray(indices.values)])


@edit_op("Gather")
def _edit_gather(node: gs.Node, cut: Cut) -> None:
    kept_in, kept_out = cut.kept(node.inputs[0]), cut.kept(node.outputs[0])
    axis = int(node.attrs.get("axis", 0)) % len(cut.shape(node.inputs[0]))
    if kept_in is None or kept_in.axis != axis or not isinstance(node.inputs[1], gs.Constant):
        return
    n_channels = cut.shape(node.inputs[0])[axis]
    indices = np.asarray(node.inputs[1].values) % n_channels
    if kept_out is not None:
        indices = indices[kept_out.positions]
    new_position = np.full(n_channels, -1, np.int64)
    new_position[kept_in.positions] = np.arange(len(kept_in.positions))
    cut.set_constant(node, 1, new_position[indices].astype(node.inputs[1].values.dtype))


@flow_op("DepthToSpace")
def _flow_depth_to_space(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None or _on_other_axis(node, flow, node.inputs[0], 1):
        return
    n_blocks = int(node.attrs["blocksize"]) ** 2
    crd = node.attrs.get("mode", "DCR") == "CRD"
    rows = found.ids.reshape(-1, n_blocks) if crd else found.ids.reshape(n_blocks, -1).T  # [C_out, blocks]
    flow.join(np.repeat(rows[:, 0], n_blocks), rows.ravel())
    flow.put(node.outputs[0], 1, np.ascontiguousarray(rows[:, 0]))


@flow_op("SpaceToDepth")
def _flow_space_to_depth(node: gs.Node, flow: Flow) -> None:
    found = flow.ids(node.inputs[0])
    if found is None or _on_other_axis(node, flow, node.inputs[0], 1):
        return
    flow.put(node.outputs[0], 1, np.tile(found.ids, int(node.attrs["blocksize"]) ** 2))


@flow_op("Shape", "Size", "Constant", "ConstantOfShape", "Range", "RandomNormalLike", "RandomUniformLike")
def _flow_nothing(node: gs.Node, flow: Flow) -> None:
    """Carry no channels: what is computed from a shape is checked on the result instead."""
    for tensor in node.inputs:
        if isinstance(tensor, gs.Constant):
            flow.use(tensor, node)

"""One tiny model for each way in which the channels of convolutional networks hang together.

Each is given with what its coupling must be: the sizes of its groups, sorted, and for nodes that are frozen a
part of the reason. A part of a node's name is enough; nodes are named after their first output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from helpers import make_model
from onnx import helper, numpy_helper

Shapes = dict[str, Sequence[int | str]]
IMAGE: Shapes = {"x": ("N", 3, 6, 6)}


@dataclass(frozen=True)
class Topology:
    """A model with the coupling that it must have; ``gone`` are groups that can be removed as a whole."""

    model: onnx.ModelProto
    sizes: tuple[int, ...]
    frozen: Mapping[str, str] = field(default_factory=dict)
    gone: tuple[str, ...] = ()


class Net:
    """Collects nodes and weights; every method returns the name of what it made."""

    def __init__(self, *, opset: int = 17, seed: int = 0) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(seed)
        self.n_made = 0

    def name(self, stem: str) -> str:
        self.n_made += 1
        return f"{stem.lower()}{self.n_made}"

    def const(self, values: Any) -> str:
        """Make an initializer."""
        name = self.name("w")
        self.weights[name] = np.asarray(values)
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def rand(self, *shape: int) -> str:
        fan_in = max(int(np.prod(shape[1:])), 1)
        return self.const((self.rng.standard_normal(shape) / fan_in**0.5).astype(np.float32))

    def op(self, op_type: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        return self.many(op_type, *inputs, outputs=[out or self.name(op_type)], **attributes)[0]

    def many(self, op_type: str, *inputs: str, outputs: Sequence[str], **attributes: Any) -> list[str]:
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=f"make_{outputs[0]}", **attributes))
        return list(outputs)

    def conv(
        self, x: str, n_in: int, n_out: int, *, k: int = 3, group: int = 1, axes: int = 2, bias: bool = True,
        out: str | None = None, weight: str | None = None, **attributes: Any,
    ) -> str:  # fmt: skip
        inputs = [x, weight or self.rand(n_out, n_in // group, *[k] * axes)]
        if bias:
            inputs.append(self.rand(n_out))
        attributes.setdefault("pads", [k // 2] * (2 * axes))
        return self.op("Conv", *inputs, out=out, group=group, **attributes)

    def norm(self, x: str, n: int) -> str:
        variance = self.const(self.rng.uniform(0.5, 2, n).astype(np.float32))
        return self.op("BatchNormalization", x, self.rand(n), self.rand(n), self.rand(n), variance)

    def relu(self, x: str) -> str:
        return self.op("Relu", x)

    def model(self, *outputs: str, inputs: Shapes | None = None) -> onnx.ModelProto:
        return make_model(
            self.nodes, inputs=inputs or IMAGE, outputs=outputs, weights=self.weights, opset=self.opset
        )


TOPOLOGIES: dict[str, Callable[[], Topology]] = {}


def topology(build: Callable[[], Topology]) -> Callable[[], Topology]:
    TOPOLOGIES[build.__name__] = build
    return build


def variants(**options: Any) -> Callable[[Callable[[Any], Topology]], Callable[[Any], Topology]]:
    """Register a builder once for each named argument."""

    def register(build: Callable[[Any], Topology]) -> Callable[[Any], Topology]:
        for name, option in options.items():
            TOPOLOGIES[f"{build.__name__}_{name}"] = lambda option=option: build(option)
        return build

    return register


# --- chains and branches ---


@topology
def chain() -> Topology:
    net = Net()
    x = net.relu(net.norm(net.conv("x", 3, 8, out="a"), 8))
    x = net.relu(net.norm(net.conv(x, 8, 6, bias=False, out="b"), 6))
    net.conv(x, 6, 4, out="y")
    return Topology(net.model("y"), (6, 8), {"make_y": "the model's output 'y'"})


@topology
def residual() -> Topology:
    net = Net()
    stream = net.relu(net.conv("x", 3, 8, out="stem"))
    for name in "ab":
        inner = net.relu(net.norm(net.conv(stream, 8, 6, out=f"{name}1"), 6))
        branch = net.norm(net.conv(inner, 6, 8, out=f"{name}2"), 8)
        stream = net.relu(net.op("Add", stream, branch))
    net.conv(stream, 8, 4, out="y")
    return Topology(net.model("y"), (6, 6, 8), {"make_y": "output"}, ("make_a1", "make_b1"))


@topology
def option_a_shortcut() -> Topology:
    """A ResNet's shortcut without weights: every other position, and zeros for the new channels."""
    net = Net()
    stream = net.relu(net.conv("x", 3, 4, out="stem"))
    inner = net.relu(net.conv(stream, 4, 7, strides=[2, 2], out="a"))
    branch = net.conv(inner, 7, 8, out="b")
    steps = net.ints(2, 2)
    short = net.op("Slice", stream, net.ints(0, 0), net.ints(2**62, 2**62), net.ints(2, 3), steps)
    short = net.op("Pad", short, net.ints(0, 2, 0, 0, 0, 2, 0, 0), net.const(np.float32(0)))
    net.conv(net.relu(net.op("Add", branch, short)), 8, 5, out="y")
    return Topology(net.model("y"), (4, 4, 7), {"make_y": "output"}, ("make_a",))


@topology
def concat() -> Topology:
    net = Net()
    parts = [net.conv("x", 3, 4, out="a"), net.conv("x", 3, 6, out="b")]
    net.conv(net.op("Concat", *parts, axis=1), 10, 5, out="y")
    return Topology(net.model("y"), (4, 6))


@topology
def concat_with_input() -> Topology:
    net = Net()
    net.conv(net.op("Concat", "x", net.conv("x", 3, 4), "x", axis=1), 10, 5, out="y")
    return Topology(net.model("y"), (4,))


@topology
def dense_block() -> Topology:
    net = Net()
    x, width = net.conv("x", 3, 4), 4
    for _ in range(3):
        new = net.conv(net.relu(net.norm(x, width)), width, 3)
        x, width = net.op("Concat", x, new, axis=1), width + 3
    net.conv(net.relu(net.norm(x, width)), width, 2, out="y")
    return Topology(net.model("y"), (3, 3, 3, 4))


@topology
def concat_on_another_axis() -> Topology:
    net = Net()
    a, b = net.conv("x", 3, 4), net.conv("x", 3, 4)
    net.conv(net.op("Concat", a, b, axis=2), 4, 5, out="y")
    return Topology(net.model("y"), (4,))


@topology
def gate() -> Topology:
    net = Net()
    halves = net.many("Split", net.conv("x", 3, 8), net.ints(4, 4), outputs=["s1", "s2"], axis=1)
    x = net.op("Mul", halves[0], net.op("Sigmoid", halves[1]))
    net.conv(x, 4, 5, out="y")
    return Topology(net.model("y"), (4,))


@topology
def gate_of_equal_parts() -> Topology:
    """Split without sizes, as since opset 18."""
    net = Net(opset=18)
    halves = net.many("Split", net.conv("x", 3, 8), outputs=["s1", "s2"], axis=1, num_outputs=2)
    net.conv(net.op("Concat", halves[1], net.relu(halves[0]), axis=1), 8, 5, out="y")
    return Topology(net.model("y"), (8,))


@topology
def squeeze_and_excitation() -> Topology:
    net = Net()
    x = net.relu(net.conv("x", 3, 8))
    gates = net.relu(net.conv(net.op("GlobalAveragePool", x), 8, 2, k=1))
    gates = net.op("Sigmoid", net.conv(gates, 2, 8, k=1))
    net.conv(net.op("Mul", x, gates), 8, 4, out="y")
    return Topology(net.model("y"), (2, 8))


@topology
def spatial_attention() -> Topology:
    net = Net()
    x = net.relu(net.conv("x", 3, 8))
    gates = net.op("Sigmoid", net.conv(x, 8, 1, out="one"))
    net.conv(net.op("Mul", gates, x), 8, 4, out="y")
    return Topology(net.model("y"), (8,), {"make_one": "spreads one channel over several"})


# --- convolutions ---


@variants(plain=1, multiplied=2)
def depthwise(multiplier: int) -> Topology:
    net = Net()
    x = net.conv("x", 3, 8, k=1)
    x = net.relu(net.norm(net.conv(x, 8, 8 * multiplier, group=8), 8 * multiplier))
    net.conv(x, 8 * multiplier, 5, k=1, out="y")
    return Topology(net.model("y"), (8,))


@topology
def grouped_narrow() -> Topology:
    """Four groups of two channels: whole groups go."""
    net = Net()
    x = net.relu(net.conv(net.conv("x", 3, 8), 8, 12, group=4))
    net.conv(x, 12, 5, out="y")
    return Topology(net.model("y"), (4,))


@topology
def grouped_wide() -> Topology:
    """Two groups of five channels: the same positions of both groups go."""
    net = Net()
    x = net.relu(net.conv(net.conv("x", 3, 10), 10, 12, group=2))
    net.conv(x, 12, 5, out="y")
    return Topology(net.model("y"), (5, 6))


@topology
def grouped_input() -> Topology:
    net = Net()
    net.conv(net.conv("x", 4, 6, group=2), 6, 5, out="y")
    return Topology(net.model("y", inputs={"x": ("N", 4, 6, 6)}), (3,))


@topology
def conv_transpose() -> Topology:
    net = Net()
    x = net.conv("x", 3, 6)
    x = net.op("ConvTranspose", x, net.rand(6, 4, 2, 2), net.rand(4), strides=[2, 2])
    net.conv(net.relu(x), 4, 2, out="y")
    return Topology(net.model("y"), (4, 6))


@topology
def conv_transpose_residual() -> Topology:
    """A transposed convolution that loses all its inputs leaves its bias."""
    net = Net()
    x = net.conv("x", 3, 6)
    inner = net.relu(net.conv(x, 6, 5, out="a"))
    net.conv(net.op("Add", x, net.op("ConvTranspose", inner, net.rand(5, 6, 1, 1))), 6, 2, out="y")
    return Topology(net.model("y"), (5, 6), gone=("make_a",))


@topology
def conv_transpose_grouped() -> Topology:
    net = Net()
    x = net.op(
        "ConvTranspose", net.conv("x", 3, 6), net.rand(6, 2, 2, 2), net.rand(6), strides=[2, 2], group=3
    )
    net.conv(net.relu(x), 6, 2, out="y")
    return Topology(net.model("y"), (3,))


@topology
def conv_transpose_depthwise() -> Topology:
    net = Net()
    x = net.op("ConvTranspose", net.conv("x", 3, 6), net.rand(6, 1, 2, 2), strides=[2, 2], group=6)
    net.conv(net.relu(x), 6, 2, out="y")
    return Topology(net.model("y"), (6,))


@topology
def conv_transpose_grouped_input() -> Topology:
    """Its output has fewer channels than a reader knows how to lose: it stays whole."""
    net = Net()
    x = net.op("ConvTranspose", "x", net.rand(4, 3, 2, 2), net.rand(6), group=2)
    net.conv(net.conv(x, 6, 5), 5, 2, out="y")
    return Topology(net.model("y", inputs={"x": ("N", 4, 6, 6)}), (5,))


@variants(conv1d=1, conv3d=3)
def other_rank(axes: int) -> Topology:
    net = Net()
    x = net.relu(net.norm(net.conv("x", 3, 8, axes=axes), 8))
    x = net.op("MaxPool", x, kernel_shape=[2] * axes, strides=[2] * axes)
    net.conv(x, 8, 4, axes=axes, out="y")
    return Topology(net.model("y", inputs={"x": ("N", 3, *[4] * axes)}), (8,))


# --- shuffles, shapes and heads ---


@topology
def shuffle_by_reshape() -> Topology:
    net = Net()
    x = net.op("Reshape", net.conv("x", 3, 12), net.ints(0, 3, 4, 6, 6))
    x = net.op("Transpose", x, perm=[0, 2, 1, 3, 4])
    net.conv(net.op("Reshape", x, net.ints(-1, 12, 6, 6)), 12, 5, out="y")
    return Topology(net.model("y"), (4,))


@topology
def shuffle_net() -> Topology:
    """Grouped convolutions around a shuffle: positions within a group meet groups."""
    net = Net()
    x = net.relu(net.conv(net.conv("x", 3, 8), 8, 8, group=2))
    x = net.op("Reshape", x, net.ints(0, 2, 4, 6, 6))
    x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 1, 3, 4]), net.ints(0, -1, 6, 6))
    x = net.conv(x, 8, 8, group=2)
    net.conv(x, 8, 5, out="y")
    return Topology(net.model("y"), (2, 4, 4))


@topology
def shuffle_net_units() -> Topology:
    """Two units of ShuffleNet with their residual stream: all grouped layers have to agree on what goes."""
    net = Net()
    stream = net.relu(net.conv("x", 3, 8, out="stem"))
    for _ in range(2):
        x = net.relu(net.conv(stream, 8, 8, k=1, group=2))
        x = net.op("Reshape", x, net.ints(0, 2, 4, 6, 6))
        x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 1, 3, 4]), net.ints(0, -1, 6, 6))
        x = net.conv(x, 8, 8, group=8)
        x = net.conv(x, 8, 8, k=1, group=2)
        stream = net.relu(net.op("Add", x, stream))
    net.conv(stream, 8, 5, out="y")
    return Topology(net.model("y"), (2, 2, 4))


@variants(permuted=[3, 0, 6, 1, 7, 2, 5, 4], partly=[-1, 0, 2, 2])
def gather(indices: list[int]) -> Topology:
    net = Net()
    x = net.op("Gather", net.conv("x", 3, 8), net.ints(*indices), axis=1)
    net.conv(x, len(indices), 5, out="y")
    return Topology(net.model("y"), (8,) if len(indices) == 8 else (1, 2, 5))


def _head(net: Net, x: str, n_in: int) -> None:
    x = net.relu(net.op("Gemm", x, net.rand(6, n_in), net.rand(6), transB=1))
    net.op("Gemm", x, net.rand(6, 3), net.rand(3), out="y")


@variants(
    flatten=None,
    literal=(-1, 36),
    copied=(0, -1),
    both=(0, 36),
    late_flatten="flatten",
    computed="one",
    computed_pair="pair",
)
def flatten_to_gemm(target: Any) -> Topology:
    net = Net()
    x = net.op("MaxPool", net.relu(net.conv("x", 3, 4)), kernel_shape=[2, 2], strides=[2, 2])
    if target is None:
        x = net.op("Flatten", x)
    elif target == "flatten":
        x = net.op("Flatten", net.op("Unsqueeze", x, net.ints(1)), axis=-4)
    elif target in ("one", "pair"):
        batch = net.op("Gather", net.op("Shape", x), net.const(np.int64(0)), axis=0)
        rest = net.ints(36) if target == "one" else net.ints(36, 1)
        x = net.op("Reshape", x, net.op("Concat", net.op("Unsqueeze", batch, net.ints(0)), rest, axis=0))
        x = net.op("Squeeze", x, net.ints(2)) if target == "pair" else x
    else:
        x = net.op("Reshape", x, net.ints(*target))
    _head(net, x, 36)
    return Topology(net.model("y"), (4, 6))


@topology
def reshape_by_counted_channels() -> Topology:
    """A target that is computed from the channels themselves needs no edit."""
    net = Net()
    x = net.relu(net.conv("x", 3, 4))
    shape = net.op("Shape", x)
    parts = [net.op("Slice", shape, net.ints(i), net.ints(i + 1), net.ints(0)) for i in (0, 1)]
    x = net.op("Reshape", x, net.op("Concat", *parts, net.ints(-1), axis=0))
    x = net.op("ReduceMax", x, axes=[2], keepdims=0)
    net.op("Gemm", x, net.rand(4, 3), out="y")
    return Topology(net.model("y"), (4,))


@topology
def computed_target_of_two() -> Topology:
    """Two Reshapes read one computed shape, of which each needs another edit."""
    net = Net()
    batch = net.op("Gather", net.op("Shape", "x"), net.ints(0), axis=0)
    shape = net.op("Concat", batch, net.ints(4), net.ints(-1), axis=0)
    parts = []
    for name in "ab":
        x = net.op("Reshape", net.relu(net.conv("x", 3, 4, out=name)), shape)
        parts.append(net.op("MatMul", x, net.rand(36, 5)))
    net.op("Transpose", net.op("Concat", *parts, axis=1), out="t", perm=[0, 2, 1])
    net.op("MatMul", "t", net.rand(8, 3), out="y")
    return Topology(net.model("y"), (4, 4))


@variants(dropped=0, kept=1)
def mean_head(keepdims: int) -> Topology:
    net = Net()
    x = net.op("ReduceMean", net.relu(net.conv("x", 3, 8)), axes=[-1, -2], keepdims=keepdims)
    x = net.op("Flatten", x) if keepdims else x
    net.op("Gemm", x, net.rand(8, 3), out="y")
    return Topology(net.model("y"), (8,))


@topology
def squeezed_head() -> Topology:
    net = Net()
    x = net.op("Squeeze", net.op("GlobalMaxPool", net.relu(net.conv("x", 3, 8))), net.ints(2, 3))
    x = net.op("Unsqueeze", net.op("Unsqueeze", x, net.ints(-1)), net.ints(3))
    net.conv(x, 8, 3, k=1, out="y")
    return Topology(net.model("y"), (8,))


@topology
def group_norm_by_reshape() -> Topology:
    net = Net()
    x = net.op("Reshape", net.conv("x", 3, 8), net.ints(0, 4, -1))
    x = net.op("InstanceNormalization", x, net.rand(4), net.rand(4))
    x = net.op("Reshape", x, net.ints(-1, 8, 6, 6))
    x = net.op("Add", net.op("Mul", x, net.rand(8, 1, 1)), net.rand(8, 1, 1))
    net.conv(net.relu(x), 8, 3, out="y")
    return Topology(net.model("y"), (4,))


@variants(two_groups=2, four_groups=4)
def group_norm_on_a_stream(n: int) -> Topology:
    """GroupNormalization as PyTorch exports it, on a residual stream: its groups go as a whole."""

    def norm(x: str) -> str:
        x = net.op("Reshape", x, net.ints(0, n, -1))
        x = net.op("InstanceNormalization", x, net.const(np.ones(n, np.float32)), net.rand(n))
        x = net.op("Reshape", x, net.ints(-1, 16, 6, 6))
        return net.op("Add", net.op("Mul", x, net.rand(16, 1, 1)), net.rand(16, 1, 1))

    net = Net()
    stream = net.relu(norm(net.conv("x", 3, 16, out="stem")))
    for _ in range(2):
        x = net.relu(norm(net.conv(stream, 16, 16)))
        stream = net.relu(net.op("Add", norm(net.conv(x, 16, 16)), stream))
    net.conv(stream, 16, 5, out="y")
    return Topology(net.model("y"), (n, n, n))


@variants(dcr="DCR", crd="CRD")
def depth_to_space(mode: str) -> Topology:
    net = Net()
    x = net.op("DepthToSpace", net.conv("x", 3, 12), blocksize=2, mode=mode)
    net.conv(x, 3, 2, out="y")
    return Topology(net.model("y"), (3,))


@topology
def space_to_depth() -> Topology:
    net = Net()
    net.conv(net.op("SpaceToDepth", net.conv("x", 3, 4), blocksize=2), 16, 2, out="y")
    return Topology(net.model("y"), (4,))


@topology
def channels_last() -> Topology:
    """What converters from TensorFlow write: channels last between the convolutions."""
    net = Net()
    x = net.conv(net.op("Transpose", "x", perm=[0, 3, 1, 2]), 3, 8, bias=False, out="a")
    x = net.relu(net.op("Add", net.op("Transpose", x, perm=[0, 2, 3, 1]), net.rand(8)))
    mean = net.op("ReduceMean", x, axes=[1, 2], keepdims=1)
    x = net.op("Softmax", net.op("Mul", x, net.op("Sigmoid", mean)), axis=1)
    x = net.op("Pad", x, net.ints(0, 1, 1, 0, 0, 1, 1, 0))
    x = net.conv(net.op("Transpose", x, perm=[0, 3, 1, 2]), 8, 5, pads=[0] * 4)
    net.op("Transpose", x, perm=[0, 2, 3, 1], out="y")
    return Topology(net.model("y", inputs={"x": ("N", 6, 6, 3)}), (8,))


# --- matrix products ---


@topology
def matmul_of_sequences() -> Topology:
    net = Net()
    x = net.relu(net.op("Add", net.rand(8), net.op("MatMul", "x", net.rand(6, 8))))
    net.op("MatMul", x, net.rand(8, 7), out="y")
    return Topology(net.model("y", inputs={"x": ("N", 5, 6)}), (8,))


@topology
def matmul_from_the_left() -> Topology:
    net = Net()
    stream = net.op("MatMul", net.rand(6, 6), "x", out="stem")
    x = net.relu(net.op("MatMul", net.rand(8, 6), stream, out="a"))
    stream = net.op("Add", stream, net.op("MatMul", net.rand(6, 8), x, out="b"))
    net.op("MatMul", net.rand(4, 6), stream, out="y")
    return Topology(net.model("y", inputs={"x": ("N", 6, 5)}), (6, 8), gone=("make_a",))


@topology
def mixer() -> Topology:
    """Products along the tokens beside products along the features."""
    net = Net()
    stream = net.op("MatMul", "x", net.rand(6, 8), out="stem")
    x = net.op("Transpose", stream, perm=[0, 2, 1])
    x = net.op("Gelu", net.op("MatMul", x, net.rand(5, 7), out="tokens"))
    x = net.op("Transpose", net.op("MatMul", x, net.rand(7, 5), out="back"), perm=[0, 2, 1])
    net.op("MatMul", net.op("Add", stream, x), net.rand(8, 3), out="y")
    net.opset = 20
    return Topology(net.model("y", inputs={"x": ("N", 5, 6)}), (8,))


@topology
def gemm_residual() -> Topology:
    net = Net()
    stream = net.op("Gemm", "x", net.rand(6, 8), out="stem")
    x = net.relu(net.op("Gemm", stream, net.rand(8, 5), net.rand(5), out="a"))
    x = net.op("Gemm", x, net.rand(5, 8), net.rand(1, 8), alpha=0.5, beta=2.0)
    net.op("Gemm", net.op("Add", stream, x), net.rand(8, 3), net.rand(1), out="y")
    return Topology(net.model("y", inputs={"x": ("N", 6)}), (5, 8), gone=("make_a",))


# --- elementwise ---


@topology
def slope_per_channel() -> Topology:
    net = Net()
    x = net.op("PRelu", net.conv("x", 3, 8), net.rand(8, 1, 1))
    net.conv(net.op("PRelu", x, net.rand(1)), 8, 4, out="y")
    return Topology(net.model("y"), (8,))


@topology
def constants_of_all_shapes() -> Topology:
    net = Net()
    x = net.conv("x", 3, 8, bias=False)
    for shape in [(), (1,), (8, 1, 1), (1, 8, 1, 1), (6, 6), (1, 1, 6, 6), (8, 6, 6), (1, 8, 6, 1)]:
        x = net.op("Add", x, net.rand(*shape)) if len(shape) != 3 else net.op("Mul", net.rand(*shape), x)
    x = net.op("Clip", x, net.const(np.float32(-1)), net.const(np.float32(2)))
    x = net.op("Where", net.op("Greater", x, net.rand(8, 1, 1)), x, net.const(np.float32(0.1)))
    net.conv(net.op("Max", net.op("Dropout", x), net.rand(8, 1, 1), net.rand(1)), 8, 4, out="y")
    return Topology(net.model("y"), (8,))


@topology
def one_channel_of_constants() -> Topology:
    """A constant spreads one channel over several: that channel has to stay."""
    net = Net()
    net.conv(net.op("Add", net.conv("x", 3, 1, out="a"), net.rand(4, 1, 1)), 4, 2, out="y")
    return Topology(net.model("y"), (), {"make_a": "spreads one channel over several"})


@topology
def sum_with_input() -> Topology:
    net = Net()
    x = net.op("Add", net.conv("x", 3, 3, out="a"), "x")
    net.conv(net.conv(x, 3, 6), 6, 2, out="y")
    return Topology(net.model("y"), (6,), {"make_a": "'x', whose channels must stay"})


@topology
def expanded_gate() -> Topology:
    net = Net()
    x = net.conv("x", 3, 8)
    gates = net.op("Expand", net.op("GlobalAveragePool", x), net.ints(1, 8, 6, 6))
    gates = net.op("Mul", gates, net.op("Tile", net.op("GlobalMaxPool", x), net.ints(1, 1, 6, 6)))
    net.conv(net.op("Mul", x, gates), 8, 4, out="y")
    return Topology(net.model("y"), (8,))


@topology
def tiled_channels() -> Topology:
    net = Net()
    net.conv(net.op("Tile", net.conv("x", 3, 4), net.ints(1, 3, 1, 1)), 12, 4, out="y")
    return Topology(net.model("y"), (4,))


# --- cutting and resizing ---


@variants(sizes=True, scales=False)
def resize(by_sizes: bool) -> Topology:
    net = Net()
    x = net.conv("x", 3, 8)
    scales = "" if by_sizes else net.const(np.array([1, 1, 2, 2], np.float32))
    sizes = [net.ints(2, 8, 12, 12)] if by_sizes else []
    x = net.op("Resize", x, "", scales, *sizes, mode="linear" if by_sizes else "nearest")
    net.conv(x, 8, 4, out="y")
    batch = 2 if by_sizes else "N"
    return Topology(net.model("y", inputs={"x": (batch, 3, 6, 6)}), (8,))


@topology
def upsample_with_computed_batch() -> Topology:
    """Sizes as PyTorch writes them: batch and channels counted, height and width literal."""
    net = Net()
    x = net.conv("x", 3, 8)
    first = net.op("Slice", net.op("Shape", x), net.ints(0), net.ints(2), net.ints(0))
    x = net.op("Resize", x, "", "", net.op("Concat", first, net.ints(12, 12), axis=0), mode="nearest")
    net.conv(x, 8, 4, out="y")
    return Topology(net.model("y"), (8,))


@variants(opset9=9, opset13=13)
def cut_and_swapped(opset: int) -> Topology:
    """Slices and parts of a split change places; attributes at opset 9, inputs since."""
    net = Net(opset=opset)
    x = net.conv("x", 3, 8)
    old = opset < 10
    if old:
        parts = net.many("Split", x, outputs=["s1", "s2", "s3"], axis=1, split=[2, 3, 3])
        a = net.op("Slice", x, starts=[0], ends=[4], axes=[1])
        b = net.op("Slice", x, starts=[0, -4], ends=[9, 2**31])
    else:
        parts = net.many("Split", x, net.ints(2, 3, 3), outputs=["s1", "s2", "s3"], axis=-3)
        a = net.op("Slice", x, net.ints(0), net.ints(4), net.ints(1))
        b = net.op("Slice", x, net.ints(0, -4), net.ints(9, 2**31))
    x = net.op("Concat", parts[2], b, parts[0], a, axis=1)
    x = net.op("Pad", x, pads=[0, 0, 1, 1, 0, 0, 1, 1]) if old else x
    net.conv(x, 13, 4, out="y")
    return Topology(net.model("y"), (3, 5))


@topology
def unread_part() -> Topology:
    """Channels that a Slice drops can go, whatever the score."""
    net = Net()
    x = net.op("Slice", net.conv("x", 3, 8), net.ints(0), net.ints(5), net.ints(1))
    net.conv(x, 5, 4, out="y")
    return Topology(net.model("y"), (3, 5))


@topology
def strided_channels() -> Topology:
    net = Net()
    x = net.op("Slice", net.conv("x", 3, 8, out="a"), net.ints(0), net.ints(8), net.ints(1), net.ints(2))
    net.conv(x, 4, 4, out="y")
    return Topology(net.model("y"), (), {"make_a": "Slice of the channels with a step"})


@topology
def upsample_opset9() -> Topology:
    net = Net(opset=9)
    x = net.op("Upsample", net.conv("x", 3, 8), net.const(np.array([1, 1, 2, 2], np.float32)))
    x = net.op("Clip", x, min=0.0, max=6.0)
    net.conv(net.op("Dropout", x), 8, 4, out="y")
    return Topology(net.model("y"), (8,))


# --- sharing ---


@topology
def shared_weight() -> Topology:
    net = Net()
    weight = net.rand(4, 4, 3, 3)
    x = net.conv("x", 3, 4)
    x = net.relu(net.conv(x, 4, 4, weight=weight, out="a"))
    x = net.relu(net.conv(x, 4, 4, weight=weight, out="b"))
    net.conv(x, 4, 3, out="y")
    return Topology(net.model("y"), (4,))


@topology
def shared_with_input() -> Topology:
    """One reader of a weight has the model's input before it: its input axis must stay."""
    net = Net()
    weight = net.rand(4, 4, 3, 3)
    x = net.conv("x", 4, 4, weight=weight, bias=False)
    x = net.conv(net.conv(x, 4, 4, out="b"), 4, 4, weight=weight, bias=False)
    net.conv(x, 4, 3, out="y")
    return Topology(net.model("y", inputs={"x": ("N", 4, 6, 6)}), (4,), {"make_b": "also used by Conv"})


@topology
def siamese() -> Topology:
    net = Net()
    weight, second = net.rand(5, 3, 3, 3), net.rand(6, 5, 3, 3)
    ends = []
    for name in ("x", "x2"):
        inner = net.relu(net.conv(name, 3, 5, weight=weight, bias=False))
        ends.append(net.conv(inner, 5, 6, weight=second, bias=False))
    net.op("Concat", *ends, axis=1, out="joined")
    net.conv("joined", 12, 3, out="y")
    net.conv(ends[0], 6, 2, out="z")
    inputs: Shapes = {"x": ("N", 3, 6, 6), "x2": ("N", 3, 6, 6)}
    return Topology(net.model("y", "z", inputs=inputs), (5, 6))


@topology
def shared_bias() -> Topology:
    """Simplifiers merge equal biases; cutting one convolution must not cut the other's."""
    net = Net()
    bias = net.rand(6)
    a = net.op("Conv", "x", net.rand(6, 3, 1, 1), bias)
    b = net.op("Conv", net.relu(a), net.rand(6, 6, 1, 1), bias)
    net.conv(net.relu(b), 6, 3, out="y")
    return Topology(net.model("y"), (6,))


@topology
def shared_norm_statistics() -> Topology:
    """Untrained networks share their ones and zeros."""
    net = Net()
    ones, zeros = net.const(np.ones(6, np.float32)), net.const(np.zeros(6, np.float32))
    x = "x"
    for n_in in (3, 6):
        x = net.conv(x, n_in, 6)
        x = net.relu(net.op("BatchNormalization", x, ones, zeros, zeros, ones))
    net.conv(x, 6, 3, out="y")
    return Topology(net.model("y"), (6,))


@topology
def bias_read_elsewhere() -> Topology:
    net = Net()
    bias = net.rand(6)
    a = net.op("Conv", "x", net.rand(6, 3, 1, 1), bias, out="a")
    net.conv(net.relu(a), 6, 3, out="y")
    net.op("Add", "v", bias, out="z")
    inputs: Shapes = {"x": ("N", 3, 6, 6), "v": ("N", 6)}
    return Topology(net.model("y", "z", inputs=inputs), (), {"make_a": "also used by Add 'make_z'"})


@topology
def weight_is_an_output() -> Topology:
    net = Net()
    weight = net.rand(6, 3, 1, 1)
    net.conv(net.relu(net.conv("x", 3, 6, k=1, weight=weight, out="a")), 6, 3, out="y")
    net.op("ReduceSum", weight, keepdims=0, out="z")
    return Topology(net.model("y", "z"), (), {"make_a": "also used by ReduceSum"})


# --- what stays ---


@topology
def unknown_operator() -> Topology:
    net = Net()
    x = net.op("LRN", net.conv("x", 3, 6, out="a"), size=3)
    net.conv(net.conv(x, 6, 5), 5, 3, out="y")
    return Topology(net.model("y"), (5,), {"make_a": "LRN is not an operator"})


@variants(softmax="Softmax", layer="LayerNormalization")
def normalised_over_channels(op_type: str) -> Topology:
    net = Net()
    a = net.op("Transpose", net.conv("x", 3, 6, out="a"), perm=[0, 2, 3, 1])
    a = net.op(op_type, a, *([] if op_type == "Softmax" else [net.rand(6)]), axis=-1)
    net.conv(net.conv(net.op("Transpose", a, perm=[0, 3, 1, 2]), 6, 5), 5, 3, out="y")
    return Topology(net.model("y"), (5,), {"make_a": f"{op_type} normalises over the channels"})


@topology
def softmax_opset9() -> Topology:
    net = Net(opset=9)
    x = net.op("GlobalAveragePool", net.conv("x", 3, 6, out="a"))
    net.conv(net.op("Softmax", x, axis=1), 6, 3, out="y")
    return Topology(net.model("y"), (), {"make_a": "Softmax normalises"})


@topology
def pooled_indices() -> Topology:
    net = Net()
    made = net.many(
        "MaxPool", net.conv("x", 3, 6, out="a"), outputs=["p", "where"], kernel_shape=[2, 2], strides=[2, 2]
    )
    net.conv(made[0], 6, 3, out="y")
    return Topology(net.model("y", "where"), (), {"make_a": "second output"})


@topology
def maximum_over_channels() -> Topology:
    net = Net()
    x = net.op("ReduceMax", net.conv("x", 3, 6, out="a"), axes=[1])
    net.conv(net.conv(x, 1, 5), 5, 3, out="y")
    return Topology(net.model("y"), (5,), {"make_a": "ReduceMax runs over the channels"})


@topology
def partly_an_output() -> Topology:
    """Two parts of three are an output: the third can go."""
    net = Net()
    net.many("Split", net.conv("x", 3, 9), net.ints(4, 3, 2), outputs=["p", "q", "z"], axis=1)
    net.conv(net.op("Concat", "p", "q", axis=1), 7, 3, out="y")
    return Topology(net.model("y", "z"), (7,))


@topology
def two_inputs_two_outputs() -> Topology:
    net = Net()
    a, b = net.relu(net.conv("x", 3, 6)), net.relu(net.conv("x2", 2, 6))
    total = net.op("Sum", a, b)
    net.conv(total, 6, 3, out="y")
    net.op("Gemm", net.op("Flatten", net.op("GlobalAveragePool", a)), net.rand(6, 4), out="z")
    inputs: Shapes = {"x": ("N", 3, 6, 6), "x2": ("N", 2, 6, 6)}
    return Topology(net.model("y", "z", inputs=inputs), (6,))


@topology
def opset9_unnamed() -> Topology:
    """Nodes without names and initializers that are listed as inputs."""
    net = Net(opset=9)
    x = net.relu(net.norm(net.conv("x", 3, 6), 6))
    x = net.op("Reshape", net.op("AveragePool", x, kernel_shape=[6, 6]), net.ints(-1, 6))
    net.op("Gemm", x, net.rand(6, 4), net.rand(4), out="y")
    model = net.model("y")
    for node in model.graph.node:
        node.ClearField("name")
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, kind, array.shape))
    return Topology(model, (6,))


@topology
def fixed_batch() -> Topology:
    """A batch of one that is written into shapes."""
    net = Net()
    x = net.op("Reshape", net.relu(net.conv("x", 3, 4)), net.ints(1, 144))
    _head(net, x, 144)
    return Topology(net.model("y", inputs={"x": (1, 3, 6, 6)}), (4, 6))


# --- combinations that are easy to get wrong ---


@topology
def branch_through_dropout() -> Topology:
    """What is left of the branch is its bias, and Dropout returns that as it is."""
    net = Net()
    stream = net.conv("x", 3, 8, out="stem")
    branch = net.conv(net.relu(net.conv(stream, 8, 5, out="a")), 5, 8)
    net.conv(net.op("Add", stream, net.op("Dropout", branch)), 8, 4, out="y")
    return Topology(net.model("y"), (5, 8), gone=("make_a",))


@topology
def branch_read_from_within() -> Topology:
    """Only the graphs inside an If read the end of the branch."""
    net = Net()
    stream = net.conv("x", 3, 8, out="stem")
    net.conv(net.relu(net.conv(stream, 8, 5, out="a")), 5, 8, out="b")
    value = [onnx.ValueInfoProto(name=name) for name in ("then", "else")]
    graphs = [
        helper.make_graph([helper.make_node(op_type, ["b"], [end.name])], end.name, [], [end])
        for op_type, end in zip(("Relu", "Tanh"), value, strict=True)
    ]
    peak = net.op("ReduceMax", "x", keepdims=0)
    chosen = net.op("Cast", peak, to=onnx.TensorProto.BOOL)
    branch = net.op("If", chosen, then_branch=graphs[0], else_branch=graphs[1])
    net.conv(net.op("Add", stream, branch), 8, 4, out="y")
    return Topology(net.model("y"), (5,), {"make_b": "a subgraph of If reads them"})


@topology
def one_channel_picked() -> Topology:
    """A product whose weight has one row reads one of the channels: that one is not like the others."""
    net = Net()
    x = net.op("Gemm", net.relu(net.op("Gemm", "x", net.rand(6, 5))), net.rand(5, 8))
    net.op("MatMul", net.op("Gather", x, net.ints(2), axis=1), net.rand(1, 3), out="y")
    return Topology(net.model("y", inputs={"x": ("N", 6)}), (1, 5, 7))


@topology
def padded_by_ones() -> Topology:
    net = Net()
    x = net.op("Pad", net.conv("x", 3, 4), net.ints(0, 1, 0, 0, 0, 3, 0, 0), net.const(np.float32(1)))
    x = net.op("Add", net.norm(x, 8), net.conv("x", 3, 8))
    net.conv(net.relu(x), 8, 3, out="y")
    return Topology(net.model("y"), (4, 4))


@topology
def channels_in_the_batch() -> Topology:
    net = Net()
    x = net.op("Reshape", net.conv("x", 3, 8), net.ints(-1, 36))
    x = net.relu(net.op("MatMul", x, net.rand(36, 36)))
    net.conv(net.op("Reshape", x, net.ints(-1, 8, 6, 6)), 8, 3, out="y")
    return Topology(net.model("y"), (8,))


@topology
def tokens_of_positions() -> Topology:
    net = Net()
    x = net.op("Reshape", net.conv("x", 3, 8, out="stem"), net.ints(0, 8, 36))
    tokens = net.op("Transpose", x, perm=[0, 2, 1])
    x = net.relu(net.op("Add", net.op("MatMul", tokens, net.rand(8, 6), out="a"), net.rand(6)))
    x = net.op("Add", tokens, net.op("MatMul", x, net.rand(6, 8)))
    x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 1]), net.ints(-1, 8, 6, 6))
    net.conv(x, 8, 3, out="y")
    return Topology(net.model("y"), (6, 8), gone=("make_a",))


@topology
def grouped_after_concat() -> Topology:
    """The first group reads the model's input: what lies at the same positions of others stays."""
    net = Net()
    x = net.op("Concat", "x", net.conv("x", 4, 8), axis=1)
    net.conv(net.relu(net.conv(x, 12, 6, group=2)), 6, 3, out="y")
    return Topology(net.model("y", inputs={"x": ("N", 4, 6, 6)}), (2, 3))


@topology
def depthwise_after_concat() -> Topology:
    net = Net()
    x = net.op("Concat", "x", net.conv("x", 4, 8), axis=1)
    net.conv(net.relu(net.conv(x, 12, 12, group=12)), 12, 3, out="y")
    return Topology(net.model("y", inputs={"x": ("N", 4, 6, 6)}), (8,))


@topology
def resize_of_named_axes() -> Topology:
    net = Net(opset=18)
    x = net.op("Resize", net.conv("x", 3, 8), "", "", net.ints(9, 9), axes=[2, 3], mode="nearest")
    net.conv(x, 8, 3, out="y")
    return Topology(net.model("y"), (8,))


@topology
def cut_in_space() -> Topology:
    net = Net()
    x = net.op("Slice", net.conv("x", 3, 8), net.ints(-1), net.ints(-7), net.ints(-1), net.ints(-1))
    x = net.op("Slice", x, net.ints(0, 0), net.ints(2**62, 4), net.ints(1, 2))
    parts = net.many("Split", x, outputs=["s1", "s2"], axis=2)
    net.conv(net.op("Mul", *parts), 8, 3, out="y")
    return Topology(net.model("y"), (8,))


@topology
def part_that_can_vanish() -> Topology:
    """Each half of a split feeds a branch of its own."""
    net = Net()
    stream = net.conv("x", 3, 5, out="stem")
    halves = net.many(
        "Split", net.relu(net.conv(stream, 5, 8, out="a")), net.ints(4, 4), outputs=["p", "q"], axis=1
    )
    for half in halves:
        stream = net.op("Add", stream, net.conv(half, 4, 5))
    net.conv(stream, 5, 3, out="y")
    return Topology(net.model("y"), (4, 4, 5), gone=("make_a",))


@topology
def norm_of_features() -> Topology:
    net = Net()
    x = net.relu(net.norm(net.op("Gemm", "x", net.rand(6, 8), net.rand(8)), 8))
    net.op("Gemm", net.op("Identity", x), net.rand(8, 3), net.rand(3), out="y", alpha=2.0)
    return Topology(net.model("y", inputs={"x": ("N", 6)}), (8,))


@topology
def instance_norm() -> Topology:
    net = Net()
    x = net.op("InstanceNormalization", net.conv("x", 3, 8), net.rand(8), net.rand(8))
    net.conv(net.op("Mul", x, x), 8, 3, out="y")
    return Topology(net.model("y"), (8,))


@topology
def computed_weight() -> Topology:
    net = Net()
    a = net.conv("x", 3, 8, out="a")
    made = net.op("Mul", net.rand(4, 8, 3, 3), net.op("ReduceMean", "x", keepdims=0))
    net.conv(net.op("Conv", a, made), 4, 3, out="y")
    return Topology(net.model("y"), (), {"make_a": "computed by other nodes"})


@topology
def counted_features() -> Topology:
    """Flatten as products of sizes that are read from the tensor."""
    net = Net()
    x = net.relu(net.conv("x", 3, 4))
    sizes = [net.op("Gather", net.op("Shape", x), net.ints(i)) for i in range(4)]
    features = net.op("Mul", net.op("Mul", sizes[1], sizes[2]), sizes[3])
    x = net.op("Reshape", x, net.op("Concat", sizes[0], features, axis=0))
    net.op("Gemm", x, net.rand(144, 3), out="y")
    return Topology(net.model("y"), (4,))


@topology
def constants_per_head() -> Topology:
    net = Net()
    x = net.op("Reshape", net.conv("x", 3, 8), net.ints(0, 2, 4, 36))
    x = net.op("Mul", x, net.rand(2, 1, 1))
    x = net.op("Reshape", x, net.ints(0, 8, 6, 6))
    net.conv(x, 8, 3, out="y")
    return Topology(net.model("y"), (4,))


@topology
def raised_rank() -> Topology:
    net = Net()
    x = net.op("Add", net.op("Gemm", "x", net.rand(6, 8)), net.rand(2, 1, 8))
    net.op("MatMul", net.op("Sum", net.rand(8), x, net.rand(1, 1)), net.rand(8, 3), out="y")
    return Topology(net.model("y", inputs={"x": ("N", 6)}), (8,))


@topology
def gathered_positions() -> Topology:
    net = Net()
    x = net.op("Gather", net.conv("x", 3, 8), net.const(np.array([[0, 2], [1, 3]])), axis=3)
    x = net.op("ReduceSum", x, net.ints(3, -1), keepdims=0)
    x = net.op("Gather", x, net.const(np.int64(1)), axis=2)
    net.op("Gemm", x, net.rand(8, 3), out="y")
    return Topology(net.model("y"), (8,))


@topology
def one_gathered_channel() -> Topology:
    net = Net()
    x = net.op("Gather", net.conv("x", 3, 8, out="a"), net.const(np.int64(1)), axis=1)
    net.op("MatMul", x, net.rand(6, 3), out="y")
    return Topology(net.model("y"), (), {"make_a": "by a single one"})


@topology
def learned_channels() -> Topology:
    net = Net()
    x = net.op("Concat", net.conv("x", 3, 4), net.rand(2, 3, 6, 6), axis=1)
    net.conv(x, 7, 3, out="y")
    return Topology(net.model("y", inputs={"x": (2, 3, 6, 6)}), (4,))


@topology
def squeezed_blindly() -> Topology:
    net = Net()
    x = net.op("Squeeze", net.op("GlobalAveragePool", net.conv("x", 3, 8, out="a")))
    net.op("Gemm", x, net.rand(8, 3), out="y")
    model = net.model("y")
    # Before 1.22, onnx infers no shape of it, and its checker wants one.
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 3]))
    return Topology(model, (), {"make_a": "Squeeze without axes"})


@topology
def pad_of_channels_opset9() -> Topology:
    net = Net(opset=9)
    x = net.op("Pad", net.conv("x", 3, 4), pads=[0, 0, 0, 0, 0, 4, 0, 0])
    x = net.op("Add", x, net.conv("x", 3, 8))
    net.op("Squeeze", net.op("GlobalMaxPool", x), out="flat", axes=[2, 3])
    net.op("Gemm", "flat", net.rand(8, 3), net.rand(3), out="y")
    return Topology(net.model("y"), (4, 4))


@topology
def weight_of_three_axes() -> Topology:
    net = Net()
    x = net.op("MatMul", "x", net.rand(6, 8), out="a")
    net.op("MatMul", x, net.rand(2, 8, 3), out="y")
    return Topology(net.model("y", inputs={"x": (2, 5, 6)}), (8,))


@topology
def group_norm() -> Topology:
    net = Net(opset=21)
    x = net.op("GroupNormalization", net.conv("x", 3, 8), net.rand(8), net.rand(8), num_groups=4)
    net.conv(net.relu(x), 8, 3, out="y")
    model = net.model("y")
    # Nothing infers the type of what this operator makes.
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 3, 6, 6]))
    return Topology(model, (4,))


@topology
def sums_and_triangles() -> Topology:
    """Along other axes than that of the channels."""
    net = Net()
    x = net.op("Trilu", net.op("CumSum", net.conv("x", 3, 8), net.const(np.int64(-1))))
    net.op("CumSum", net.conv("x", 3, 2, out="a"), net.const(np.int64(1)), out="sums")
    net.conv(net.op("Concat", x, "sums", axis=1), 10, 3, out="y")
    return Topology(net.model("y"), (8,), {"make_a": "CumSum adds up channels"})


@topology
def pixel_shuffle_by_reshape() -> Topology:
    net = Net()
    x = net.op("Reshape", net.conv("x", 3, 32), net.ints(0, 8, 2, 2, 6, 6))
    x = net.op("Reshape", net.op("Transpose", x, perm=[0, 1, 4, 2, 5, 3]), net.ints(0, 8, 12, 12))
    net.conv(net.relu(x), 8, 3, out="y")
    return Topology(net.model("y"), (8,))


@topology
def detection_head() -> Topology:
    """Two scales, joined along their positions; the boxes are expectations over bins."""
    net = Net()
    a = net.relu(net.conv("x", 3, 8, out="a"))
    b = net.relu(net.conv(a, 8, 6, strides=[2, 2], out="b"))
    parts = []
    for name, x, n in (("box_a", a, 8), ("box_b", b, 6)):
        x = net.relu(net.conv(x, n, 7))
        x = net.op("Concat", net.conv(x, 7, 8, k=1, out=name), net.conv(x, 7, 3, k=1), axis=1)
        parts.append(net.op("Reshape", x, net.ints(0, 11, -1)))
    x = net.op("Concat", *parts, axis=2)
    boxes, classes = net.many("Split", x, net.ints(8, 3), outputs=["boxes", "classes"], axis=1)
    bins = net.op("Transpose", net.op("Reshape", boxes, net.ints(0, 2, 4, -1)), perm=[0, 2, 1, 3])
    sides = net.conv(net.op("Softmax", bins, axis=1), 4, 1, k=1, bias=False)
    sides = net.op("Reshape", sides, net.ints(0, 2, -1))
    net.op("Concat", sides, net.op("Sigmoid", classes), out="y", axis=1)
    return Topology(net.model("y"), (6, 7, 7, 8), {"make_box_a": "Softmax normalises"})


import topologies_attention  # noqa: E402,F401  (registers its own)

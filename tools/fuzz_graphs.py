"""Random valid ONNX graphs, drawn decision by decision.

``random_model`` asks for one small integer after the other and turns them into a model. Where they come from
is the caller's matter: a seed (``Seeded``), a list that is being minimised (``Replayed``), or hypothesis. Any
list of integers is a valid model, and zeros are the simplest choices: a failing list can be cut down blindly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import gcd, prod
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

T = TypeVar("T")
Dim = int | str
Shape = tuple[Dim, ...]

MAX_VALUES = 700
"""Largest number of values per sample in one tensor: it is the wiring that is tested."""
OPSETS = (17, 13, 11, 12, 14, 15, 16, 18, 19, 20, 21, 22)
ACTIVATIONS = (
    "Relu", "Sigmoid", "Tanh", "LeakyRelu", "clip", "HardSwish", "silu", "PRelu", "Softplus", "Elu", "gelu",
    "Abs", "Identity", "Dropout", "cast", "Neg", "HardSigmoid",
)  # fmt: skip


class Draws(Protocol):
    """A source of decisions."""

    def integer(self, low: int, high: int) -> int:
        """Return an integer between ``low`` and ``high``, both included; ``low`` is the simplest."""
        ...


class Seeded:
    """Decisions of a seed; ``drawn`` holds them for ``Replayed``."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.drawn: list[int] = []

    def integer(self, low: int, high: int) -> int:
        number = self._random.randint(low, high)
        self.drawn.append(number - low)
        return number


class Replayed:
    """Decisions of a list; beyond its end all are the simplest."""

    def __init__(self, drawn: Sequence[int]) -> None:
        self._given = list(drawn)
        self.drawn: list[int] = []

    def integer(self, low: int, high: int) -> int:
        position = len(self.drawn)
        offset = self._given[position] if position < len(self._given) else 0
        self.drawn.append(min(offset, high - low))
        return low + self.drawn[-1]


class Sketch:
    """A model that grows: values with their shapes, ``"N"`` being the batch; methods return names."""

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.opset = self.pick(OPSETS)
        self.batch: Dim = "N"
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.shapes: dict[str, Shape] = {}
        self.inputs: list[str] = []
        self.pool: list[str] = []
        self.kernels: dict[tuple[int, ...], list[str]] = {}  # weights that can be shared, by shape
        self.rng = np.random.default_rng(self.draws.integer(0, 63))
        self.shares = 3 if self.chance(4) else 40  # one in how many weights has been there before
        self._n_names = 0

    # --- decisions ---

    def pick(self, options: Sequence[T]) -> T:
        return options[self.draws.integer(0, len(options) - 1)]

    def chance(self, one_in: int) -> bool:
        return self.draws.integer(0, one_in - 1) == one_in - 1

    def some(self, fits: Callable[[Shape], bool], *, newest: int = 6) -> str | None:
        """Pick one of the newest values whose shape fits."""
        found = [name for name in self.pool if fits(self.shapes[name])]
        return found[-1 - self.draws.integer(0, min(len(found), newest) - 1)] if found else None

    # --- building ---

    def name(self, stem: str) -> str:
        self._n_names += 1
        return f"{stem.lower()}_{self._n_names}"

    def shape(self, name: str) -> Shape:
        return self.shapes[name] if name in self.shapes else self.weights[name].shape

    def const(self, values: Any) -> str:
        """Make a constant: an initializer, now and then a Constant node."""
        name = self.name("c")
        array = np.asarray(values)
        if self.chance(12):
            self.nodes.append(
                helper.make_node(
                    "Constant", [], [name], name=f"n_{name}", value=numpy_helper.from_array(array)
                )
            )
            self.weights[name] = array
        else:
            self.weights[name] = array
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def numbers(self, *shape: int, scale: float = 1.0) -> str:
        return self.const((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def kernel(self, *shape: int, fan_in: int) -> str:
        """Make a weight, or take one that is there already."""
        known = self.kernels.setdefault(shape, [])
        if known and self.chance(self.shares):
            return self.pick(known)
        name = self.name("w")
        self.weights[name] = (self.rng.standard_normal(shape) / max(fan_in, 1) ** 0.5).astype(np.float32)
        known.append(name)
        return name

    def bias(self, n: int) -> str:
        return self.kernel(n, fan_in=4)

    def many(
        self, op: str, inputs: Sequence[str], shapes: Sequence[Shape], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        outputs = [self.name(op) for _ in shapes]
        self.nodes.append(
            helper.make_node(op, list(inputs), outputs, name=f"n_{outputs[0]}", domain=domain, **attributes)
        )
        self.shapes.update(zip(outputs, shapes, strict=True))
        return outputs

    def op(self, op: str, *inputs: str, shape: Shape | None = None, **attributes: Any) -> str:
        """Add a node; its output has the shape of its first input if no other is given."""
        return self.many(op, inputs, [self.shape(inputs[0]) if shape is None else shape], **attributes)[0]

    def keep(self, name: str) -> None:
        self.pool.append(name)

    # --- operators that are spelled differently from opset to opset ---

    def along(
        self, op: str, x: str, axes: Sequence[int], shape: Shape, *, since: int, **attributes: Any
    ) -> str:
        """Write axes as an attribute, or as an input since an opset."""
        if self.opset >= since:
            return self.op(op, x, self.ints(*axes), shape=shape, **attributes)
        return self.op(op, x, shape=shape, axes=list(axes), **attributes)

    def squeeze(self, x: str, *axes: int) -> str:
        shape = tuple(size for axis, size in enumerate(self.shape(x)) if axis not in axes)
        return self.along("Squeeze", x, axes, shape, since=13)

    def unsqueeze(self, x: str, axis: int) -> str:
        shape = self.shape(x)
        return self.along("Unsqueeze", x, [axis], (*shape[:axis], 1, *shape[axis:]), since=13)

    def reduce(self, op: str, x: str, axes: Sequence[int], *, keepdims: bool) -> str:
        old = self.shape(x)
        shape = tuple(1 if axis in axes else n for axis, n in enumerate(old) if keepdims or axis not in axes)
        return self.along(op, x, axes, shape, since=13 if op == "ReduceSum" else 18, keepdims=int(keepdims))

    def split(self, x: str, axis: int, sizes: Sequence[int]) -> list[str]:
        old = self.shape(x)
        shapes: list[Shape] = [(*old[:axis], size, *old[axis + 1 :]) for size in sizes]
        axis = axis - len(old) if self.chance(4) else axis
        if self.opset < 13:
            return self.many("Split", [x], shapes, axis=axis, split=list(sizes))
        equal = len(set(sizes)) == 1 and self.chance(2)
        more = {"num_outputs": len(sizes)} if equal and self.opset >= 18 else {}
        return self.many("Split", [x] if equal else [x, self.ints(*sizes)], shapes, axis=axis, **more)

    def reshape(self, x: str, shape: Shape) -> str:
        """Reshape, the target spelled in one of the ways that exporters have."""
        old = self.shape(x)
        style = self.draws.integer(0, 3)
        written = [size for size in shape if size != "N"]
        fixed = all(isinstance(size, int) for size in written) and all(
            isinstance(size, int) for size in old if size != "N"
        )
        if not fixed or (style == 2 and shape and shape[0] == "N" == old[0]):
            sizes: list[str] = []
            whole = self.op("Shape", x, shape=(len(old),))
            for size in shape:
                if isinstance(size, str):
                    index = self.ints(old.index(size))
                    sizes.append(self.op("Gather", whole, index, shape=(1,), axis=0))
                else:
                    sizes.append(self.ints(size))
            return self.op("Reshape", x, self.op("Concat", *sizes, shape=(len(shape),), axis=0), shape=shape)
        target = [-1 if size == "N" else int(size) for size in shape]
        if shape and shape[0] == old[0] and style != 1:
            target[0] = 0
        if style == 3 and -1 not in target and len(target) > 1:
            target[self.draws.integer(1, len(target) - 1)] = -1
        if self.batch != "N" and style == 0 and shape and shape[0] == old[0] == self.batch:
            target[0] = int(self.batch)
        return self.op("Reshape", x, self.ints(*target), shape=shape)

    def clip(self, x: str, low: float, high: float) -> str:
        return self.op("Clip", x, self.const(np.float32(low)), self.const(np.float32(high)))

    # --- layers ---

    def conv(
        self, x: str, n_out: int, *, k: int = 3, group: int = 1, stride: int = 1, bias: bool = True
    ) -> str:
        shape = self.shape(x)
        n_in, space = int(shape[1]), shape[2:]
        weight = self.kernel(n_out, n_in // group, *[k] * len(space), fan_in=n_in // group * k ** len(space))
        inputs = [x, weight, *([self.bias(n_out)] if bias else [])]
        out = tuple(size if isinstance(size, str) else -(-size // stride) for size in space)
        attributes: dict[str, Any] = {"strides": [stride] * len(space)} if stride > 1 else {}
        if k > 1 and self.chance(8):
            attributes["auto_pad"] = "SAME_UPPER"
        else:
            attributes["pads"] = [k // 2] * (2 * len(space))
        return self.op("Conv", *inputs, shape=(shape[0], n_out, *out), group=group, **attributes)

    def dense(self, x: str, n_out: int, *, bias: bool = True) -> str:
        """Multiply the last axis by a weight."""
        shape = self.shape(x)
        n_in = int(shape[-1])
        if len(shape) == 2 and self.chance(2):
            turned = self.chance(2)
            weight = self.kernel(*((n_out, n_in) if turned else (n_in, n_out)), fan_in=n_in)
            more = {"transB": 1} if turned else {}
            more |= {"alpha": 0.5, "beta": 2.0} if self.chance(6) else {}
            inputs = [x, weight, *([self.bias(n_out)] if bias or self.opset < 11 else [])]
            return self.op("Gemm", *inputs, shape=(shape[0], n_out), **more)
        y = self.op("MatMul", x, self.kernel(n_in, n_out, fan_in=n_in), shape=(*shape[:-1], n_out))
        if not bias:
            return y
        pair = [y, self.bias(n_out)]
        return self.op("Add", *(pair[::-1] if self.chance(3) else pair), shape=self.shape(y))

    def batch_norm(self, x: str) -> str:
        n = int(self.shape(x)[1])
        variance = self.const(self.rng.uniform(0.5, 2, n).astype(np.float32))
        return self.op("BatchNormalization", x, self.bias(n), self.bias(n), self.bias(n), variance)

    def activation(self, x: str) -> str:
        kind = self.pick(ACTIVATIONS)
        if kind == "clip":
            return self.clip(x, -1.0, 2.0)
        if kind == "silu":
            return self.op("Mul", x, self.op("Sigmoid", x))
        if kind == "gelu":
            if self.opset >= 20 and self.chance(2):
                return self.op("Gelu", x, approximate=self.pick(["none", "tanh"]))
            cdf = self.op("Erf", self.op("Div", x, self.const(np.float32(2**0.5))))
            half = self.op("Mul", x, self.op("Add", cdf, self.const(np.float32(1))))
            return self.op("Mul", half, self.const(np.float32(0.5)))
        if kind == "PRelu":
            shape = self.shape(x)
            per_channel = len(shape) > 1 and isinstance(shape[1], int) and not self.chance(4)
            return self.op("PRelu", x, self.numbers(int(shape[1]), *[1] * (len(shape) - 2)) if per_channel
                           else self.numbers(1))  # fmt: skip
        if kind == "cast":
            return self.op("Cast", self.op("Cast", x, to=TensorProto.DOUBLE), to=TensorProto.FLOAT)
        if kind == "HardSwish" and self.opset < 14:
            kind = "Relu"
        return self.op(kind, x)


# --- blocks: each takes a value of the pool and adds what it makes; it may also do nothing ---

Block = Callable[[Sketch], None]
BLOCKS: dict[str, Block] = {}


def block(build: Block) -> Block:
    BLOCKS[build.__name__] = build
    return build


def _is_image(shape: Shape) -> bool:
    return len(shape) in (3, 4, 5) and isinstance(shape[1], int)


def _is_2d(shape: Shape) -> bool:
    return len(shape) == 4 and isinstance(shape[1], int)


def _is_known(shape: Shape) -> bool:
    return all(isinstance(size, int) for size in shape[1:]) and len(shape) > 1


def _ends_known(shape: Shape) -> bool:
    return len(shape) > 1 and isinstance(shape[-1], int)


def _n_values(shape: Shape) -> int:
    return prod(size if isinstance(size, int) else 6 for size in shape[1:])


def _width(s: Sketch) -> int:
    return s.pick([4, 6, 3, 8, 5, 2])


@block
def conv(s: Sketch) -> None:
    x = s.some(_is_image)
    if x is None:
        return
    k = s.pick([3, 1]) if len(s.shape(x)) < 5 else 1
    stride = 2 if s.chance(6) and _is_known(s.shape(x)) else 1
    s.keep(s.conv(x, _width(s), k=k, stride=stride, bias=not s.chance(3)))
    if s.chance(3):
        s.keep(s.activation(s.batch_norm(s.pool[-1])))


@block
def grouped_conv(s: Sketch) -> None:
    x = s.some(_is_image)
    if x is None:
        return
    n = int(s.shape(x)[1])
    groups = [group for group in (2, 3, 4, n) if n % group == 0]
    if not groups:
        return
    group = s.pick(groups)
    s.keep(s.conv(x, group * s.pick([1, 2, 3]), k=s.pick([3, 1]), group=group, bias=not s.chance(3)))


@block
def depthwise(s: Sketch) -> None:
    x = s.some(_is_image)
    if x is not None:
        n = int(s.shape(x)[1])
        s.keep(s.activation(s.conv(x, n * s.pick([1, 1, 2]), group=n, bias=s.chance(2))))


@block
def conv_transpose(s: Sketch) -> None:
    x = s.some(_is_2d)
    if x is None:
        return
    shape = s.shape(x)
    n = int(shape[1])
    group = gcd(n, s.pick([1, 1, 2, 3, n]))
    per_group = s.pick([1, 2, 3])
    big = s.chance(2) and _is_known(shape) and _n_values(shape) * 4 * group * per_group / n <= MAX_VALUES
    k = 2 if big else 1
    weight = s.kernel(n, per_group, k, k, fan_in=n // group)
    space = tuple(size * 2 if big and isinstance(size, int) else size for size in shape[2:])
    inputs = [x, weight, *([s.bias(group * per_group)] if s.chance(2) else [])]
    s.keep(s.op("ConvTranspose", *inputs, shape=(shape[0], group * per_group, *space), strides=[k, k],
                group=group))  # fmt: skip


@block
def residual(s: Sketch) -> None:
    x = s.some(_is_image)
    if x is None:
        return
    n = int(s.shape(x)[1])
    inner = s.conv(x, _width(s), k=s.pick([3, 1]))
    inner = s.batch_norm(inner) if s.chance(2) else inner
    inner = s.activation(inner)
    branch = s.conv(inner, n, k=s.pick([1, 3]), bias=not s.chance(3))
    branch = s.batch_norm(branch) if s.chance(2) else branch
    pair = [x, branch]
    y = s.op("Add", *(pair[::-1] if s.chance(2) else pair))
    s.keep(s.activation(y) if s.chance(2) else y)


@block
def mlp(s: Sketch) -> None:
    x = s.some(_ends_known)
    if x is None:
        return
    n = int(s.shape(x)[-1])
    if n > 40:
        return
    hidden = s.activation(s.dense(x, _width(s)))
    if s.chance(3):
        hidden = s.op("Mul", hidden, s.activation(s.dense(x, int(s.shape(hidden)[-1]))))
    s.keep(s.op("Add", s.dense(hidden, n, bias=not s.chance(3)), x))


@block
def dense(s: Sketch) -> None:
    x = s.some(_ends_known)
    if x is not None:
        s.keep(s.activation(s.dense(x, _width(s), bias=not s.chance(3))))


@block
def left_product(s: Sketch) -> None:
    """A weight from the left, or one with several axes."""
    x = s.some(lambda shape: len(shape) == 3 and _is_known(shape))
    if x is None:
        return
    batch, rows, columns = s.shape(x)
    if s.chance(3) and isinstance(batch, int):
        weight = s.kernel(batch, int(columns), 4, fan_in=int(columns))
        s.keep(s.op("MatMul", x, weight, shape=(batch, rows, 4)))
    else:
        n = _width(s)
        s.keep(s.op("MatMul", s.kernel(n, int(rows), fan_in=int(rows)), x, shape=(batch, n, columns)))


@block
def activation(s: Sketch) -> None:
    x = s.some(lambda shape: True)
    if x is not None:
        s.keep(s.activation(x))


@block
def normalisation(s: Sketch) -> None:
    kind = s.pick(["batch", "instance", "layer", "group", "batch", "softmax", "rms", "lrn", "group op", "lp"])
    if kind in ("batch", "instance", "group", "group op", "lrn"):
        x = s.some(_is_image)
        if x is None:
            return
        shape = s.shape(x)
        n = int(shape[1])
        if kind in ("instance", "group", "group op") and all(size == 1 for size in shape[2:]):
            return  # of a single number onnxruntime leaves its rounding error, magnified by the deviation
        if kind == "batch":
            s.keep(s.batch_norm(x))
        elif kind == "instance":
            s.keep(s.op("InstanceNormalization", x, s.bias(n), s.bias(n)))
        elif kind == "lrn" and len(shape) == 4:
            s.keep(s.op("LRN", x, size=3))
        else:
            group = gcd(n, s.pick([2, 3, 4]))
            if kind == "group op" and s.opset >= 21:
                s.keep(s.op("GroupNormalization", x, s.bias(n), s.bias(n), num_groups=group))
            elif _is_known(shape) and group > 1:
                y = s.reshape(x, (shape[0], group, prod(int(size) for size in shape[1:]) // group))
                y = s.op("InstanceNormalization", y, s.bias(group), s.bias(group))
                y = s.reshape(y, shape)
                ones = [1] * (len(shape) - 2)
                s.keep(s.op("Add", s.op("Mul", y, s.numbers(n, *ones)), s.numbers(n, *ones)))
        return
    x = s.some(lambda shape: len(shape) > 1)
    if x is None:
        return
    shape = s.shape(x)
    axis = s.draws.integer(1, len(shape) - 1)
    if kind == "softmax":
        s.keep(s.op(s.pick(["Softmax", "LogSoftmax"]), x, axis=axis))
    elif kind == "lp":
        s.keep(s.op("LpNormalization", x, axis=axis, p=2))
    elif isinstance(shape[-1], int) and kind == "layer" and s.opset >= 17:
        s.keep(s.op("LayerNormalization", x, s.numbers(shape[-1]), s.numbers(shape[-1]), axis=-1))
    elif isinstance(shape[-1], int):
        centred = s.op("Sub", x, s.reduce("ReduceMean", x, [len(shape) - 1], keepdims=True))
        power = s.reduce("ReduceMean", s.op("Mul", centred, centred), [len(shape) - 1], keepdims=True)
        root = s.op("Sqrt", s.op("Add", power, s.const(np.float32(1e-2))))
        s.keep(s.op("Mul", s.op("Div", centred, root), s.numbers(shape[-1])))


@block
def add(s: Sketch) -> None:
    """Join two values that broadcast against each other."""
    x = s.some(lambda shape: True)
    if x is None:
        return
    shape = s.shape(x)

    def fits(other: Shape) -> bool:
        return len(other) == len(shape) and _broadcast(shape, other) is not None

    y = s.some(fits, newest=12)
    if y is None:
        return
    result = _broadcast(shape, s.shape(y))
    assert result is not None
    op = s.pick(["Add", "Mul", "Sub", "Max", "Min", "Sum", "Mean", "Where", "Div"])
    if op == "Where":
        s.keep(s.op("Where", s.op("Greater", x, y, shape=result), x, y, shape=result))
    elif op == "Div":
        safe = s.op("Add", s.op("Abs", y), s.const(np.float32(0.5)))
        s.keep(s.op("Div", x, safe, shape=result))
    elif op in ("Sum", "Max", "Min", "Mean") and s.chance(2):
        s.keep(s.op(op, x, y, x, shape=result))
    else:
        s.keep(s.op(op, x, y, shape=result))


def _broadcast(a: Shape, b: Shape) -> Shape | None:
    n = max(len(a), len(b))
    result: list[Dim] = []
    for i, j in zip((*[1] * (n - len(a)), *a), (*[1] * (n - len(b)), *b), strict=True):
        if i != j and 1 not in (i, j):
            return None
        result.append(j if i == 1 else i)
    return tuple(result) if _n_values(tuple(result)) <= MAX_VALUES else None


@block
def constant_operand(s: Sketch) -> None:
    x = s.some(lambda shape: len(shape) > 0)
    if x is None:
        return
    shape = s.shape(x)
    n_axes = s.draws.integer(0, len(shape))
    sizes = [size if isinstance(size, int) and s.chance(2) else 1 for size in shape[len(shape) - n_axes :]]
    if n_axes == len(shape):
        sizes[0] = 1
    spread = s.chance(10) and 0 < n_axes < len(shape) and shape[len(shape) - n_axes] == 1
    if spread:
        sizes[0] = 3
    pair = [x, s.numbers(*sizes)]
    result = _broadcast(shape, tuple(sizes))
    if result is None:
        return
    op = s.pick(["Add", "Mul", "Sub", "Max", "Min", "Greater"])
    if op == "Greater":
        s.keep(s.op("Where", s.op(op, *pair, shape=result), *pair, shape=result))
    else:
        s.keep(s.op(op, *(pair[::-1] if s.chance(3) else pair), shape=result))


@block
def gate(s: Sketch) -> None:
    """Squeeze and excitation, or a gate of one channel."""
    x = s.some(_is_2d)
    if x is None:
        return
    shape = s.shape(x)
    n = int(shape[1])
    if s.chance(4):
        one = s.conv(x, 1, k=1)
        s.keep(s.op("Mul", x, s.op("Sigmoid", one)))
        return
    if s.chance(2):
        small = s.reduce("ReduceMean", x, [2, 3], keepdims=True)
    else:
        small = s.op("GlobalAveragePool", x, shape=(*shape[:2], 1, 1))
    inner = s.op("Relu", s.conv(small, s.pick([2, 3]), k=1))
    gates = s.op(s.pick(["Sigmoid", "HardSigmoid"]), s.conv(inner, n, k=1))
    s.keep(s.op("Mul", *([x, gates] if s.chance(2) else [gates, x]), shape=shape))


@block
def concat(s: Sketch) -> None:
    x = s.some(lambda shape: len(shape) > 1)
    if x is None:
        return
    shape = s.shape(x)
    axis = 1 if not s.chance(3) else s.draws.integer(1, len(shape) - 1)
    if not isinstance(shape[axis], int):
        return

    def fits(other: Shape) -> bool:
        same = len(other) == len(shape) and isinstance(other[axis], int)
        return same and other[:axis] == shape[:axis] and other[axis + 1 :] == shape[axis + 1 :]

    parts = [x]
    for _ in range(s.pick([1, 2])):
        y = s.some(fits, newest=10)
        assert y is not None  # x itself fits
        parts.append(y)
    if s.chance(8) and all(isinstance(size, int) for size in shape):
        sizes = [int(size) for size in shape]
        sizes[axis] = 2
        parts.append(s.numbers(*sizes))
    if s.chance(2):
        parts.reverse()
    total = sum(int(s.shape(part)[axis]) for part in parts)
    result = (*shape[:axis], total, *shape[axis + 1 :])
    if _n_values(result) <= MAX_VALUES:
        s.keep(s.op("Concat", *parts, shape=result, axis=axis - len(shape) if s.chance(4) else axis))


def _axis(s: Sketch, shape: Shape) -> int | None:
    """Pick an axis of known size, mostly that of the channels."""
    axes = [axis for axis in range(1, len(shape)) if isinstance(shape[axis], int) and shape[axis] != 1]
    return axes[s.draws.integer(0, len(axes) - 1) if s.chance(2) else 0] if axes else None


def _some_axis(s: Sketch) -> tuple[str, int] | None:
    """Pick a tensor and one of its axes; None if there is none of known size."""
    x = s.some(lambda shape: len(shape) > 1)
    axis = None if x is None else _axis(s, s.shape(x))
    return None if x is None or axis is None else (x, axis)


@block
def split(s: Sketch) -> None:
    found = _some_axis(s)
    if found is None:
        return
    x, axis = found
    n = int(s.shape(x)[axis])
    if n % 2 == 0 and s.chance(2):
        sizes = [n // 2, n // 2]
    elif n % 3 == 0 and s.chance(3):
        sizes = [n // 3] * 3
    else:
        first = s.draws.integer(1, n - 1)
        sizes = [first, n - first]
    parts = s.split(x, axis, sizes)
    for part in parts:
        s.keep(part)
    if len(set(sizes)) == 1 and s.chance(2):
        s.keep(s.op("Mul", parts[0], s.op("Sigmoid", parts[-1])))
    elif s.chance(3):
        s.keep(s.op("Concat", *parts[::-1], shape=s.shape(x), axis=axis))


@block
def cut_out(s: Sketch) -> None:
    """Slice along an axis."""
    found = _some_axis(s)
    if found is None:
        return
    x, axis = found
    shape = s.shape(x)
    n = int(shape[axis])
    start = s.draws.integer(0, n - 1)
    end = s.draws.integer(start + 1, n)
    step = s.pick([1, 1, 1, 2])
    size = len(range(start, end, step))
    if s.chance(8):
        numbers, size = (-1, -n - 1, -1), n
    else:
        numbers = (start - n if s.chance(3) else start, 2**62 if end == n and s.chance(2) else end, step)
    arguments = [s.ints(numbers[0]), s.ints(numbers[1]), s.ints(axis), s.ints(numbers[2])]
    s.keep(s.op("Slice", x, *(arguments if numbers[2] != 1 or s.chance(2) else arguments[:3]),
                shape=(*shape[:axis], size, *shape[axis + 1 :])))  # fmt: skip


@block
def gather(s: Sketch) -> None:
    found = _some_axis(s)
    if found is None:
        return
    x, axis = found
    shape = s.shape(x)
    n = int(shape[axis])
    if s.chance(4) and len(shape) > 2:
        index = s.const(np.int64(s.draws.integer(0, n - 1)))
        s.keep(s.op("Gather", x, index, shape=(*shape[:axis], *shape[axis + 1 :]), axis=axis))
        return
    if s.chance(2):
        indices = [int(i) for i in s.rng.permutation(n)]
    else:
        indices = [s.draws.integer(0, n - 1) for _ in range(s.draws.integer(1, n))]
    s.keep(s.op("Gather", x, s.ints(*indices), shape=(*shape[:axis], len(indices), *shape[axis + 1 :]),
                axis=axis))  # fmt: skip


@block
def pad(s: Sketch) -> None:
    found = _some_axis(s)
    if found is None:
        return
    x, axis = found
    shape = s.shape(x)
    before, after = s.draws.integer(0, 1), s.draws.integer(0, 2)
    pads = [0] * (2 * len(shape))
    pads[axis], pads[axis + len(shape)] = before, after
    mode = s.pick(["constant", "constant", "constant", "edge", "reflect"])
    if mode == "reflect" and max(before, after) >= int(shape[axis]):
        mode = "edge"
    inputs = [x, s.ints(*pads)]
    if mode == "constant" and s.chance(2):
        inputs.append(s.const(np.float32(s.pick([0, 1]))))
    result = (*shape[:axis], int(shape[axis]) + before + after, *shape[axis + 1 :])
    s.keep(s.op("Pad", *inputs, shape=result, mode=mode))


@block
def pool(s: Sketch) -> None:
    x = s.some(_is_2d)
    if x is None:
        return
    shape = s.shape(x)
    kind = s.pick(["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "same", "LpPool"])
    if kind.startswith("Global"):
        s.keep(s.op(kind, x, shape=(*shape[:2], 1, 1)))
    elif kind == "same" or not _is_known(shape):
        s.keep(s.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=s.pick([0, 1])))
    elif min(int(size) for size in shape[2:]) >= 2:
        space = tuple(int(size) // 2 for size in shape[2:])
        s.keep(s.op(kind, x, shape=(*shape[:2], *space), kernel_shape=[2, 2], strides=[2, 2]))


@block
def resize(s: Sketch) -> None:
    x = s.some(_is_2d)
    if x is None or _n_values(s.shape(x)) * 4 > MAX_VALUES:
        return
    shape = s.shape(x)
    if not _is_known(shape):
        s.keep(s.op("GlobalMaxPool", x, shape=(*shape[:2], 1, 1)))
        return
    space = [int(size) * 2 for size in shape[2:]]
    result = (*shape[:2], *space)
    how = s.pick(["scales", "sizes", "axes"])
    mode = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    if s.chance(3):
        mode = {"mode": "linear"}
    if how == "axes" and s.opset >= 18:
        s.keep(s.op("Resize", x, "", "", s.ints(*space), shape=result, axes=[2, 3], **mode))
    elif how == "sizes":
        first = s.op("Slice", s.op("Shape", x, shape=(4,)), s.ints(0), s.ints(2), s.ints(0), shape=(2,))
        sizes = s.op("Concat", first, s.ints(*space), shape=(4,), axis=0)
        empty = "" if s.opset >= 13 else s.const(np.zeros(0, np.float32))
        roi = "" if s.opset >= 13 else s.const(np.zeros(0, np.float32))
        s.keep(s.op("Resize", x, roi, empty, sizes, shape=result, **mode))
    else:
        roi = "" if s.opset >= 13 else s.const(np.zeros(0, np.float32))
        s.keep(s.op("Resize", x, roi, s.const(np.array([1, 1, 2, 2], np.float32)), shape=result, **mode))


@block
def blocks_of_space(s: Sketch) -> None:
    x = s.some(lambda shape: len(shape) == 4 and _is_known(shape))
    if x is None:
        return
    shape = s.shape(x)
    batch, n, height, width = shape[0], *(int(size) for size in shape[1:])
    if n % 4 == 0:
        y = s.op("DepthToSpace", x, shape=(batch, n // 4, height * 2, width * 2), blocksize=2,
                 mode=s.pick(["DCR", "CRD"]))  # fmt: skip
        s.keep(y)
    elif height % 2 == 0 and width % 2 == 0:
        s.keep(s.op("SpaceToDepth", x, shape=(batch, n * 4, height // 2, width // 2), blocksize=2))


@block
def shuffle(s: Sketch) -> None:
    x = s.some(_is_2d)
    if x is None:
        return
    shape = s.shape(x)
    batch, n, height, width = shape
    groups = [group for group in (2, 3, 4) if int(n) % group == 0 and int(n) > group]
    if not groups:
        return
    group = s.pick(groups)
    spread = s.reshape(x, (batch, group, int(n) // group, height, width))
    turned = s.op(
        "Transpose", spread, shape=(batch, int(n) // group, group, height, width), perm=[0, 2, 1, 3, 4]
    )
    s.keep(s.reshape(turned, shape))


@block
def to_tokens(s: Sketch) -> None:
    """[N, C, H, W] -> [N, H * W, C], or the way back."""
    x = s.some(lambda shape: len(shape) == 4 and _is_known(shape))
    if x is None:
        return
    batch, n, height, width = s.shape(x)
    y = s.reshape(x, (batch, n, int(height) * int(width)))
    y = s.op("Transpose", y, shape=(batch, int(height) * int(width), n), perm=[0, 2, 1])
    if int(n) <= 12 and s.chance(2):
        y = s.op("Add", y, s.dense(s.activation(s.dense(y, _width(s))), int(n)))
    s.keep(y)
    if s.chance(2):
        y = s.op("Transpose", y, shape=(batch, n, int(height) * int(width)), perm=[0, 2, 1])
        s.keep(s.reshape(y, (batch, n, height, width)))


@block
def flatten(s: Sketch) -> None:
    x = s.some(lambda shape: len(shape) > 2 and _is_known(shape) and _n_values(shape) <= 200)
    if x is None:
        return
    shape = s.shape(x)
    n = _n_values(shape)
    if s.chance(2):
        s.keep(s.op("Flatten", x, shape=(shape[0], n), axis=1 - len(shape) if s.chance(3) else 1))
    else:
        s.keep(s.reshape(x, (shape[0], n)))
    if s.chance(2):
        s.keep(s.activation(s.dense(s.pool[-1], _width(s))))


@block
def mean_head(s: Sketch) -> None:
    x = s.some(lambda shape: len(shape) in (3, 4) and isinstance(shape[1], int))
    if x is None:
        return
    axes = list(range(2, len(s.shape(x))))
    op = s.pick(["ReduceMean", "ReduceMax", "ReduceSum", "ReduceL2"])
    y = s.reduce(op, x, axes, keepdims=s.chance(2))
    if len(s.shape(y)) > 2:
        y = s.squeeze(y, *axes) if s.chance(2) else s.op("Flatten", y, shape=s.shape(y)[:2])
    s.keep(y)
    if s.chance(2):
        s.keep(s.dense(y, _width(s)))


@block
def reduction(s: Sketch) -> None:
    x = s.some(lambda shape: len(shape) > 2)
    if x is None:
        return
    axis = s.draws.integer(1, len(s.shape(x)) - 1)
    op = s.pick(["ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin", "ReduceSumSquare"])
    s.keep(s.reduce(op, x, [axis], keepdims=not s.chance(2)))


@block
def transpose(s: Sketch) -> None:
    x = s.some(lambda shape: len(shape) > 2)
    if x is None:
        return
    shape = s.shape(x)
    order = list(range(1, len(shape)))
    rotated = order[(k := s.draws.integer(1, len(order) - 1)) :] + order[:k]
    perm = [0, *rotated]
    y = s.op("Transpose", x, shape=tuple(shape[axis] for axis in perm), perm=perm)
    s.keep(y)
    if s.chance(3):  # what is channels-last for a while
        y = s.activation(y)
        y = s.op("Add", y, s.numbers(int(shape[perm[-1]]))) if isinstance(shape[perm[-1]], int) else y
        s.keep(s.op("Transpose", y, shape=shape, perm=[perm.index(axis) for axis in range(len(shape))]))


@block
def batch_moves(s: Sketch) -> None:
    """The batch leaves its place for a while."""
    x = s.some(lambda shape: len(shape) == 3 and _is_known(shape) and int(shape[2]) <= 40)
    if x is None:
        return
    batch, rows, columns = s.shape(x)
    if s.chance(2):
        y = s.op("Transpose", x, shape=(rows, batch, columns), perm=[1, 0, 2])
        y = s.activation(s.dense(y, _width(s)))
        s.keep(s.op("Transpose", y, shape=(batch, rows, s.shape(y)[2]), perm=[1, 0, 2]))
    else:
        y = s.op("Reshape", x, s.ints(-1, int(columns)), shape=("NT", columns))
        y = s.activation(s.dense(y, _width(s)))
        n = int(s.shape(y)[1])
        s.keep(s.op("Reshape", y, s.ints(-1, int(rows), n), shape=(batch, rows, n)))


@block
def merge_axes(s: Sketch) -> None:
    """Join two neighbouring axes, or cut one in two."""
    x = s.some(lambda shape: len(shape) > 1 and _is_known(shape))
    if x is None:
        return
    shape = s.shape(x)
    if len(shape) > 2 and s.chance(2):
        axis = s.draws.integer(1, len(shape) - 2)
        s.keep(s.reshape(x, (*shape[:axis], int(shape[axis]) * int(shape[axis + 1]), *shape[axis + 2 :])))
        return
    cuts = [
        (axis, k)
        for axis in range(1, len(shape))
        for k in (2, 3, 4)
        if int(shape[axis]) % k == 0 < int(shape[axis]) // k - 1
    ]
    if cuts and len(shape) < 5:
        axis, k = s.pick(cuts)
        pair = (k, int(shape[axis]) // k) if s.chance(2) else (int(shape[axis]) // k, k)
        s.keep(s.reshape(x, (*shape[:axis], *pair, *shape[axis + 1 :])))


@block
def another_axis(s: Sketch) -> None:
    x = s.some(lambda shape: 0 < len(shape) < 5)
    if x is None:
        return
    y = s.unsqueeze(x, s.draws.integer(1, len(s.shape(x))))
    s.keep(y)
    ones = [axis for axis, size in enumerate(s.shape(y)) if size == 1 and axis]
    if s.chance(2):
        s.keep(s.squeeze(y, s.pick(ones)))


@block
def expand(s: Sketch) -> None:
    x = s.some(lambda shape: len(shape) > 1 and 1 in shape[1:])
    if x is None:
        return
    shape = s.shape(x)
    axis = s.pick([axis for axis in range(1, len(shape)) if shape[axis] == 1])
    result = (*shape[:axis], 3, *shape[axis + 1 :])
    if _n_values(result) > MAX_VALUES:
        return
    if s.chance(2):
        s.keep(s.op("Tile", x, s.ints(*(3 if a == axis else 1 for a in range(len(shape)))), shape=result))
    else:
        sizes = [
            3 if a == axis else size if isinstance(size, int) and a else 1 for a, size in enumerate(result)
        ]
        s.keep(s.op("Expand", x, s.ints(*sizes), shape=result))


@block
def tile(s: Sketch) -> None:
    found = _some_axis(s)
    if found is None:
        return
    x, axis = found
    shape = s.shape(x)
    result = (*shape[:axis], int(shape[axis]) * 2, *shape[axis + 1 :])
    if _n_values(result) <= MAX_VALUES:
        s.keep(s.op("Tile", x, s.ints(*(2 if a == axis else 1 for a in range(len(shape)))), shape=result))


@block
def attention(s: Sketch) -> None:
    x = s.some(lambda shape: len(shape) == 3 and _ends_known(shape) and int(shape[2]) <= 40)
    if x is None:
        return
    shape = s.shape(x)
    batch, n_tokens, width = shape
    n_heads, size = s.pick([2, 3, 4]), s.pick([2, 3])
    inner = n_heads * size
    source = s.op("Add", x, s.numbers(int(width))) if s.chance(3) else x

    def heads(y: str, n: int) -> str:
        y = s.reshape(y, (batch, n_tokens, n, size))
        return s.op("Transpose", y, shape=(batch, n, n_tokens, size), perm=[0, 2, 1, 3])

    if s.chance(3):
        packed = s.dense(source, 3 * inner)
        if s.chance(2):
            parts = [heads(part, n_heads) for part in s.split(packed, 2, [inner] * 3)]
        else:
            spread = s.reshape(packed, (batch, n_tokens, 3, n_heads, size))
            turned = s.op(
                "Transpose", spread, shape=(3, batch, n_heads, n_tokens, size), perm=[2, 0, 3, 1, 4]
            )
            one = (batch, n_heads, n_tokens, size)
            parts = [s.op("Gather", turned, s.const(np.int64(i)), shape=one, axis=0) for i in range(3)]
    else:
        parts = [heads(s.dense(source, inner, bias=not s.chance(4)), n_heads) for _ in range(3)]
    queries, keys, values = parts
    turned = s.op("Transpose", keys, shape=(batch, n_heads, size, n_tokens), perm=[0, 1, 3, 2])
    scores = s.op("MatMul", queries, turned, shape=(batch, n_heads, n_tokens, n_tokens))
    scores = s.op("Mul", scores, s.const(np.float32(size**-0.5)))
    if s.chance(3) and isinstance(n_tokens, int):
        scores = s.op("Add", scores, s.numbers(s.pick([1, n_heads]), n_tokens, n_tokens))
    mixed = s.op("MatMul", s.op("Softmax", scores, axis=-1), values, shape=(batch, n_heads, n_tokens, size))
    back = s.op("Transpose", mixed, shape=(batch, n_tokens, n_heads, size), perm=[0, 2, 1, 3])
    joined = s.reshape(back, (batch, n_tokens, inner))
    s.keep(s.op("Add", s.dense(joined, int(width)), x))


@block
def product(s: Sketch) -> None:
    """A product of two activations."""
    x = s.some(lambda shape: len(shape) == 3 and _is_known(shape))
    if x is None:
        return
    batch, rows, inner = s.shape(x)
    y = s.some(lambda shape: len(shape) == 3 and shape[0] == batch and shape[2] == inner and _is_known(shape))
    assert y is not None  # x itself fits
    other = s.shape(y)[1]
    result = (batch, rows, other)
    if _n_values(result) > MAX_VALUES:
        return
    scale = s.const(np.float32(int(inner) ** -0.5))
    if s.opset >= 12 and s.chance(3):
        s.keep(s.op("Einsum", s.op("Mul", x, scale), y, shape=result, equation="bij,bkj->bik"))
    else:
        turned = s.op("Transpose", y, shape=(batch, inner, other), perm=[0, 2, 1])
        s.keep(s.op("MatMul", s.op("Mul", x, scale), turned, shape=result))


@block
def siamese(s: Sketch) -> None:
    """Two layers with one weight, of one operator or of two."""
    x = s.some(_is_2d)
    if x is None:
        return
    n = int(s.shape(x)[1])
    first = s.conv(x, n, k=1, bias=False)
    weight = s.nodes[-1].input[1]
    if s.chance(3):
        twice = s.op("ConvTranspose", s.activation(first), weight, shape=s.shape(first), strides=[1, 1])
    else:
        twice = s.op("Conv", s.activation(first), weight)
    s.keep(s.op("Add", first, twice) if s.chance(2) else twice)


@block
def strangers(s: Sketch) -> None:
    """What channels are not followed through, or what reads a weight besides a layer."""
    kind = s.pick(["if", "weight read", "computed weight", "cumsum", "quantized", "topk"])
    x = s.some(_is_2d)
    if x is None:
        return
    shape = s.shape(x)
    n = int(shape[1])
    if kind == "if":
        _branching(s, x)
    elif kind == "weight read":
        y = s.conv(x, n, k=1)
        bias = s.nodes[-1].input[2]
        s.keep(s.op("Add", s.activation(y), s.op("Reshape", bias, s.ints(n, 1, 1), shape=(n, 1, 1))))
    elif kind == "computed weight":
        y = s.conv(x, 4, k=1)
        factor = s.reduce("ReduceMean", s.kernel(2, 4, 1, 1, fan_in=4), [0], keepdims=True)
        made = s.op("Mul", s.kernel(3, 4, 1, 1, fan_in=4), factor, shape=(3, 4, 1, 1))
        s.keep(s.op("Conv", y, made, shape=(shape[0], 3, *shape[2:])))
    elif kind == "cumsum":
        s.keep(s.op("CumSum", x, s.const(np.int64(s.pick([1, 2])))))
    elif kind == "quantized":
        codes = s.const(s.rng.integers(-20, 20, (4, n, 1, 1)).astype(np.int8))
        weight = s.op(
            "DequantizeLinear", codes, s.const(np.float32(0.05)), s.const(np.int8(0)), shape=(4, n, 1, 1)
        )
        s.keep(s.op("Conv", x, weight, s.bias(4), shape=(shape[0], 4, *shape[2:])))
    elif _is_known(shape):
        best = s.many("TopK", [x, s.ints(1)], [(*shape[:3], 1), (*shape[:3], 1)], axis=3)
        s.keep(best[0])


def _branching(s: Sketch, x: str) -> None:
    """An If whose branches read tensors from outside."""
    y = s.some(lambda other: other == s.shape(x))
    assert y is not None
    condition = s.const(np.array(s.chance(2)))
    if s.chance(2):
        peak = s.reduce("ReduceMax", x, list(range(len(s.shape(x)))), keepdims=False)
        condition = s.op("Greater", peak, s.const(np.float32(0)), shape=())
    names = [s.name("then"), s.name("else")]
    branches = []
    for name, read, op in zip(names, (x, y), ("Relu", "Tanh"), strict=True):
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        branches.append(helper.make_graph([helper.make_node(op, [read], [name])], name, [], [value]))
    s.keep(s.op("If", condition, shape=s.shape(x), then_branch=branches[0], else_branch=branches[1]))


# --- whole models ---

# What makes channels comes more often than what freezes them.
KINDS = (
    *BLOCKS.values(), conv, conv, grouped_conv, depthwise, residual, residual, mlp, gate, concat, split, add,
    attention, shuffle,
)  # fmt: skip


def random_model(draws: Draws) -> onnx.ModelProto:
    """Draw a valid model with up to three inputs and outputs."""
    s = Sketch(draws)
    n_blocks = s.draws.integer(1, 8)
    if s.chance(5):
        s.batch = s.pick([1, 2])
    for _ in range(1 + int(s.chance(5)) + int(s.chance(10))):
        _add_input(s)
    for _ in range(n_blocks):
        s.pick(KINDS)(s)
    outputs = _add_outputs(s)
    return _finish(s, outputs)


def _add_input(s: Sketch) -> None:
    kind = s.pick(["image", "image", "image", "tokens", "vector", "dynamic", "line"])
    n = s.pick([3, 4, 6, 2])
    shapes: dict[str, Shape] = {
        "image": (s.batch, n, 4, 4),
        "dynamic": (s.batch, n, "H", "W"),
        "line": (s.batch, n, 5),
        "tokens": (s.batch, 5, n),
        "vector": (s.batch, n),
    }
    name = f"x{len(s.inputs)}"
    s.shapes[name] = shapes[kind]
    s.inputs.append(name)
    # Something that can lose channels comes first.
    if kind in ("image", "dynamic", "line"):
        s.keep(s.conv(name, _width(s), k=s.pick([1, 3])))
    else:
        s.keep(s.dense(name, _width(s)))
    if s.chance(4):
        s.pool.insert(0, name)


def _add_outputs(s: Sketch) -> list[str]:
    """End in layers mostly, so that what is before them can lose channels; nearly nothing is left unread."""
    read = {name for node in s.nodes for name in node.input}
    leaves = [name for name in s.pool if name not in read and name not in s.inputs] or s.pool[-1:]
    leaves.reverse()
    n_own = s.pick([1, 2, 3])
    outputs: list[str] = []
    for leaf in leaves[:n_own]:
        shape = s.shape(leaf)
        if _is_image(shape) and not s.chance(8):
            leaf = s.conv(leaf, 3, k=1)
        elif _ends_known(shape) and not s.chance(8):
            leaf = s.dense(leaf, 3)
        elif leaf in s.inputs:
            leaf = s.op("Relu", leaf)
        if leaf not in outputs:
            outputs.append(leaf)
    total = ""
    for leaf in leaves[n_own : n_own + 8]:
        part = _summary(s, leaf)
        total = part if not total else s.op("Add", total, part)
    if total:
        outputs.append(total)
    if s.chance(16):
        inner = s.pool[0] if s.pool[0] not in s.inputs else s.pool[-1]
        if inner not in outputs and inner not in s.inputs:
            outputs.append(inner)
    return outputs


def _summary(s: Sketch, x: str) -> str:
    """Make [N, 3] of a value."""
    shape = s.shape(x)
    channels = next((axis for axis in range(1, len(shape)) if isinstance(shape[axis], int)), None)
    axes = [axis for axis in range(1, len(shape)) if axis != channels]
    if axes:
        x = s.reduce(s.pick(["ReduceMean", "ReduceMax"]), x, axes, keepdims=False)
    if channels is None:
        x = s.unsqueeze(x, len(s.shape(x)))
    return s.dense(x, 3)


def _finish(s: Sketch, outputs: Sequence[str]) -> onnx.ModelProto:
    named = {node.output[0] for node in s.nodes if node.op_type == "Constant"}
    initializers = [
        numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        for name, array in s.weights.items()
        if name not in named
    ]
    infos = [_describe(s, name) for name in s.inputs]
    ir_version = s.pick([9, 8, 7]) if s.opset <= 20 else 10
    if s.chance(8):
        infos += [
            helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            for tensor in initializers
        ]
        ir_version = 3 if s.opset <= 8 else ir_version
    # GroupNormalization has no rule of inference in some versions of onnx: outputs say their types.
    graph = helper.make_graph(
        s.nodes, "random", infos, [_describe(s, name) for name in outputs], initializers
    )
    how = s.draws.integer(0, 5)
    if how == 5:
        for node in graph.node:
            node.ClearField("name")
    elif how == 4:
        for node in list(graph.node)[::2]:
            node.ClearField("name")
    opsets = [helper.make_opsetid("", s.opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def _describe(s: Sketch, name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(s.shape(name)))

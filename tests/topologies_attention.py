"""Tiny models of attention in the shapes that exporters write, and of what surrounds it in transformers.

All have 3 heads of width 4 over 5 tokens unless they say otherwise; names and meaning as in ``topologies``.
"""

from __future__ import annotations

import numpy as np
from topologies import Net, Shapes, Topology, topology, variants

TOKENS: Shapes = {"x": ("N", 5, 12)}
HEADS, WIDTH, N_TOKENS = 3, 4, 5


class Attention(Net):
    """A net with the parts of transformers."""

    def dense(self, x: str, n_in: int, n_out: int, *, out: str | None = None) -> str:
        """MatMul and the Add of a bias; ``out`` names the product."""
        product = self.op("MatMul", x, self.const(self.normal(n_in, n_out) / n_in**0.5), out=out)
        return self.op("Add", product, self.rand(n_out))

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def scalar(self, value: float) -> str:
        return self.const(np.float32(value))

    def layer_norm(self, x: str, n: int = 12) -> str:
        return self.op("LayerNormalization", x, self.rand(n), self.rand(n))

    def gelu(self, x: str) -> str:
        """Gelu as it is spelled before opset 20."""
        cdf = self.op("Add", self.op("Erf", self.op("Div", x, self.scalar(2**0.5))), self.scalar(1))
        return self.op("Mul", self.op("Mul", x, cdf), self.scalar(0.5))

    def sizes_of(self, x: str, *axes: int) -> list[str]:
        shape = self.op("Shape", x)
        return [
            self.op("Unsqueeze", self.op("Gather", shape, self.const(np.int64(axis))), self.ints(0))
            for axis in axes
        ]

    def heads(self, x: str, n: int = HEADS, width: int = WIDTH) -> str:
        """[N, T, n * width] -> [N, n, T, width]."""
        return self.op("Transpose", self.op("Reshape", x, self.ints(0, 0, n, width)), perm=[0, 2, 1, 3])

    def attend(self, q: str, k: str, v: str, *, bias: str | None = None, scale: bool = True) -> str:
        """Products of [N, H, T, W]; the result is transposed to [N, T, H, W]."""
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        if scale:
            scores = self.op("Mul", scores, self.scalar(WIDTH**-0.5))
        if bias is not None:
            scores = self.op("Add", scores, bias)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        return self.op("Transpose", mixed, perm=[0, 2, 1, 3])

    def finish(self, mixed: str, x: str = "x", *, width: int = HEADS * WIDTH) -> str:
        """Join the heads, project them, and add them to the stream."""
        joined = self.op("Reshape", mixed, self.ints(0, 0, width))
        return self.op("Add", x, self.dense(joined, width, 12, out=self.name("proj")))

    def qkv(self, x: str) -> list[str]:
        return [self.heads(self.dense(x, 12, 12, out=self.name(name))) for name in "qkv"]

    def done(self, x: str, *more: str, inputs: Shapes | None = None):
        self.op("MatMul", x, self.const(self.normal(12, 3)), out="y")
        return self.model("y", *more, inputs=inputs or TOKENS)


# --- the spellings of heads ---


@topology
def transformer_block() -> Topology:
    """LayerNorm keeps the stream whole, and nothing behind it is lost for that."""
    net = Attention()
    x = net.dense("x", 12, 12, out="stem")
    x = net.finish(net.attend(*net.qkv(net.layer_norm(x))), x)
    hidden = net.gelu(net.dense(net.layer_norm(x), 12, 20, out="up"))
    x = net.op("Add", x, net.dense(hidden, 20, 12, out="down"))
    frozen = {"make_stem": "LayerNormalization", "make_down": "LayerNormalization"}
    return Topology(net.done(net.layer_norm(x)), (3, 20), frozen, ("make_up",))


@variants(
    literal=lambda net, x: net.ints(-1, 5, 3, 4),
    inferred=lambda net, x: net.ints(0, 5, -1, 4),
    computed=lambda net, x: net.op("Concat", *net.sizes_of(x, 0, 1), net.ints(3), net.ints(4), axis=0),
    one_constant=lambda net, x: net.op("Concat", *net.sizes_of(x, 0, 1), net.ints(3, 4), axis=0),
    width_computed=lambda net, x: net.op(
        "Concat",
        *net.sizes_of(x, 0, 1),
        net.ints(3),
        net.op("Div", *net.sizes_of(x, 2), net.ints(3)),
        axis=0,
    ),
)
def heads_by_reshape(target) -> Topology:
    net = Attention()
    parts = []
    for name in "qkv":
        x = net.dense("x", 12, 12, out=name)
        parts.append(net.op("Transpose", net.op("Reshape", x, target(net, x)), perm=[0, 2, 1, 3]))
    mixed = net.attend(*parts)
    sizes = net.sizes_of(mixed, 0, 1)
    joined = net.op("Reshape", mixed, net.op("Concat", *sizes, net.ints(12), axis=0))
    return Topology(net.done(net.op("Add", "x", net.dense(joined, 12, 12))), (3,))


@variants(
    gather=("3hw", "Gather"), split=("3hw", "Split"), slice=("3hw", "Slice"), heads_first=("h3w", "last"),
    split_before=("flat", "Split"), slice_before=("flat", "Slice"),
)  # fmt: skip
def packed_heads(how: tuple[str, str]) -> Topology:
    """One product makes queries, keys and values."""
    layout, cut = how
    net = Attention()
    x = net.dense("x", 12, 36, out="qkv")
    if layout == "flat":
        parts = _cut(net, x, cut, axis=2, n=12)
        return Topology(net.done(net.finish(net.attend(*map(net.heads, parts)))), (3,))
    if layout == "h3w":
        x = net.op("Transpose", net.op("Reshape", x, net.ints(0, 0, 3, 12)), perm=[0, 2, 1, 3])
        parts = _cut(net, x, "Split", axis=3, n=4)
        return Topology(net.done(net.finish(net.attend(*parts))), (3,))
    x = net.op("Transpose", net.op("Reshape", x, net.ints(0, 0, 3, 3, 4)), perm=[2, 0, 3, 1, 4])
    if cut == "Gather":
        parts = [net.op("Gather", x, net.const(np.int64(i)), axis=0) for i in range(3)]
    else:
        parts = [net.op("Squeeze", part, net.ints(0)) for part in _cut(net, x, cut, axis=0, n=1)]
    return Topology(net.done(net.finish(net.attend(*parts))), (3,))


def _cut(net: Net, x: str, how: str, *, axis: int, n: int) -> list[str]:
    if how == "Split":
        return net.many(
            "Split", x, net.ints(n, n, n), outputs=[net.name("part") for _ in range(3)], axis=axis
        )
    return [net.op("Slice", x, net.ints(i * n), net.ints(i * n + n), net.ints(axis)) for i in range(3)]


@variants(literal="literal", computed="computed", written="written")
def heads_in_the_batch(how: str) -> Topology:
    """Batch and heads share an axis, tokens come first: [T, N, D] -> [N * H, T, W]."""
    net = Attention()
    x = net.op("Transpose", "x", perm=[1, 0, 2])
    x = net.op("Reshape", net.dense(x, 12, 36, out="qkv"), net.ints(5, -1, 3, 12))
    x = net.op(
        "Squeeze", net.op("Transpose", net.op("Unsqueeze", x, net.ints(0)), perm=[3, 1, 2, 0, 4]), net.ints(3)
    )
    if how == "computed":
        count = net.op("Mul", *net.sizes_of("x", 0), net.ints(3))
        target = net.op("Concat", net.ints(5), count, net.ints(4), axis=0)
    else:
        target = net.ints(5, -1 if how == "literal" else 3, 4)
    parts = []
    for index in range(3):
        part = net.op("Gather", x, net.const(np.int64(index)), axis=0)
        parts.append(net.op("Transpose", net.op("Reshape", part, target), perm=[1, 0, 2]))
    q, k, v = parts
    scores = net.op("MatMul", net.op("Div", q, net.scalar(2)), net.op("Transpose", k, perm=[0, 2, 1]))
    mixed = net.op("Transpose", net.op("MatMul", net.op("Softmax", scores, axis=-1), v), perm=[1, 0, 2])
    flat = net.op(
        "Gemm", net.op("Reshape", mixed, net.ints(-1, 12)), net.rand(12, 12), net.rand(12), transB=1
    )
    back = net.op("Transpose", net.op("Reshape", flat, net.ints(5, -1, 12)), perm=[1, 0, 2])
    inputs: Shapes = {"x": (1, 5, 12)} if how == "written" else TOKENS
    return Topology(net.done(net.op("Add", "x", back), inputs=inputs), (3,))


@topology
def keys_transposed_in_the_batch() -> Topology:
    """As torch spells scaled products of attention, with the batch of one written in."""
    net = Attention()
    q, k, v = net.qkv("x")
    k = net.op("Transpose", net.op("Reshape", k, net.ints(3, 5, 4)), perm=[0, 2, 1])
    scores = net.op("MatMul", q, net.op("Reshape", k, net.ints(1, 3, 4, 5)))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    x = net.finish(net.op("Transpose", mixed, perm=[0, 2, 1, 3]))
    return Topology(net.done(x, inputs={"x": (1, 5, 12)}), (3,))


@topology
def heads_by_einsum() -> Topology:
    """Products of activations and with weights of three axes."""
    net = Attention()
    q, k, v = (
        net.op("Einsum", "x", net.rand(12, 3, 4), out=name, equation="btd,dhw->bthw") for name in "qkv"
    )
    scores = net.op("Softmax", net.op("Einsum", q, k, equation="bihw,bjhw->bhij"), axis=-1)
    mixed = net.op("Einsum", scores, v, equation="bhij, bjhw -> bihw")
    out = net.op("Einsum", mixed, net.rand(3, 4, 12), equation="abcd,cde")
    return Topology(net.done(net.op("Add", "x", out)), (3,))


@topology
def products_by_einsum() -> Topology:
    """Einsum with dots, and one that sums over the channels of a single operand."""
    net = Attention()
    x = net.op("Relu", net.op("Einsum", "x", net.rand(12, 8), out="a", equation="...d,de->...e"))
    lost = net.op(
        "Einsum", net.op("Einsum", "x", net.rand(12, 6), out="b", equation="abd,de"), equation="bte->bt"
    )
    x = net.op("Add", net.op("Einsum", x, net.rand(8, 12), equation="...e,ed->...d"), "x")
    x = net.op("Add", x, net.op("Unsqueeze", lost, net.ints(2)))
    return Topology(net.done(x), (8,), {"make_b": "adds up the channels"})


@variants(expand=False, one_constant=True)
def grouped_queries(shared: bool) -> Topology:
    """Four heads of queries read two of keys and values: an element is a pair with its own."""
    net = Attention()
    q = net.heads(net.dense("x", 12, 16, out="q"), 4)
    parts = []
    for name in "kv":
        x = net.op("Unsqueeze", net.heads(net.dense("x", 12, 8, out=name), 2), net.ints(2))
        two = net.ints(2)
        sizes = [*net.sizes_of("x", 0), two, two if shared else net.ints(2), net.ints(5), net.ints(4)]
        x = net.op("Expand", x, net.op("Concat", *sizes, axis=0) if shared else net.ints(1, 1, 2, 1, 1))
        parts.append(net.op("Reshape", x, net.ints(0, 4, 5, 4)))
    return Topology(net.done(net.finish(net.attend(q, *parts), width=16)), (2,))


@topology
def one_key_for_all_queries() -> Topology:
    """Heads cannot go where keys and values have none, but parts of their width can."""
    net = Attention()
    q = net.heads(net.dense("x", 12, 12, out="q"))
    parts = []
    for name in "kv":
        x = net.heads(net.dense("x", 12, 4, out=name), 1)
        parts.append(net.op("Expand", x, net.ints(1, 3, 1, 1)))
    return Topology(net.done(net.finish(net.attend(q, *parts))), (4, 4))


@topology
def heads_of_two_widths() -> Topology:
    """Keys narrower than values."""
    net = Attention()
    q, k = (net.heads(net.dense("x", 12, 6, out=name), 3, 2) for name in "qk")
    v = net.heads(net.dense("x", 12, 15, out="v"), 3, 5)
    return Topology(net.done(net.finish(net.attend(q, k, v), width=15)), (3,))


@topology
def as_many_heads_as_parts() -> Topology:
    """Three heads of width three in a packed product: every axis of [3, H, W] is as long."""
    net = Attention()
    x = net.op("Reshape", net.dense("x", 12, 27, out="qkv"), net.ints(0, 0, 3, 3, 3))
    x = net.op("Transpose", x, perm=[2, 0, 3, 1, 4])
    q, k, v = (net.op("Gather", x, net.const(np.int64(i)), axis=0) for i in range(3))
    return Topology(net.done(net.finish(net.attend(q, k, v), width=9)), (3,))


@topology
def attention_over_channels() -> Topology:
    """The scores are of channels with channels, scaled by a number per head."""
    net = Attention()
    x = net.op("Reshape", net.dense("x", 12, 36, out="qkv"), net.ints(0, 0, 3, 3, 4))
    x = net.op("Transpose", x, perm=[2, 0, 3, 4, 1])  # [3, N, H, W, T]
    q, k, v = (net.op("Gather", x, net.const(np.int64(i)), axis=0) for i in range(3))
    q = net.op("Div", q, net.op("ReduceL2", q, axes=[-1]))
    scores = net.op("Mul", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), net.rand(3, 1, 1))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    return Topology(net.done(net.finish(net.op("Transpose", mixed, perm=[0, 3, 1, 2]))), (3,))


@topology
def attention_of_convolutions() -> Topology:
    """Convolutions with BatchNormalization make the heads, a depthwise one reads the values as well."""
    net = Attention()
    stream = net.conv("x", 3, 12, out="stem")
    x = net.op("Reshape", net.norm(net.conv(stream, 12, 30, k=1, out="qkv"), 30), net.ints(0, 3, 10, -1))
    q, k, v = net.many("Split", x, net.ints(3, 3, 4), outputs=["q", "k", "v"], axis=2)
    scores = net.op("MatMul", net.op("Transpose", q, perm=[0, 1, 3, 2]), k)
    table = net.op("Gather", net.rand(3, 7), net.const(net.rng.integers(0, 7, (36, 36))), axis=1)
    scores = net.op("Softmax", net.op("Add", scores, table), axis=-1)
    mixed = net.op("MatMul", v, net.op("Transpose", scores, perm=[0, 1, 3, 2]))
    beside = net.conv(net.op("Reshape", v, net.ints(0, 12, 6, 6)), 12, 12, group=12)
    x = net.relu(net.op("Add", net.op("Reshape", mixed, net.ints(0, 12, 6, 6)), beside))
    x = net.op("Add", stream, net.conv(x, 12, 12, k=1, out="proj"))
    net.conv(x, 12, 3, out="y")
    return Topology(net.model("y"), (3, 12), gone=("make_qkv",))


@topology
def scores_as_an_output() -> Topology:
    net = Attention()
    q, k, v = net.qkv("x")
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]), out="scores")
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    x = net.finish(net.op("Transpose", mixed, perm=[0, 2, 1, 3]))
    # Whole heads are an output, but parts of their width are summed up before.
    return Topology(net.done(x, "scores"), (4, 4))


@variants(
    heads=(4, 3, 3), merged=(3, 3, 3), grouped=(4, 4, 2), grouped_merged=(3, 4, 2),
    biased=(4, 3, 3, (1, 3, 5, 5)), masked=(3, 3, 3, (5, 5)),
)  # fmt: skip
def attention_in_one_node(how) -> Topology:
    """The operator of opset 23, on [B, H, S, W] or on [B, S, H * W]."""
    ndim, n_queries, n_keys, *mask = how
    net = Attention(opset=23)
    parts = [
        net.dense("x", 12, n * 4, out=name)
        for name, n in zip("qkv", (n_queries, n_keys, n_keys), strict=True)
    ]
    attributes = {}
    if ndim == 4:
        parts = [net.heads(x, n) for x, n in zip(parts, (n_queries, n_keys, n_keys), strict=True)]
    else:
        attributes = {"q_num_heads": n_queries, "kv_num_heads": n_keys}
    y = net.op("Attention", *parts, *[net.const(net.normal(*shape)) for shape in mask], **attributes)
    if ndim == 4:
        y = net.op("Transpose", y, perm=[0, 2, 1, 3])
    return Topology(net.done(net.finish(y, width=n_queries * 4)), (n_keys,))


@topology
def attention_with_a_past() -> Topology:
    net = Attention(opset=23)
    q, k, v = net.qkv("x")
    inputs: Shapes = {**TOKENS, "keys": ("N", 3, 2, 4), "values": ("N", 3, 2, 4)}
    y = net.many("Attention", q, k, v, "", "keys", "values", outputs=["mixed", "k_new", "v_new"])[0]
    x = net.finish(net.op("Transpose", y, perm=[0, 2, 1, 3]))
    return Topology(net.done(x, inputs=inputs), (), {"make_q1": "Attention with a past"})


@topology
def recurrent_layer() -> Topology:
    net = Attention()
    x = net.op("Transpose", net.dense(net.op("Relu", net.dense("x", 12, 8)), 8, 6, out="b"), perm=[1, 0, 2])
    x = net.many("LSTM", x, net.rand(1, 48, 6), net.rand(1, 48, 12), outputs=["lstm"], hidden_size=12)[0]
    x = net.op("Transpose", net.op("Squeeze", x, net.ints(1)), perm=[1, 0, 2])
    return Topology(net.done(x), (8,), {"make_b": "LSTM reads them at every step"})


# --- biases and masks of scores ---


def _positions() -> np.ndarray:
    index = np.arange(N_TOKENS)
    return index[:, None] - index[None] + N_TOKENS - 1


def _table(net: Attention) -> str:
    """A table [positions, heads], looked up as Swin and BEiT do."""
    x = net.op("Gather", net.rand(2 * N_TOKENS - 1, HEADS), net.const(_positions().ravel()))
    x = net.op("Transpose", net.op("Reshape", x, net.ints(5, 5, -1)), perm=[2, 0, 1])
    return net.op("Unsqueeze", x, net.ints(0))


def _literal_table(net: Attention) -> str:
    x = net.op("Gather", net.rand(2 * N_TOKENS - 1, HEADS), net.const(_positions()))
    return net.op("Reshape", net.op("Transpose", x, perm=[2, 0, 1]), net.ints(1, 3, 5, 5))


def _slopes(net: Attention) -> str:
    """Distances that are counted at run time, times a slope per head."""
    length = net.op("Squeeze", *net.sizes_of("x", 1))
    index = net.op("Range", net.const(np.int64(0)), length, net.const(np.int64(1)))
    rows = net.op("Unsqueeze", index, net.ints(1))
    distance = net.op("Cast", net.op("Abs", net.op("Sub", rows, index)), to=1)
    return net.op("Mul", net.op("Neg", distance), net.rand(HEADS, 1, 1))


def _small_network(net: Attention) -> str:
    """A network makes the table from coordinates: its last layer has one output per head."""
    x = net.relu(net.dense(net.const(net.normal(1, 9, 2)), 2, 6, out="coordinates"))
    x = net.op("Reshape", net.op("MatMul", x, net.const(net.normal(6, HEADS))), net.ints(-1, 3))
    x = net.op("Gather", x, net.const(_positions().ravel()))
    x = net.op("Transpose", net.op("Reshape", x, net.ints(5, 5, -1)), perm=[2, 0, 1])
    return net.op("Mul", net.op("Sigmoid", x), net.scalar(16))


@variants(
    constant=(lambda net: net.rand(1, 3, 5, 5), ()),
    mask=(lambda net: net.const(np.triu(np.full((1, 1, 5, 5), -9, np.float32), 1)), ()),
    table=(_table, ()),
    literal_table=(_literal_table, ()),
    slopes=(_slopes, ()),
    small_network=(_small_network, (6,)),
)
def bias_of_scores(how) -> Topology:
    build, more = how
    net = Attention()
    x = net.finish(net.attend(*net.qkv("x"), bias=build(net)))
    return Topology(net.done(x), (3, *more))


@topology
def one_table_for_two_layers() -> Topology:
    net = Attention()
    bias = _table(net)
    x = net.finish(net.attend(*net.qkv("x"), bias=bias))
    x = net.finish(net.attend(*net.qkv(net.layer_norm(x)), bias=bias), x)
    return Topology(net.done(x), (3,))


@topology
def table_read_elsewhere() -> Topology:
    """What reads the table without heads keeps it whole, and the heads with it."""
    net = Attention()
    table = net.rand(9, HEADS)
    x = net.op("Transpose", net.op("Gather", table, net.const(_positions())), perm=[2, 0, 1])
    x = net.finish(net.attend(*net.qkv("x"), bias=x))
    x = net.op("Add", x, net.op("ReduceMean", table, keepdims=0))
    return Topology(net.done(x), (4, 4), {})


@topology
def scores_scaled_by_samples() -> Topology:
    """A gate per head that comes from outside."""
    net = Attention()
    inputs: Shapes = {**TOKENS, "gate": ("N", 3, 1, 1)}
    q, k, v = net.qkv("x")
    x = net.finish(net.attend(net.op("Mul", q, "gate"), k, v))
    return Topology(net.done(x, inputs=inputs), (4, 4))


# --- windows ---


@topology
def shifted_windows() -> Topology:
    """Swin's: rolled by Slice and Concat, cut into four windows, with a table and a mask per window."""
    net = Attention()
    x = net.op("Transpose", net.conv("x", 3, 12, out="stem"), perm=[0, 2, 3, 1])
    y = net.layer_norm(x)
    for axis in (1, 2):
        y = _roll(net, y, 1, axis)
    y = net.op("Transpose", net.op("Reshape", y, net.ints(-1, 2, 3, 2, 3, 12)), perm=[0, 1, 3, 2, 4, 5])
    y = net.op("Reshape", y, net.ints(-1, 9, 12))
    x3 = net.op(
        "Transpose",
        net.op("Reshape", net.dense(y, 12, 36, out="qkv"), net.ints(-1, 9, 3, 3, 4)),
        perm=[2, 0, 3, 1, 4],
    )
    q, k, v = (net.op("Gather", x3, net.const(np.int64(i)), axis=0) for i in range(3))
    table = net.op("Gather", net.rand(25, 3), net.const(net.rng.integers(0, 25, 81)))
    table = net.op("Transpose", net.op("Reshape", table, net.ints(9, 9, -1)), perm=[2, 0, 1])
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = net.op("Add", scores, net.op("Unsqueeze", table, net.ints(0)))
    mask = net.const(np.where(net.rng.random((1, 4, 1, 9, 9)) < 0.3, -100, 0).astype(np.float32))
    scores = net.op("Add", net.op("Reshape", scores, net.ints(-1, 4, 3, 9, 9)), mask)
    scores = net.op("Softmax", net.op("Reshape", scores, net.ints(-1, 3, 9, 9)), axis=-1)
    mixed = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    y = net.dense(net.op("Reshape", mixed, net.ints(-1, 9, 12)), 12, 12, out="proj")
    y = net.op("Transpose", net.op("Reshape", y, net.ints(-1, 2, 2, 3, 3, 12)), perm=[0, 1, 3, 2, 4, 5])
    y = net.op("Reshape", y, net.ints(-1, 6, 6, 12))
    for axis in (1, 2):
        y = _roll(net, y, 5, axis)
    x = net.op("Add", x, y)
    # Patches are merged: four positions become channels.
    x = net.op("Transpose", net.op("Reshape", x, net.ints(-1, 3, 2, 3, 2, 12)), perm=[0, 1, 3, 4, 2, 5])
    x = net.op("Reshape", x, net.ints(-1, 9, 48))
    net.op(
        "MatMul", net.dense(net.layer_norm(x, 48), 48, 10, out="merge"), net.const(net.normal(10, 3)), out="y"
    )
    return Topology(net.model("y"), (3, 10), {"make_stem": "LayerNormalization"})


def _roll(net: Net, x: str, shift: int, axis: int) -> str:
    first = net.op("Slice", x, net.ints(shift), net.ints(2**62), net.ints(axis))
    last = net.op("Slice", x, net.ints(0), net.ints(shift), net.ints(axis))
    return net.op("Concat", first, last, axis=axis)


# --- gated widths ---


@variants(split=True, slices=False)
def gated_width(split: bool) -> Topology:
    """Half of the width gates the other half."""
    net = Attention()
    x = net.dense(net.layer_norm("x"), 12, 16, out="up")
    if split:
        a, b = net.many("Split", x, net.ints(8, 8), outputs=["a", "b"], axis=-1)
    else:
        a = net.op("Slice", x, net.ints(0), net.ints(8), net.ints(2))
        b = net.op("Slice", x, net.ints(8), net.ints(2**62), net.ints(2))
    x = net.op("Add", "x", net.dense(net.op("Mul", net.gelu(a), b), 8, 12))
    return Topology(net.done(x), (8,))


@topology
def chunks_of_counted_width() -> Topology:
    """The bounds of the halves are computed from the width."""
    net = Attention()
    x = net.dense("x", 12, 16, out="up")
    half = net.op("Div", net.op("Add", *net.sizes_of(x, 2), net.ints(1)), net.ints(2))
    a = net.op("Slice", x, net.ints(0), half, net.ints(2))
    b = net.op("Slice", x, half, net.op("Mul", half, net.ints(2)), net.ints(2))
    x = net.op("Add", "x", net.dense(net.op("Mul", net.op("Sigmoid", a), b), 8, 12))
    return Topology(net.done(x), (8,))

"""Programs that compute shapes: their values, and which numbers follow when channels go."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from topologies import Net

from hap_onnx.model.model_io import load_model, normalise
from hap_onnx.surgery.shape_program import evaluate, find_edits, replace_numbers

OPSET = 17


class Program:
    """The target of the Reshape that a net ends with; x is [N, T, D]."""

    def __init__(self, net: Net, target: str) -> None:
        net.op("Reshape", "x", target, out="y")
        self.graph = normalise(load_model(net.model("y", inputs={"x": ("N", "T", "D")})))
        self.target = self.graph.nodes[-1].inputs[1]
        self.n_names = 0

    def value(self, shape: tuple[int, ...], target: gs.Tensor | None = None) -> list[int]:
        found = evaluate(target or self.target, lambda tensor: shape, opset=OPSET)
        assert found is not None
        return found.tolist()

    def edits(self, shape: tuple[int, ...], wanted: list[int]) -> Mapping[tuple[str, int, int], int] | None:
        return find_edits(
            self.target, wanted, lambda n: n, lambda tensor: shape, opset=OPSET, ratios=[(9, 12)]
        )

    def replaced(self, shape: tuple[int, ...], wanted: list[int]) -> gs.Tensor:
        edits = self.edits(shape, wanted)
        assert edits

        def name(base: str) -> str:
            self.n_names += 1
            return f"{base}_{self.n_names}"

        return replace_numbers(self.target, edits, name, lambda node, after: self.graph.nodes.append(node))


def sizes(net: Net, *axes: int) -> list[str]:
    shape = net.op("Shape", "x")
    return [net.op("Gather", shape, net.ints(axis)) for axis in axes]


def test_evaluates_what_shapes_decide() -> None:
    net = Net()
    n, t, d = sizes(net, 0, 1, 2)
    width = net.op("Div", d, net.ints(6))
    program = Program(net, net.op("Concat", net.op("Mul", n, net.ints(6)), t, width, axis=0))
    assert program.value((2, 5, 24)) == [12, 5, 4]
    assert program.value((7, 3, 12)) == [42, 3, 2]


def test_does_not_evaluate_what_data_decides() -> None:
    net = Net()
    largest = net.op("Cast", net.op("ReduceMax", "x", keepdims=0), to=7)
    program = Program(net, net.op("Concat", net.op("Unsqueeze", largest, net.ints(0)), net.ints(-1), axis=0))
    assert evaluate(program.target, lambda tensor: (2, 5, 24), opset=OPSET) is None
    assert program.edits((2, 5, 24), [2, -1]) is None


@pytest.mark.parametrize("kind", ["factor", "divisor", "entry", "part_of_a_constant", "where"])
def test_finds_the_number_that_follows(kind: str) -> None:
    """12 heads become 9: whatever the batch, the new program gives the new shape."""
    net = Net()
    n, t, d = sizes(net, 0, 1, 2)
    before = {"factor": [24, 5, 2], "divisor": [2, 5, 12, 2]}.get(kind, [2, 5, 12, 2])
    after = {"factor": [18, 5, 2]}.get(kind, [2, 5, 9, 2])
    if kind == "factor":
        target = net.op("Concat", net.op("Mul", n, net.ints(12)), t, net.ints(2), axis=0)
    elif kind == "divisor":
        target = net.op("Concat", n, t, net.ints(12), net.op("Div", d, net.ints(12)), axis=0)
    elif kind == "part_of_a_constant":
        target = net.op("Concat", n, t, net.ints(12, 2), axis=0)
    else:
        target = net.op("Concat", n, t, net.ints(12), net.ints(2), axis=0)
    if kind == "where":  # as torch spells expand: -1 would mean the size of the input
        unknown = net.op("Equal", target, net.ints(-1))
        target = net.op("Where", unknown, net.ints(1), target)
    program = Program(net, target)
    assert program.value((2, 5, 24)) == before
    new = program.replaced((2, 5, 18), after)
    assert program.value((2, 5, 18), new) == after
    assert program.value((7, 3, 18), new) == [after[0] * 7 // 2, 3, *after[2:]]
    assert program.value((2, 5, 24)) == before  # others may read the old one


def test_numbers_follow_where_they_are_read() -> None:
    """One constant is two sizes, of which one stays."""
    net = Net()
    two = net.ints(4)
    program = Program(net, net.op("Concat", *sizes(net, 0), two, two, net.ints(-1), axis=0))
    assert program.value((2, 5, 24)) == [2, 4, 4, -1]
    assert program.value((2, 5, 24), program.replaced((2, 5, 24), [2, 3, 4, -1])) == [2, 3, 4, -1]
    assert program.value((2, 5, 24), program.replaced((2, 5, 24), [2, 4, 3, -1])) == [2, 4, 3, -1]


def test_leaves_what_is_right_already() -> None:
    net = Net()
    program = Program(net, net.op("Concat", *sizes(net, 0, 1, 2), axis=0))
    assert program.edits((2, 5, 18), [2, 5, 18]) == {}


def test_never_changes_where_a_program_looks() -> None:
    """Another size would be as long here; only numbers that arrive in the target may change."""
    net = Net()
    program = Program(net, net.op("Concat", *sizes(net, 0, 2), net.ints(-1), axis=0))
    assert program.edits((2, 12, 24), [2, 12, -1]) is None


def test_takes_constants_of_large_models_for_no_numbers() -> None:
    net = Net()
    program = Program(net, net.op("Concat", *sizes(net, 0), net.const(np.ones(20_000, np.int64)), axis=0))
    assert evaluate(program.target, lambda tensor: (2, 5, 24), opset=OPSET) is None

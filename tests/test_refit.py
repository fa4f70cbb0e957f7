"""Refit: what duplicates carried is restored exactly, errors are corrected, the rest is left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from hap_onnx.calibration import InputSpec, Subset, open_dataset
from hap_onnx.channels import find_groups
from hap_onnx.errors import SurgeryError
from hap_onnx.events import Event
from hap_onnx.model_io import load_model, normalise
from hap_onnx.ops.elementwise import clip_bounds
from hap_onnx.refit import _n_rows, _Options, _Store, refit
from hap_onnx.surgery import Kept, kept_positions, remove_channels
from hap_onnx.twin import build_twin, probe_shapes
from tests.helpers import make_model, node, rand

Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def graph_of(model: onnx.ModelProto) -> gs.Graph:
    return normalise(load_model(model))


def subset_of(x: np.ndarray) -> Subset:
    dataset = open_dataset({"x": x}, [InputSpec("x", x.dtype, ("N", *x.shape[1:]))])
    return Subset(dataset, np.arange(len(x)))


def cut(
    graph: gs.Graph, x: np.ndarray, drop: Mapping[str, Sequence[int]]
) -> tuple[gs.Graph, dict[str, Kept]]:
    """Remove the channels at the given positions of tensors."""
    shapes = probe_shapes(build_twin(graph), {"x": torch.from_numpy(x[:2])})
    coupling = find_groups(graph, shapes)
    keep = np.ones(coupling.n_elements, bool)
    for name, positions in drop.items():
        elements = coupling.tensors[name].ids[list(positions)]
        assert (elements >= 0).all()
        keep[elements] = False
    kept = {
        name: Kept(found.axis, kept_positions(found.ids, keep)) for name, found in coupling.tensors.items()
    }
    return remove_channels(graph, coupling, keep, shapes=shapes), kept


def run(graph: gs.Graph, x: np.ndarray, new: Arrays | None = None) -> np.ndarray:
    twin = build_twin(graph)
    with torch.no_grad():
        for name, values in (new or {}).items():
            assert values.dtype == np.float32
            assert values.shape == tuple(twin.parameter_of[name].shape)
            twin.parameter_of[name].copy_(torch.from_numpy(values))
        return twin({"x": torch.from_numpy(x)})["y"].numpy()


def relative_error(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def fit(
    graph: gs.Graph, compressed: gs.Graph, kept: Mapping[str, Kept], x: np.ndarray, **options: Any
) -> Arrays:
    options = {"batch_size": 16, "seed": 0, "ridge": 1e-7, **options}
    return refit(graph, compressed, kept, subset_of(x), **options)


def duplicates(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    """A weight of 2n outputs, the second half equal to the first."""
    return np.concatenate([rand(n, *shape, seed=seed)] * 2)


def check_restored(model: onnx.ModelProto, x: np.ndarray, drop: Sequence[int], changed: set[str]) -> None:
    """Assert that refit restores the function of a model whose tensor ``h`` lost duplicate channels."""
    graph = graph_of(model)
    compressed, kept = cut(graph, x, {"h": drop})
    expected = run(graph, x)
    assert relative_error(run(compressed, x), expected) > 0.05
    new = fit(graph, compressed, kept, x)
    assert set(new) == changed
    assert relative_error(run(compressed, x, new), expected) < 1e-4


# --- every kind of contraction ---


@pytest.mark.parametrize(
    ("n_axes", "attributes"),
    [
        (2, {"pads": [1, 1, 1, 1]}),
        (2, {"strides": [2, 1], "dilations": [1, 2], "pads": [0, 2, 1, 1]}),
        (2, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        (1, {"strides": [2], "pads": [2, 0]}),
        (3, {"pads": [1, 0, 1, 0, 1, 1]}),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_conv_takes_over_duplicates(n_axes: int, attributes: dict[str, Any], bias: bool) -> None:
    taps = [3] * n_axes
    weights = {"a": duplicates(3, 2, *[1] * n_axes), "ab": duplicates(3), "w": rand(5, 6, *taps, seed=1)}
    if bias:
        weights["b"] = rand(5, seed=2)
    model = make_model(
        [
            node("Conv", ["x", "a", "ab"], ["c"]),
            node("Relu", ["c"], ["h"]),
            node("Conv", ["h", "w", *(["b"] if bias else [])], ["y"], **attributes),
        ],
        inputs={"x": ["N", 2, *[6] * n_axes]},
        outputs=["y"],
        weights=weights,
    )
    # Without noise no bias needs to move: it may be in the result all the same.
    check_restored(model, rand(20, 2, *[6] * n_axes, seed=3), [3, 4, 5], {"w", "b"} if bias else {"w"})


def test_grouped_conv_is_solved_in_blocks() -> None:
    a = np.concatenate([duplicates(2, 2, 1, 1, seed=seed) for seed in (0, 1)])
    model = make_model(
        [
            node("Conv", ["x", "a"], ["c"]),
            node("Relu", ["c"], ["h"]),
            node("Conv", ["h", "w", "b"], ["y"], group=2, pads=[1, 1, 1, 1]),
        ],
        inputs={"x": ["N", 2, 5, 5]},
        outputs=["y"],
        weights={"a": a, "w": rand(6, 4, 3, 3, seed=1), "b": rand(6, seed=2)},
    )
    check_restored(model, rand(20, 2, 5, 5, seed=3), [2, 3, 6, 7], {"w", "b"})


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_takes_over_duplicates(transposed: int) -> None:
    a, w = duplicates(3, 4), rand(5, 6, seed=1)
    model = make_model(
        [
            node("Gemm", ["x", "a"], ["c"], transB=1),
            node("Relu", ["c"], ["h"]),
            node("Gemm", ["h", "w", "b"], ["y"], transB=transposed),
        ],
        inputs={"x": ["N", 4]},
        outputs=["y"],
        weights={"a": a, "w": w if transposed else np.ascontiguousarray(w.T), "b": rand(5, seed=2)},
    )
    check_restored(model, rand(100, 4, seed=3), [3, 4, 5], {"w", "b"})


@pytest.mark.parametrize("bias", [True, False])
def test_matmul_takes_over_duplicates_and_shares_the_bias_that_is_added(bias: bool) -> None:
    nodes = [
        node("MatMul", ["x", "a"], ["c"]),
        node("Relu", ["c"], ["h"]),
        node("MatMul", ["h", "w"], ["m" if bias else "y"]),
    ]
    if bias:
        nodes.append(node("Add", ["b", "m"], ["y"]))
    weights = {"a": np.ascontiguousarray(duplicates(3, 4).T), "w": rand(6, 5, seed=1)}
    model = make_model(
        nodes,
        inputs={"x": ["N", 7, 4]},
        outputs=["y"],
        weights={**weights, "b": rand(5, seed=2)} if bias else weights,
    )
    check_restored(model, rand(20, 7, 4, seed=3), [3, 4, 5], {"w", "b"} if bias else {"w"})


def test_fewer_rows_than_features() -> None:
    model = make_model(
        [
            node("Gemm", ["x", "a"], ["c"], transB=1),
            node("Relu", ["c"], ["h"]),
            node("Gemm", ["h", "w", "b"], ["y"], transB=1),
        ],
        inputs={"x": ["N", 4]},
        outputs=["y"],
        weights={"a": duplicates(40, 4), "w": rand(5, 80, seed=1), "b": rand(5, seed=2)},
    )
    check_restored(model, rand(16, 4, seed=3), list(range(40, 80)), {"w", "b"})


def depthwise_model(batch: int | str = "N") -> onnx.ModelProto:
    return make_model(
        [
            node("Conv", ["x", "w", "b"], ["d"], group=3, pads=[1, 1, 1, 1]),
            node("ConvTranspose", ["d", "t", "tb"], ["u"], strides=[2, 2]),
            node("GlobalAveragePool", ["u"], ["p"]),
            node("Reshape", ["p", "shape"], ["f"]),
            node("Gemm", ["f", "g", "gb"], ["y"], alpha=2.0, beta=0.5),
        ],
        inputs={"x": [batch, 3, 6, 6]},
        outputs=["y"],
        weights={
            "w": rand(3, 1, 3, 3),
            "b": rand(3, seed=1),
            "t": rand(3, 4, 2, 2, seed=2),
            "tb": rand(4, seed=3),
            "shape": np.array([1 if batch == 1 else -1, 4]),
            "g": rand(4, 5, seed=4),
            "gb": rand(5, seed=5),
        },
    )


@pytest.mark.parametrize("name", ["b", "tb", "gb"])
@pytest.mark.parametrize("batch", ["N", 1])
def test_a_bias_that_drifted_comes_back(name: str, batch: int | str) -> None:
    """Depthwise convolutions are solved per channel; what has no matrix form gets a bias."""
    graph = graph_of(depthwise_model(batch))
    compressed = graph.copy()
    constant = compressed.tensors()[name]
    constant.values = constant.values + 1
    x = rand(10, 3, 6, 6, seed=6)
    new = fit(graph, compressed, {}, x)
    np.testing.assert_allclose(new[name], graph.tensors()[name].values, atol=1e-4)
    if batch == "N":
        assert relative_error(run(compressed, x, new), run(graph, x)) < 1e-5


# --- targets ---


def two_branches(*, through: str) -> onnx.ModelProto:
    """Two branches that are added: one through a narrow tensor ``h``, one that reads the input."""
    nodes = [
        node("Conv", ["x", "a"], ["h"]),
        node("Conv", ["h", "b", "bb"], ["d"]),
        node("Conv", ["x", "w", "wb"], ["e"]),
        node("Add", ["d", "e" if through == "conv" else "x"], ["s"]),
        node("Conv", ["s", "v"], ["y"]),
    ]
    if through != "conv":
        del nodes[2]
    return make_model(
        nodes,
        inputs={"x": ["N", 4, 5, 5]},
        outputs=["y"],
        weights={
            "a": rand(6, 4, 1, 1),
            "b": rand(4, 6, 1, 1, seed=1),
            "bb": rand(4, seed=2),
            "v": rand(4, 4, 1, 1, seed=4),
        }
        | ({"w": rand(4, 4, 1, 1, seed=3), "wb": rand(4, seed=5)} if through == "conv" else {}),
    )


@pytest.mark.parametrize("drop", [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
def test_the_later_branch_corrects_the_error_of_the_earlier_one(drop: list[int]) -> None:
    graph, x = graph_of(two_branches(through="conv")), rand(20, 4, 5, 5, seed=6)
    compressed, kept = cut(graph, x, {"h": drop})
    new = fit(graph, compressed, kept, x)
    assert {"w", "wb"} <= set(new)
    assert relative_error(run(compressed, x, new), run(graph, x)) < 1e-4


def test_what_is_left_of_a_removed_branch_is_the_mean_of_the_branch() -> None:
    graph, x = graph_of(two_branches(through="skip")), rand(20, 4, 5, 5, seed=6) + 1
    compressed, kept = cut(graph, x, {"h": range(6)})
    new = fit(graph, compressed, kept, x, ridge=1e6)
    weights = {name: tensor.values for name, tensor in graph.tensors().items() if name in "abbb"}
    h = np.einsum("oc,nchw->nohw", weights["a"][:, :, 0, 0], x)
    d = np.einsum("oc,nchw->nohw", weights["b"][:, :, 0, 0], h) + weights["bb"][:, None, None]
    np.testing.assert_allclose(new["d_hap_constant"].ravel(), d.mean((0, 2, 3)), atol=1e-4)


def relu_model() -> onnx.ModelProto:
    return make_model(
        [
            node("Conv", ["x", "a"], ["c"]),
            node("Relu", ["c"], ["h"]),
            node("Conv", ["h", "w", "b"], ["d"]),
            node("Add", ["x", "d"], ["s"]),
            node("Relu", ["s"], ["y"]),
        ],
        inputs={"x": ["N", 4, 5, 5]},
        outputs=["y"],
        weights={"a": rand(8, 4, 1, 1), "w": rand(4, 8, 1, 1, seed=1), "b": rand(4, seed=2)},
    )


def test_rounds_lower_the_error_after_a_relu() -> None:
    graph, x = graph_of(relu_model()), rand(20, 4, 5, 5, seed=3)
    compressed, kept = cut(graph, x, {"h": [0, 3, 5]})
    expected = run(graph, x)
    errors = [
        relative_error(run(compressed, x, fit(graph, compressed, kept, x, n_relu_rounds=n)), expected)
        for n in (0, 1, 3)
    ]
    assert relative_error(run(compressed, x), expected) > errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("op_type", "limits", "expected"),
    [
        ("Relu", [], (0, np.inf)),
        ("Clip", [0, 6], (0, 6)),
        ("Clip", [0], (0, np.inf)),
        ("Clip", [6, 0], None),
        ("Sigmoid", [], None),
    ],
)
def test_bounds(op_type: str, limits: list[float], expected: tuple[float, float] | None) -> None:
    constants = [gs.Constant(str(value), np.array(value, np.float32)) for value in limits]
    assert clip_bounds(gs.Node(op_type, inputs=[gs.Variable("x"), *constants])) == expected


# --- what is left alone ---


def test_nothing_removed_changes_nothing() -> None:
    graph, x = graph_of(relu_model()), rand(8, 4, 5, 5)
    assert fit(graph, graph.copy(), {}, x) == {}


def test_layers_before_the_first_change_and_shared_weights_stay() -> None:
    model = make_model(
        [
            node("Conv", ["x", "w"], ["c"]),
            node("Conv", ["c", "a"], ["h"]),
            node("Conv", ["h", "b"], ["d"]),
            node("Conv", ["d", "w"], ["y"]),
        ],
        inputs={"x": ["N", 4, 5, 5]},
        outputs=["y"],
        weights={"w": rand(4, 4, 1, 1), "a": rand(6, 4, 1, 1, seed=1), "b": rand(4, 6, 1, 1, seed=2)},
    )
    graph, x = graph_of(model), rand(8, 4, 5, 5, seed=3)
    before = {name: np.array(tensor.values) for name, tensor in graph.tensors().items() if name in "wab"}
    compressed, kept = cut(graph, x, {"h": [0]})
    assert set(fit(graph, compressed, kept, x)) == {"b"}
    for name, values in before.items():
        np.testing.assert_array_equal(graph.tensors()[name].values, values)


def test_a_wrong_map_of_channels_is_refused() -> None:
    graph, x = graph_of(two_branches(through="conv")), rand(8, 4, 5, 5)
    compressed, kept = cut(graph, x, {"h": [0]})
    with pytest.raises(SurgeryError, match="left of the original"):
        fit(graph, compressed, {**kept, "h": Kept(1, np.arange(3))}, x)


# --- memory, batches, positions ---


def deep_case() -> tuple[gs.Graph, gs.Graph, dict[str, Kept], np.ndarray]:
    graph, x = graph_of(relu_model()), rand(30, 4, 5, 5, seed=3)
    return graph, *cut(graph, x, {"h": [0, 3, 5]}), x


def test_spilling_changes_no_bit_and_leaves_nothing_behind(tmp_path: Path) -> None:
    case = deep_case()
    options = {"ridge": 1e-3, "n_positions": 10}
    in_memory = fit(*case, **options)
    for limit in (0, 20_000):
        spilled = fit(*case, **options, memory_limit_bytes=limit, work_dir=tmp_path)
        assert spilled.keys() == in_memory.keys()
        for name, values in in_memory.items():
            np.testing.assert_array_equal(spilled[name], values)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(event: Event) -> None:
        if event.kind == "advance":
            assert any(tmp_path.rglob("*.bin"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(*deep_case(), memory_limit_bytes=0, work_dir=tmp_path, on_event=fail)
    assert list(tmp_path.iterdir()) == []


def test_store_counts_a_storage_once_and_frees_it_with_its_last_view(tmp_path: Path) -> None:
    store = _Store(tmp_path, 1000)
    whole = torch.arange(100, dtype=torch.float32)
    store.append(("", "whole"), whole)
    store.append(("", "view"), whole.reshape(10, 10)[::2].mT)
    assert store.n_bytes == 400
    store.append(("", "spilled"), torch.arange(200.0).reshape(20, 10).mT)
    assert (store.n_bytes, len(list(tmp_path.iterdir()))) == (400, 1)
    assert store.get(("", "spilled"), 0).stride() == (1, 10)
    torch.testing.assert_close(store.get(("", "spilled"), 0), torch.arange(200.0).reshape(20, 10).mT)
    store.drop(("", "whole"))
    assert store.n_bytes == 400
    store.close()
    assert (store.n_bytes, list(tmp_path.iterdir())) == (0, [])


def test_batches_do_not_matter_when_all_positions_are_used() -> None:
    case = deep_case()
    first = fit(*case, ridge=1e-3, batch_size=30)
    for batch_size in (1, 7):
        again = fit(*case, ridge=1e-3, batch_size=batch_size)
        for name, values in first.items():
            np.testing.assert_allclose(again[name], values, atol=1e-5)


def test_seed_chooses_positions() -> None:
    case = deep_case()
    results = [fit(*case, ridge=1e-3, n_positions=4, seed=seed)["w"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_number_of_rows() -> None:
    options = _Options(ridge=0, n_positions=64, n_relu_rounds=0, seed=0)
    assert _n_rows(614, 577, 1, options) == (64, 614)
    assert _n_rows(24, 577, 1, options) == (97, 24)  # four rows per feature
    assert _n_rows(4096, 100, 1, options) == (16, 4096)  # 65,536 in total
    assert _n_rows(100_000, 100, 1, options) == (1, 65_536)
    assert _n_rows(614, 25_089, 1, options)[0] * 614 <= 2**26 // 25_089


def test_long_work_is_reported() -> None:
    events: list[Event] = []
    fit(*deep_case(), on_event=events.append)
    kinds = [event.kind for event in events]
    assert {event.stage for event in events} == {"refit"}
    assert (kinds[0], kinds[-1], kinds.count("advance")) == ("start", "end", events[0].total)

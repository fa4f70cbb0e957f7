"""Timing models in onnxruntime."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import numpy as np
import pytest
from onnx import ModelProto, helper

from hap_onnx.errors import UsageError
from hap_onnx.runtime import latency
from hap_onnx.runtime.latency import latency_feed, measure_latency, median_interval
from hap_onnx.runtime.session import make_session
from tests.runtime.cases import RNG, build, matmul_model, x_of


def slow_model(n_layers: int) -> ModelProto:
    nodes, source = [], "x"
    for index in range(n_layers):
        nodes.append(helper.make_node("MatMul", [source, "w"], [f"m{index}"]))
        nodes.append(helper.make_node("Tanh", [f"m{index}"], ["y" if index == n_layers - 1 else f"t{index}"]))
        source = f"t{index}"
    return build(nodes, [x_of("N", 96)], ["y"], {"w": RNG.standard_normal((96, 96)).astype(np.float32) / 10})


def test_latency_tells_a_model_four_times_as_deep() -> None:
    shallow, deep = (make_session(slow_model(n), threads=1, providers="cpu") for n in (2, 16))
    feed = latency_feed(shallow, {"x": np.ones((3, 96))}, batch=8)
    comparison = measure_latency(shallow, deep, feed, rounds=25)
    assert comparison.is_slower
    assert 1.5 < comparison.ratio_low <= comparison.ratio <= comparison.ratio_high
    assert comparison.after_ms > comparison.before_ms > 0
    assert (comparison.n, comparison.threads, comparison.batch) == (25, 1, 8)
    assert comparison.provider == "CPUExecutionProvider"
    assert not measure_latency(deep, shallow, feed, rounds=25).is_slower


def test_latency_alternates_strictly() -> None:
    calls: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, *_: object) -> list[np.ndarray]:
            calls.append(self.name)
            return [np.zeros((1, 4))]

    base = make_session(matmul_model(), threads=1, providers="cpu")
    first, second = (replace(base, session=Recorder(name)) for name in "ab")
    original = latency._MIN_TIMING_S
    latency._MIN_TIMING_S = 0.0
    try:
        measure_latency(first, second, {"x": np.ones((1, 3))}, rounds=6)
    finally:
        latency._MIN_TIMING_S = original
    assert "".join(calls[-12:]) == "abbaabbaabba"


def test_latency_refuses_unlike_sessions() -> None:
    one, two = (make_session(matmul_model(), threads=n, providers="cpu") for n in (1, 2))
    with pytest.raises(UsageError, match="same threads"):
        measure_latency(one, two, {"x": np.ones((1, 3))})


def test_latency_feed_fits_the_batch() -> None:
    x = np.arange(6).reshape(2, 3)
    dynamic, fixed = (make_session(matmul_model(n), providers="cpu") for n in ("N", 5))
    np.testing.assert_array_equal(latency_feed(dynamic, {"x": x})["x"], x[:1])
    np.testing.assert_array_equal(latency_feed(fixed, {"x": x}, batch=2)["x"], x[[0, 1, 0, 1, 0]])


def test_median_interval_holds_at_least_its_confidence() -> None:
    """Exact: the interval misses iff fewer than ``index + 1`` of n values fall on one side of the median."""
    for n in range(6, 120):
        low, median, high = median_interval(np.arange(n))
        index = int(low)
        missed = 2 * sum(comb(n, k) for k in range(index + 1)) / 2**n
        assert missed <= 0.05
        tighter = 2 * sum(comb(n, k) for k in range(index + 2)) / 2**n
        assert tighter > 0.05
        assert (median, high) == ((n - 1) / 2, n - 1 - index)
    assert median_interval(np.array([2.0, 1.0])) == (1.0, 1.5, 2.0)

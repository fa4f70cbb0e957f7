"""Which implants are worth their time, by the times of layers and of what would stand in for them."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from planning_cases import Job, make_job
from topologies import Net

from hap_onnx.implants.speed import COMPARED_SHARES, faster_kinds
from hap_onnx.model.measure import node_macs
from hap_onnx.planning.times import ImplantTimes, NodeTimes


def make_net() -> Job:
    net = Net()
    x = net.relu(net.conv("x", 3, 32, out="a"))
    for name in "bc":
        x = net.relu(net.conv(x, 32, 32, out=name))
    net.conv(x, 32, 4, k=1, out="y")
    return make_job(net.model("y"), n_samples=20)


def times_of(job: Job, *, per_mac: float = 1000.0, overhead: float = 0.0) -> NodeTimes:
    """Let each layer take so many picoseconds per multiply-accumulate, and each part of an implant more."""
    dense, implants = {}, {}
    for name, kinds in job.kinds.items():
        node = job.nodes[name]
        n_out, n_in, *kernel = node.inputs[1].shape
        per_tap = node_macs(node, job.prepared.shapes) / (n_in * n_out * prod(kernel))
        dense[name] = np.array([round(1000 * per_tap * prod(kernel)), 0, 0, 0])
        for form in job.losses.implants[name].layer.forms:
            if form.kind in kinds:
                first, second = (
                    np.array([per_mac * per_tap * taps, 0.0, 0.0, overhead]) for taps in form.taps
                )
                implants[name, form.kind] = ImplantTimes(first, second)
    return NodeTimes(dense, {}, implants)


def test_implants_as_fast_as_their_macs_are_kept_at_the_largest_share() -> None:
    one = make_net()
    found = faster_kinds(one.prepared, one.kinds, times_of(one))
    assert set(found) == set(one.kinds)
    for name, shares in found.items():
        assert set(shares) == set(one.kinds[name])
        assert all(0.5 <= share < 1 for share in shares.values())
    for share in (*found["make_b"].values(), *found["make_c"].values()):  # ranks are fine enough here
        assert share == pytest.approx(COMPARED_SHARES[0], abs=0.09)


@pytest.mark.parametrize("kind", ["lowrank", "pointwise"])
def test_half_of_what_macs_save_must_be_saved_in_time(kind: str) -> None:
    """At the share s of the multiply-accumulates, s of the time would be ideal, and (1 + s) / 2 is enough."""
    one, just = make_net(), 1e-3
    offered = {"make_b": (kind,)}

    def shares(per_mac: float) -> dict[str, float]:
        return faster_kinds(one.prepared, offered, times_of(one, per_mac=per_mac))["make_b"]

    # An implant at the share s may be (1 + s) / 2s as slow per multiply-accumulate, and smaller ones slower.
    large = shares(1000)[kind]
    enough = 1000 * (1 + large) / 2 / large
    assert shares(enough * (1 - just))[kind] == large
    small = shares(enough * (1 + just))[kind]
    assert small == pytest.approx(COMPARED_SHARES[1], abs=0.09)
    # What is kept is at least the share asked for, and what was compared may be a little below.
    assert shares(1000 * (1 + 0.41) / 2 / 0.41) == {}


def test_overhead_that_small_layers_cannot_bear_leaves_them_as_they_are() -> None:
    one = make_net()
    found = faster_kinds(one.prepared, one.kinds, times_of(one, overhead=1e12))
    assert found == {name: {} for name in one.kinds}


def test_only_what_is_offered_and_timed_is_considered() -> None:
    one = make_net()
    times = times_of(one)
    offered = {"make_b": ("lowrank", "spatial"), "make_c": ("pointwise",)}
    found = faster_kinds(one.prepared, offered, times)
    assert {name: set(kinds) for name, kinds in found.items()} == {
        name: set(kinds) for name, kinds in offered.items()
    }
    lacking = NodeTimes(times.dense, {}, {key: t for key, t in times.implants.items() if key[1] != "spatial"})
    assert set(faster_kinds(one.prepared, offered, lacking)["make_b"]) == {"lowrank"}

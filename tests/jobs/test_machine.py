"""What a job runs on and with."""

from __future__ import annotations

import pytest

from hap_onnx.jobs import machine
from hap_onnx.jobs.machine import Stopwatch


def test_stages_add_up_where_one_is_within_another(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 13.0, 20.0, 21.0, 26.0, 40.0, 41.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(now))
    clock = Stopwatch()
    with clock.stage("compress"):  # 0 to 26
        with clock.stage("latency"):  # 10 to 13
            pass
        with clock.stage("latency"):  # 20 to 21
            pass
    with clock.stage("latency"):  # 40 to 41
        pass
    assert clock.seconds == {"compress": 22.0, "latency": 5.0}


def test_the_seconds_so_far_are_what_the_stages_have_at_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now)
    clock = Stopwatch()
    with clock.stage("write"):
        now = 4.0
        with clock.stage("latency"):
            now = 5.0
            with clock.stage("write"):
                now = 7.0
                inside = clock.so_far()
                assert clock.seconds == {}
    assert inside == clock.seconds == clock.so_far() == {"write": 6.0, "latency": 1.0}

"""Several processes do what one does: the same sums, the same plan, one voice, and one end."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import cache
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forks import Ended
from planning_cases import Job, make_job
from sample_models import fix_speed, images, residual_cnn, with_labels, write
from teams import free_port, run_commands, run_team, start_team, wait_for_team

from hap_onnx.data.calibration import Subset
from hap_onnx.distributed import ALONE, Team, join_team
from hap_onnx.errors import BudgetError, CalibrationError, ModelError, TeamError, UsageError
from hap_onnx.jobs import rounds
from hap_onnx.jobs.carry_out import cut_model, refit_layers
from hap_onnx.place import Place, find_place
from hap_onnx.planning.choose import Choice, choose
from hap_onnx.planning.decide import LossModel, build_loss_model
from hap_onnx.planning.plan import load_plan
from hap_onnx.sensitivity import estimate as estimates
from hap_onnx.sensitivity.curvature import collect_curvature
from hap_onnx.sensitivity.estimate import Options, estimate

CLOSE = 1e-5
"""How near the sums of several processes are to those of one, relative to the largest of a kind."""
N_SAMPLES, BATCH_SIZE = 40, 16
"""Two whole batches and a half: of two processes one has two of them, of four one has none."""


@cache
def job() -> Job:
    return make_job(residual_cnn(width=8), n_samples=N_SAMPLES)


def assert_close(found: Any, expected: Any) -> None:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0.0) <= CLOSE * np.abs(expected).max(initial=0.0)


# --- what a team does ---


def test_a_single_process_is_a_team_of_its_own() -> None:
    assert (ALONE.leads, ALONE.size) == (True, 1)
    tensor = torch.tensor([1.5, 2.5])
    assert ALONE.sum_(tensor) is tensor
    assert ALONE.sum_all({"a": tensor})["a"] is tensor
    assert ALONE.gather(3) == [3]
    assert ALONE.map(str, [1, 2]) == ["1", "2"]
    assert ALONE.lead(lambda: 4) == ALONE.finish(lambda: 4) == ALONE.agree(4) == 4
    assert ALONE.part_of(5) == slice(0, 5)
    with join_team(1) as team:
        assert team is ALONE


def test_sums_and_decisions_are_the_same_everywhere() -> None:
    def work(team: Team) -> Any:
        own = {"all": torch.full((2,), 1.0 + team.rank, dtype=torch.float64)}
        if team.rank == 1:
            own["some"] = torch.ones(3, dtype=torch.float64)
        sums = {name: tensor.tolist() for name, tensor in team.sum_all(own).items()}
        view = team.lead(lambda: MappingProxyType({"leader": team.rank}))
        return (
            sums,
            team.total(0.5),
            team.gather("x" * team.rank),
            team.map(lambda item: (item, team.rank), range(5)),
            dict(view),
            team.agree(team.rank),
        )

    expected = (
        {"all": [6.0, 6.0], "some": [1.0] * 3},
        1.5,
        ["", "x", "xx"],
        [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1)],
        {"leader": 0},
        0,
    )
    assert run_team(3, work) == [expected] * 3


def test_each_sample_is_in_one_share() -> None:
    subset = job().subset

    def work(team: Team) -> Any:
        dealt = [(n, batch and len(batch.inputs["x"])) for n, batch in team.deal(subset, BATCH_SIZE)]
        return dealt, [batch.inputs["x"].tobytes() for batch in team.batches(subset, BATCH_SIZE)]

    found = run_team(2, work)
    assert found[0][0] == [(16, 16), (16, None), (8, 8)]
    assert found[1][0] == [(16, None), (16, 16), (8, None)]
    whole = [batch.inputs["x"].tobytes() for batch in subset.batches(BATCH_SIZE)]
    assert [found[0][1][0], found[1][1][0], found[0][1][1]] == whole
    for n in (0, 1, 5, 32):
        parts = [list(range(n))[Team(rank, 4).part_of(n)] for rank in range(4)]
        assert [item for part in parts for item in part] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_the_first_raises_all_raise() -> None:
    def work(team: Team) -> str:
        def fail() -> None:
            error = BudgetError("no model is that small")
            error.report = MappingProxyType({"macs": 0.5})  # type: ignore[assignment]  # as reports may hold
            raise error

        try:
            team.lead(fail)
        except BudgetError as error:
            return str(error)
        return "nothing"

    assert run_team(2, work) == ["no model is that small"] * 2


def test_variables_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_place() == Place()
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert find_place() == Place(1, 2)
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "many"), ("MASTER_PORT", "70000")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(UsageError, match=name):
                find_place()


# --- statistics ---


def curvature_of(team: Team, part: Subset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    one, twin = job().prepared, job().prepared.twin
    layers = list(job().losses.implants)
    found = collect_curvature(
        one.graph, twin, one.coupling, part,
        scales=job().scales, batch_size=BATCH_SIZE, seed=3, layers=layers, team=team,
    )  # fmt: skip
    return {name: (layer.inputs.numpy(), layer.gradients.numpy()) for name, layer in found.items()}


@pytest.mark.parametrize("size", [2, 4])
def test_curvature_is_that_of_one_process(size: int) -> None:
    expected = curvature_of(ALONE, job().subset)
    assert expected
    for found in run_team(size, lambda team: curvature_of(team, job().subset)):
        assert found.keys() == expected.keys()
        for name, pair in expected.items():
            for ours, whole in zip(found[name], pair, strict=True):
                assert_close(ours, whole)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("gate", "distance"),
        ("gauss-newton", "cross-entropy"),
        pytest.param("hutchinson", "distance", marks=pytest.mark.slow),
        pytest.param("hutchinson", "cross-entropy", marks=pytest.mark.slow),
        pytest.param("gauss-newton", "distance", marks=pytest.mark.slow),
        pytest.param("gate", "cross-entropy", marks=pytest.mark.slow),
    ],
)
def test_estimates_are_those_of_one_process(name: str, loss: Any) -> None:
    one = job()
    subset = one.subset
    labels = np.arange(N_SAMPLES) % 5
    if name == "hutchinson" and loss == "cross-entropy":
        subset.dataset.labels = labels

    def work(team: Team) -> tuple[np.ndarray, np.ndarray]:
        options = Options(
            graph=one.prepared.graph, loss=loss, scales=one.scales, n_probes=8, n_directions=2,
            batch_size=BATCH_SIZE, team=team,
        )  # fmt: skip
        found = estimate(name, one.prepared.twin, one.prepared.coupling, subset, options=options)
        return found.mean, found.std_error

    try:
        expected = work(ALONE)
        for size in (2, 4):
            for found in run_team(size, work):
                for ours, whole in zip(found, expected, strict=True):
                    assert_close(ours, whole)
    finally:
        subset.dataset.labels = None


def test_all_end_an_estimate_after_the_same_probe() -> None:
    """Machines that round in their own ways may see the last channel settle at other probes."""
    one = job()

    def work(team: Team) -> int:
        estimates.misplaced_share = lambda *_: float(team.rank == 0)  # type: ignore[assignment]
        options = Options(
            graph=one.prepared.graph, loss="distance", scales=one.scales, n_probes=16, batch_size=BATCH_SIZE,
            team=team,
        )  # fmt: skip
        found = estimate("hutchinson", one.prepared.twin, one.prepared.coupling, one.subset, options=options)
        return found.n_probes

    assert run_team(2, work) == [16, 16]


def losses_of(team: Team) -> LossModel:
    one = job()
    return build_loss_model(
        one.prepared, one.subset, sensitivity="obs", scales=one.scales, batch_size=BATCH_SIZE, n_probes=4,
        seed=0, team=team,
    )  # fmt: skip


@pytest.mark.slow
def test_rankings_curves_and_plan_are_those_of_one_process() -> None:
    one = job()

    def work(team: Team) -> Any:
        losses = losses_of(team)
        choice = choose(one.prepared, losses, one.budgets(macs=0.5), align=1, kinds=one.kinds)
        orders = [ranking.order.tolist() for ranking in losses.rankings]
        measured = [*(curve.loss for curve in losses.curves), *(x.ratios for x in losses.implants.values())]
        return orders, measured, plan_of(choice)

    expected = work(ALONE)
    for orders, measured, plan in run_team(2, work):
        assert orders == expected[0]
        assert plan == expected[2]
        for ours, whole in zip(measured, expected[1], strict=True):
            assert_close(ours, whole)


def plan_of(choice: Choice) -> Any:
    return (
        [(decision.group, decision.keep.tolist()) for decision in choice.decisions],
        [(one.node, one.kind, one.rank) for one in choice.replacements],
    )


def test_kept_losses_are_used_by_all_or_none(tmp_path: Path) -> None:
    """Between two looks at a file another job may replace it."""
    (tmp_path / "losses").touch()

    def work(team: Team) -> bool:
        def load(*_: Any) -> str:
            if team.rank == 1:
                raise ModelError("it is gone")
            return "losses"

        rounds.load_losses = load  # type: ignore[assignment]
        shop: Any = SimpleNamespace(team=team, note=print)
        return rounds.Round(shop, job().prepared)._kept_losses(tmp_path / "losses") is None

    assert run_team(2, work) == [True, True]


# --- refit ---


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("n_samples", [N_SAMPLES, 20], ids=["more rows than features", "one batch or two"])
def test_refit_is_that_of_one_process(size: int, n_samples: int) -> None:
    """Of 20 samples there are two batches: some processes have nothing to count."""
    one = job()
    choice = choose(one.prepared, one.losses, one.budgets(macs=0.3), align=1, kinds=one.kinds)
    assert any(len(decision.drop) for decision in choice.decisions)
    assert {one.kind for one in choice.replacements} == {"spatial", "pointwise"}
    cut = cut_model(one.prepared, choice, one.losses.implants)

    def work(team: Team) -> dict[str, np.ndarray]:
        found = refit_layers(cut, one.subset.take(n_samples), batch_size=BATCH_SIZE, seed=0, team=team)
        implants = {
            f"{name}.{index}": array
            for name, (_, arrays) in found.implants.items()
            for index, array in enumerate(arrays)
        }
        return {**found.weights, **implants}  # type: ignore[dict-item]

    expected = work(ALONE)
    found = run_team(size, work)
    for name, whole in expected.items():
        for ours in found:
            assert np.array_equal(ours[name], found[0][name])  # to the bit in all processes
            assert np.abs(ours[name] - whole).max() <= 1e-3 * np.abs(whole).max()  # solved in float32
    assert found[0].keys() == expected.keys()


# --- the whole command ---


WORDS = ("compress", "net.onnx", "--data", "calib.npz", "-o", "small.onnx", "--threads", 1)


def prepare_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write(folder)
    np.savez(folder / "calib.npz", **with_labels(images(120)))
    return folder


def outputs_in(folder: Path) -> set[str]:
    ours = {"net.onnx", "calib.npz", "work"}
    return {path.name for path in folder.iterdir() if not path.name.startswith(("out.", "err."))} - ours


@pytest.mark.slow
def test_two_processes_write_the_plan_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch)
    words = (*WORDS, "--keep-macs", 0.5, "--epochs", 2, "--save-plan", "plan.json", "--work-dir", "work")
    plans, qualities = [], []
    for size in (1, 2):
        folder = prepare_folder(tmp_path / str(size))
        ended = run_commands(size, folder, *words)
        assert [one.code for one in ended] == [0] * size, ended[0].err
        assert outputs_in(folder) == {"small.onnx", "plan.json", "plan.safetensors"}
        assert "parameters" in ended[0].out
        assert [one.out + one.err for one in ended[1:]] == [""] * (size - 1)
        plan = load_plan(folder / "plan.json")
        plans.append(plan_of(Choice(plan.decisions, plan.replacements)))
        qualities.append(plan.training["best_score"])
    assert plans[0] == plans[1]
    assert qualities[1] == pytest.approx(qualities[0], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--keep-macs", 0.5, "--rounds", 2, "--allow-slower"),
        ("--keep-macs", 0.5, "--then", "int8", "--allow-slower"),
        ("--keep-params", 0.5, "--preset", "paper", "--allow-slower"),
        ("--keep-macs", 0.6, "--dry-run", "--sensitivity", "hutchinson"),
        ("--max-drop", 0.3, "--method", "prune", "--allow-slower"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_two_processes_do_it_as_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...]
) -> None:
    fix_speed(monkeypatch)
    plans = []
    for size in (1, 2):
        folder = prepare_folder(tmp_path / str(size))
        ended = run_commands(size, folder, *WORDS, *words, "--save-plan", "plan.json")
        assert [one.code for one in ended] == [0] * size, ended[0].err
        assert [one.out + one.err for one in ended[1:]] == [""] * (size - 1)
        plan = load_plan(folder / "plan.json")
        plans.append([plan_of(Choice(one.decisions, one.replacements)) for one in (*plan.earlier, plan)])
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_two_processes_sweep_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch)
    found = []
    for size in (1, 2):
        folder = prepare_folder(tmp_path / str(size))
        words = (*WORDS[:4], "-o", "sweep", "--threads", 1, "--sweep", "0.8,0.5", "--allow-slower")
        ended = run_commands(size, folder, *words, "--html", "page.html")
        assert [one.code for one in ended] == [0] * size, ended[0].err
        assert [one.out + one.err for one in ended[1:]] == [""] * (size - 1)
        names = sorted(path.name for path in (folder / "sweep").iterdir() if not path.name.startswith("."))
        plans = [load_plan(folder / "sweep" / f"keep-macs-{keep}.json") for keep in ("0.80", "0.50")]
        found.append((names, [plan_of(Choice(plan.decisions, plan.replacements)) for plan in plans]))
        assert (folder / "page.html").is_file()
    assert found[0] == found[1]


def run_two(folder: Path, *words: Any, **options: Any) -> list[Ended]:
    return run_commands(2, prepare_folder(folder), *WORDS, *words, **options)


def test_a_target_that_is_missed_is_said_once(tmp_path: Path) -> None:
    ended = run_two(tmp_path, "--keep-params", 0.001, "--allow-slower")
    assert [one.code for one in ended] == [3, 3]
    assert ended[0].err.count("error: ") == 1
    assert ended[1].err + ended[1].out == ""
    assert outputs_in(tmp_path) == set()


def test_wrong_usage_is_said_once(tmp_path: Path) -> None:
    ended = run_two(tmp_path, "--keep-params", 2)
    assert [one.code for one in ended] == [2, 2]
    assert "in (0, 1]" in ended[0].err
    assert ended[1].err + ended[1].out == ""
    inspect = run_commands(2, tmp_path, "inspect", "net.onnx")
    assert [one.code for one in inspect] == [2, 2]
    assert "without torchrun" in inspect[0].err


def test_the_first_speaks_of_what_befalls_another(tmp_path: Path) -> None:
    def lose_data(rank: int) -> None:
        if rank == 1:
            from hap_onnx.data import array_data

            def fail(*args: Any) -> Any:
                raise CalibrationError("calib.npz: the file is gone")

            read = array_data.FileArray.read
            times = iter(range(8))
            array_data.FileArray.read = lambda *args: read(*args) if next(times, None) is not None else fail()  # type: ignore[method-assign]

    ended = run_two(tmp_path, "--keep-macs", 0.5, "--allow-slower", before=lose_data)
    assert [one.code for one in ended] == [1, 1]
    last = ended[0].err.splitlines()[-1]
    assert last == "hap-onnx: error: calib.npz: the file is gone (rank 1 of 2)"
    assert ended[0].err.count("error: ") == 1
    assert ended[1].err == ""
    assert outputs_in(tmp_path) == set()


@pytest.mark.slow
def test_a_page_and_an_analysis_are_made_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a report tells of sensitivities takes all processes, though only the first one writes it."""
    fix_speed(monkeypatch)
    reports = {}
    for size in (1, 2):
        folder = prepare_folder(tmp_path / str(size))
        ours = ("--report", "r.json", "--work-dir", "work")
        words = (*WORDS, "--keep-macs", 0.5, "--html", "page.html", *ours)
        analyze = ("analyze", *WORDS[1:4], "--threads", 1, *ours)
        for again, command in enumerate((words, words, analyze)):  # the second time all is in the work folder
            ended = run_commands(size, folder, *command)
            assert [one.code for one in ended] == [0] * size, ended[0].err
            assert [one.out + one.err for one in ended[1:]] == [""] * (size - 1)
            assert ("sensitivities are those of an earlier run" in ended[0].err) == bool(again)
            reports[size, again] = json.loads((folder / "r.json").read_text())
        assert outputs_in(folder) == {"small.onnx", "page.html", "r.json"}
    for again in range(3):
        (one, two) = (reports[size, again]["analysis"] for size in (1, 2))
        for kind in ("groups", "layers", "sizes"):
            assert len(one[kind]) == len(two[kind]) > 0
            for found, whole in zip(two[kind], one[kind], strict=True):
                assert_close(_numbers(found), _numbers(whole))


def _numbers(entry: Any) -> list[float]:
    """All numbers in an entry of a report, in their order."""
    if isinstance(entry, dict):
        entry = list(entry.values())
    if isinstance(entry, list):
        return [number for part in entry for number in _numbers(part)]
    return [entry] if isinstance(entry, (int, float)) else []


@pytest.mark.parametrize(
    "words", [("--keep-params", 0.001), ("--max-drop", 0.0)], ids=["a budget", "a search"]
)
def test_a_refusal_has_a_page(tmp_path: Path, words: tuple[Any, ...]) -> None:
    ended = run_two(tmp_path, *words, "--allow-slower", "--html", "page.html", "--method", "prune")
    assert [one.code for one in ended] == [3, 3]
    assert ended[0].err.count("error: ") == 1
    assert ended[1].err + ended[1].out == ""
    assert "small.onnx" not in outputs_in(tmp_path)


@pytest.mark.slow
def test_other_data_elsewhere_is_refused(tmp_path: Path) -> None:
    prepare_folder(tmp_path)
    np.savez(tmp_path / "other.npz", **with_labels(images(120, seed=9)))

    def elsewhere(rank: int) -> None:
        if rank == 1:
            os.chdir(prepare_folder(tmp_path / "elsewhere"))
            (tmp_path / "other.npz").rename("calib.npz")

    ended = run_commands(2, tmp_path, *WORDS, "--keep-macs", 0.5, before=elsewhere)
    assert [one.code for one in ended] == [1, 1]
    assert "rank 1 of 2 has another model or other data than rank 0" in ended[0].err


# --- processes that end, or do not answer ---


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_one_is_the_end_of_all(tmp_path: Path, victim: int, number: signal.Signals) -> None:
    prepare_folder(tmp_path)
    from hap_onnx.planning import decide

    measure_curves = decide.measure_curves

    def die(rank: int) -> None:
        def measure(*args: Any, **options: Any) -> Any:
            if rank == victim:
                os.kill(os.getpid(), number)
            return measure_curves(*args, **options)

        decide.measure_curves = measure

    words = (*WORDS, "--keep-macs", 0.5, "--allow-slower", "--work-dir", "work")
    start = time.monotonic()
    ended = run_commands(2, tmp_path, *words, before=die)
    assert time.monotonic() - start < 30  # the timeout is half an hour
    speaker = ended[0] if victim == 1 or number == signal.SIGTERM else ended[1]
    assert speaker.err.splitlines()[-1].startswith("hap-onnx: ")
    # Without torchrun the notes go with the first process: that it was asked to end, nobody can know.
    n_spoken = 2 if (victim, number) == (0, signal.SIGTERM) else 1
    assert sum(one.err.count("hap-onnx: ") for one in ended) == n_spoken
    assert not any("Traceback" in one.err for one in ended)
    if number == signal.SIGKILL:
        assert [one.code for one in ended] == ([-9, 1] if victim == 0 else [1, -9])
        assert f"rank {victim} " in speaker.err
        assert "nothing was written" in speaker.err
        assert "goes on from work" in speaker.err
    assert outputs_in(tmp_path) == set()
    done = run_commands(2, tmp_path, *words)
    assert [one.code for one in done] == [0, 0], done[0].err
    assert "small.onnx" in outputs_in(tmp_path)


def slowly(text: str, seconds: float) -> str:
    time.sleep(seconds)
    return text


def test_a_leader_at_work_may_take_longer_than_the_timeout() -> None:
    def work(team: Team) -> tuple[str, float]:
        made = team.lead(lambda: slowly("validated", 5))
        return made, team.total(1.0)

    assert run_team(2, work, timeout_s=2.0) == [("validated", 2.0)] * 2


def test_what_is_finished_when_another_goes_is_no_failure(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        with join_team(20) as team:
            team.total(1.0)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            print(team.finish(lambda: slowly("written", 1)))
        return 0

    ended = wait_for_team(start_team(2, work, folder=tmp_path), tmp_path)
    assert [one.code for one in ended] == [0, -signal.SIGKILL], ended[0].err
    assert ended[0].out == "written\n"


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_waited_for_so_long(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        try:
            with join_team(2.0) as team:
                if rank == 1:
                    time.sleep(30)
                team.total(1.0)
        except TeamError as error:
            print(error)
            return 1
        return 0

    started = start_team(2, work, folder=tmp_path, port=free_port())
    (first,) = (pid for pid, rank in started.items() if rank == 0)
    start = time.monotonic()
    status = os.waitpid(first, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 1
    assert time.monotonic() - start < 15
    assert "do not answer" in (tmp_path / "out.0").read_text()
    (other,) = (pid for pid, rank in started.items() if rank == 1)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)


def test_processes_that_do_not_come_are_waited_for_so_long(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        os.environ["WORLD_SIZE"] = "2"
        try:
            with join_team(0.5):
                return 0
        except TeamError as error:
            print(error)
            return 1

    (ended,) = wait_for_team(start_team(1, work, folder=tmp_path), tmp_path)
    assert ended.code == 1
    assert ended.out.startswith("not all of 2 processes have come within 0.5 s")

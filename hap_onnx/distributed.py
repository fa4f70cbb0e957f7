"""Several processes at one job, started by ``torchrun``: they share the samples, and one of them leads.

All processes walk through the same job. What is a sum over samples is shared: batches are cut as one process
would cut them and dealt out in turn, each process runs its own, and the sums are added up in float64 and are
then the same everywhere. What else decides (times, files, what a solver makes of the sums) the first process
does alone and tells the others. So nothing depends on how many there are but the order in which numbers are
added, a process without a batch adds zeros, and random numbers are drawn for all batches by everyone, in
order. Only the first process writes, prints, and talks about errors, also those of others.

A ``Team`` is passed to what shares its work; ``ALONE`` is that of a single process, for which all methods
return what they are given. It is a value and no global: a reader sees in the signature what is shared.

Whoever fails leaves a note in the store by which torch brought the processes together; a process that is gone
without one was killed. The first that is left says which.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # no stubs

from hap_onnx import errors
from hap_onnx.errors import HapOnnxError, TeamError, UsageError, is_out_of_memory
from hap_onnx.place import Place, find_place

if TYPE_CHECKING:
    from hap_onnx.data.calibration import Batch, Subset

T = TypeVar("T")
U = TypeVar("U")

_NOISE = re.compile(r"^(\[[^\]]*\]\s*)+")
"""What torch puts before its messages."""
SECONDS_FOR_NOTES = 5.0
"""How long a process that has lost others waits to learn why."""
_AT_WORK = -1
"""Sent in place of the length of a result that is not there yet."""


# ---------------------------------------------------------------- the team


@dataclass(frozen=True)
class Team:
    """The processes of one job, as one of them sees it. All must call the same methods in the same order.

    Methods raise TeamError when another process is gone, or does not answer for ``timeout_s``.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    timeout_s: float = 1800.0

    @property
    def leads(self) -> bool:
        """Whether this process is the one that decides, writes and speaks."""
        return self.rank == 0

    # --- who runs what ---

    def deal(self, subset: Subset, batch_size: int) -> Iterator[tuple[int, Batch | None]]:
        """Yield the size of each batch of a subset, and the batch if it is this process's turn: others are
        not read.
        """
        own = subset.batches(batch_size, first=self.rank, step=self.size)
        for index, start in enumerate(range(0, subset.n_samples, batch_size)):
            n_samples = min(batch_size, subset.n_samples - start)
            yield n_samples, next(own) if index % self.size == self.rank else None

    def batches(self, subset: Subset, batch_size: int) -> Iterator[Batch]:
        """Yield the batches of a subset that are this process's."""
        return subset.batches(batch_size, first=self.rank, step=self.size)

    def part_of(self, n: int) -> slice:
        """Return which of ``n`` things in a row are this process's: as many as others have, or one less."""
        ends = [(index * n) // self.size for index in (self.rank, self.rank + 1)]
        return slice(*ends)

    def map(self, function: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """Return the results of a function for all items, each computed by one of the processes."""
        if self.size == 1:
            return [function(item) for item in items]
        own = [function(item) for item in items[self.rank :: self.size]]
        found = self.gather(own)
        return [found[index % self.size][index // self.size] for index in range(len(items))]

    # --- what is shared ---

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place; returns it."""
        if self.size > 1:
            with _talking():
                dist.all_reduce(tensor)
        return tensor

    def total(self, number: float) -> float:
        """Add up a number over all processes."""
        return number if self.size == 1 else float(self.sum_(torch.tensor(number, dtype=torch.float64)))

    def sum_all(self, sums: dict[str, Tensor], *, device: torch.device | None = None) -> dict[str, Tensor]:
        """Add up float64 tensors by name, in place; a process that lacks a name has zeros there."""
        if self.size == 1:
            return sums
        known = {
            name: shape
            for shapes in self.gather({name: tuple(tensor.shape) for name, tensor in sums.items()})
            for name, shape in shapes.items()
        }
        return {
            name: self.sum_(
                sums[name] if name in sums else torch.zeros(shape, dtype=torch.float64, device=device)
            )
            for name, shape in known.items()
        }

    def gather(self, value: T) -> list[T]:
        """Return what each process gives, by rank."""
        if self.size == 1:
            return [value]
        content = _to_bytes(value)
        sizes = self._sizes(len(content))
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(content)] = content
        found = [torch.empty_like(padded) for _ in sizes]
        with _talking():
            dist.all_gather(found, padded)
        return [_from_bytes(one[:size]) for one, size in zip(found, sizes, strict=True)]

    def _sizes(self, own: int) -> list[int]:
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = own
        with _talking():
            dist.all_reduce(sizes)
        return sizes.tolist()

    def lead(self, make: Callable[[], T]) -> T:
        """Return to all what ``make`` gives to the first process, which alone calls it; also its errors."""
        if self.size == 1:
            return make()
        if not self.leads:
            is_error, found = self._receive()
            if is_error:
                raise found
            return found
        try:
            with self._signs_of_life():
                made = make()
        except Exception as error:
            with suppress(TeamError):  # what went wrong first is what counts
                self._send((True, _portable(error)))
            raise
        self._send((False, made))
        return made

    def finish(self, make: Callable[[], T]) -> T:
        """As ``lead``, for the last step of a job: what is done is done, also if others are gone by now."""
        made: list[T] = []

        def keep() -> T:
            made.append(make())
            return made[0]

        try:
            return self.lead(keep)
        except TeamError:
            if not made:
                raise
            return made[0]

    def agree(self, value: T) -> T:
        """Return to all what the first process has found: machines round in their own ways."""
        return self.lead(lambda: value)

    @contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        """Tell the others, who wait for what this process makes, that it is at work: it may take hours."""
        over = threading.Event()

        def give() -> None:
            with suppress(RuntimeError):  # who is gone is noticed when the result is sent
                while not over.wait(self.timeout_s / 4):
                    dist.broadcast(torch.tensor(_AT_WORK), src=0)

        thread = threading.Thread(target=give, daemon=True)
        thread.start()
        try:
            yield
        except Exception:
            over.set()
            thread.join()
            raise
        finally:  # a signal does not wait for the others
            over.set()
        thread.join()

    def _send(self, value: Any) -> None:
        content = _to_bytes(value)
        with _talking():
            dist.broadcast(torch.tensor(len(content)), src=0)
            dist.broadcast(content, src=0)

    def _receive(self) -> Any:
        length = torch.tensor(_AT_WORK)
        with _talking():
            while int(length) == _AT_WORK:
                dist.broadcast(length, src=0)
            content = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(content, src=0)
        return _from_bytes(content)


ALONE = Team()


class _Pickler(pickle.Pickler):
    dispatch_table = {  # noqa: RUF012  (where pickle looks for it)
        **copyreg.dispatch_table,
        MappingProxyType: lambda view: (_as_view, (dict(view),)),
        Tensor: lambda x: (_on_own_device, (x.cpu(),)) if x.is_cuda else x.__reduce_ex__(5),
    }


def _as_view(entries: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(entries)  # pickle does not find the type itself


def _on_own_device(tensor: Tensor) -> Tensor:
    return tensor.cuda()  # that of this process: set when it joined


def _to_bytes(value: Any) -> Tensor:
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return torch.frombuffer(bytearray(stream.getbuffer()), dtype=torch.uint8)


def _from_bytes(content: Tensor) -> Any:
    return pickle.loads(content.numpy().data)


def _portable(error: Exception) -> Exception:
    """Return an error that another process can raise: itself, or what it says."""
    try:
        _from_bytes(_to_bytes(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise TeamError(
            f"the other processes of the team do not answer any more ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return _NOISE.sub("", (str(error).strip().splitlines() or [type(error).__name__])[0]).split(". ")[0][:200]


# ---------------------------------------------------------------- coming together, and falling apart


@contextmanager
def join_team(timeout_s: float) -> Iterator[Team]:
    """Yield the team of all processes that were started together; ``ALONE`` for a single one.

    Inside, a failure of any process ends all: this one raises what the first one to fail said, TeamError if
    it said nothing.

    Args:
        timeout_s: how long a process waits for the others before it gives up.

    Raises TeamError if the others cannot be found.
    """
    place = find_place()
    if place.size == 1:
        yield ALONE
        return
    if dist.is_initialized():
        raise UsageError(
            "torch.distributed is in use already: call hap-onnx before init_process_group, or after "
            "destroy_process_group"
        )
    timeout = timedelta(seconds=timeout_s)
    try:
        notes = _Notes(_open_store(place, timeout), place)
        notes.arrive(timeout)
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend,
            store=PrefixStore(f"{notes.prefix}/group", notes.store),
            rank=place.rank,
            world_size=place.size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise TeamError(
            f"process {place.rank} of {place.size} cannot reach the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {_first_line(error)}"
        ) from error
    try:
        yield Team(place.rank, place.size, place.local_rank, timeout_s)
        notes.leave({"kind": "done"})
    except BaseException as error:
        cause = notes.explain(error)
        if cause is error:
            raise
        raise cause from error
    dist.destroy_process_group()


def _open_store(place: Place, timeout: timedelta) -> TCPStore:
    """Connect to the store of ``torchrun``, or make one at the first process where there is none."""
    is_there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        place.size,
        is_master=place.rank == 0 and not is_there,
        timeout=timeout,
        wait_for_workers=False,
    )


class _Notes:
    """What each process leaves for the others: where it runs, and why it went."""

    def __init__(self, store: Store, place: Place) -> None:
        self.store, self._place = store, place
        self.prefix = f"hap-onnx/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._where: dict[int, tuple[str, int]] = {}  # host and process of the others

    def arrive(self, timeout: timedelta) -> None:
        """Say where this process is, and wait until all others have; raises TeamError if they do not come."""
        self._set("where", (socket.gethostname(), os.getpid()))
        seconds = timeout.total_seconds()
        end = time.monotonic() + seconds
        # Torch could wait for them, but would let signals wait, too.
        while not self.store.check([self._key("where", rank) for rank in range(self._place.size)]):
            if time.monotonic() > end:
                raise TeamError(
                    f"not all of {self._place.size} processes have come within {seconds:g} s; "
                    "start all of them, or give a longer --dist-timeout"
                )
            time.sleep(0.05)
        self._where = {rank: self._get("where", rank) for rank in self._others()}

    def leave(self, note: Mapping[str, Any]) -> None:
        with suppress(RuntimeError):  # the store may be gone as well
            self._set("note", {**note, "time": time.time()})

    def explain(self, error: BaseException) -> BaseException:
        """Return what ended the job, given how it showed here; leaves this process's note."""
        rank = self._place.rank
        if isinstance(error, Exception) and not isinstance(error, TeamError):
            self.leave({"kind": "error", "type": type(error).__name__, "text": str(error)})
            return error
        with _deaf():
            # Who sends a signal because another process has failed does it when that has ended.
            found, dead = self._ask(SECONDS_FOR_NOTES if isinstance(error, TeamError) else 0.0)
            self.leave({"kind": "stopped"})
        failed = sorted((note["time"], other) for other, note in found.items() if note["kind"] == "error")
        speaker = next(other for other in range(self._place.size) if other == rank or other not in dead)
        if failed:
            return _as_error(found[failed[0][1]], failed[0][1], self._place.size)
        if dead:
            names = " and ".join(f"{other} (process {pid} on {host})" for other, (host, pid) in dead.items())
            return TeamError(
                f"rank {names} of {self._place.size} ended in the middle of the work, killed from outside or "
                "for want of memory, and so all have to",
                speaker=speaker,
            )
        return error

    def _others(self) -> list[int]:
        return [rank for rank in range(self._place.size) if rank != self._place.rank]

    def _ask(self, seconds: float) -> tuple[dict[int, Any], dict[int, tuple[str, int]]]:
        """Return the notes of others, and who has gone without one, as soon as that says why."""
        end, others = time.monotonic() + seconds, self._others()
        has_store = True
        while True:
            gone = {rank for rank, place in self._where.items() if _is_gone(*place)}
            notes: dict[int, Any] = {}  # read after that: a note comes before the end of its process
            try:
                there = [rank for rank in others if has_store and self.store.check([self._key("note", rank)])]
                notes = {rank: self._get("note", rank) for rank in there}
            except RuntimeError:  # it went with the first process
                has_store = False
            dead = {rank: self._where[rank] for rank in sorted(gone - set(notes))}
            has_failed = any(note["kind"] == "error" for note in notes.values())
            if dead or has_failed or len(notes) == len(others) or time.monotonic() > end:
                return notes, dead
            time.sleep(0.05)

    def _key(self, what: str, rank: int) -> str:
        return f"{self.prefix}/{what}/{rank}"

    def _set(self, what: str, value: Any) -> None:
        self.store.set(self._key(what, self._place.rank), pickle.dumps(value).hex())

    def _get(self, what: str, rank: int) -> Any:
        return pickle.loads(bytes.fromhex(self.store.get(self._key(what, rank)).decode()))


@contextmanager
def _deaf() -> Iterator[None]:
    """Ignore SIGTERM meanwhile: whoever started us sends it when another process has failed."""
    try:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_gone(host: str, pid: int) -> bool:
    """Tell whether a process has ended; not known of other machines."""
    if host != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except OSError:  # another user's, or a system without /proc
        return False


def _as_error(note: Mapping[str, Any], rank: int, size: int) -> Exception:
    """Return what another process has raised, as far as it can be told."""
    where = f"rank {rank} of {size}"
    if note["type"] == "MemoryError":
        return MemoryError(f"at {where}")
    kind = getattr(errors, note["type"], None)
    if isinstance(kind, type) and issubclass(kind, HapOnnxError):
        return kind(f"{note['text']} ({where})")
    return HapOnnxError(f"{where} failed: {note['type']}: {note['text']}")

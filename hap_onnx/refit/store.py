"""Activations by name and batch, in memory as far as it goes, else on disk."""

from __future__ import annotations

import logging
import mmap
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from hap_onnx.errors import CalibrationError

_log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Whose tensor it is (one of the three below), and its name."""
ORIGINAL, COMPRESSED, ROWS = "original", "compressed", "rows"


RESIDENT_BYTES = 1 << 26
"""So much of what lies on disk may be mapped into memory at once, beside what is at work."""


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Take the disk space of a file that will be mapped: a disk that is full then would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
    else:
        os.truncate(descriptor, n_bytes)


class Store:
    """Lists of per-batch tensors by key; what exceeds the limit lies in memory-mapped files.

    Memory is counted by storage, so views cost nothing. A storage goes to disk as it is, strides and all:
    what is computed from it does not depend on where it lies. What was read of it leaves the process's memory
    again (not the system's cache, while there is room), so that this does not grow with the samples.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._lists: dict[Key, list[Tensor]] = {}
        self._devices: dict[Key, torch.device] = {}
        self._users: dict[int, int] = {}  # by address of the storage
        self._sizes: dict[int, int] = {}  # of storages in memory
        self._files: dict[int, tuple[Path, mmap.mmap]] = {}
        self._n_touched = 0  # bytes that may be mapped
        self.n_bytes = 0
        self.n_files = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._lists

    def append(self, key: Key, tensor: Tensor) -> None:
        """Add the next batch."""
        if isinstance(tensor, Tensor):
            self._devices[key] = tensor.device
            tensor = self._hold(tensor)
        self._lists.setdefault(key, []).append(tensor)

    def get(self, key: Key, batch: int) -> Tensor:
        tensor = self._lists[key][batch]
        if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self._files:
            self._touch(tensor.untyped_storage().nbytes())
        # What does not fit on a device lies on the host; ONNX sequences are lists.
        return tensor.to(self._devices[key]) if isinstance(tensor, Tensor) else tensor

    def drop(self, key: Key) -> None:
        """Free all batches, if there are any."""
        for tensor in self._lists.pop(key, []):
            if isinstance(tensor, Tensor):
                self._let_go(tensor)

    def close(self) -> None:
        for key in list(self._lists):
            self.drop(key)

    def _hold(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._users and size and self.n_bytes + size > self._limit:
            tensor = self._spill(tensor)
            address = tensor.untyped_storage().data_ptr()
        elif address not in self._users:
            self._sizes[address] = size
            self.n_bytes += size
        self._users[address] = self._users.get(address, 0) + 1
        return tensor

    def _let_go(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        self._users[address] -= 1
        if self._users[address]:
            return
        del self._users[address]
        self.n_bytes -= self._sizes.pop(address, 0)
        if address in self._files:
            path, _ = self._files.pop(address)
            try:
                path.unlink()
            except OSError:  # some systems keep mapped files; the folder goes at the end
                _log.debug("cannot remove %s yet", path)

    def _touch(self, n_bytes: int) -> None:
        """Count what is about to be read or written, and let go of what was: it is in the files."""
        self._n_touched += n_bytes
        if self._n_touched > RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            for _, file in self._files.values():
                file.madvise(mmap.MADV_DONTNEED)
            self._n_touched = n_bytes

    def _spill(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        free = shutil.disk_usage(self._folder).free
        if free < storage.nbytes() + (64 << 20):
            raise CalibrationError(
                f"the refit needs more disk space for activations than is left in {self._folder.parent} "
                f"({free >> 20} MB); give --work-dir on a larger disk, or fewer --max-samples"
            )
        path = self._folder / f"{self.n_files}.bin"
        self.n_files += 1
        try:
            with path.open("wb+") as stream:
                _reserve(stream.fileno(), storage.nbytes())
                file = mmap.mmap(stream.fileno(), storage.nbytes())
        except OSError as error:
            raise CalibrationError(
                f"activations for the refit cannot be written to {self._folder.parent} "
                f"({error.strerror or error}); give --work-dir on a larger disk, or fewer --max-samples"
            ) from error
        self._touch(storage.nbytes())
        copy = torch.frombuffer(file, dtype=torch.uint8)
        copy.copy_(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
        mapped = copy.untyped_storage()
        self._files[mapped.data_ptr()] = path, file
        whole = torch.empty(0, dtype=tensor.dtype)
        return whole.set_(mapped, tensor.storage_offset(), tensor.size(), tensor.stride())

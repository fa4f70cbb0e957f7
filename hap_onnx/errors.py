"""Everything that can go wrong, as one tree::

    HapOnnxError                     exit code 1: the model or the data cannot be processed
    ├── ModelError                   the input is not a model that can be loaded, run or compressed
    ├── CalibrationError             the data does not fit the model, or is damaged or empty
    ├── SurgeryError                 a result is not what its plan says (a bug in hap-onnx: please report)
    ├── ValidationError              the result does not load or run in onnxruntime (a bug, too), has numbers
    │                                that are none, or cannot be written
    ├── TeamError                    one of several processes that share the work has ended or does not answer
    ├── UsageError                   exit code 2: the request itself makes no sense
    └── TargetError                  exit code 3: nothing is written
        ├── BudgetError              the budget cannot be reached
        └── GateError                the quality or the speed gate is not met

Each message is one sentence that says what is wrong, where, what was expected and what to do. Memory that
does not suffice is a MemoryError, whoever noticed it: no stage may take it for a property of the model.
"""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hap_onnx.report import CompressReport, SweepReport


class HapOnnxError(Exception):
    """Base of all errors that hap-onnx raises on purpose; ``exit_code`` is the command line's."""

    exit_code = 1


class ModelError(HapOnnxError):
    """The model (or a plan) is missing, damaged, unsafe, or cannot be run or compressed."""


class CalibrationError(HapOnnxError):
    """The data does not fit the model, or is damaged or empty."""


class SurgeryError(HapOnnxError):
    """The result is not what its plan says: a bug in hap-onnx, please report it."""


class ValidationError(HapOnnxError):
    """The result does not load or run in onnxruntime, has numbers that are none, or cannot be written."""


class TeamError(HapOnnxError):
    """One of the processes that share the work has ended, or does not answer.

    ``speaker`` is the rank of the one that says so: the first that is left.
    """

    def __init__(self, message: str, *, speaker: int = 0) -> None:
        super().__init__(message)
        self.speaker = speaker


class UsageError(HapOnnxError, ValueError):
    """The request itself makes no sense; it is a ``ValueError``, too."""

    exit_code = 2


class TargetError(HapOnnxError):
    """A target is not met; nothing is written.

    ``report`` may hold the `CompressReport` of the refused model, or the `SweepReport` of a sweep of which no
    model is kept, so that the numbers can be shown.
    """

    exit_code = 3
    report: CompressReport | SweepReport | None = None


class BudgetError(TargetError):
    """The budget cannot be reached; ``report`` may hold the numbers."""


class GateError(TargetError):
    """The quality or the speed gate is not met; ``report`` holds the numbers."""


_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|out of memory|bad_?alloc|[Ff]ailed to allocate|[Cc]annot allocate memory"
    r"|can't allocate memory|can't start new thread|[Uu]nable to allocate|not enough memory"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory did not suffice; torch and others have their own types."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, Exception) and _NO_MEMORY.search(str(error)) is not None


def refuse_out_of_memory(error: Exception, where: str) -> None:
    """Raise MemoryError if an error that was met at ``where`` means that memory did not suffice."""
    if is_out_of_memory(error):
        raise MemoryError(f"at {where}") from error

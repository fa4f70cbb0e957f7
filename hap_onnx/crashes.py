"""What a crash inside onnxruntime or another native library comes to: one sentence and exit code 1.

A model can be made so that onnxruntime divides by zero or reads where nothing is, already while it loads the
model. The system would end the process with a signal, without a word. Here the signal is caught where it
arises, and nothing else runs any more.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any

_SIGNALS = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT")
_handlers: list[Any] = []  # for as long as the process lives, or C would call what is gone


def speak_of_crashes(program: str) -> None:
    """Let this process end with a sentence on stderr and exit code 1 when native code crashes.

    A second crash, inside the handler, ends the process as ever. Systems without such signals are left alone.
    """
    if os.name != "posix":
        return
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    names = {int(getattr(signal, name)): name for name in _SIGNALS}

    def handle(number: int) -> None:
        text = (
            f"{program}: error: a library crashed on this model or data ({names.get(number, number)}), most "
            "likely onnxruntime; they are damaged or malicious, or it has a bug: export the model again\n"
        )
        os.write(2, text.encode())
        os._exit(1)

    handler = handler_type(handle)
    _handlers.append(handler)
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes = [ctypes.c_int, handler_type]
    set_handler.restype = ctypes.c_void_p
    for number in names:
        set_handler(number, handler)

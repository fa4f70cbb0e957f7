"""Whether a model may be written: the checker, the runtime and its warnings, finite outputs."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from hap_onnx.errors import ModelError, ValidationError
from hap_onnx.model.protos import MAX_PROTO_BYTES, count_bytes
from hap_onnx.model.weights import AnyModel, LargeModel, split_model, with_placeholders
from hap_onnx.runtime.session import Model, load


def check_finite(outputs: Mapping[str, np.ndarray], *, label: str) -> None:
    """Raise ValidationError if an output has NaN or infinite numbers."""
    for name, array in outputs.items():
        if array.dtype.kind not in "fc":
            continue
        bad = ~np.isfinite(array)
        if bad.any():
            n_samples = int(bad.reshape(len(array), -1).any(axis=1).sum()) if array.ndim else 1
            raise ValidationError(
                f"output {name!r} of {label} has {int(bad.sum())} NaN or infinite numbers (in {n_samples} "
                "samples); check the data's preprocessing and the model's number range"
            )


def check_model(model: AnyModel | Path, *, reference: AnyModel | Path | None = None) -> str | None:
    """Raise ValidationError unless a model is sound; return a remark for the user, if there is one.

    It must pass onnx.checker with full check (which infers all shapes strictly) and load in onnxruntime on
    the CPU without kinds of warnings that ``reference``, the model it came from, does not give. What
    onnx.checker already says about the reference is not held against it but returned.
    """
    complaint = _checker_complaint(model)
    if complaint is not None:
        if reference is None or _checker_complaint(reference) is None:
            raise ValidationError(f"the written model does not pass onnx.checker: {complaint}")
        complaint = f"the input model does not pass onnx.checker, and neither does the result: {complaint}"
    try:
        warnings = _load_warnings(model)
    except ModelError as error:
        raise ValidationError(f"the written model is not usable: {error}") from error
    if warnings:
        known = _load_warnings(reference) if reference is not None else {}
        for place, text in warnings.items():
            if place not in known:
                raise ValidationError(f"onnxruntime loads the written model with a new warning: {text}")
    return complaint


def _checker_complaint(model: AnyModel | Path) -> str | None:
    try:
        if isinstance(model, ModelProto) and count_bytes(model) > MAX_PROTO_BYTES:
            model = split_model(model)
        if isinstance(model, LargeModel):  # the types and shapes of its arrays are in its message
            model = with_placeholders(model)
        onnx.checker.check_model(str(model) if isinstance(model, Path) else model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return " ".join(str(error).split())
    return None


_WARNING = re.compile(r"\[[WE]:onnxruntime:[^,]*, (?P<place>\S+ \S+)\] ?(?P<text>.*)")


def _load_warnings(model: Model) -> dict[str, str]:
    """Load a model and return onnxruntime's warnings by the place in its source that gives them.

    The place, not the text, tells one kind of warning from another: texts name tensors.
    """
    with _captured_stderr() as captured:
        load(model, ["CPUExecutionProvider"], threads=1, severity=2, label="it")
    found: dict[str, str] = {}
    for line in captured:
        match = _WARNING.search(re.sub(r"\x1b\[[\d;]*m", "", line))
        if match is not None:
            found.setdefault(match["place"], match["text"])
    return found


@contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Collect what native code writes to stderr; other lines than onnxruntime's are passed on."""
    lines: list[str] = []
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # the process has no stderr, so nothing can be lost or found there
        yield lines
        return
    with tempfile.TemporaryFile() as buffer:
        os.dup2(buffer.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            buffer.seek(0)
            for line in buffer.read().decode(errors="replace").splitlines(keepends=True):
                if ":onnxruntime:" in line:
                    lines.append(line)
                else:
                    sys.stderr.write(line)



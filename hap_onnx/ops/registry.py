"""The one registry of operators.

An operator is known by ``(domain, op_type)``. For each there are up to seven plain functions,
side by side in the module of its family:

* ``@run_op("Conv", since=1)``: the torch computation. The function is named as the operator, takes
  its inputs as positional tensors (``None`` for an omitted optional one) and its attributes as
  keyword arguments with the names and defaults of the ONNX specification. A second registration
  with a higher ``since`` is needed only where an opset changed the meaning. A function that
  declares ``n_outputs`` is told how many outputs the node has, ``readers`` by what operators they are read.
* ``@flow_op("Conv")``: how channel ids pass through (see ``hap_onnx.coupling.channels``).
* ``@edit_op("Reshape")``: how literals (sizes, bounds, indices) follow when channels are removed
  (see ``hap_onnx.surgery``); weights are sliced by their ids and need no rule.
* ``@linear_op("Conv")``: the contraction as a matrix product (see ``hap_onnx.ops.linear``).
* ``@bias_op("Conv")``: what the contraction leaves when it has nothing to read any more.
* ``@macs_op("Conv")``: multiply-accumulates of one node from its input and output shapes.
* ``@implant_op("Conv")``: the cheaper nodes that can take its place (see ``hap_onnx.ops.implant``).

``keep_constant("Relu")`` marks operators that turn one number per channel into one number per channel;
``learn_inputs("Conv", inputs=(1, 2))`` says where an operator has what training changes.

No other part of hap-onnx branches on the name of an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
Key = tuple[str, str]

_RUN: dict[Key, list[tuple[int, Callable[..., Any]]]] = {}
_FLOW: dict[Key, Callable[..., Any]] = {}
_EDIT: dict[Key, Callable[..., Any]] = {}
_LINEAR: dict[Key, Callable[..., Any]] = {}
_BIAS: dict[Key, Callable[..., Any]] = {}
_MACS: dict[Key, Callable[..., Any]] = {}
_IMPLANTS: dict[Key, Callable[..., Any]] = {}
_KEEPS_CONSTANT: set[Key] = set()
_LEARNED: dict[Key, tuple[int, ...]] = {}


def _key(op_type: str, domain: str) -> Key:
    return ("" if domain == "ai.onnx" else domain, op_type)


def run_op(op_type: str, *, since: int = 1, domain: str = "") -> Callable[[F], F]:
    """Register the torch computation of an operator from opset ``since`` on."""

    def register(function: F) -> F:
        versions = _RUN.setdefault(_key(op_type, domain), [])
        if any(version == since for version, _ in versions):
            raise ValueError(f"{op_type} since opset {since} is registered twice")
        versions.append((since, function))
        versions.sort(key=lambda entry: entry[0], reverse=True)
        return function

    return register


def _register_once(
    table: dict[Key, Callable[..., Any]], op_types: tuple[str, ...], domain: str
) -> Callable[[F], F]:
    def register(function: F) -> F:
        for op_type in op_types:
            key = _key(op_type, domain)
            if key in table:
                raise ValueError(f"{op_type} is registered twice")
            table[key] = function
        return function

    return register


def flow_op(*op_types: str, domain: str = "") -> Callable[[F], F]:
    """Register how channel ids pass through operators."""
    return _register_once(_FLOW, op_types, domain)


def edit_op(*op_types: str, domain: str = "") -> Callable[[F], F]:
    """Register how the literals of operators follow when channels are removed."""
    return _register_once(_EDIT, op_types, domain)


def linear_op(*op_types: str, domain: str = "") -> Callable[[F], F]:
    """Register the matrix form of contractions."""
    return _register_once(_LINEAR, op_types, domain)


def bias_op(*op_types: str, domain: str = "") -> Callable[[F], F]:
    """Register what contractions leave when they read nothing any more: (node, ndim) -> array or None.

    The array has as many axes as the output and can be added where the output was; its length along the
    channel axis is the output's. None: the contraction cannot be replaced by a constant.
    """
    return _register_once(_BIAS, op_types, domain)


def macs_op(*op_types: str, domain: str = "") -> Callable[[F], F]:
    """Register how multiply-accumulates of operators are counted."""
    return _register_once(_MACS, op_types, domain)


def implant_op(*op_types: str, domain: str = "") -> Callable[[F], F]:
    """Register which implants can replace contractions."""
    return _register_once(_IMPLANTS, op_types, domain)


def find_run(op_type: str, *, opset: int, domain: str = "") -> Callable[..., Any] | None:
    """Return the newest computation that is not newer than ``opset``, or None if there is none."""
    for since, function in _RUN.get(_key(op_type, domain), []):
        if since <= opset:
            return function
    return None


def find_flow(op_type: str, *, domain: str = "") -> Callable[..., Any] | None:
    """Return the flow rule of an operator, or None if it has none (its channels are then frozen)."""
    return _FLOW.get(_key(op_type, domain))


def find_edit(op_type: str, *, domain: str = "") -> Callable[..., Any] | None:
    """Return the rule for the literals of an operator, or None if it has none to edit."""
    return _EDIT.get(_key(op_type, domain))


def find_linear(op_type: str, *, domain: str = "") -> Callable[..., Any] | None:
    """Return the matrix form of a contraction, or None if the operator is none."""
    return _LINEAR.get(_key(op_type, domain))


def find_bias(op_type: str, *, domain: str = "") -> Callable[..., Any] | None:
    """Return what a contraction leaves when it reads nothing any more, or None if it has no such rule."""
    return _BIAS.get(_key(op_type, domain))


def find_macs(op_type: str, *, domain: str = "") -> Callable[..., Any] | None:
    """Return the counting rule of an operator, or None if its multiply-accumulates count as zero."""
    return _MACS.get(_key(op_type, domain))


def find_implants(op_type: str, *, domain: str = "") -> Callable[..., Any] | None:
    """Return the implants of a contraction, or None if nothing can replace the operator."""
    return _IMPLANTS.get(_key(op_type, domain))


def keep_constant(*op_types: str, domain: str = "") -> None:
    """Mark operators that, if all other inputs are constants, map a constant per channel to another."""
    _KEEPS_CONSTANT.update(_key(op_type, domain) for op_type in op_types)


def keeps_constant(op_type: str, *, domain: str = "") -> bool:
    """Say whether an operator maps one number per channel to one number per channel."""
    return _key(op_type, domain) in _KEEPS_CONSTANT


def learn_inputs(*op_types: str, inputs: tuple[int, ...], domain: str = "") -> None:
    """Say at which inputs operators have weights, biases and scales: what training may change."""
    for op_type in op_types:
        _LEARNED[_key(op_type, domain)] = inputs


def learned_inputs(op_type: str, *, domain: str = "") -> tuple[int, ...]:
    """Return the inputs of an operator that may hold weights, biases and scales."""
    return _LEARNED.get(_key(op_type, domain), ())

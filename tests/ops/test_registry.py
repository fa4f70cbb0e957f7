"""The functions of operators take what the operators' schemas allow, in every version that is in use."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import onnx
import pytest
from onnx.defs import OpSchema

from hap_onnx.ops.registry import find_run

OLDEST, NEWEST = 9, 26  # opsets that users have and onnxruntime runs
# Attributes that no function needs: Constant nodes become initializers before.
UNUSED = {"Constant": {"sparse_value", "value_string", "value_strings"}}
# Defaults that mean the same as the function's own.
SAME_DEFAULTS = {
    ("Clip", "min"),
    ("Clip", "max"),
    ("GridSample", "mode"),
    ("MeanVarianceNormalization", "axes"),
}


def _versions() -> list[tuple[OpSchema, Callable[..., Any]]]:
    """Return each schema in use that has a torch function, with it."""
    names = sorted({schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain})
    found = {}
    for name in names:
        for opset in range(OLDEST, NEWEST + 1):
            try:
                schema = onnx.defs.get_schema(name, opset, "")
            except onnx.defs.SchemaError:
                continue
            function = find_run(name, opset=opset)
            if function is not None and not schema.deprecated:
                found[name, schema.since_version] = (schema, function)
    return list(found.values())


VERSIONS = _versions()


@pytest.mark.parametrize(
    ("schema", "function"), VERSIONS, ids=[f"{schema.name}-{schema.since_version}" for schema, _ in VERSIONS]
)
def test_function_takes_what_the_schema_allows(schema: OpSchema, function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    attributes = set(schema.attributes) - UNUSED.get(schema.name, set())
    assert attributes <= set(parameters)
    positional = [p for p in parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    if not any(p.kind == p.VAR_POSITIONAL for p in parameters.values()):
        assert len(schema.inputs) <= len(positional)
        needed = [p for p in positional if p.default is p.empty and p.name not in attributes]
        assert len(needed) <= sum(i.option != OpSchema.FormalParameterOption.Optional for i in schema.inputs)
    for name in attributes - {attribute for op_type, attribute in SAME_DEFAULTS if op_type == schema.name}:
        proto = schema.attributes[name].default_value
        if proto.name:
            assert _plain(parameters[name].default) == pytest.approx(_plain(proto))


def _plain(value: Any) -> Any:
    """Return a default as a number, text, or list of them."""
    if isinstance(value, onnx.AttributeProto):
        value = onnx.helper.get_attribute_value(value)
    if isinstance(value, bytes):
        return value.decode()
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def test_an_operator_has_a_function_in_all_its_versions_or_in_none() -> None:
    with_function = {schema.name for schema, _ in VERSIONS}
    for name in with_function:
        for opset in range(OLDEST, NEWEST + 1):
            try:
                schema = onnx.defs.get_schema(name, opset, "")
            except onnx.defs.SchemaError:
                continue
            assert schema.deprecated or find_run(name, opset=opset), (name, opset)

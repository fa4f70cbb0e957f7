"""The schema of ``hap.toml`` that editors use, against what the command itself takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fastjsonschema
import pytest

from hap_onnx.config import COMMAND_OPTIONS, describe_options, read_config
from hap_onnx.errors import UsageError
from tools.schema import build_schema

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

VALUES = (
    "true", "false", "0", "-1", "1", "2", "8", "2000", "1e17", "0.5", "1.0", "1.5", "0.01",
    '""', '"auto"', '"none"', '"cpu"', '"hap"', '"prune"', '"params"', '"latency"', '"macs"', '"paper"',
    '"obs"', '"refit"', '"int8"', '"imagenet"', '"imagnet"', '"a/recipe.toml"', '".toml"', '"recipe.json"',
    '"accuracy"', '"pack.mod:fn"', '"pack.mod:"', '"x.onnx"',
    "[]", "[0.5]", "[0.9, 0.5]", "[0.0]", "[2]", '["a*", "b"]', '[""]', "[1]", '[["a"]]',
    "{}", "{a = 1}", "2020-01-01",
)  # fmt: skip
"""One value of every kind that TOML has, and those at the borders; none that is a number in quotes."""


@pytest.fixture(scope="module")
def accepts():
    check = fastjsonschema.compile(build_schema())

    def ask(text: str) -> bool:
        try:
            check(json.loads(json.dumps(tomllib.loads(text), default=lambda date: {"date": str(date)})))
        except fastjsonschema.JsonSchemaException:
            return False
        return True

    return ask


def is_read(folder: Path, text: str) -> bool:
    path = folder / "hap.toml"
    path.write_text(text, encoding="utf-8")
    try:
        read_config(path, also=("data",))
    except UsageError:
        return False
    return True


def test_the_file_in_docs_is_what_the_options_say():
    written = (ROOT / "docs" / "hap.schema.json").read_text(encoding="utf-8")
    assert json.loads(written) == build_schema(), "run: python -m tools.schema docs/hap.schema.json"


def test_every_option_is_in_it_with_its_help():
    properties = build_schema()["properties"]
    assert set(properties) == {name.replace("_", "-") for name in (*COMMAND_OPTIONS["compress"], "data")}
    for option in describe_options("compress"):
        assert properties[option.name.replace("_", "-")]["description"] == option.metadata["help"]


@pytest.mark.parametrize("name", [*COMMAND_OPTIONS["compress"], "data"])
def test_schema_and_command_take_the_same_values(accepts, tmp_path, name):
    verdicts = {}
    for value in VALUES:
        text = f"{name.replace('_', '-')} = {value}"
        verdicts[value] = is_read(tmp_path, text)
        assert accepts(text) == verdicts[value], text
    assert set(verdicts.values()) == {True, False}


def test_words_may_be_joined_either_way_and_unknown_ones_are_mistakes(accepts):
    assert accepts("keep-macs = 0.5\nmax_drop = 0.01")
    assert not accepts("keep_macs = 2.0")
    assert not accepts("keep-mac = 0.5")
    assert not accepts("[compress]\nkeep-macs = 0.5")


def test_the_check_takes_numbers_as_text_and_the_schema_does_not(accepts, tmp_path):
    assert is_read(tmp_path, 'keep-macs = "0.5"')
    assert not accepts('keep-macs = "0.5"')

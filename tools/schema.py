"""Write the JSON schema of ``hap.toml``, by which editors complete and check it.

    python -m tools.schema docs/hap.schema.json

It is made of the options that ``hap_onnx.config`` declares. That module decides: the schema knows single
options, not which of them go together, and asks for numbers where the command also takes them as text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hap_onnx.cli import DATA_HELP
from hap_onnx.config import describe_options, flag_of


def build_schema() -> dict[str, Any]:
    """Return the schema (draft 7, the newest that editors of TOML understand)."""
    properties: dict[str, Any] = {
        "data": {"type": "string", "minLength": 1, "description": DATA_HELP},
    }
    for option in describe_options("compress"):
        entry = {**option.metadata["check"].schema, "description": option.metadata["help"]}
        if isinstance(option.default, (bool, int, str)):
            entry["default"] = option.default
        properties[flag_of(option.name)[2:]] = entry
    # Words may be joined by _ as well; there an editor need not offer both.
    joined = {name.replace("-", "_"): name for name in properties if "-" in name}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "hap.toml",
        "description": "Options of 'hap-onnx compress', for --config.",
        "type": "object",
        "properties": properties,
        "patternProperties": {f"^{word}$": {"$ref": f"#/properties/{name}"} for word, name in joined.items()},
        "additionalProperties": False,
    }


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
def main(path: Path) -> None:
    """Write the schema to PATH."""
    path.write_text(json.dumps(build_schema(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

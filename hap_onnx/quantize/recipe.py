"""What ``--then`` does to a compressed model, complete enough to do it again without data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hap_onnx.config import THENS

CALIBRATIONS = ("minmax", "percentile")
"""How the range of an activation is taken from the data: all of it, or all but the rarest values."""
WEIGHT_BITS = (8, 7)
"""Bits of a quantized weight. Seven never overflow the 16-bit sums of processors without VNNI."""

Ranges = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Recipe:
    """How a float32 model becomes the final file.

    Attributes:
        kind: int8 or fp16; the other attributes are about int8.
        calibration: one of ``CALIBRATIONS``.
        weight_bits: one of ``WEIGHT_BITS``.
        ranges: lowest and highest value of each float tensor.
        nodes: the only nodes to quantize; empty for all that can be.

    Raises ValueError for values that make no sense.
    """

    kind: str
    calibration: str = CALIBRATIONS[0]
    weight_bits: int = WEIGHT_BITS[0]
    ranges: Ranges = field(default_factory=dict)
    nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = (
            (self.kind, THENS),
            (self.calibration, CALIBRATIONS),
            (self.weight_bits, WEIGHT_BITS),
        )
        for value, choices in known:
            if value not in choices:
                raise ValueError(f"{value!r} is none of {', '.join(map(str, choices))}")
        for name, (low, high) in self.ranges.items():
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"the range of '{name}' is {low} to {high}")
        object.__setattr__(self, "ranges", MappingProxyType(dict(self.ranges)))

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        if self.kind != "int8":
            return {"kind": self.kind}
        return {
            "kind": self.kind,
            "calibration": self.calibration,
            "weight_bits": self.weight_bits,
            "ranges": {name: list(bounds) for name, bounds in self.ranges.items()},
            "nodes": list(self.nodes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Undo ``to_dict``; raises ValueError for anything that it does not write."""
        ranges, nodes = values.get("ranges", {}), values.get("nodes", [])
        if not isinstance(ranges, Mapping) or not isinstance(nodes, list):
            raise ValueError("'ranges' of 'then' is no object, or 'nodes' no list")
        for name, bounds in ranges.items():
            numbers = isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_number, bounds))
            if not numbers:
                raise ValueError(f"the range of '{name}' in 'then' is not two numbers")
        if not all(isinstance(node, str) for node in nodes):
            raise ValueError("a node of 'then' is no text")
        return cls(
            kind=values.get("kind", ""),
            calibration=values.get("calibration", CALIBRATIONS[0]),
            weight_bits=values.get("weight_bits", WEIGHT_BITS[0]),
            ranges={name: (float(low), float(high)) for name, (low, high) in ranges.items()},
            nodes=tuple(nodes),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""Which widths are offered."""

from __future__ import annotations

import pytest

from hap_onnx.planning.align import Blocks, allowed_widths


@pytest.mark.parametrize(
    ("size", "align", "widths"),
    [
        (5, "auto", [1, 2, 3, 4]),
        (12, "auto", [2, 4, 6, 8, 10]),
        (20, "auto", [4, 8, 12, 16]),
        (70, "auto", [8, 16, 24, 32, 40, 48, 56, 64]),
        (20, 6, [6, 12, 18]),
        (6, 6, []),
        (50, Blocks(16), [16, 32, 48]),
        (32, Blocks(16), [16]),
        (16, Blocks(16), [4, 8, 12]),
        (3, Blocks(2), [2]),
        (2, Blocks(2), [1]),
    ],
)
def test_widths_are_aligned(size: int, align: int | str | Blocks, widths: list[int]) -> None:
    assert allowed_widths(size, align).tolist() == widths


def test_ranks_come_in_the_steps_of_their_layer() -> None:
    assert allowed_widths(17, Blocks(16), of=64).tolist() == [16]
    assert allowed_widths(17, Blocks(16), of=16).tolist() == [4, 8, 12, 16]
    assert allowed_widths(17, "auto", of=64).tolist() == [8, 16]

"""Samples on which a compressed model differs most from the original, for people to look at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np

from hap_onnx.data.calibration import Subset
from hap_onnx.report.analysis import WorstSample
from hap_onnx.runtime.metrics import distances, top_classes

N_WORST = 10
THUMBNAIL = 160
"""Longest side of a picture, in pixels; smaller inputs stay as they are."""

Outputs = Mapping[str, np.ndarray]


def find_worst(
    before: Outputs, after: Outputs, part: Subset, *, scales: Mapping[str, float], scores: str | None
) -> tuple[WorstSample, ...]:
    """Return the samples of a part whose outputs lie farthest apart, worst first; equal ones are none.

    Where there are classes, samples that get another one come before all others: they are what a drop
    consists of, and may lie near each other, just beyond a boundary.

    Args:
        before, after: outputs of both models, all samples of ``part`` on axis 0.
        scales: of the outputs that count, see ``curvature.output_scales``.
        scores: the output that holds class scores, None where there is none.
    """
    far = distances(before, after, scales)
    far = np.where(np.isnan(far), np.inf, far)
    names = part.dataset.class_names or ()
    labels = part.labels

    def name_of(number: int) -> str:
        return names[number] if 0 <= number < len(names) else str(number)

    tops = [] if scores is None else [top_classes(outputs[scores]) for outputs in (before, after)]
    same = np.equal(*tops) if tops else np.zeros(len(far), bool)
    order = np.lexsort((-far, same))[:N_WORST]
    found = []
    for place in order.tolist():
        if not far[place] > 0:
            continue
        index = int(part.indices[place])
        says = [None if top[place] < 0 else name_of(int(top[place])) for top in tops]
        right = None if labels is None or scores is None else name_of(int(labels[place]))
        number, source = part.dataset.number_of(index), part.dataset.name_of(index)
        found.append(WorstSample(number, source, float(far[place]), right, *says))
    return tuple(found)


def draw_worst(worst: Sequence[WorstSample], part: Subset) -> dict[int, bytes]:
    """Return a small PNG of the input of each sample, by its number; none where inputs are no images.

    See ``Dataset.picture_of``.
    """
    numbers = {part.dataset.number_of(int(index)): int(index) for index in part.indices}
    pictures = {}
    for sample in worst:
        picture = part.dataset.picture_of(numbers[sample.index])
        if picture is not None:
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG", optimize=True)
            pictures[sample.index] = buffer.getvalue()
    return pictures

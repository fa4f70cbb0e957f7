"""Draw the pictures of docs/how.md from real runs on the network of ``python -m hap_onnx.example``.

    python -m tools.pictures docs/pictures

Trains, exports and inspects that network, plans it at 0.35 of its multiply-accumulates, and sweeps it. Time
does not count here, as with ``--allow-slower``, so that runs with the same versions draw the same.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import hap_onnx
from hap_onnx import example
from hap_onnx.report import CompressReport, InspectReport
from hap_onnx.report.plot import draw_sweep

KEEP_MACS = 0.35
_INK = "#767676"  # is read on white and on black: nothing is painted behind the pictures
_PREDICTED, _MEASURED = "#d0672b", "#1f7fd6"


def draw_widths(before: InspectReport, plan: CompressReport) -> Figure:
    """Draw the channels of each layer in the colour of its group: what the plan keeps full, the rest pale."""
    groups = {group.name: group for group in plan.plan.groups}
    roles = {group.name: group.role for group in before.groups}
    ranks = {implant.node: implant for implant in plan.plan.implants}
    layers = list(reversed(before.layers))
    colors = dict(zip(groups, colormaps["tab10"].colors))
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for row, layer in enumerate(layers):
        if not layer.groups:
            axes.text(1, row, layer.prune, color=_INK, va="center", fontsize=8)
            continue
        group = groups[layer.groups[0]]
        color = colors[group.name]
        axes.barh(row, group.kept, color=color)
        axes.barh(row, group.size - group.kept, left=group.kept, color=color, alpha=0.25)
        if layer.node in ranks:
            implant = ranks[layer.node]
            text = f"{implant.kind}, rank {implant.rank}"
            axes.text(group.size + 1, row, text, color=_INK, va="center", fontsize=8)
    axes.set_yticks(range(len(layers)), [_short(layer.node) for layer in layers])
    axes.set_xlabel("channels that the layer makes", color=_INK)
    axes.set_xlim(0, 84)
    axes.set_ylim(-0.8, len(layers) - 0.4)
    handles = [Patch(color=color, label=f"{roles[name]} group") for name, color in colors.items()]
    handles.append(Patch(color=_INK, alpha=0.25, label="pale: removed"))
    axes.legend(handles=handles, frameon=False, labelcolor=_INK, fontsize=8, loc="upper right")
    _dress(axes)
    return figure


def draw_losses(plan: CompressReport) -> Figure:
    """Draw what the curvature predicts of implants that were tried, and what was measured, by layer."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for column, implant in enumerate(plan.plan.implants):
        for part, tried in enumerate(implant.measured):
            x = column + 0.3 * (part - 0.5)
            axes.plot([x, x], [tried.predicted, tried.measured], color=_INK, linewidth=1, zorder=1)
            is_first = column == part == 0
            label = {"label": "predicted by curvature"} if is_first else {}
            axes.plot(x, tried.predicted, "s", color=_PREDICTED, markerfacecolor="none", **label)
            label = {"label": "measured"} if is_first else {}
            axes.plot(x, tried.measured, "o", color=_MEASURED, **label)
    axes.set_yscale("log")
    axes.set_ylabel("loss (1: outputs know nothing)", color=_INK)
    axes.set_xticks(range(len(plan.plan.implants)), [_short(each.node) for each in plan.plan.implants])
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
    _dress(axes)
    return figure


def _short(node: str) -> str:
    return node.removeprefix("node_")


def _dress(axes: Axes) -> None:
    axes.tick_params(colors=_INK, labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(color=_INK, alpha=0.25, linewidth=0.6)
    for name, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(name in ("left", "bottom"))


def to_svg(figure: Figure) -> str:
    """Return a figure as text that is the same each time."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "hap-onnx"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def draw_all(work: Path) -> Mapping[str, str]:
    """Return the pictures by file name; models and data go to ``work``."""
    train, test = example.load_digits()
    model, calib, val = work / "digits.onnx", work / "calib.npz", work / "test.npz"
    example.export_network(example.train_network(train), model)
    train.save(calib)
    test.save(val)
    before = hap_onnx.inspect(model)
    plan = hap_onnx.compress(
        model, calib, val=val, keep_macs=KEEP_MACS, allow_slower=True, dry_run=True, threads=1
    )
    family = hap_onnx.sweep(model, calib, val=val, allow_slower=True, threads=1)
    return {
        "widths.svg": to_svg(draw_widths(before, plan)),
        "losses.svg": to_svg(draw_losses(plan)),
        "sweep.svg": draw_sweep(family),
    }


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Write the pictures to FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for name, text in draw_all(Path(work)).items():
            (folder / name).write_text(text, encoding="utf-8")
            click.echo(folder / name)


if __name__ == "__main__":
    main()

"""A comparison as a table for the terminal and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_speedups.core.throughput import Spread
from lightning_speedups.measure.runs import Run, Summary

NOTHING = "–"


def table(settings: Mapping[str, Any], rows: Sequence[Summary], notes: Sequence[str]) -> Table:
    """A rich table with one row an arm.

    Args:
        settings: What was compared: ``model``, ``data``, ``epochs`` and the number of ``seeds``.
        rows: One summary an arm.
        notes: What a reader must know.

    Returns:
        The table, with the notes as its caption.
    """
    result = Table(
        title=f"{settings['model']} on {settings['data']}: {settings['epochs']} epochs, {_seeds(settings['seeds'])}",
        caption="\n".join(notes),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    result.add_column("arm", no_wrap=True)
    for name in ("to target, s", "epochs", "accuracy, %", "samples/s", "speed-up"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.baseline is None and result.rows:
            result.add_section()
        result.add_row(*_cells(row), style="bold" if row.baseline is None else None)
    return result


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _cells(row: Summary) -> list[str]:
    if row.accuracy is None or row.accuracy_std is None or row.throughput is None:
        return [row.arm, "not run", *[NOTHING] * 4]
    accuracy = f"{100 * row.accuracy:.1f}"
    if row.runs > 1:
        accuracy += f" ± {100 * row.accuracy_std:.1f}"
    seconds = _range(row.seconds, 1, never="not reached")
    if row.seconds is not None and row.reached < row.runs:
        seconds += f", {row.reached} of {row.runs}"
    epochs = NOTHING if row.epochs is None or math.isinf(row.epochs.median) else f"{row.epochs.median:g}"
    speedup = "1" if row.baseline is None else _range(row.speedup, 2, "×", never=f"only {row.arm}")
    return [row.arm, seconds, epochs, accuracy, f"{row.throughput.median:.0f}", speedup]


def _range(values: Spread | None, digits: int, unit: str = "", *, never: str) -> str:
    """The median, and from where to where for several values."""
    if values is None or values.median == 0:  # the ratio to a run that did not arrive
        return NOTHING
    if math.isinf(values.median):
        return never
    middle = f"{values.median:.{digits}f}{unit}"
    if values.count == 1:
        return middle
    high = "…" if math.isinf(values.high) else f"{values.high:.{digits}f}"
    return f"{middle} ({values.low:.{digits}f}–{high})"


def _draw_arm(axes: Axes, runs: Sequence[Run], *, baseline: bool, colour: str) -> tuple[float, Line2D]:
    """Mean accuracy over median seconds as a line, from the worst to the best run a band; gives the line's end, too."""
    arm, epochs = runs[0].arm, min(len(run.points) for run in runs)
    seconds = np.median([[point.seconds for point in run.points[:epochs]] for run in runs], 0)
    accuracy = 100 * np.array([[point.accuracy for point in run.points[:epochs]] for run in runs])
    mean = accuracy.mean(0)
    label, style = f"{arm}  {mean[-1]:.1f} %", "--" if baseline and arm != "plain" else "-"
    if not runs[0].complete:
        label, style = f"{label} (interrupted)", ":"
    axes.fill_between(seconds, accuracy.min(0), accuracy.max(0), color=colour, alpha=0.10, linewidth=0)
    width = 2.6 if baseline else 1.8
    line, *_ = axes.plot(seconds, mean, style, color=colour, linewidth=width, label=label, marker="o", markersize=3)
    return float(mean[-1]), line


def figure(
    settings: Mapping[str, Any], baselines: Mapping[str, str | None], runs: Sequence[Run], target: float | None
) -> Figure:
    """Test accuracy against training seconds: a line an arm (mean over seeds), a light band from worst to best seed.

    Args:
        settings: What was compared: ``model``, ``data`` and the number of ``seeds``.
        baselines: The arms in their order, each with the name of its baseline (``None`` for a baseline).
        runs: What was measured. An arm without a complete run is drawn from its partial one, dotted.
        target: Accuracy to mark, a fraction.

    Returns:
        A figure of its own, outside pyplot's global state.
    """
    result = Figure(figsize=(9, 5.5), layout="constrained")
    axes = result.add_subplot()
    # baselines in greys, so that the colours mean tricks
    greys = iter(("black", "dimgray", "darkgray"))
    colours = iter([f"C{i}" for i in range(10) if i != 7] * 2)  # C7 is a grey
    lines = []
    for arm, baseline in baselines.items():
        colour = next(greys if baseline is None else colours)
        begun = [run for run in runs if run.arm == arm and run.points]
        shown = [run for run in begun if run.complete] or begun[:1]
        if shown:
            lines.append(_draw_arm(axes, shown, baseline=baseline is None, colour=colour))
    if target is not None:
        axes.axhline(100 * target, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
        axes.annotate(
            f"target {100 * target:.1f} %", (1, 100 * target), xycoords=("axes fraction", "data"),
            xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=8,
        )  # fmt: skip
    axes.set(
        xlabel="training seconds, without evaluation",
        ylabel="test accuracy, %",
        title=f"{settings['model']} on {settings['data']}: mean of {_seeds(settings['seeds'])}, band worst to best",
    )
    axes.title.set_parse_math(False)  # a file's name may hold a dollar sign
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    # in the order in which the lines end, so that the legend reads like labels beside them
    handles = [line for _, line in sorted(lines, key=lambda entry: -entry[0])]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return result

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

from lightning_speedups.core.counts import counted
from lightning_speedups.core.throughput import Spread
from lightning_speedups.measure.runs import ACCURACY, Metric, Run, Summary

NOTHING = "–"


def table(
    settings: Mapping[str, Any], rows: Sequence[Summary], notes: Sequence[str], metric: Metric = ACCURACY
) -> Table:
    """A rich table with one row an arm.

    Args:
        settings: What was compared: ``model``, ``data``, ``epochs`` and the number of ``seeds``.
        rows: One summary an arm.
        notes: What a reader must know.
        metric: What was compared by; beside a loss stand tokens where epochs stand beside an accuracy.

    Returns:
        The table, with the notes as its caption.
    """
    result = Table(
        title=f"{settings['model']} on {settings['data']}: {counted(settings['epochs'], 'epoch')}, "
        f"{counted(settings['seeds'], 'seed')}",
        caption="\n".join(notes),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    result.add_column("arm", no_wrap=True)
    columns = ("tokens, M", "loss", "tokens/s") if metric.is_loss else ("epochs", "accuracy, %", "samples/s")
    for name in ("to target, s", *columns, "speed-up"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.baseline is None and result.rows:
            result.add_section()
        result.add_row(*_cells(row, metric), style="bold" if row.baseline is None else None)
    return result


def _cells(row: Summary, metric: Metric) -> list[str]:
    final, deviation = (row.loss, row.loss_std) if metric.is_loss else (row.accuracy, row.accuracy_std)
    if final is None or deviation is None or row.throughput is None:
        return [row.arm, "not run", *[NOTHING] * 4]
    value = metric.shown(final).removesuffix(metric.unit)
    if row.runs > 1:
        value += f" ± {metric.shown(deviation).removesuffix(metric.unit)}"
    seconds = _range(row.seconds, 1, never="not reached")
    if row.seconds is not None and row.reached < row.runs:
        seconds += f", {row.reached} of {row.runs}"
    length, form = (row.samples, _millions) if metric.is_loss else (row.epochs, "{:g}".format)
    until = NOTHING if length is None or math.isinf(length.median) else form(length.median)
    speedup = "1" if row.baseline is None else _range(row.speedup, 2, "×", never=f"only {row.arm}")
    return [row.arm, seconds, until, value, f"{row.throughput.median:.0f}", speedup]


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f}"


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


def _draw_arm(
    axes: Axes, runs: Sequence[Run], metric: Metric, *, is_baseline: bool, is_pale: bool
) -> tuple[float, Line2D]:
    """Mean value over median seconds as a line, from the worst to the best run a band; gives the line's end, too."""
    seconds = np.median([[point.seconds for point in run.points] for run in runs], 0)
    values = metric.factor * np.array([[metric.of(point) for point in run.points] for run in runs])
    arm, mean = runs[0].arm, values.mean(0)
    # baselines in black, so that the colours mean tricks
    style, colour = ("-" if arm == "plain" else "--", "black") if is_baseline else ("-", None)
    width, alpha = (1.2, 0.5) if is_pale else (2.6, 1.0)
    (line,) = axes.plot(seconds, mean, style, color=colour, linewidth=width, alpha=alpha, marker="o", markersize=3)
    line.set_label(f"{arm}  {metric.shown(mean[-1] / metric.factor)}")
    axes.fill_between(seconds, values.min(0), values.max(0), color=line.get_color(), alpha=0.10, linewidth=0)
    return float(mean[-1]), line


def figure(
    settings: Mapping[str, Any],
    baselines: Mapping[str, str | None],
    runs: Sequence[Run],
    target: float | None,
    metric: Metric = ACCURACY,
) -> Figure:
    """Accuracy or loss against training seconds: a line an arm (mean over seeds), a light band from worst to best seed.

    Args:
        settings: What was compared: ``model``, ``data`` and the number of ``seeds``; ``singles``, drawn pale.
        baselines: The arms in their order, each with the name of its baseline (``None`` for a baseline).
        runs: The complete runs.
        target: Accuracy, a fraction, or loss to mark.
        metric: What was compared by.

    Returns:
        A figure of its own, outside pyplot's global state.
    """
    result = Figure(figsize=(9, 5.5), layout="constrained")
    axes = result.add_subplot()
    lines = []
    for arm, baseline in baselines.items():
        if of_arm := [run for run in runs if run.arm == arm]:
            is_pale = arm in settings.get("singles", ())
            lines.append(_draw_arm(axes, of_arm, metric, is_baseline=baseline is None, is_pale=is_pale))
    if target is not None:
        level, word = metric.factor * target, f"target {metric.shown(target)}"
        line = axes.axhline(level, color="black", linewidth=0.8, linestyle=":")
        axes.text(0.99, level, word, transform=line.get_transform(), ha="right", va="bottom", size=8)
    axes.set(
        xlabel="training seconds, without evaluation",
        ylabel=metric.title + f",{metric.unit}" * bool(metric.unit),
        title=f"{settings['model']} on {settings['data']}: mean of {counted(settings['seeds'], 'seed')}, "
        "band worst to best",
    )
    axes.title.set_parse_math(False)  # a file's name may hold a dollar sign
    axes.set_xscale("log")  # the arms differ tenfold
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    axes.xaxis.set_minor_formatter(lambda seconds, _: f"{seconds:g}" * (f"{seconds:e}"[0] in "235"))
    axes.grid(alpha=0.25, which="both")
    # in the order in which the lines end, so that the legend reads like labels beside them
    handles = [line for _, line in sorted(lines, key=lambda entry: -entry[0])]  # from the top down
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return result

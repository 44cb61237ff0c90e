"""Plots of a run: losses, accuracy per skill, other curves. They need matplotlib.

Events are lines of log.jsonl, as `engine.training.logger.read_log` returns them.
Not here: fonts and colors (style.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from engine.figures.style import BLUE, MUTED, ORANGE, PALE, shorten

NOT_ACCURACY = ("val_loss", "val_answers", "val_left_out", "val_problem")
NOT_DRAWN = ("lr_factor",)  # of the schedule; the learning rates include it
MAX_POINTS = 40  # of a smoothed curve
ACCURACY = "val_accuracy"
TITLE_SIZE, MAX_TITLE = 10, 62  # of a panel's title: font size and width, in points


def points_of(events: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a name in the log."""
    found = [(e["step"], e[name]) for e in events if isinstance(e.get(name), (int, float))]
    return [step for step, _ in found], [value for _, value in found]


def accuracies(events: Sequence[dict]) -> list[str]:
    """Names of the accuracies in the log; the one over all skills comes first."""
    names = dict.fromkeys(name for event in events for name in event if name.startswith("val_"))
    names = [name for name in names if name not in NOT_ACCURACY and points_of(events, name)[0]]
    return sorted(names, key=lambda name: name != ACCURACY)


def smooth(values: Sequence[float]) -> list[float]:
    """Centered moving average over a fortieth of the values."""
    half = len(values) // (2 * MAX_POINTS)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _format_step(step: float, _position: int | None = None) -> str:
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:,.0f}"


def add_title(figure: Any, title: str) -> None:
    """A title above the left edge of a figure or one of its parts."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)


def add_legend(axis: Any) -> None:
    """A legend in one row above the panel, where it covers no line."""
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0, columnspacing=1)


def format_steps(axis: Any, events: Sequence[dict], n_ticks: int = 5) -> None:
    """A linear x axis from step 0 to the last one, with few, round ticks."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    last = max(event["step"] for event in events)
    axis.set_xlim(-0.02 * last, 1.02 * last)
    axis.xaxis.set_major_locator(MaxNLocator(n_ticks, integer=True, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(_format_step))


def use_log_scale(axis: Any) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def format_accuracy(axis: Any, events: Sequence[dict], n_ticks: int = 5) -> None:
    """Format both axes of an accuracy plot: percent from 0 to 100, and steps."""
    from matplotlib.ticker import PercentFormatter

    axis.set(ylim=(0, 1), yticks=(0, 0.5, 1))
    axis.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    format_steps(axis, events, n_ticks)


def draw_losses(figure: Any, events: Sequence[dict]) -> None:
    """Plot the training loss (pale: every value; solid: smoothed) and the validation loss."""
    axis = figure.subplots()
    steps, losses = points_of(events, "loss")
    axis.plot(steps, losses, color=BLUE, alpha=0.3, lw=0.9)
    axis.plot(steps, smooth(losses), color=BLUE, label="training")
    val_steps, val_losses = points_of(events, "val_loss")
    if val_steps:
        axis.plot(val_steps, val_losses, "o-", color=ORANGE, ms=4, label="validation")
        add_legend(axis)
    if any(value > 0 for value in (*losses, *val_losses)):
        use_log_scale(axis)
    axis.set_xlabel("step")
    format_steps(axis, events)
    add_title(figure, "Loss")


def draw_accuracies(figure: Any, events: Sequence[dict]) -> None:
    """Plot validation accuracy: a panel per skill, or one panel if there are no skills."""
    names = accuracies(events)
    if len(names) < 3:
        axis = figure.subplots()
        for name, color in zip(names, (BLUE, ORANGE)):
            label = name.removeprefix("val_")
            axis.plot(*points_of(events, name), "o-", color=color, ms=4, label=label, clip_on=False)
        format_accuracy(axis, events)
        axis.set_xlabel("step")
        if len(names) > 1:
            add_legend(axis)
        add_title(figure, "Validation accuracy")
        return
    n_columns = math.ceil(math.sqrt(1.4 * len(names)))
    n_rows = -(-len(names) // n_columns)
    axes = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names):
        draw_skill(axis, events, name)
        format_accuracy(axis, events, n_ticks=2)
    add_title(figure, "Validation accuracy per skill (gray: all skills)")


def draw_skill(axis: Any, events: Sequence[dict], name: str) -> None:
    """Plot the accuracy of one skill and, in gray, that of all skills."""
    is_all = name == ACCURACY
    if not is_all:
        axis.plot(*points_of(events, ACCURACY), color=PALE, lw=1.2)
    steps, values = points_of(events, name)
    axis.plot(steps, values, "o-", color=MUTED if is_all else BLUE, ms=3, clip_on=False)
    title = "all skills" if is_all else name.removeprefix("val_")
    axis.set_title(shorten(title, MAX_TITLE, TITLE_SIZE), fontsize=TITLE_SIZE)
    axis.set_title(f"{100 * values[-1]:.0f} %", loc="right", color=MUTED, fontsize=TITLE_SIZE)


def run_figure(figure_class: Any, events: Sequence[dict]) -> Any:
    """A figure with losses on the left and, if the log has any, validation accuracies."""
    n = len(accuracies(events))
    if n == 0:
        figure = figure_class(figsize=(5.5, 3.8))
        draw_losses(figure, events)
        return figure
    figure = figure_class(figsize=(9, 3.8))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.9 if n > 2 else 1), wspace=0.05)
    draw_losses(left, events)
    draw_accuracies(right, events)
    return figure


def draw_curves(
    figure: Any, events: Sequence[dict], title: str, prefix: str, is_noisy: bool = True
) -> None:
    """Plot all values of the log whose names start with `prefix`; equal ones share a line."""
    axis = figure.subplots()
    names = dict.fromkeys(n for event in events for n in event if n.startswith(prefix))
    lines: dict[tuple, list[str]] = {}
    for name in names:
        if name not in NOT_DRAWN:
            steps, values = points_of(events, name)
            label = name.removeprefix(prefix).removeprefix("_") or "all"
            lines.setdefault((tuple(steps), tuple(values)), []).append(label)
    for (steps, values), labels in lines.items():
        axis.plot(steps, smooth(values) if is_noisy else values, label=", ".join(labels))
    axis.set_xlabel("step")
    axis.set_ylim(0)
    axis.yaxis.set_major_formatter("{x:,.7g}")
    format_steps(axis, events)
    if len(lines) > 1:
        add_legend(axis)
    add_title(figure, title)

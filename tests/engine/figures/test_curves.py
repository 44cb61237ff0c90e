"""Plots of a run show every skill in its own panel, and work for any log."""

from __future__ import annotations

import pytest

from engine.figures.curves import accuracies, draw_curves, run_figure, smooth
from engine.figures.style import plotting

TRAIN = [{"step": step, "loss": 3 / step, "lr_a": 0.1, "lr_b": 0.1} for step in range(1, 90)]


def val(step: int, **values: float) -> dict:
    return {"step": step, "val_loss": 1.0, "val_answers": ["a"], "val_left_out": 1, **values}


@pytest.fixture
def draw(tmp_path):
    """Draw and save a figure; returns its panels."""
    pytest.importorskip("matplotlib")

    def panels(events: list[dict]) -> list:
        with plotting("a plot") as figure_class:
            figure = run_figure(figure_class, events)
            figure.savefig(tmp_path / "loss.png")
        return [axis for axis in figure.axes if axis.axison]

    return panels


def test_a_panel_per_skill(draw):
    skills = {f"val_s{i}": i / 10 for i in range(10)}
    events = [*TRAIN, val(40, val_accuracy=0.2, **skills), val(80, val_accuracy=0.5, **skills)]
    losses, *others = draw(events)
    assert losses.get_yscale() == "log" and len(losses.lines) == 3
    assert [axis.get_title("left") for axis in others] == [
        "all skills", *(f"s{i}" for i in range(10))
    ]  # fmt: skip
    assert [axis.get_title("right") for axis in others][:3] == ["50 %", "0 %", "10 %"]
    assert all(axis.get_ylim() == (0, 1) for axis in others)


def test_a_classifier_has_one_panel_of_accuracies(draw):
    _, axis = draw([*TRAIN, val(80, val_accuracy=0.5, val_top5=0.9)])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["accuracy", "top5"]


@pytest.mark.parametrize(
    "events", [TRAIN, TRAIN[:1], [{"step": 5, "loss": 0.0}], [*TRAIN, val(20)], [val(1), *TRAIN]]
)
def test_without_accuracies_there_are_losses_only(draw, events):
    assert len(draw(events)) == 1


def test_titles_of_skills_do_not_overlap():
    pytest.importorskip("matplotlib")
    skills = {f"val_a long name of skill {i}": 1.0 for i in range(10)}
    with plotting("a plot") as figure_class:
        figure = run_figure(figure_class, [*TRAIN, val(40, val_accuracy=1.0, **skills)])
        figure.draw_without_rendering()
        for axis in figure.axes[1:]:
            name, value = axis._left_title, axis._right_title
            assert not name.get_window_extent().overlaps(value.get_window_extent())


def test_names_of_accuracies():
    events = [val(1, val_b=0.5, val_accuracy=0.1), {"step": 2, "val_problem": "no loss"}]
    assert accuracies(events) == ["val_accuracy", "val_b"]


def test_smoothing_keeps_constants_and_short_curves():
    assert smooth([2.0] * 500) == [2.0] * 500
    assert smooth([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]


def test_equal_curves_share_a_line():
    pytest.importorskip("matplotlib")
    with plotting("a plot") as figure_class:
        figure = figure_class()
        draw_curves(figure, [*TRAIN, {"step": 90, "lr_factor": 1.0}], "Learning rate", "lr_")
    assert [line.get_label() for line in figure.axes[0].lines] == ["a, b"]

"""The built-in world: equally many questions of each skill, half about unseen combinations."""

from dataclasses import replace

from data.world.scenes import COLORS, POSITIONS, SHAPES
from engine.evaluation.evaluate import Task, items

YES_NO = ("yes", "no")
ROWS, COLUMNS = ("above", "below", ""), ("left", "right", "")
DIRECTIONS = tuple(f"{a} {b}".strip() for a in ROWS for b in COLUMNS if a or b)
CHOICES = {
    "color": tuple(COLORS),
    "shape": tuple(SHAPES),
    "count": tuple("012345"),
    "where": POSITIONS,
    "exist": YES_NO,
    "relation": DIRECTIONS,
    "compare": YES_NO,
    "read": tuple(map(str, range(10, 100))),
}


def world(cfg, split: str, n: int) -> list:
    found = items(replace(cfg, source="world"), split, n)
    return [replace(item, choices=CHOICES.get(item.skill, ())) for item in found]


TASK = Task(world, source="world")

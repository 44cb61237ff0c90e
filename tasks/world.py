"""The built-in world: equally many questions per skill, half on held-out combinations."""

from dataclasses import replace

from configs import DataConfig
from data.world.scenes import COLORS, POSITIONS, SHAPES
from engine.evaluation.evaluate import Item, Task, load_items

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


def load_world_items(cfg: DataConfig, split: str, n: int) -> list[Item]:
    """Questions of the built-in world, with the choices of their skill."""
    items = load_items(replace(cfg, source="world"), split, n)
    return [replace(item, choices=CHOICES.get(item.skill, ())) for item in items]


TASK = Task(load_world_items, source="world")

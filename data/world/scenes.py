"""Scenes of the built-in dataset, generated from (seed, split, index).

Some color-shape pairs, counts and numbers are held out of `train` and `val`. `test` thus measures
whether a model generalises to new combinations or only memorises.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np

POSITIONS = ("top left", "top", "top right", "left", "center", "right",
             "bottom left", "bottom", "bottom right")  # fmt: skip
# Whether the point (x, y) is inside; in units of the radius, y points down.
SHAPES = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.88,
    "triangle": lambda x, y: (y <= 0.85) & (1.85 * abs(x) <= y + 1),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1),
    "ring": lambda x, y: abs(x * x + y * y - 0.66) <= 0.34,
}
PLURAL = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
COLORS = {"red": (215, 35, 40), "green": (30, 180, 70), "blue": (35, 80, 225),
          "yellow": (245, 215, 30), "purple": (145, 45, 185), "orange": (250, 130, 20)}  # fmt: skip
BACKGROUNDS = {"white": (245, 245, 245), "light gray": (200, 200, 200), "dark gray": (70, 70, 70),
               "black": (14, 14, 14), "beige": (235, 222, 195),
               "light blue": (190, 215, 240)}  # fmt: skip
# Radius and maximum offset of the center, in pixels. Their sum stays below half a cell (8).
SIZES = {"small": (4.5, 1.5), "large": (6.75, 0.75)}
# Held out of train and val: never drawn and never asked about, even with the answer "no".
HELD_PAIRS = frozenset({("blue", "circle"), ("yellow", "square"), ("green", "triangle"),
                        ("red", "cross"), ("purple", "ring")})  # fmt: skip
HELD_COUNTS = frozenset({(3, "circle"), (2, "cross")})  # exactly this many in a scene
HELD_NUMBERS = frozenset({"17", "24", "39", "41", "56", "62", "78", "85", "93"})
# Every other test scene has held-out content; its kind cycles through this list.
TEST_THEMES = ("pair", "count", "pair", "pair", "number", "pair", "pair", "count", "pair", "pair")


@dataclass(frozen=True)
class Thing:
    """One drawn object; (dx, dy) is the offset from the center of its cell in pixels."""

    cell: int  # 0..8 in reading order
    shape: str
    color: str
    size: str  # small | large
    dx: float
    dy: float

    @property
    def kind(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def held(self) -> bool:
        return (self.color, self.shape) in HELD_PAIRS


@dataclass(frozen=True)
class Scene:
    """The content of an image. A number is not a thing: questions never count it."""

    things: tuple[Thing, ...]  # in reading order
    number: str | None
    number_cell: int  # -1 without a number
    background: str
    noise: int  # seed of tints, gradient and grain, which are never asked about


def theme_of(split: str, index: int) -> str | None:
    """The kind of held-out content in a scene: pair, count, number or None."""
    return TEST_THEMES[index // 2 % len(TEST_THEMES)] if split == "test" and index % 2 else None


def make_scene(seed: int, split: str, index: int, min_shapes: int = 2) -> Scene:
    """Scene `index` of a split; equal arguments give equal scenes."""
    rng = random.Random(f"{seed}/{split}/{index}")
    theme = theme_of(split, index)
    things = _place_things(rng, theme, min_shapes)
    while bool(held_counts(things)) != (theme == "count"):
        things = _place_things(rng, theme, min_shapes)
    number, number_cell, held = None, -1, theme == "number"
    if held or rng.random() < 0.5:
        number = rng.choice([n for n in map(str, range(10, 100)) if (n in HELD_NUMBERS) == held])
        number_cell = rng.choice(sorted(set(range(9)) - {thing.cell for thing in things}))
    return Scene(things, number, number_cell, rng.choice(list(BACKGROUNDS)), rng.getrandbits(32))


def _place_things(rng: random.Random, theme: str | None, min_shapes: int) -> tuple[Thing, ...]:
    """Two to five things of `min_shapes` to four shapes, so that shapes and colors repeat."""
    cells = sorted(rng.sample(range(9), rng.randint(2, 5)))
    palette = rng.sample(list(COLORS), rng.randint(2, 5))
    choices = rng.sample(list(SHAPES), rng.randint(min_shapes, 4))
    shapes = [rng.choice(choices) for _ in cells]
    if theme == "count":
        n, held = rng.choice(sorted(HELD_COUNTS))
        others = [shape for shape in choices if shape != held]
        shapes = [held] * n + [rng.choice(others) for _ in cells[n:]]
        rng.shuffle(shapes)
    kinds = [
        (rng.choice([color for color in palette if (color, shape) not in HELD_PAIRS]), shape)
        for shape in shapes
    ]
    if theme == "pair":
        kinds[rng.randrange(len(cells))] = rng.choice(sorted(HELD_PAIRS))
    things = []
    for cell, (color, shape) in zip(cells, kinds):
        size = rng.choice(list(SIZES))
        reach = int(4 * SIZES[size][1])  # in quarters of a pixel
        jitter = (rng.randint(-reach, reach) / 4 for _ in "xy")
        things.append(Thing(cell, shape, color, size, *jitter))
    return tuple(things)


def held_counts(things: tuple[Thing, ...]) -> frozenset[tuple[int, str]]:
    """The held-out (count, shape) pairs among these things."""
    return HELD_COUNTS & {(n, shape) for shape, n in Counter(t.shape for t in things).items()}


def label(scene: Scene) -> str:
    """The class of a scene: its most frequent shape; in a tie, the first in reading order."""
    return Counter(thing.shape for thing in scene.things).most_common(1)[0][0]

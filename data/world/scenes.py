"""The built-in data set's scenes, made on the fly from (seed, split, index).

Some pairs, counts and numbers are held out of `train` and `val`, so `test` can tell a model that composes what it knows from one that has memorised.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np

POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
# Inside-or-not in units of the radius, y pointing down.
SHAPES = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.88,
    "triangle": lambda x, y: (y <= 0.85) & (1.85 * abs(x) <= y + 1),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1),
    "ring": lambda x, y: abs(x * x + y * y - 0.66) <= 0.34,
}
PLURAL = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
COLORS = {
    "red": (215, 35, 40),
    "green": (30, 180, 70),
    "blue": (35, 80, 225),
    "yellow": (245, 215, 30),
    "purple": (145, 45, 185),
    "orange": (250, 130, 20),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "light gray": (200, 200, 200),
    "dark gray": (70, 70, 70),
    "black": (14, 14, 14),
    "beige": (235, 222, 195),
    "light blue": (190, 215, 240),
}
# Radius in pixels, and how far the centre may move: the sum stays below half a cell.
SIZES = {"small": (4.5, 1.5), "large": (6.75, 0.75)}
# Held out of train and val: neither drawn nor written, not even in a question whose answer is no.
HELD_PAIRS = frozenset(
    {
        ("blue", "circle"),
        ("yellow", "square"),
        ("green", "triangle"),
        ("red", "cross"),
        ("purple", "ring"),
    }
)
HELD_COUNTS = frozenset({(3, "circle"), (2, "cross")})  # exactly so many in one scene
HELD_NUMBERS = frozenset({"17", "24", "39", "41", "56", "62", "78", "85", "93"})
# Every other test scene holds one of these out; the mix is what a balanced test asks for.
TEST_THEMES = ("pair", "count", "pair", "pair", "number", "pair", "pair", "count", "pair", "pair")


@dataclass(frozen=True)
class Thing:
    """One drawn object; (dx, dy) moves it off the centre of its cell, in pixels."""

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
    """What there is to see. A number is not a thing: it is read, never counted or described."""

    things: tuple[Thing, ...]  # in reading order
    number: str | None
    number_cell: int | None
    background: str
    noise: int  # seeds what no question is about: tints, gradient, grain


def theme_of(split: str, index: int) -> str | None:
    """Which kind of held-out content this scene has: pair, count, number or None."""
    return TEST_THEMES[index // 2 % len(TEST_THEMES)] if split == "test" and index % 2 else None


def make_scene(seed: int, split: str, index: int, fewest: int = 2) -> Scene:
    rng = random.Random(f"{seed}/{split}/{index}")
    theme = theme_of(split, index)
    things = _place_things(rng, theme, fewest)
    while bool(_held_counts(things)) != (theme == "count"):
        things = _place_things(rng, theme, fewest)
    number = number_cell = None
    if theme == "number" or rng.random() < 0.5:
        held = theme == "number"
        numbers = [n for n in map(str, range(10, 100)) if (n in HELD_NUMBERS) == held]
        number = rng.choice(numbers)
        number_cell = rng.choice(sorted(set(range(9)) - {thing.cell for thing in things}))
    return Scene(things, number, number_cell, rng.choice(list(BACKGROUNDS)), rng.getrandbits(32))


def _place_things(rng: random.Random, theme: str | None, fewest: int) -> tuple[Thing, ...]:
    """Two to five things of `fewest` to four shapes: they repeat, and near misses abound."""
    cells = sorted(rng.sample(range(9), rng.randint(2, 5)))
    palette = rng.sample(list(COLORS), rng.randint(2, 5))
    choices = rng.sample(list(SHAPES), rng.randint(fewest, 4))
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


def _held_counts(things: tuple[Thing, ...]) -> frozenset[tuple[int, str]]:
    return HELD_COUNTS & {(n, shape) for shape, n in Counter(t.shape for t in things).items()}


def label(scene: Scene) -> str:
    """The class of a scene: its most frequent shape, of equals the first in reading order."""
    return Counter(thing.shape for thing in scene.things).most_common(1)[0][0]

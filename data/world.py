"""The built-in data set: drawn scenes with questions, captions and class labels, made on the fly.

All follows from (seed, split, index). Some pairs, counts and numbers are held out of `train` and
`val`, so `test` can tell a model that composes what it knows from one that has memorised.
`python -m data.world scene.png 7` draws one.
Not here: choosing this source by name (sources.py), turning its samples into tokens (processor.py).
"""
from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, combinations, count, permutations, product, takewhile

import numpy as np
from PIL import Image

from data.sample import Sample, Turn

CELL, SIDE, SUPERSAMPLE = 16, 48, 4  # of a cell and a picture in pixels; samples along a pixel
SLOPE = np.linspace(-1, 1, SIDE, dtype=np.float32)  # from edge to edge of a picture
POSITIONS = ("top left", "top", "top right", "left", "center", "right",
             "bottom left", "bottom", "bottom right")

# Inside-or-not in units of the radius, y pointing down.
SHAPES = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.88,
    "triangle": lambda x, y: (y <= 0.85) & (1.85 * abs(x) <= y + 1),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1),
    "ring": lambda x, y: abs(x * x + y * y - 0.66) <= 0.34,
}
PLURAL = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
COLORS = {"red": (215, 35, 40), "green": (30, 180, 70), "blue": (35, 80, 225),
          "yellow": (245, 215, 30), "purple": (145, 45, 185), "orange": (250, 130, 20)}
BACKGROUNDS = {"white": (245, 245, 245), "light gray": (200, 200, 200), "dark gray": (70, 70, 70),
               "black": (14, 14, 14), "beige": (235, 222, 195), "light blue": (190, 215, 240)}
# Radius in pixels, and how far the centre may move: the sum stays below half a cell.
SIZES = {"small": (4.5, 1.5), "large": (6.75, 0.75)}
# Three by five pixels a digit, row after row.
DIGITS = ("111101101101111", "010110010010111", "111001111100111", "111001111001111",
          "101101111001001", "111100111001111", "111100111101111", "111001001001001",
          "111101111101111", "111101111001111")

# Held out of train and val: neither drawn nor written, not even in a question whose answer is no.
HELD_PAIRS = frozenset({("blue", "circle"), ("yellow", "square"), ("green", "triangle"),
                        ("red", "cross"), ("purple", "ring")})
HELD_COUNTS = frozenset({(3, "circle"), (2, "cross")})  # exactly so many in one scene
HELD_NUMBERS = frozenset({"17", "24", "39", "41", "56", "62", "78", "85", "93"})
# Every other test scene holds one of these out; the mix is what a balanced test asks for.
TEST_THEMES = ("pair", "count", "pair", "pair", "number", "pair", "pair", "count", "pair", "pair")
# How often training asks for each skill: comparing two things takes longest to learn.
WEIGHTS = {"color": 2, "shape": 1, "count": 2, "where": 4, "what": 2, "exist": 2,
           "relation": 4, "compare": 3, "read": 2, "sum": 3}
SKILLS = (*(skill for skill in WEIGHTS if skill != "sum"), "caption")  # what is tested


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


@dataclass(frozen=True)
class Question:
    skill: str
    text: str
    answer: str
    unseen: bool  # about something held out of training


# Scenes

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
    kinds = [(rng.choice([color for color in palette if (color, shape) not in HELD_PAIRS]), shape)
             for shape in shapes]
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


# Pictures

def draw(scene: Scene) -> Image.Image:
    """RGB, 48 x 48. The background is drawn first, so it does not depend on what stands on it."""
    rng = random.Random(scene.noise)
    picture = _background(BACKGROUNDS[scene.background], rng)
    for thing in scene.things:
        tint = [channel + rng.randint(-12, 12) for channel in COLORS[thing.color]]
        _blend(picture, thing.cell, _coverage(thing.shape, thing.size, thing.dx, thing.dy), tint)
    if scene.number is not None:
        ink = 0 if sum(BACKGROUNDS[scene.background]) > 3 * 128 else 255
        _blend(picture, scene.number_cell, _digits(scene.number, rng), [ink] * 3)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _background(color: tuple[int, int, int], rng: random.Random) -> np.ndarray:
    gradient = rng.uniform(-6, 6) * SLOPE[:, None] + rng.uniform(-6, 6) * SLOPE  # [48, 48]
    grain = (np.frombuffer(rng.randbytes(SIDE * SIDE), np.uint8) % 7 - 3.0).reshape(SIDE, SIDE)
    return np.array(color, np.float32) + (gradient + grain)[..., None]  # [48, 48, 3]


@cache  # places are quarters of a pixel, so there are 1,090
def _coverage(shape: str, size: str, dx: float, dy: float) -> np.ndarray:
    """How much of each pixel of the cell a thing covers. [16, 16] in 0..1"""
    radius, _ = SIZES[size]
    at = (np.arange(CELL * SUPERSAMPLE, dtype=np.float32) + 0.5) / SUPERSAMPLE - CELL / 2
    inside = SHAPES[shape]((at - dx) / radius, (at[:, None] - dy) / radius)  # [64, 64]
    return inside.reshape(CELL, SUPERSAMPLE, CELL, SUPERSAMPLE).mean((1, 3))


def _digits(number: str, rng: random.Random) -> np.ndarray:
    """Two digits at twice the font's size, at most a pixel off the middle. [16, 16], 0 or 1"""
    return _ink(number, 3 + rng.randint(-1, 1), 1 + rng.randint(-1, 1))


@cache
def _ink(number: str, top: int, left: int) -> np.ndarray:
    rows = [np.array(list(DIGITS[int(digit)]), np.float32).reshape(5, 3) for digit in number]
    ink = np.hstack([rows[0], np.zeros((5, 1), np.float32), rows[1]])
    ink = ink.repeat(2, 0).repeat(2, 1)  # [10, 14]
    return np.pad(ink, ((top, 6 - top), (left, 2 - left)))


def _blend(picture: np.ndarray, cell: int, alpha: np.ndarray, color: list[int]) -> None:
    row, column = cell // 3 * CELL, cell % 3 * CELL
    block = picture[row:row + CELL, column:column + CELL]  # a view, [16, 16, 3]
    block += alpha[..., None] * (np.array(color, np.float32) - block)


# Questions: for each skill, every unambiguous (text, answer, unseen) that a scene has

def _lookup(ways: dict[str, str], answer: str, scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """About each thing that no other shares its color, shape, kind or cell with."""
    for of, text in ways.items():
        for t in _single(scene, of):
            yield text.format(t, POSITIONS[t.cell]), answer.format(t, POSITIONS[t.cell]), t.held


def _count(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """None at all is an answer in half of the scenes only: there is always more that is absent."""
    shapes, colors = (Counter(getattr(t, of) for t in scene.things) for of in ("shape", "color"))
    held = {shape for _, shape in _held_counts(scene.things)}
    yield "How many things are there?", str(len(scene.things)), False
    for color in COLORS:
        if colors[color] or scene.noise % 2:
            yield f"How many {color} things are there?", str(colors[color]), False
    for a in SHAPES:
        if shapes[a] or scene.noise % 2:
            yield f"How many {PLURAL[a]} are there?", str(shapes[a]), a in held
    for a, b in permutations(shapes, 2):
        text = f"How many {PLURAL[a]} and {PLURAL[b]} are there?"
        yield text, str(shapes[a] + shapes[b]), a in held or b in held


def _sum(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """For training: every number comes near every shape, which alone is learned to be never 3."""
    rng = random.Random(scene.noise)
    for of, names in (("shape", PLURAL), ("color", {c: f"{c} things" for c in COLORS})):
        times = Counter(getattr(t, of) for t in scene.things)
        for few in chain(combinations(names, 2), combinations(names, 3)):
            *rest, last = rng.sample([names[x] for x in few], len(few))
            if total := sum(times[x] for x in few):
                yield f"How many {', '.join(rest)} and {last} are there?", str(total), False


def _exist(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """Hard negatives: color and shape are there, but not on one thing; else one of the two."""
    here = {(t.color, t.shape) for t in scene.things}
    colors, shapes = ({kind[i] for kind in here} for i in (0, 1))
    for unseen in (False, True):
        kinds = [kind for kind in product(COLORS, SHAPES) if (kind in HELD_PAIRS) == unseen]
        near = {kind: (kind[0] in colors) + (kind[1] in shapes)
                for kind in kinds if kind not in here}
        negatives = {kind for kind in near if near[kind] == max(near.values())}
        for color, shape in here.intersection(kinds) | negatives:
            article = "an" if color == "orange" else "a"
            answer = "yes" if (color, shape) in here else "no"
            yield f"Is there {article} {color} {shape}?", answer, unseen


def _relation(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """Which way from one thing to another: eight answers, where yes or no would be won by guess."""
    for a, b in permutations(_single(scene, "kind"), 2):
        (row_a, column_a), (row_b, column_b) = divmod(a.cell, 3), divmod(b.cell, 3)
        words = [("above", "below")[row_a > row_b]] * (row_a != row_b)
        words += [("left", "right")[column_a > column_b]] * (column_a != column_b)
        yield (f"Seen from the {b.kind}, where is the {a.kind}?", " ".join(words),
               a.held or b.held)


def _compare(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """Shapes that are there; absent ones only if all are equally many, so that yes is possible."""
    times = Counter(t.shape for t in scene.things)
    held = {shape for _, shape in _held_counts(scene.things)}
    for a, b in permutations(times if len(set(times.values())) > 1 else SHAPES, 2):
        if times[a] or times[b]:
            answer = "yes" if times[a] > times[b] else "no"
            yield f"Are there more {PLURAL[a]} than {PLURAL[b]}?", answer, a in held or b in held


def _read(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    if scene.number is not None:
        yield "What number is there?", scene.number, scene.number in HELD_NUMBERS


def _describe(text: str, order: Callable, scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """All there is, each with its place: one caption teaches what and where."""
    parts = [(t.cell, f"a {t.size} {t.kind}") for t in scene.things]
    if scene.number is not None:
        parts.append((scene.number_cell, f"the number {scene.number}"))
    *rest, last = [f"{what} at the {POSITIONS[cell]}" for cell, what in order(parts)]
    unseen = (bool(_held_counts(scene.things)) or any(t.held for t in scene.things)
              or scene.number in HELD_NUMBERS)
    yield text, f"{', '.join(rest)} and {last}", unseen


def _shuffled(parts: list) -> list:
    """For training: in reading order the next place is guessed, not looked up."""
    return random.Random(str(parts)).sample(parts, len(parts))


def _single(scene: Scene, of: str) -> list[Thing]:
    """The things whose color, shape, kind or cell no other thing has."""
    times = Counter(getattr(t, of) for t in scene.things)
    return [t for t in scene.things if times[getattr(t, of)] == 1]


ASK = {"color": partial(_lookup, {"shape": "What color is the {0.shape}?"}, "{0.color}"),
       "shape": partial(_lookup, {"color": "What shape is the {0.color} thing?"}, "{0.shape}"),
       "where": partial(_lookup, {"kind": "Where is the {0.kind}?",
                                  "shape": "Where is the {0.shape}?",
                                  "color": "Where is the {0.color} thing?"}, "{1}"),
       "what": partial(_lookup, {"cell": "What is at the {1}?"}, "a {0.size} {0.kind}"),
       "count": _count, "sum": _sum, "exist": _exist, "relation": _relation, "compare": _compare,
       "read": _read, "caption": partial(_describe, "Describe the picture.", sorted),
       "list": partial(_describe, "List the things.", _shuffled)}


def ask(scene: Scene, skill: str, rng: random.Random, heldout: bool,
        given: Counter[str] | None = None) -> Question | None:
    """A question about something held out of training, or nothing so; None where there is none.

    The answer is drawn first, of those `given` least often so far, then a question that has it:
    otherwise the common answers ("no", "0") would win without a look at the picture.
    """
    given = given or Counter()
    pool = sorted((answer, text) for text, answer, unseen in ASK[skill](scene) if unseen == heldout)
    if not pool:
        return None
    wanted = min(dict(pool), key=lambda answer: (given[answer], rng.random()))
    text = rng.choice([text for answer, text in pool if answer == wanted])
    return Question(skill, text, wanted, heldout)


# Samples

def _conversation(seed: int, split: str, index: int, n_questions: int,
                  described: float, fewest: int = 2) -> tuple[Scene, tuple[Turn, ...]]:
    """A scene and its caption alone, or distinct questions, fewer than asked if it has no more.

    Never both: a caption before a question would answer it, and teach to read instead of to see.
    """
    scene = make_scene(seed, split, index, fewest)
    rng = random.Random(f"{seed}/{split}/{index}/ask")
    asked: dict[str, Question] = {}
    skills = (rng.choices(list(WEIGHTS), WEIGHTS.values())[0] for _ in range(50 * n_questions))
    if rng.random() < described:
        skills, n_questions = chain([rng.choice(("caption", "list"))], skills), 1
    for skill in skills:
        if question := ask(scene, skill, rng, heldout=False):
            asked.setdefault(question.text, question)
        if len(asked) == n_questions:
            break
    turns = [turn for q in asked.values()
             for turn in (Turn("user", q.text), Turn("assistant", q.answer))]
    return scene, (Turn("user", f"<image>{turns[0].text}"), *turns[1:])


def train_sample(seed: int, split: str, index: int, n_questions: int, described: float,
                 fewest: int = 2) -> Sample:
    """One conversation: its caption for a share `described` of the scenes, else questions.

    Never about anything held out.
    """
    scene, turns = _conversation(seed, split, index, n_questions, described, fewest)
    return Sample(turns, (draw(scene),), row=f"world {split} {index}")


def questions(seed: int, split: str, n_per_skill: int) -> Iterator[tuple[Sample, Question]]:
    """For scoring: `n_per_skill` single questions of each skill, each on its own scene.

    Answers are balanced. Of `test` half are unseen, the others on scenes with nothing held out.
    """
    n_unseen = n_per_skill // 2 if split == "test" else 0
    missing = {(skill, unseen): n_unseen if unseen else n_per_skill - n_unseen
               for skill in SKILLS for unseen in (False, True)}
    given: dict[tuple[str, bool], Counter[str]] = {key: Counter() for key in missing}
    for index in takewhile(lambda _: any(missing.values()), count()):
        scene, unseen = make_scene(seed, split, index), theme_of(split, index) is not None
        rng = random.Random(f"{seed}/{split}/{index}/score")
        skills = [s for s in SKILLS if missing[s, unseen]]
        for skill in sorted(skills, key=lambda s: -missing[s, unseen]):
            if question := ask(scene, skill, rng, unseen, given[skill, unseen]):
                missing[skill, unseen] -= 1
                given[skill, unseen][question.answer] += 1
                turns = Turn("user", f"<image>{question.text}"), Turn("assistant", question.answer)
                yield Sample(turns, (draw(scene),), row=f"world {split} {index}"), question
                break


def corpus(n: int = 2000) -> Iterator[str]:
    """The text of n training conversations with their speakers, for training a tokenizer.

    The first question stands alone once more: behind a picture it has no space in front.
    """
    for index in range(n):
        _, turns = _conversation(0, "train", index, 8, 0.25)
        yield turns[0].text.removeprefix("<image>")
        said = [f"{role.capitalize()}: {text.removeprefix('<image>')}" for role, text in turns]
        yield "\n".join(said) + "\n\n"


if __name__ == "__main__":
    path, index = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    draw(make_scene(0, "test", index)).save(path)
    print(f"scene {index} of the test split: {path}")

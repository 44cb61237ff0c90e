"""Questions, captions and conversations about the scenes of the built-in dataset."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, count, permutations, product, takewhile

from data.types import Sample, Turn
from data.world import scenes
from data.world.drawing import draw
from data.world.scenes import COLORS, PLURAL, POSITIONS, SHAPES, Scene, Thing, held_counts

# Relative frequency of each skill in training; harder skills are more frequent.
WEIGHTS = {"color": 2, "shape": 1, "count": 2, "where": 4, "what": 2, "exist": 2, "relation": 4,
           "compare": 3, "read": 2, "sum": 3}  # fmt: skip
SKILLS = (*(skill for skill in WEIGHTS if skill != "sum"), "caption")  # scored in the test


@dataclass(frozen=True)
class Question:
    skill: str
    text: str
    answer: str
    unseen: bool  # about held-out content


def _lookup(ways: dict[str, str], answer: str, scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """One question about each thing whose color, shape, kind or cell is unique."""
    for of, text in ways.items():
        for t in _single(scene, of):
            yield text.format(t, POSITIONS[t.cell]), answer.format(t, POSITIONS[t.cell]), t.held


def _count(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """Only half of the scenes ask about absent kinds; otherwise most answers would be 0."""
    shapes, colors = (Counter(getattr(t, of) for t in scene.things) for of in ("shape", "color"))
    held = {shape for _, shape in held_counts(scene.things)}
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
    """For training only: sums mention every shape with every number, even with held-out counts."""
    rng = random.Random(scene.noise)
    for of, names in (("shape", PLURAL), ("color", {c: f"{c} things" for c in COLORS})):
        times = Counter(getattr(t, of) for t in scene.things)
        for few in (few for n in (2, 3) for few in combinations(names, n)):
            *rest, last = rng.sample([names[x] for x in few], len(few))
            if total := sum(times[x] for x in few):
                yield f"How many {', '.join(rest)} and {last} are there?", str(total), False


def _exist(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """Hard negatives: color and shape both occur, but on different things; else only one occurs."""
    here = {(t.color, t.shape) for t in scene.things}
    colors, shapes = ({kind[i] for kind in here} for i in (0, 1))
    for unseen in (False, True):
        kinds = [kind for kind in product(COLORS, SHAPES) if (kind in scenes.HELD_PAIRS) == unseen]
        n_matches = {(c, s): (c in colors) + (s in shapes) for c, s in kinds if (c, s) not in here}
        negatives = {kind for kind in n_matches if n_matches[kind] == max(n_matches.values())}
        for color, shape in here.intersection(kinds) | negatives:
            article = "an" if color == "orange" else "a"
            answer = "yes" if (color, shape) in here else "no"
            yield f"Is there {article} {color} {shape}?", answer, unseen


def _relation(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """The direction from one thing to another. Eight answers are harder to guess than yes or no."""
    for a, b in permutations(_single(scene, "kind"), 2):
        (row_a, column_a), (row_b, column_b) = divmod(a.cell, 3), divmod(b.cell, 3)
        words = [("above", "below")[row_a > row_b]] * (row_a != row_b)
        words += [("left", "right")[column_a > column_b]] * (column_a != column_b)
        yield (f"Seen from the {b.kind}, where is the {a.kind}?", " ".join(words), a.held or b.held)


def _compare(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """Compare shapes in the scene; absent ones only if all counts are equal, so that yes occurs."""
    times = Counter(t.shape for t in scene.things)
    held = {shape for _, shape in held_counts(scene.things)}
    for a, b in permutations(times if len(set(times.values())) > 1 else SHAPES, 2):
        if times[a] or times[b]:
            answer = "yes" if times[a] > times[b] else "no"
            yield f"Are there more {PLURAL[a]} than {PLURAL[b]}?", answer, a in held or b in held


def _read(scene: Scene) -> Iterator[tuple[str, str, bool]]:
    if scene.number is not None:
        yield "What number is there?", scene.number, scene.number in scenes.HELD_NUMBERS


def _describe(text: str, order: Callable, scene: Scene) -> Iterator[tuple[str, str, bool]]:
    """All things with their positions: a caption supervises both."""
    parts = [(t.cell, f"a {t.size} {t.kind}") for t in scene.things]
    if scene.number is not None:
        parts.append((scene.number_cell, f"the number {scene.number}"))
    *rest, last = [f"{what} at the {POSITIONS[cell]}" for cell, what in order(parts)]
    unseen = any(t.held for t in scene.things) or scene.number in scenes.HELD_NUMBERS
    yield text, f"{', '.join(rest)} and {last}", unseen or bool(held_counts(scene.things))


def _shuffled(parts: list) -> list:
    """Random order, for training: in reading order the next position could be guessed."""
    return random.Random(str(parts)).sample(parts, len(parts))


def _single(scene: Scene, of: str) -> list[Thing]:
    """The things whose color, shape, kind or cell (`of`) is unique in the scene."""
    times = Counter(getattr(t, of) for t in scene.things)
    return [t for t in scene.things if times[getattr(t, of)] == 1]


WHERE = {"kind": "Where is the {0.kind}?", "shape": "Where is the {0.shape}?",
         "color": "Where is the {0.color} thing?"}  # fmt: skip
ASK = {
    "color": partial(_lookup, {"shape": "What color is the {0.shape}?"}, "{0.color}"),
    "shape": partial(_lookup, {"color": "What shape is the {0.color} thing?"}, "{0.shape}"),
    "where": partial(_lookup, WHERE, "{1}"),
    "what": partial(_lookup, {"cell": "What is at the {1}?"}, "a {0.size} {0.kind}"),
    "count": _count,
    "sum": _sum,
    "exist": _exist,
    "relation": _relation,
    "compare": _compare,
    "read": _read,
    "caption": partial(_describe, "Describe the picture.", sorted),
    "list": partial(_describe, "List the things.", _shuffled),
}


def ask(
    scene: Scene, skill: str, rng: random.Random, heldout: bool, given: Counter[str] | None = None
) -> Question | None:
    """A question about held-out content if `heldout`, else about other content; or None.

    First choose the answer that was `given` least often so far, then a question with that answer.
    Without this balance, a model that ignores the image would often be right with "no" or "0".
    """
    given = given or Counter()
    pool = sorted((answer, text) for text, answer, unseen in ASK[skill](scene) if unseen == heldout)
    if not pool:
        return None
    wanted = min(dict(pool), key=lambda answer: (given[answer], rng.random()))
    text = rng.choice([text for answer, text in pool if answer == wanted])
    return Question(skill, text, wanted, heldout)


def train_sample(
    seed: int, split: str, index: int, n_questions: int, caption_fraction: float,
    min_shapes: int = 2,
) -> Sample:  # fmt: skip
    """A scene with a caption (with probability `caption_fraction`) or `n_questions` questions.

    Never both: a caption would answer the questions without the image.
    Questions are distinct and avoid held-out content.
    """
    scene = scenes.make_scene(seed, split, index, min_shapes)
    rng = random.Random(f"{seed}/{split}/{index}/ask")
    asked: dict[str, Question] = {}
    weights = list(WEIGHTS.values())
    skills = (rng.choices(list(WEIGHTS), weights)[0] for _ in range(50 * n_questions))
    if rng.random() < caption_fraction:
        skills, n_questions = chain([rng.choice(("caption", "list"))], skills), 1
    for skill in skills:
        if question := ask(scene, skill, rng, heldout=False):
            asked.setdefault(question.text, question)
        if len(asked) == n_questions:
            break
    return _sample(scene, asked.values(), f"world {split} {index}")


def _sample(scene: Scene, asked: Iterable[Question], row: str) -> Sample:
    """Alternating questions and answers; the image precedes the first question."""
    turns = [Turn(*turn) for q in asked for turn in (("user", q.text), ("assistant", q.answer))]
    turns[0] = Turn("user", f"<image>{turns[0].text}")
    return Sample(tuple(turns), (draw(scene),), row)


def questions(seed: int, split: str, n_per_skill: int) -> Iterator[tuple[Sample, Question]]:
    """For scoring: `n_per_skill` questions per skill, each about a different scene.

    Answers are balanced. Half of the `test` questions are unseen (about held-out content).
    """
    n_unseen = n_per_skill // 2 if split == "test" else 0
    wanted = {False: n_per_skill - n_unseen, True: n_unseen}
    missing = {(skill, unseen): n for skill in SKILLS for unseen, n in wanted.items()}
    given: dict[tuple[str, bool], Counter[str]] = {key: Counter() for key in missing}
    for index in takewhile(lambda _: any(missing.values()), count()):
        scene = scenes.make_scene(seed, split, index)
        unseen = scenes.theme_of(split, index) is not None
        rng = random.Random(f"{seed}/{split}/{index}/score")
        skills = [s for s in SKILLS if missing[s, unseen]]
        for skill in sorted(skills, key=lambda s: -missing[s, unseen]):
            if question := ask(scene, skill, rng, unseen, given[skill, unseen]):
                missing[skill, unseen] -= 1
                given[skill, unseen][question.answer] += 1
                yield _sample(scene, [question], f"world {split} {index}"), question
                break


def corpus(n: int = 2000) -> Iterator[str]:
    """The text of n training conversations with their roles, to train a tokenizer.

    The first question is repeated without its role, as no space precedes it after an image.
    """
    for index in range(n):
        turns = train_sample(0, "train", index, 8, 0.25).turns
        yield turns[0].text.removeprefix("<image>")
        lines = [f"{role.capitalize()}: {text.removeprefix('<image>')}" for role, text in turns]
        yield "\n".join(lines) + "\n\n"

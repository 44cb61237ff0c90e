"""The built-in dataset: reproducible scenes, correct answers, held-out content only in `test`."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from configs import PRESETS
from data.world import drawing, questions, scenes

COLOR, SHAPE = "|".join(scenes.COLORS), "|".join(scenes.SHAPES)
MANY = "|".join(scenes.PLURAL.values())
GRID = [
    ["top left", "top", "top right"],
    ["left", "center", "right"],
    ["bottom left", "bottom", "bottom right"],
]
PER_SKILL = 300
DESCRIBED = {"Describe the picture.", "List the things."}


@pytest.fixture(scope="module")
def scored():
    """(scene, question) of a whole test; the scene is looked up by the row of the sample."""
    pairs = [
        (int(sample.row.split()[-1]), question)
        for sample, question in questions.questions(0, "test", PER_SKILL)
    ]
    assert len({index for index, _ in pairs}) == len(pairs), "two questions on one scene"
    return [(scenes.make_scene(0, "test", index), question) for index, question in pairs]


@pytest.fixture(scope="module")
def conversations():
    sample = questions.train_sample
    return [
        (split, scenes.make_scene(0, split, index), sample(0, split, index, 8, 0.25).turns)
        for split in ("train", "val")
        for index in range(1500)
    ]


def singular(plural: str) -> str:
    return next(shape for shape in scenes.SHAPES if plural in (shape + "s", shape + "es"))


def solve(scene: scenes.Scene, text: str) -> list[str]:
    """All answers that fit the things; a single answer means that the question is unambiguous."""
    things = [(t.cell // 3, t.cell % 3, t.color, t.shape, t.size) for t in scene.things]

    def find(words: str) -> list[tuple]:
        return [t for t in things if f"{t[2]} {t[3]}" == words]

    def fits(thing: tuple, color: str | None, shape: str) -> bool:
        return color in (None, thing[2]) and shape in ("thing", thing[3])

    if m := re.fullmatch(f"What color is the ({SHAPE})\\?", text):
        return [t[2] for t in things if t[3] == m[1]]
    if m := re.fullmatch(f"What shape is the ({COLOR}) thing\\?", text):
        return [t[3] for t in things if t[2] == m[1]]
    if m := re.fullmatch("What (color|shape) is the thing at the ([a-z ]+)\\?", text):
        return [t[2 if m[1] == "color" else 3] for t in things if GRID[t[0]][t[1]] == m[2]]
    if m := re.fullmatch("How many ([a-z, ]+) and ([a-z ]+) are there\\?", text):
        names = [*m[1].split(", "), m[2]]
        of = 2 if names[0].endswith(" things") else 3
        wanted = [name.removesuffix(" things") if of == 2 else singular(name) for name in names]
        return [str(sum(t[of] in wanted for t in things))]
    if m := re.fullmatch(f"How many (?:(?:({COLOR}) )?things|({MANY})) are there\\?", text):
        return [
            str(
                sum(
                    (not m[1] or t[2] == m[1]) and (not m[2] or t[3] == singular(m[2]))
                    for t in things
                )
            )
        ]
    if m := re.fullmatch(f"Where is the (?:({COLOR}) )?(thing|{SHAPE})\\?", text):
        return [GRID[t[0]][t[1]] for t in things if fits(t, m[1], m[2])]
    if m := re.fullmatch("What is at the ([a-z ]+)\\?", text):
        return [
            f"a {size} {color} {shape}" for r, c, color, shape, size in things if GRID[r][c] == m[1]
        ]
    if m := re.fullmatch(f"Is there an? ((?:{COLOR}) (?:{SHAPE}))\\?", text):
        return ["yes" if find(m[1]) else "no"]
    if m := re.fullmatch("Seen from the (\\w+ \\w+), where is the (\\w+ \\w+)\\?", text):
        ways = {(-1, 0): "above", (1, 0): "below", (0, -1): "left", (0, 1): "right"}
        return [
            " ".join(
                ways[way]
                for way in ((np.sign(b[0] - a[0]), 0), (0, np.sign(b[1] - a[1])))
                if way in ways
            )
            for a in find(m[1])
            for b in find(m[2])
        ]
    if m := re.fullmatch(f"Are there more ({MANY}) than ({MANY})\\?", text):
        a, b = (sum(t[3] == singular(word) for t in things) for word in m.groups())
        return ["yes" if a > b else "no"]
    if text == "What number is there?":
        return [scene.number] if scene.number else []
    assert text == "Describe the picture.", text
    words = {row * 3 + col: f"a {size} {color} {shape}" for row, col, color, shape, size in things}
    if scene.number:
        words[scene.number_cell] = f"the number {scene.number}"
    *rest, last = [f"{words[cell]} at the {scenes.POSITIONS[cell]}" for cell in sorted(words)]
    return [", ".join(rest) + " and " + last]


def in_reading_order(listed: str) -> str:
    """The caption for a list of things: the same parts in reading order."""
    parts = re.split(", | and ", listed)
    *rest, last = sorted(parts, key=lambda part: scenes.POSITIONS.index(part.split(" at the ")[1]))
    return ", ".join(rest) + " and " + last


def held_kinds(scene: scenes.Scene) -> set[str]:
    """The kinds of held-out content in the scene."""
    shapes = [t.shape for t in scene.things]
    return (
        {"pair" for t in scene.things if (t.color, t.shape) in scenes.HELD_PAIRS}
        | {"count" for n, shape in scenes.HELD_COUNTS if shapes.count(shape) == n}
        | {"number" for _ in [0] if scene.number in scenes.HELD_NUMBERS}
    )


def concerns_held(scene: scenes.Scene, question: questions.Question) -> bool:
    """Whether the question is about held-out content, judged from its words."""
    shapes, text = [t.shape for t in scene.things], f"{question.text} {question.answer}"
    pairs = {f"{color} {shape}" for color, shape in scenes.HELD_PAIRS}
    if question.skill in ("color", "shape"):
        text = " ".join(
            (question.answer, *re.findall(SHAPE, question.text))
            if question.skill == "color"
            else (*re.findall(COLOR, question.text), question.answer)
        )
    if question.skill == "read":
        return question.answer in scenes.HELD_NUMBERS
    if m := re.fullmatch("What (?:color|shape) is the thing at the (.*)\\?", question.text):
        return any(t.held for t in scene.things if scenes.POSITIONS[t.cell] == m[1])
    if question.skill == "where":  # the question may name only a color or a shape
        return any(t.held for t in scene.things if scenes.POSITIONS[t.cell] == question.answer)
    asked = {singular(word) for word in re.findall(MANY, question.text)}
    counts = set(scenes.SHAPES) if question.skill == "caption" else asked
    if question.skill == "caption" and scene.number in scenes.HELD_NUMBERS:
        return True
    return any(pair in text for pair in pairs) or any(
        shapes.count(shape) == n for n, shape in scenes.HELD_COUNTS if shape in counts
    )


def test_scenes_never_change():
    digest = hashlib.sha256()
    for split, index in (
        ("train", 0),
        ("train", 1),
        ("val", 0),
        ("test", 1),
        ("test", 3),
        ("test", 9),
    ):
        sample = questions.train_sample(7, split, index, 6, 0.25)
        assert sample == replace(
            sample, images=questions.train_sample(7, split, index, 6, 0.25).images
        )
        digest.update(np.asarray(sample.images[0]).tobytes() + repr(sample.turns).encode())
    assert digest.hexdigest()[:16] == "16544c5b8fd2ec2e"
    assert (
        scenes.make_scene(0, "train", 5)
        != scenes.make_scene(0, "val", 5)
        != scenes.make_scene(1, "val", 5)
    )


def test_sample_is_one_conversation():
    """Questions or a caption, never both: a caption would answer the questions."""
    n_described = 0
    for index in range(200):
        sample = questions.train_sample(0, "train", index, 8, 0.25)
        users, answers = sample.turns[::2], sample.turns[1::2]
        described = users[0].text.removeprefix("<image>") in DESCRIBED
        n_described += described
        n_turns = 1 if described else 8
        assert [turn.role for turn in sample.turns] == ["user", "assistant"] * n_turns
        assert users[0].text.startswith("<image>")
        assert not any("<image>" in turn.text for turn in sample.turns[1:])
        assert len({turn.text.removeprefix("<image>") for turn in users}) == len(answers) == n_turns
        assert described or not DESCRIBED & {turn.text for turn in users}
        assert sample.row == f"world train {index}"
        assert sample.images[0].size == (48, 48) and sample.images[0].mode == "RGB"
    assert 30 <= n_described <= 70
    for share, wanted in ((0.0, 0), (1.0, 50)):
        turns = [questions.train_sample(0, "train", i, 8, share).turns for i in range(50)]
        asked = Counter(t[0].text.removeprefix("<image>") for t in turns)
        assert sum(asked[text] for text in DESCRIBED) == wanted
    assert min(asked[text] for text in DESCRIBED) >= 15  # both kinds


def test_training_has_no_held_out_content(conversations):
    banned = [f"{color} {shape}" for color, shape in scenes.HELD_PAIRS] + sorted(
        scenes.HELD_NUMBERS
    )
    for _, scene, turns in conversations:
        assert not held_kinds(scene)
        text = " ".join(turn.text for turn in turns)
        assert not any(words in text for words in banned), text
    assert not any(words in text for text in islice(questions.corpus(), 50) for words in banned)
    for split in ("train", "val"):
        assert not any(question.unseen for _, question in questions.questions(0, split, 10))


def test_half_of_the_test_scenes_have_held_out_content():
    themes = Counter(
        frozenset(held_kinds(scenes.make_scene(0, "test", index))) for index in range(1000)
    )
    assert themes[frozenset()] == 500
    assert {"pair", "count", "number"} == set().union(*themes)


def test_every_question_has_exactly_one_answer(scored, conversations):
    for scene, question in scored:
        assert solve(scene, question.text) == [question.answer], (scene, question)
    for _, scene, turns in conversations[::5]:
        for user, assistant in zip(turns[::2], turns[1::2]):
            text, answer = user.text.removeprefix("<image>"), assistant.text
            if text == "List the things.":  # in any order
                text, answer = "Describe the picture.", in_reading_order(answer)
            assert solve(scene, text) == [answer], (scene, user)


def test_every_candidate_question_is_correct():
    """All candidates of each skill, on scenes of every theme."""
    for index in range(150):
        scene = scenes.make_scene(3, "test", index)
        for skill in questions.SKILLS:
            for text, answer, unseen in questions.ASK[skill](scene):
                assert solve(scene, text) == [answer]
                question = questions.Question(skill, text, answer, unseen)
                assert concerns_held(scene, question) == unseen, (scene, question)


def test_seen_and_unseen(scored):
    for skill in questions.SKILLS:
        mine = [(scene, question) for scene, question in scored if question.skill == skill]
        assert len(mine) == PER_SKILL
        assert sum(question.unseen for _, question in mine) == PER_SKILL // 2
        assert all(question.unseen or not held_kinds(scene) for scene, question in mine)
        assert all(question.unseen == concerns_held(scene, question) for scene, question in mine)


def test_answers_are_balanced(scored, conversations):
    answers = {
        skill: Counter(q.answer for _, q in scored if q.skill == skill)
        for skill in questions.SKILLS
    }
    for skill in ("exist", "compare"):
        assert answers[skill] == {"yes": PER_SKILL // 2, "no": PER_SKILL // 2}
    ways = Counter(answers["relation"])
    assert len(ways) == 8 and max(ways.values()) < 1.5 * min(ways.values())
    assert np.mean([max(given.values()) / PER_SKILL for given in answers.values()]) < 0.45
    given = Counter(
        (re.sub("^<image>", "", user.text)[:9], answer.text)
        for _, _, turns in conversations
        for user, answer in zip(turns[::2], turns[1::2])
    )
    for start in ("Is there ", "Are there"):
        assert 0.45 < given[start, "yes"] / (given[start, "yes"] + given[start, "no"]) < 0.55
    n_counts = sum(n for (start, _), n in given.items() if start == "How many ")
    assert given["How many ", "0"] / n_counts < 0.2


def test_negatives_are_hard(scored):
    """Color and shape of an absent thing both occur on other things if possible."""
    for scene, question in scored:
        if question.skill == "exist" and question.answer == "no":
            here = {(t.color, t.shape) for t in scene.things}
            crossed = {(color, shape) for color, _ in here for _, shape in here} - here
            crossed = (
                crossed & scenes.HELD_PAIRS if question.unseen else crossed - scenes.HELD_PAIRS
            )
            asked = tuple(question.text.rstrip("?").split()[-2:])
            assert (
                asked in crossed
                if crossed
                else set(asked) & {word for kind in here for word in kind}
            )


def test_drawings_stay_in_their_cells():
    for index in range(300):
        scene = scenes.make_scene(1, "test", index)
        bare = np.asarray(drawing.draw(replace(scene, things=(), number=None)), np.int16)
        changed = abs(np.asarray(drawing.draw(scene), np.int16) - bare).sum(2).reshape(3, 16, 3, 16)
        occupied = {t.cell for t in scene.things} | ({scene.number_cell} if scene.number else set())
        assert len(occupied) == len(scene.things) + bool(scene.number)
        assert [t.cell for t in scene.things] == sorted(t.cell for t in scene.things)
        assert {cell for cell in range(9) if changed[cell // 3, :, cell % 3].max() > 60} == occupied
        assert not any(changed[cell // 3, :, cell % 3].any() for cell in set(range(9)) - occupied)
    for shape in scenes.SHAPES:  # even with maximum offset, nothing reaches the border
        for size, (_, reach) in scenes.SIZES.items():
            middle = drawing._coverage(shape, size, 0, 0).sum()
            for dx, dy in ((-reach, -reach), (reach, -reach), (-reach, reach), (reach, reach)):
                moved = drawing._coverage(shape, size, dx, dy).sum()
                assert abs(moved / middle - 1) < 0.05


def test_colors_are_distinct():
    def distance(a, b):
        return np.linalg.norm(np.subtract(a, b))

    colors = list(scenes.COLORS.values())
    assert all(distance(a, b) > 100 for a in colors for b in scenes.BACKGROUNDS.values())
    assert all(distance(a, b) > 80 for i, a in enumerate(colors) for b in colors[:i])


def test_held_out_by_design():
    assert Counter(shape for _, shape in scenes.HELD_PAIRS) == dict.fromkeys(scenes.SHAPES, 1)
    assert len({color for color, _ in scenes.HELD_PAIRS}) == 5
    tens, units = zip(*scenes.HELD_NUMBERS)
    assert len(set(tens)) == len(set(units)) == 9


def test_ask_returns_none_without_candidates():
    scene = replace(scenes.make_scene(0, "train", 0), number=None, number_cell=-1)
    assert questions.ask(scene, "read", random.Random(0), heldout=False) is None
    assert questions.ask(scene, "where", random.Random(0), heldout=True) is None


def test_scenes_of_one_shape_have_larger_counts():
    """With the settings of tiny-long; held-out content never occurs."""
    drawn = [scenes.make_scene(2, "train", i, PRESETS["tiny-long"].data.world_min_shapes)
              for i in range(600)]  # fmt: skip
    times = [n for scene in drawn for n in Counter(t.shape for t in scene.things).values()]
    others = [scenes.make_scene(2, "train", i) for i in range(600)]
    usual = [n for scene in others for n in Counter(t.shape for t in scene.things).values()]
    assert times.count(4) > 1.5 * usual.count(4) and times.count(5) > 5 * usual.count(5) > 0
    assert not any(held_kinds(scene) for scene in drawn)


def test_label():
    for scene in (scenes.make_scene(0, "train", index) for index in range(100)):
        shapes = [t.shape for t in scene.things]
        most = max(map(shapes.count, shapes))
        assert scenes.label(scene) == next(shape for shape in shapes if shapes.count(shape) == most)

"""How good a model is: loss on held-out batches, and answers to questions, scored per skill.

Not here: the metrics themselves (scoring.py), what is asked (tasks/), training (loop.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from config_tools import InputError
from configs import DataConfig
from data.batches.loader import Loader
from data.processor import Processor
from data.sources.fetch import resolve_image
from data.sources.open import open_source
from data.sources.rows import open_rows
from data.types import Sample, Tokens, Turn
from data.world import questions
from engine.evaluation.metrics import Metric, any_exact, bootstrap_interval, each
from engine.inference.chat import Chat
from models.inference.sampling import Sampling

SHOWN = 10  # answers that an evaluation logs and a sheet shows
VIEWS = ("answer", "blind", "shuffled")  # the picture; mid grey; another question's picture


@dataclass(frozen=True)
class Item:
    """One question to score: the prompt is everything before the last answer."""

    sample: Sample
    skill: str
    unseen: bool = False  # about a combination that never occurs in training
    references: tuple[str, ...] = ()  # right answers; without any, the sample's last turn
    choices: tuple[str, ...] = ()  # of which one is right, where it is multiple choice

    @property
    def question(self) -> str:
        """What was asked last; "" where all that is learned is an answer."""
        turns = self.sample.turns
        return turns[-2].text if len(turns) > 1 else ""

    @property
    def expected(self) -> str:
        return self.right[0]

    @property
    def right(self) -> tuple[str, ...]:
        return self.references or (self.sample.turns[-1].text,)


@dataclass(frozen=True)
class Task:
    """What is asked and what an answer is worth; see tasks/."""

    items: Callable[[DataConfig, str, int], Sequence[Item]]  # (data, split, at most so many)
    metric: Metric = each(any_exact)
    source: str = ""  # asked for where the command names none
    also: Callable[[Sequence[str], Sequence[Sequence[str]]], dict] = lambda answers, right: {}


def items(cfg: DataConfig, split: str, n: int) -> list[Item]:
    """Up to `n` questions: over the world's skills, or a file's rows in a fixed random order."""
    if cfg.source == "world":
        per_skill = max(1, n // len(questions.SKILLS))
        return [
            Item(sample, q.skill, q.unseen)
            for sample, q in questions.questions(cfg.seed, split, per_skill)
        ]
    source = open_source(cfg, split)
    return [Item(source[i], "all") for i in chosen(source, n)]


def chosen(source, n: int) -> list[int]:
    """Numbers of `n` rows in a fixed random order."""
    return np.random.default_rng(0).permutation(len(source))[:n].tolist()


@dataclass(frozen=True)
class RowItems(Sequence):
    """Questions of a public data set, read when asked for: their pictures may be gigabytes."""

    rows: object  # a reader
    order: list[int]
    read: Callable[[dict], tuple]  # row -> prompt, picture, Item's fields from `skill` on

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> Item:
        k = self.order[i]
        where, row = self.rows.where(k), self.rows[k]
        try:
            prompt, picture, fields = self.read(row)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(
                f"{where}: not a row of this task ({type(error).__name__} {error}); it has "
                f"{', '.join(row)}."
            ) from None
        images = () if picture is None else (resolve_image(picture, self.rows.folder),)
        turns = Turn("user", "<image>" * len(images) + prompt), Turn("assistant", "")
        return Item(Sample(turns, images, where), **fields)


def row_items(read: Callable[[dict], tuple]) -> Callable[[DataConfig, str, int], RowItems]:
    """`Task.items` of a data set with columns of its own; `cfg.source` names the split."""

    def found(cfg: DataConfig, split: str, n: int) -> RowItems:
        rows = open_rows(cfg.source)
        return RowItems(rows, chosen(rows, n), read)

    return found


# --- Answers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    item: Item
    answer: str
    score: float


def prompt_of(chat: Chat, questions: Sequence[Item], i: int, view: str, max_tiles: int) -> Tokens:
    """Question i as a model sees it that looks, is blind, or looks at another picture.

    Blank pictures are mid grey; the other one is that of the question half the list away, or of
    the next after it with as many pictures. A picture that cannot be opened raises `InputError`:
    a score over other questions would mislead.
    """
    sample = questions[i].sample
    images, n = sample.images, len(questions)
    if view == "shuffled":
        order = [j for k in range(n) if (j := (i + n // 2 + k) % n) != i]
        others = (questions[j].sample.images for j in order)
        images = next((other for other in others if len(other) == len(images)), images)
    tokens = chat.processor.encode_prompt(sample.turns[:-1], images, max_tiles)
    if view != "blind":
        return tokens
    return Tokens(tokens.ids, tokens.supervised, np.full_like(tokens.tiles, 128))


def answer_views(
    chat: Chat,
    questions: Sequence[Item],
    which: Sequence[int],
    views: Sequence[str] = ("answer",),
    max_tiles: int = 1 << 30,
    max_new_tokens: int = 96,
) -> Iterator[tuple[int, dict[str, str]]]:
    """(i, its greedy answer in each view) for the i in `which`, as they are done."""
    asked = [(i, view) for i in which for view in views]
    prompts = (prompt_of(chat, questions, i, view, max_tiles) for i, view in asked)
    found: dict[int, dict[str, str]] = {}
    for number, reply in chat.replies(prompts, Sampling(max_new_tokens=max_new_tokens)):
        i, view = asked[number]
        found.setdefault(i, {})[view] = reply.text
        if len(found[i]) == len(views):
            yield i, found.pop(i)


def choose_views(
    chat: Chat,
    questions: Sequence[Item],
    which: Sequence[int],
    views: Sequence[str] = ("answer",),
    max_tiles: int = 1 << 30,
) -> Iterator[tuple[int, dict[str, str]]]:
    """(i, the likeliest of its choices in each view) for the i in `which`."""
    for i in which:
        choices, found = questions[i].choices, {}
        for view in views:
            shares = chat.choose(prompt_of(chat, questions, i, view, max_tiles), choices)
            found[view] = choices[max(range(len(choices)), key=shares.__getitem__)]
        yield i, found


def graded(questions: Sequence[Item], answers: Sequence[str], metric: Metric) -> list[Answered]:
    """Answers with their scores; of each skill only the first SHOWN keep their pictures."""
    kept, n_of = [], Counter()
    for item in questions:
        n_of[item.skill] += 1
        light = replace(item, sample=replace(item.sample, images=()))
        kept.append(item if n_of[item.skill] <= SHOWN else light)
    scores = metric(answers, [item.right for item in kept]) if kept else []
    return [Answered(*found) for found in zip(kept, answers, scores, strict=True)]


def answer_items(
    chat: Chat,
    questions: Sequence[Item],
    view: str = "answer",
    max_tiles: int = 1 << 30,
    max_new_tokens: int = 96,
    metric: Metric = each(any_exact),
) -> list[Answered]:
    """Greedy answers to all questions in one view, scored."""
    which = range(len(questions))
    found = dict(answer_views(chat, questions, which, (view,), max_tiles, max_new_tokens))
    return graded(questions, [found[i][view] for i in which], metric)


# --- Figures ------------------------------------------------------------------------------------


def by_skill(answered: Iterable[Answered]) -> dict[str, list[Answered]]:
    groups: dict[str, list[Answered]] = {}
    for a in answered:
        groups.setdefault(a.item.skill, []).append(a)
    return groups


def firsts(answered: Sequence[Answered]) -> list[Answered]:
    """The answers that an evaluation logs: SHOWN in all, as many of each skill."""
    groups = by_skill(answered)
    return [a for group in groups.values() for a in group[: max(1, SHOWN // len(groups))]]


def mean(answered: Sequence[Answered]) -> float | None:
    """Average score; None of nothing."""
    return sum(a.score for a in answered) / len(answered) if answered else None


def summary(views: dict[str, Sequence[Answered]]) -> dict:
    """The figures of score.py: accuracy, interval, seen and unseen apart, other views beside it."""
    answered = views["answer"]
    return {
        "accuracy": mean(answered),
        "interval": bootstrap_interval([a.score for a in answered]),
        "seen": mean([a for a in answered if not a.item.unseen]),
        "unseen": mean([a for a in answered if a.item.unseen]),
        **{view: mean(views[view]) for view in VIEWS[1:] if view in views},
        "n": len(answered),
    }


def report(views: dict[str, Sequence[Answered]]) -> dict:
    """`summary` over everything and, under `skills`, of each."""
    groups = {view: by_skill(answered) for view, answered in views.items()}
    skills = {
        skill: summary({view: groups[view][skill] for view in views}) for skill in groups["answer"]
    }
    return summary(views) | {"skills": skills}


@torch.inference_mode()
def validation_loss(model, loader: Loader, n_batches: int, region: torch.autocast) -> float:
    """Loss per target over the loader's next batches."""
    total, n_targets = 0.0, 0
    for batch in islice(iter(loader), n_batches):
        with region:
            _, loss = model(**batch.to(model.device).tensors(), reduction="sum")
        total, n_targets = total + loss.item(), n_targets + batch.n_targets
    return total / max(1, n_targets)


def askable(processor: Processor, cfg: DataConfig, n: int) -> tuple[list[Item], int]:
    """Validation questions whose pictures open and whose prompt fits; how many do not.

    A run goes on without those, where `items` would end it.
    """
    if cfg.source == "world":
        return items(cfg, "val", n), 0
    source, found = open_source(cfg, "val"), []
    numbers = chosen(source, n)
    for i in numbers:
        try:
            item = Item(source[i], "all")
            processor.encode_prompt(item.sample.turns[:-1], item.sample.images)
        except InputError:
            continue
        found.append(item)
    return found, len(numbers) - len(found)


def evaluate(
    model,
    processor: Processor,
    cfg: DataConfig,
    n_questions: int,
    region: torch.autocast,
    show: Callable[[Sequence[Answered]], object] | None = None,
) -> dict:
    """Validation loss, accuracy per skill and the first answers; empty without validation rows.

    Questions that cannot be asked, as of a broken picture, are left out and counted; of rows that
    give no loss it only says why, as `val_problem`. `show` gets the answers with their pictures.
    """
    source = open_source(cfg, "val")
    if len(source) == 0:
        return {}
    was_training = model.training
    model.eval()
    loader = Loader(source, processor, replace(cfg, workers=0))
    try:
        loss = validation_loss(model, loader, 2, region)
    except InputError as error:
        model.train(was_training)
        return {"val_problem": f"validation: {error}"}
    chat = Chat(model, processor)
    questions, n_lost = askable(processor, cfg, n_questions)
    answered = answer_items(chat, questions)
    model.train(was_training)
    if show is not None and answered:
        show(answered)
    groups = by_skill(answered)
    accuracies = {f"val_{skill}": round(mean(group), 4) for skill, group in groups.items()}
    return {
        "val_loss": round(loss, 4),
        "val_accuracy": round(mean(answered) or 0.0, 4),
        **accuracies,
        **({"val_left_out": n_lost} if n_lost else {}),
        "val_answers": [a.answer for a in firsts(answered)],
    }

"""Evaluation: loss on held-out batches, and answers to questions, scored per skill.

Not here: the metrics (metrics.py), the benchmarks (tasks/), training (loop.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from config_tools import InputError
from configs import DataConfig
from data.batches.loader import Loader
from data.processor import Processor
from data.sources.fetch import resolve_image
from data.sources.open import open_dataset, open_rows
from data.types import Sample, Tokens, Turn
from data.world import questions
from engine.evaluation.metrics import Metric, any_exact, bootstrap_interval, per_answer
from engine.inference.chat import Chat
from models.inference.sampling import Sampling

N_EXAMPLES = 10  # answers that an evaluation logs and an answer sheet shows
# With the question's image, a blank (mid-gray) image, or another question's image. Accuracy that
# survives the last two does not come from the image.
VIEWS = ("answer", "blind", "shuffled")
Views = Iterator[tuple[int, dict[str, str]]]  # (number of the question, answer by view)


@dataclass(frozen=True)
class Item:
    """A question to score: the prompt is every turn of `sample` but the last."""

    sample: Sample
    skill: str
    unseen: bool = False  # about a held-out combination, which training never contains
    references: tuple[str, ...] = ()  # correct answers; empty: the last turn of the sample
    choices: tuple[str, ...] = ()  # options of a multiple-choice question

    @property
    def question(self) -> str:
        """The last user turn; "" if the sample is only an answer."""
        turns = self.sample.turns
        return turns[-2].text if len(turns) > 1 else ""

    @property
    def correct(self) -> tuple[str, ...]:
        """All correct answers."""
        return self.references or (self.sample.turns[-1].text,)

    @property
    def expected(self) -> str:
        return self.correct[0]


@dataclass(frozen=True)
class Task:
    """A benchmark: its questions and its metric; see tasks/."""

    items: Callable[[DataConfig, str, int], Sequence[Item]]  # (data, split, maximum number)
    metric: Metric = per_answer(any_exact)
    source: str = ""  # default of data.source
    # (answers, correct answers of each) -> further figures
    extra_metrics: Callable[[Sequence[str], Sequence[Sequence[str]]], dict] = lambda a, c: {}


def load_items(cfg: DataConfig, split: str, n: int) -> list[Item]:
    """Up to `n` questions: `n` / skills of each skill of the world, or random rows of a file."""
    if cfg.source == "world":
        per_skill = max(1, n // len(questions.SKILLS))
        rows = questions.questions(cfg.seed, split, per_skill)
        return [Item(sample, q.skill, q.unseen) for sample, q in rows]
    source = open_dataset(cfg, split)
    return [Item(source[i], "all") for i in sample_rows(source, n)]


def sample_rows(source: Sized, n: int) -> list[int]:
    """Indices of up to `n` rows in a fixed random order."""
    return np.random.default_rng(0).permutation(len(source))[:n].tolist()


@dataclass(frozen=True)
class RowQuestions(Sequence):
    """Questions of a public dataset; images are loaded lazily, as they may be gigabytes."""

    rows: Any  # rows of a file (data/sources/open.py)
    order: list[int]
    read: Callable[[dict], tuple]  # row -> (prompt, image, fields of Item from `skill` on)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> Item:
        k = self.order[i]
        where, row = self.rows.where(k), self.rows[k]
        try:
            prompt, image, fields = self.read(row)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            reason = f"not a row of this task ({type(error).__name__} {error})"
            raise InputError(f"{where}: {reason}; its columns are {', '.join(row)}.") from None
        images = () if image is None else (resolve_image(image, self.rows.folder),)
        turns = Turn("user", "<image>" * len(images) + prompt), Turn("assistant", "")
        return Item(Sample(turns, images, where), **fields)


def row_questions(read: Callable[[dict], tuple]) -> Callable[[DataConfig, str, int], RowQuestions]:
    """`Task.items` of a public dataset: `read` maps its columns; `cfg.source` names the split."""

    def load(cfg: DataConfig, split: str, n: int) -> RowQuestions:
        rows = open_rows(cfg.source)
        return RowQuestions(rows, sample_rows(rows, n), read)

    return load


# --- Answers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """A question with the model's answer and its score, 0 to 1."""

    item: Item
    answer: str
    score: float


def encode_question(
    chat: Chat, questions: Sequence[Item], i: int, view: str, max_tiles: int
) -> Tokens:
    """Encode question `i` with its image (view answer), a blank one, or another question's.

    Blank images are mid-gray. The other question is half the list away, or the next one after it
    with as many images. Raises `InputError` if an image cannot be opened, because leaving the
    question out would change the score.
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


def generate_views(
    chat: Chat, questions: Sequence[Item], which: Sequence[int], views: Sequence[str],
    max_tiles: int = 1 << 30, max_new_tokens: int = 96,
) -> Views:  # fmt: skip
    """Yield (i, greedy answer by view) for each i in `which`, in the order they finish."""
    keys = [(i, view) for i in which for view in views]
    prompts = (encode_question(chat, questions, i, view, max_tiles) for i, view in keys)
    answers: dict[int, dict[str, str]] = {}
    for number, reply in chat.generate_replies(prompts, Sampling(max_new_tokens=max_new_tokens)):
        i, view = keys[number]
        answers.setdefault(i, {})[view] = reply.text
        if len(answers[i]) == len(views):
            yield i, answers.pop(i)


def choose_views(
    chat: Chat, questions: Sequence[Item], which: Sequence[int], views: Sequence[str],
    max_tiles: int = 1 << 30,
) -> Views:  # fmt: skip
    """Yield (i, most likely choice by view) for each i in `which`."""
    for i in which:
        choices, answers = questions[i].choices, {}
        for view in views:
            prompt = encode_question(chat, questions, i, view, max_tiles)
            probabilities = chat.choice_probabilities(prompt, choices)
            answers[view] = choices[max(range(len(choices)), key=probabilities.__getitem__)]
        yield i, answers


def score_answers(
    questions: Sequence[Item], answers: Sequence[str], metric: Metric
) -> list[Answered]:
    """Score answers; only the first N_EXAMPLES of each skill keep their images, to save memory."""
    kept, n_per_skill = [], Counter()
    for item in questions:
        n_per_skill[item.skill] += 1
        without_images = replace(item, sample=replace(item.sample, images=()))
        kept.append(item if n_per_skill[item.skill] <= N_EXAMPLES else without_images)
    scores = metric(answers, [item.correct for item in kept]) if kept else []
    return [Answered(*fields) for fields in zip(kept, answers, scores, strict=True)]


def answer_questions(
    chat: Chat, questions: Sequence[Item], view: str = "answer", **limits: int
) -> list[Answered]:
    """Greedy answers to all questions in one view, scored; `limits` as in `generate_views`."""
    which = range(len(questions))
    answers = dict(generate_views(chat, questions, which, (view,), **limits))
    return score_answers(questions, [answers[i][view] for i in which], per_answer(any_exact))


# --- Figures ------------------------------------------------------------------------------------


def by_skill(answered: Iterable[Answered]) -> dict[str, list[Answered]]:
    """Group answers by the skill of their question."""
    groups: dict[str, list[Answered]] = {}
    for a in answered:
        groups.setdefault(a.item.skill, []).append(a)
    return groups


def select_examples(answered: Sequence[Answered]) -> list[Answered]:
    """The answers that an evaluation logs: N_EXAMPLES in total, evenly over the skills."""
    groups = by_skill(answered)
    return [a for group in groups.values() for a in group[: max(1, N_EXAMPLES // len(groups))]]


def mean_score(answered: Sequence[Answered]) -> float | None:
    """Average score; None without answers."""
    return sum(a.score for a in answered) / len(answered) if answered else None


def summarize(views: Mapping[str, Sequence[Answered]]) -> dict:
    """Accuracy with its interval, on seen and unseen combinations, and in the other views."""
    answered = views["answer"]
    return {
        "accuracy": mean_score(answered),
        "interval": bootstrap_interval([a.score for a in answered]),
        "seen": mean_score([a for a in answered if not a.item.unseen]),
        "unseen": mean_score([a for a in answered if a.item.unseen]),
        **{view: mean_score(views[view]) for view in VIEWS[1:] if view in views},
        "n": len(answered),
    }


def summarize_skills(views: Mapping[str, Sequence[Answered]]) -> dict:
    """`summarize` over all questions and, under `skills`, for each skill."""
    groups = {view: by_skill(answered) for view, answered in views.items()}
    skills = {s: summarize({view: groups[view][s] for view in views}) for s in groups["answer"]}
    return summarize(views) | {"skills": skills}


@torch.inference_mode()
def validation_loss(
    model: Any, loader: Loader, n_batches: int, autocast_context: torch.autocast
) -> float:
    """Loss per supervised token over the next batches of the loader."""
    total, n_targets = 0.0, 0
    for batch in islice(iter(loader), n_batches):
        with autocast_context:
            _, loss = model(**batch.to(model.device).tensors(), reduction="sum")
        total, n_targets = total + loss.item(), n_targets + batch.n_targets
    return total / max(1, n_targets)


def load_answerable_items(processor: Processor, cfg: DataConfig, n: int) -> tuple[list[Item], int]:
    """Return (usable validation questions, number of unusable ones).

    A question is unusable if an image cannot be opened or the prompt is too long. `load_items`
    would raise; training continues without them.
    """
    if cfg.source == "world":
        return load_items(cfg, "val", n), 0
    source, items = open_dataset(cfg, "val"), []
    indices = sample_rows(source, n)
    for i in indices:
        try:
            item = Item(source[i], "all")
            processor.encode_prompt(item.sample.turns[:-1], item.sample.images)
        except InputError:
            continue
        items.append(item)
    return items, len(indices) - len(items)


def evaluate(
    model: Any, processor: Processor, cfg: DataConfig, n_questions: int,
    autocast_context: torch.autocast,
    on_answers: Callable[[Sequence[Answered]], object] | None = None,
) -> dict:  # fmt: skip
    """Validation loss, accuracy per skill and the first answers; {} without validation rows.

    Unusable questions, for example with a broken image, are skipped and counted as `val_left_out`.
    If the loss cannot be computed, returns only `val_problem`. `on_answers` gets the answers; the
    first of each skill keep their images.
    """
    source = open_dataset(cfg, "val")
    if len(source) == 0:
        return {}
    was_training = model.training
    model.eval()
    loader = Loader(source, processor, replace(cfg, workers=0))
    try:
        loss = validation_loss(model, loader, 2, autocast_context)
    except InputError as error:
        model.train(was_training)
        return {"val_problem": f"validation: {error}"}
    chat = Chat(model, processor)
    questions, n_skipped = load_answerable_items(processor, cfg, n_questions)
    answered = answer_questions(chat, questions)
    model.train(was_training)
    if on_answers is not None and answered:
        on_answers(answered)
    groups = by_skill(answered)
    groups = groups if len(groups) > 1 else {}  # a single one is val_accuracy
    scores = {skill: mean_score(group) or 0.0 for skill, group in groups.items()}
    return {
        "val_loss": round(loss, 4),
        "val_accuracy": round(mean_score(answered) or 0.0, 4),
        **{f"val_{skill}": round(score, 4) for skill, score in scores.items()},
        **({"val_left_out": n_skipped} if n_skipped else {}),
        "val_answers": [a.answer for a in select_examples(answered)],
    }

"""How good a model is: loss on held-out batches, and exact answers by greedy generation, per skill.

Not here: the metrics themselves (scoring.py), training (loop.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from configs import DataConfig, InputError
from data import world
from data.loader import Loader
from data.processor import Processor
from data.sample import Sample, Tokens
from data.sources import open_source
from engine.chat import Chat
from engine.scoring import bootstrap_interval, exact
from models.generation import Sampling


@dataclass(frozen=True)
class Item:
    """One question to score: the prompt is everything before the last answer."""

    sample: Sample
    skill: str
    unseen: bool  # about a combination that never occurs in training

    @property
    def expected(self) -> str:
        return self.sample.turns[-1].text


def items(cfg: DataConfig, split: str, n: int) -> list[Item]:
    """Up to `n` questions: over the world's skills, or a file's rows in a fixed random order."""
    if cfg.source == "world":
        per_skill = max(1, n // len(world.SKILLS))
        return [
            Item(sample, q.skill, q.unseen)
            for sample, q in world.questions(cfg.seed, split, per_skill)
        ]
    source = open_source(cfg, split)
    order = np.random.default_rng(0).permutation(len(source))[:n]
    return [Item(source[int(i)], "all", False) for i in order]


@dataclass(frozen=True)
class Answered:
    item: Item
    answer: str

    @property
    def score(self) -> float:
        return exact(self.answer, self.item.expected)


def answer_items(
    chat: Chat,
    questions: Sequence[Item],
    blind: bool = False,
    max_tiles: int = 1 << 30,
    max_new_tokens: int = 96,
) -> list[Answered]:
    """Greedy answers to the questions.

    `blind` blanks every picture to mid grey: what is then still right was guessed. A picture that
    cannot be opened raises `InputError`: a score over other questions would mislead.
    """
    prompts = []
    for item in questions:
        tokens = chat.processor.encode_prompt(item.sample.turns[:-1], item.sample.images, max_tiles)
        prompts.append(
            Tokens(tokens.ids, tokens.supervised, np.full_like(tokens.tiles, 128))
            if blind
            else tokens
        )
    with torch.inference_mode():
        texts = chat.answers(prompts, Sampling(max_new_tokens=max_new_tokens))
    return [Answered(item, text) for item, text in zip(questions, texts, strict=True)]


def by_skill(answered: Iterable[Answered]) -> dict[str, list[Answered]]:
    groups: dict[str, list[Answered]] = {}
    for a in answered:
        groups.setdefault(a.item.skill, []).append(a)
    return groups


def mean(answered: Sequence[Answered]) -> float | None:
    """Average score; None of nothing."""
    return sum(a.score for a in answered) / len(answered) if answered else None


def summary(answered: Sequence[Answered], blind: Sequence[Answered]) -> dict:
    """The figures of score.py: accuracy, interval, seen and unseen apart, blind beside it."""
    return {
        "accuracy": mean(answered),
        "interval": bootstrap_interval([a.score for a in answered]),
        "seen": mean([a for a in answered if not a.item.unseen]),
        "unseen": mean([a for a in answered if a.item.unseen]),
        "blind": mean(blind),
        "n": len(answered),
    }


def report(answered: Sequence[Answered], blind: Sequence[Answered]) -> dict:
    """`summary` over everything and, under `skills`, of each."""
    unsighted = by_skill(blind)
    skills = {
        skill: summary(group, unsighted[skill]) for skill, group in by_skill(answered).items()
    }
    return summary(answered, blind) | {"skills": skills}


@torch.inference_mode()
def validation_loss(model, loader: Loader, n_batches: int, region: torch.autocast) -> float:
    """Loss per target over the loader's next batches."""
    total, n_targets = 0.0, 0
    for batch in islice(iter(loader), n_batches):
        with region:
            _, loss = model(**batch.to(model.device).tensors(), reduction="sum")
        total, n_targets = total + loss.item(), n_targets + batch.n_targets
    return total / max(1, n_targets)


def evaluate(
    model, processor: Processor, cfg: DataConfig, n_questions: int, region: torch.autocast
) -> dict:
    """Validation loss and accuracy per skill, for the log; empty without validation rows."""
    source = open_source(cfg, "val")
    if len(source) == 0:
        return {}
    was_training = model.training
    model.eval()
    loader = Loader(source, processor, replace(cfg, workers=0))
    loss = validation_loss(model, loader, 2, region)
    try:
        groups = by_skill(answer_items(Chat(model, processor), items(cfg, "val", n_questions)))
    except InputError:
        groups = {}
    model.train(was_training)
    accuracies = {f"val_{skill}": round(mean(group), 4) for skill, group in groups.items()}
    everything = [a for group in groups.values() for a in group]
    return {
        "val_loss": round(loss, 4),
        "val_accuracy": round(mean(everything) or 0.0, 4),
    } | accuracies

"""Score a checkpoint: exact greedy answers per skill, with error bars and a blind check.

python score.py runs/demo --data.source world --split test --json score.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from configs import DataConfig, InputError, command, parse
from engine.chat import Chat
from engine.distributed import setup
from engine.evaluation import answer_items, items, report
from engine.sheet import draw_sheet


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Score a checkpoint."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint directory, or run folder (its newest checkpoint is used)."""
    data: DataConfig = field(default_factory=DataConfig)
    """What to score on: data.source is the built-in world or your own data."""
    split: Literal["train", "val", "test"] = "test"
    """Part of the source; test of your own data is every row."""
    n: int = 3000
    """Questions: for the world spread over its skills, for a file this many rows."""
    max_new_tokens: int = 96
    """Longest answer in tokens."""
    json: Path | None = None
    """Write the figures here."""
    predictions: Path | None = None
    """Write every question with its answer here, one JSON object a line."""
    sheet: Path | None = None
    """Write a picture of some questions with their answers, right or wrong, here."""


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    if args.n < 1:
        raise InputError(f"n = {args.n}: must be at least 1.")
    for path in (args.json, args.predictions, args.sheet):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path}: its folder does not exist.")
        if path is not None and path.is_dir():
            raise InputError(f"{path}: is a folder; name a file.")
    chat = Chat.load(args.checkpoint, setup().device)
    questions = items(args.data, args.split, args.n)
    if not questions:
        raise InputError(f"{args.data.source}: no rows in split {args.split}.")
    answered, blind = (
        answer_items(chat, questions, is_blind, args.data.max_tiles, args.max_new_tokens)
        for is_blind in (False, True)
    )
    result = report(answered, blind)
    print(table(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.predictions is not None:
        lines = (
            json.dumps(
                {
                    "row": a.item.sample.row,
                    "skill": a.item.skill,
                    "unseen": a.item.unseen,
                    "question": a.item.sample.turns[-2].text,
                    "expected": a.item.expected,
                    "answer": a.answer,
                    "blind": b.answer,
                    "score": a.score,
                }
            )
            for a, b in zip(answered, blind, strict=True)
        )
        args.predictions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if args.sheet is not None:
        draw_sheet(answered, args.sheet)


def table(result: dict) -> str:
    """The figures for people."""
    lines = [
        f"{'skill':10} {'accuracy':>8}  {'95 % interval':>15} "
        f"{'seen':>7} {'unseen':>7} {'blind':>7} {'n':>6}"
    ]
    for skill, s in (result["skills"] | {"all": result}).items():
        low, high = s["interval"]
        cells = ["-" if s[k] is None else f"{s[k]:.1%}" for k in ("seen", "unseen", "blind")]
        lines.append(
            f"{skill:10} {s['accuracy']:8.1%}  {low:6.1%} - {high:6.1%} "
            f"{cells[0]:>7} {cells[1]:>7} {cells[2]:>7} {s['n']:6}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)

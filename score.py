"""Score a checkpoint on a task: answers with error bars, blind, and with pictures exchanged.

python score.py runs/demo --data.source world --split test --json score.json
python score.py runs/demo --task mmstar --by likelihood --predictions mmstar.jsonl
python score.py runs/other --task mmstar --against mmstar.jsonl
torchrun --nproc-per-node 2 -- score.py runs/demo --n 600
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from PIL import Image
from tqdm import tqdm

from cli import command, parse
from config_tools import InputError, write_whole
from configs import DataConfig
from engine.evaluation.answer_sheet import draw_answer_sheet
from engine.evaluation.evaluate import (
    VIEWS,
    Task,
    answer_views,
    choose_views,
    graded,
    report,
)
from engine.evaluation.metrics import paired_difference
from engine.evaluation.predictions import (
    asked,
    fingerprint,
    keep,
    read_found,
    read_scores,
    write_all,
)
from engine.inference.chat import Chat
from engine.training.checkpoint import resolve
from engine.training.distributed import Dist, setup


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Score a checkpoint."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint directory, or run folder (its newest checkpoint is used)."""
    task: Literal[
        "auto", "world", "rows", "mmstar", "pope", "scienceqa", "chartqa", "textvqa", "docvqa",
        "coco_captions",
    ] = "auto"  # fmt: skip
    """What is asked; auto: the world, or the rows of another data.source. The public sets come from
    the Hub, or from a file or folder with their columns that data.source names."""
    data: DataConfig = field(default_factory=DataConfig)
    """What to score on: data.source is the built-in world or your own data."""
    split: Literal["train", "val", "test"] = "test"
    """Part of the world or of your own rows; test of your own rows is every row."""
    n: int = 3000
    """Questions: of the world spread over its skills, of others this many rows."""
    by: Literal["generation", "likelihood"] = "generation"
    """likelihood: the likeliest of a question's choices; questions without any are left out."""
    max_new_tokens: int = 96
    """Longest answer in tokens."""
    json: Path | None = None
    """Write the figures here."""
    predictions: Path | None = None
    """Keep every question and its answers here, one JSON object a line; goes on where it ends."""
    against: Path | None = None
    """The predictions of another checkpoint: is this one better on the same questions?"""
    sheet: Path | None = None
    """Write a picture of some questions with their answers, right or wrong, here."""


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    for field_name in ("n", "max_new_tokens"):
        if getattr(args, field_name) < 1:
            raise InputError(f"{field_name} = {getattr(args, field_name)}: must be at least 1.")
    for path in (args.json, args.predictions, args.sheet):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path}: its folder does not exist.")
        if path is not None and path.is_dir():
            raise InputError(f"{path}: is a folder; name a file.")
        if path is not None and not os.access(path.parent, os.W_OK):
            raise InputError(f"{path}: its folder may not be written.")
    if args.sheet is not None and args.sheet.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"sheet = {args.sheet}: must end as a picture does, as in .png.")
    auto = "world" if args.data.source == "world" else "rows"
    name = auto if args.task == "auto" else args.task
    task: Task = importlib.import_module(f"tasks.{name}").TASK
    data = args.data
    if data.source == "world" and task.source:
        data = replace(data, source=task.source)
    dist = setup()
    chat = Chat.load(args.checkpoint, dist.device)
    questions = task.items(data, args.split, args.n)
    if args.by == "likelihood":
        questions = [item for item in questions if item.choices]
    if not questions:
        raise InputError(f"{data.source}: no rows in split {args.split}, or none with choices.")
    what = (name, data.source, data.seed, args.split, args.n, args.by, args.max_new_tokens,
            data.max_tiles, asked(questions) if args.predictions is not None else "")  # fmt: skip
    run = fingerprint(resolve(args.checkpoint), what)
    others = None if args.against is None else read_scores(args.against, questions)
    found = answers(args, chat, questions, dist, run)
    if dist.is_main:
        views = {
            view: graded(questions, [found[i][view] for i in range(len(questions))], task.metric)
            for view in VIEWS
        }
        extra = {"task": name, "by": args.by, **also(task, views["answer"])}
        if others is not None:
            extra["against"] = paired_difference([a.score for a in views["answer"]], others)
        show(args, report(views) | extra, views, run)
    dist.close()


def answers(args: Arguments, chat: Chat, questions, dist: Dist, run: str) -> dict:
    """Every question's answers: those on disk, and the rest, shared among the processes."""
    # Gathered, so that all have read before one writes: else they would share other questions out.
    found = dist.gather(read_found(args.predictions, run))[0]
    which = [i for i in range(len(questions)) if i not in found][dist.rank :: dist.world]
    tiles, new = args.data.max_tiles, args.max_new_tokens
    making = (
        choose_views(chat, questions, which, VIEWS, tiles)
        if args.by == "likelihood"
        else answer_views(chat, questions, which, VIEWS, tiles, new)
    )
    made = dict(
        tqdm(
            keep(args.predictions, dist.rank, run, making),
            total=len(which),
            unit="question",
            disable=not dist.is_main or not which,
        )
    )
    for part in dist.gather(made):
        found |= part
    return found


def also(task: Task, answered) -> dict:
    return task.also([a.answer for a in answered], [a.item.right for a in answered])


def show(args: Arguments, result: dict, views: dict, run: str) -> None:
    """Print and write what was found."""
    print(table(result))
    if args.json is not None:
        write_whole(args.json, json.dumps(result, indent=2) + "\n")
    if args.predictions is not None:
        write_all(args.predictions, run, views)
    if args.sheet is not None:
        draw_answer_sheet(views["answer"], args.sheet)


def table(result: dict) -> str:
    """The figures for people."""
    columns = ("seen", "unseen", *VIEWS[1:])
    lines = [f"{'skill':10} {'accuracy':>8}  {'95 % interval':>15} "
             + " ".join(f"{c:>8}" for c in (*columns, "n"))]  # fmt: skip
    for skill, s in (result["skills"] | {"all": result}).items():
        low, high = s["interval"]
        cells = ["-" if s[k] is None else f"{s[k]:.1%}" for k in columns]
        lines.append(
            f"{skill:10} {s['accuracy']:8.1%}  {low:6.1%} - {high:6.1%} "
            + " ".join(f"{cell:>8}" for cell in (*cells, s["n"]))
        )
    extra = [k for k in ("precision", "recall", "f1", "says_yes") if k in result]
    lines += [", ".join(f"{k} {result[k]:.1%}" for k in extra)] if extra else []
    if "against" in result:
        a = result["against"]
        low, high = a["interval"]
        verdict = f"better by {a['difference']:+.1%} ({low:+.1%} to {high:+.1%}), p = {a['p']:.4f}"
        lines.append(f"against the other checkpoint: {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)

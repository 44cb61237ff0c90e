"""Score a checkpoint on a task: accuracy with intervals, also with blank and shuffled images.

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

from cli import command, parse
from config_tools import InputError, check, write_atomic
from configs import DataConfig
from engine.evaluation import predictions
from engine.evaluation.answer_sheet import draw_answer_sheet
from engine.evaluation.evaluate import Answered, Task, summarize_skills
from engine.evaluation.metrics import paired_difference
from engine.evaluation.scoring import answer_all, format_result, score_views
from engine.inference.chat import Chat
from engine.training.checkpoint import resolve
from engine.training.distributed import setup


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Score a checkpoint on a task."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint, run folder (its newest checkpoint), or Hub id."""
    task: Literal[
        "auto", "world", "rows", "mmstar", "pope", "scienceqa", "chartqa", "textvqa", "docvqa",
        "coco_captions",
    ] = "auto"  # fmt: skip
    """auto: world, or rows if data.source is set. Other benchmarks are read from the Hub."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data to score on. data.source: world, your own rows, or a local copy of a benchmark."""
    split: Literal["train", "val", "test"] = "test"
    """Own rows: val are those held out from training, test all, with training rows."""
    n: int = 3000
    """Maximum number of questions; world: evenly over its skills."""
    by: Literal["generation", "likelihood"] = "generation"
    """likelihood: pick the most likely choice; skips questions without choices."""
    max_new_tokens: int = 96
    """Maximum length of an answer, in tokens."""
    json: Path | None = None
    """JSON file for the result."""
    predictions: Path | None = None
    """JSONL file for all answers; an interrupted run resumes from it."""
    against: Path | None = None
    """Predictions file of another checkpoint, for a paired test on the same questions."""
    answer_sheet: Path | None = None
    """Image file to write: example questions with right and wrong answers."""


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    check_arguments(args)
    name, data = args.task, args.data
    if name == "auto":
        name = "world" if data.source == "world" else "rows"
    task: Task = importlib.import_module(f"tasks.{name}").TASK
    if data.source == "world" and task.source:
        data = replace(data, source=task.source)
    dist = setup()
    chat = Chat.load(args.checkpoint, dist.device)
    questions = task.items(data, args.split, args.n)
    if args.by == "likelihood":
        questions = [item for item in questions if item.choices]
    if not questions:
        kind = "rows with choices" if args.by == "likelihood" else "rows"
        raise InputError(f"{data.source}: no {kind} in split {args.split}; choose another.")
    hashed = predictions.hash_questions(questions) if args.predictions is not None else ""
    settings = (name, data.source, data.seed, args.split, args.n, args.by, args.max_new_tokens,
                data.max_tiles, hashed)  # fmt: skip
    run = predictions.fingerprint(resolve(args.checkpoint), settings)
    others = None if args.against is None else predictions.read_scores(args.against, questions)
    answers = answer_all(
        chat, questions, dist, args.by, args.predictions, run, data.max_tiles, args.max_new_tokens
    )
    if dist.is_main:
        views = score_views(questions, answers, task.metric)
        result = summarize_skills(views) | {"task": name, "by": args.by}
        answered = views["answer"]
        result |= task.extra_metrics([a.answer for a in answered],
                                     [a.item.correct for a in answered])  # fmt: skip
        if others is not None:
            result["against"] = paired_difference([a.score for a in answered], others)
        write(args, result, views, run)
    dist.shutdown()


def check_arguments(args: Arguments) -> None:
    """Raise `InputError` for a number below 1 or a file that cannot be written."""
    for name in ("n", "max_new_tokens"):
        check(getattr(args, name) >= 1, args, name, "must be at least 1")
    for path in filter(None, (args.json, args.predictions, args.answer_sheet)):
        if not path.parent.is_dir():
            raise InputError(f"{path}: its folder does not exist.")
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a file.")
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"{path}: its folder is not writable.")
    sheet = args.answer_sheet
    if sheet is not None and sheet.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"answer_sheet = {sheet}: must have an image suffix, such as .png.")


def write(args: Arguments, result: dict, views: dict[str, list[Answered]], run: str) -> None:
    """Print the result and write the files that `args` names."""
    print(format_result(result))
    if args.json is not None:
        write_atomic(args.json, json.dumps(result, indent=2) + "\n")
    if args.predictions is not None:
        predictions.write_predictions(args.predictions, run, views)
    if args.answer_sheet is not None:
        draw_answer_sheet(views["answer"], args.answer_sheet)


if __name__ == "__main__":
    command(main)

"""The predictions file of score.py: scoring resumes from it, and other runs are compared with it.

Every process appends to its own part file; in the end, one file holds a line per question.
Not here: questions, answers and scores (evaluate.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from config_tools import InputError, json_line, write_atomic
from engine.evaluation.evaluate import Answered, Item, Views

Answers = dict[int, dict[str, str]]  # number of the question -> view -> answer


def fingerprint(checkpoint: Path, settings: Iterable[object]) -> str:
    """Hash of weights and settings, 12 hex digits."""
    digest = hashlib.blake2b(repr(list(settings)).encode(), digest_size=6)
    for path in sorted(checkpoint.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def hash_questions(questions: Iterable[Item]) -> str:
    """Hash of questions, 16 hex digits; images count by path or content."""
    digest = hashlib.blake2b(digest_size=8)
    for item in questions:
        turns = [turn.text for turn in item.sample.turns]
        words = item.sample.row, turns, item.correct, item.choices
        digest.update(repr(words).encode("utf-8", "backslashreplace"))
        for image in item.sample.images:
            if isinstance(image, Image.Image):
                image = image.tobytes()
            content = image if isinstance(image, bytes) else repr(str(image)).encode()
            digest.update(hashlib.blake2b(content).digest())
    return digest.hexdigest()


def part_files(path: Path) -> list[Path]:
    """The part files of all processes."""
    return sorted(path.parent.glob(f"{path.name}.part*"))


def read_lines(path: Path) -> list[str]:
    """Lines of a file; `splitlines` would also split at U+2028, which answers may contain."""
    return [line for line in path.read_text("utf-8", "replace").split("\n") if line]


def read_answers(path: Path | None, run: str) -> Answers:
    """Answers of an interrupted or finished run; an incomplete last line is ignored."""
    answers: Answers = {}
    for part in [] if path is None else [path, *part_files(path)]:
        for line in read_lines(part) if part.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                if line.startswith("{"):
                    continue
                row = None
            keys = {"number", "run", "views"}
            if not isinstance(row, dict) or not keys <= row.keys() or row["run"] != run:
                reason = "holds predictions of another checkpoint or other settings"
                raise InputError(f"{part}: {reason}; choose another file, or delete it.")
            answers[row["number"]] = row["views"]
    return answers


def record_answers(path: Path | None, rank: int, run: str, answers: Views) -> Views:
    """Append each answer to this process's part file, then yield it; without a path, only yield."""
    if path is None:
        yield from answers
        return
    with open(f"{path}.part{rank}", "a", encoding="utf-8") as file:
        for number, views in answers:
            file.write(json.dumps({"run": run, "number": number, "views": views}) + "\n")
            file.flush()
            yield number, views


def write_predictions(path: Path, run: str, views: Mapping[str, Sequence[Answered]]) -> None:
    """Replace the part files by the final file: questions in order, with scores."""
    lines = []
    for number, answered in enumerate(zip(*views.values(), strict=True)):
        item = answered[0].item
        row = {
            "number": number,
            "row": item.sample.row,
            "skill": item.skill,
            "unseen": item.unseen,
            "question": item.question,
            "expected": item.expected,
            "score": answered[0].score,
            "views": {view: a.answer for view, a in zip(views, answered)},
            "run": run,
        }
        lines.append(json_line(row))
    write_atomic(path, "".join(lines))
    for part in part_files(path):
        part.unlink()


def read_scores(path: Path, questions: Sequence[Item]) -> list[float]:
    """Scores in another checkpoint's file; raises `InputError` unless it answers `questions`."""
    if not path.is_file():
        expected = "expected a file that score.py --predictions wrote"
        raise InputError(f"{path}: no such file; {expected}.")
    try:
        rows = [json.loads(line) for line in read_lines(path)]
        answered = [(r["row"], r["question"], r["expected"]) for r in rows]
        scores = [float(r["score"]) for r in rows]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a complete file of score.py --predictions.") from None
    if answered != [(item.sample.row, item.question, item.expected) for item in questions]:
        fix = "score both with the same task, source, split and n"
        raise InputError(f"{path}: its {len(answered)} questions differ; {fix}.")
    return scores

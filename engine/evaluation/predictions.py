"""Answers on disk while they are made, so that scoring goes on where it was interrupted.

Every process appends to a part of its own; in the end one file holds all, a question a line.
Not here: what is asked, and what an answer is worth (evaluation.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from config_tools import InputError, json_line, write_whole
from engine.evaluation.evaluate import Answered, Item

Found = dict[int, dict[str, str]]  # number of the question -> view -> answer


def fingerprint(checkpoint: Path, settings: Iterable[object]) -> str:
    """Twelve digits that tell these weights and settings from others."""
    digest = hashlib.blake2b(repr(list(settings)).encode(), digest_size=6)
    for path in sorted(checkpoint.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def asked(questions: Iterable[Item]) -> str:
    """Digits that tell these questions from others; pictures by their path or content."""
    digest = hashlib.blake2b(digest_size=8)
    for item in questions:
        turns = [turn.text for turn in item.sample.turns]
        words = item.sample.row, turns, item.right, item.choices
        digest.update(repr(words).encode("utf-8", "backslashreplace"))
        for picture in item.sample.images:
            if isinstance(picture, Image.Image):
                picture = picture.tobytes()
            content = picture if isinstance(picture, bytes) else repr(str(picture)).encode()
            digest.update(hashlib.blake2b(content).digest())
    return digest.hexdigest()


def parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.part*"))


def lines_of(path: Path) -> list[str]:
    """Not `splitlines`: answers may hold U+2028. What is no text becomes lines that are no JSON."""
    return [line for line in path.read_text("utf-8", "replace").split("\n") if line]


def read_found(path: Path | None, run: str) -> Found:
    """Answers of an interrupted run, or of a finished one; a torn line does not count.

    Raises `InputError` where they are of another checkpoint or other settings.
    """
    found: Found = {}
    for part in [] if path is None else [path, *parts(path)]:
        for line in lines_of(part) if part.exists() else ():
            try:
                row = json.loads(line)
                number, run_of_row, views = row["number"], row["run"], row["views"]
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, ValueError) and line.startswith("{"):
                    continue
                run_of_row = None
            if run_of_row != run:
                raise InputError(
                    f"{part}: holds predictions of another checkpoint or other settings; name "
                    "another file, or delete it."
                )
            found[number] = views
    return found


def keep(
    path: Path | None, rank: int, run: str, found: Iterable[tuple[int, dict[str, str]]]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Pass answers on, each written to this process's part first; without a path only that."""
    if path is None:
        yield from found
        return
    with open(f"{path}.part{rank}", "a", encoding="utf-8") as file:
        for number, views in found:
            file.write(json.dumps({"run": run, "number": number, "views": views}) + "\n")
            file.flush()
            yield number, views


def write_all(path: Path, run: str, views: dict[str, Sequence[Answered]]) -> None:
    """The whole file in place of its parts: questions in order, with scores."""
    lines = []
    for number, answered in enumerate(zip(*views.values(), strict=True)):
        item, first = answered[0].item, answered[0]
        row = {
            "number": number,
            "row": item.sample.row,
            "skill": item.skill,
            "unseen": item.unseen,
            "question": item.question,
            "expected": item.expected,
            "score": first.score,
            "views": {view: a.answer for view, a in zip(views, answered)},
            "run": run,
        }
        lines.append(json_line(row))
    write_whole(path, "".join(lines))
    for part in parts(path):
        part.unlink()


def read_scores(path: Path, questions: Sequence[Item]) -> list[float]:
    """The scores of another checkpoint's predictions for these questions.

    Raises `InputError` where they are not the same.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; it is what score.py --predictions wrote of the other model."
        )
    try:
        rows = [json.loads(line) for line in lines_of(path)]
        asked = [(r["row"], r["question"], r["expected"]) for r in rows]
        scores = [float(r["score"]) for r in rows]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a finished file of score.py --predictions.") from None
    ours = [(item.sample.row, item.question, item.expected) for item in questions]
    if asked != ours:
        raise InputError(
            f"{path}: answers {len(asked)} other questions; score both with the same task, source, "
            "split and n."
        )
    return scores

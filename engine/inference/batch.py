"""A file of questions -> a file of answers, which an interrupted run goes on with.

Each row is a JSON object: "image" or "images" (paths relative to the file), a "question" or
"prompt", and "choices" where the likeliest of some answers is wanted. Its answer repeats it.
Not here: how many are answered together (models/inference/generate.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from config_tools import InputError, json_line, write_whole
from data.sources.rows import open_rows
from data.types import Tokens
from engine.inference.chat import Chat, Reply
from models.inference.sampling import Sampling

NAMES = ("id", "image", "images", "question", "prompt", "choices")  # repeated in an answer


class Asked(NamedTuple):
    """A row of the questions."""

    prompt: str
    images: list[str]
    choices: list[str]
    repeated: dict  # as it reads from the file of answers


def answer_file(
    chat: Chat,
    questions: Path,
    out: Path,
    run: str,
    sampling: Sampling,
    stop: Sequence[str] = (),
    choices: Sequence[str] = (),
    logprobs: bool = False,
    n_rows: int = 64,
) -> None:
    """Append an answer to `out` as soon as it is there; when all are, put them in order.

    `run` names these weights and settings. A row's number is added to the seed, so that a run that
    goes on says what the whole one would. Raises `InputError` before the first answer if a row
    lacks something, after the last if one could not be asked: the next run asks again.
    """
    rows = open_rows(str(questions))
    asked = [_asked(rows, k) for k in range(len(rows))]
    done = read_done(out, [question.repeated for question in asked], run)
    left = [k for k in range(len(rows)) if k not in done]
    limited = [k for k in left if asked[k].choices or choices]
    free = [k for k in left if not (asked[k].choices or choices)]
    failed, order = {}, []  # why rows have no answer; the rows whose prompts could be made
    with tqdm(total=len(rows), initial=len(done), unit="row") as bar, _open(out) as file:

        def write(k: int, values: dict) -> None:
            row = done[k] = {**asked[k].repeated, **values, "row": k, "run": run}
            file.write(json_line(row))
            file.flush()
            bar.update()

        def prompts() -> Iterator[Tokens]:
            for k in free:
                try:
                    tokens = chat.prompt(asked[k].prompt, asked[k].images)
                except InputError as error:
                    failed[k] = error
                    bar.update()
                else:
                    order.append(k)
                    yield tokens

        for k, reply in chat.replies(prompts(), sampling, stop, n_rows, order.__getitem__):
            write(k, {"answer": reply.text} | (_details(chat, reply) if logprobs else {}))
        for k in limited:
            offered = asked[k].choices or list(choices)
            try:
                shares = chat.choose(chat.prompt(asked[k].prompt, asked[k].images), offered)
            except InputError as error:
                failed[k] = error
                bar.update()
                continue
            best = max(range(len(offered)), key=shares.__getitem__)
            write(k, {"answer": offered[best], "shares": [round(s, 6) for s in shares]})
    _in_order(out, done)
    if failed:
        k, error = next(iter(failed.items()))
        n = f"{len(failed)} of {len(rows)} rows"
        raise InputError(f"{out}: {n} are not answered, the first: {rows.where(k)}: {error}")


def _asked(rows, k: int) -> Asked:
    row = rows[k]
    prompt = row.get("question") or row.get("prompt")
    images = row.get("images") or row.get("image") or []
    images = [images] if isinstance(images, str) else images
    choices = row.get("choices") or []
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{rows.where(k)}: needs a text in 'question' or 'prompt'.")
    for name, value in (("image", images), ("choices", choices)):
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            kind = "a path or a list of paths" if name == "image" else "a list of texts"
            raise InputError(f"{rows.where(k)}: {name!r} must be {kind}.")
    repeated = json.loads(json.dumps({n: row[n] for n in NAMES if n in row}, default=str))
    return Asked(prompt, [str(rows.folder / image) for image in images], choices, repeated)


def _details(chat: Chat, reply: Reply) -> dict:
    words = [chat.processor.tokenizer.id_to_token(t) for t in reply.tokens]
    return {"tokens": words, "logprobs": [round(x, 4) for x in reply.logprobs]}


# --- What is there already ----------------------------------------------------------------------


def read_done(out: Path, asked: Sequence[dict], run: str) -> dict[int, dict]:
    """Row number -> its line, of an earlier `run`; a torn last line is cut off the file.

    `asked` is what each answer repeats of its question. Raises `InputError` where the file holds
    answers to other questions, or of another model.
    """
    if not out.exists():
        return {}
    done, whole = {}, 0
    for line in out.read_bytes().splitlines(keepends=True):
        torn = not line.endswith(b"\n")
        try:
            row = json.loads(line)
            repeated = {name: row[name] for name in NAMES if name in row}
            same = asked[row["row"]] == repeated and row["run"] == run
        except (KeyError, IndexError, TypeError):
            same = False
        except ValueError:
            same = torn and line.startswith(b"{")
        if not same:
            raise InputError(
                f"{out}: holds other answers, or those of another model or other "
                "settings; name another file, or delete it."
            )
        if torn:
            os.truncate(out, whole)
            break
        done[row["row"]], whole = row, whole + len(line)
    return done


def _open(out: Path):
    try:
        return open(out, "a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"out = {out}: cannot be written ({error.strerror}).") from None


def _in_order(out: Path, done: dict[int, dict]) -> None:
    """Rewrite the file in the order of the questions, at once or not at all."""
    lines = (json_line(done[k]) for k in sorted(done))
    write_whole(out, "".join(lines))

"""Answer a file of questions; an interrupted run resumes.

Each row is a JSON object: "image" or "images" (paths relative to the file), "question" or "prompt",
and optionally "choices". The answer's row repeats these fields. Not here: continuous batching
(models/inference/continuous_batching.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from config_tools import InputError, json_line, write_atomic
from data.sources.open import open_rows
from data.types import Tokens
from engine.inference.chat import Chat
from models.inference.sampling import Sampling

NAMES = ("id", "image", "images", "question", "prompt", "choices")  # copied into the answer's row


class Request(NamedTuple):
    """A row of the questions file."""

    prompt: str
    images: list[str]
    choices: list[str]
    copied: dict  # fields that the answer's row repeats


def answer_file(
    chat: Chat, questions: Path, out: Path, run: str, sampling: Sampling,
    stop: Sequence[str] = (), choices: Sequence[str] = (), logprobs: bool = False, n_rows: int = 64,
) -> None:  # fmt: skip
    """Append each answer to `out` when it is finished; at the end, sort them like the questions.

    `run` identifies weights and settings. The row number is added to the seed, so a resumed run
    gives the same answers. Raises `InputError` before the first answer if a row is invalid, and
    after the last if rows could not be answered; the next run tries them again.
    """
    rows = open_rows(str(questions))
    requests = [_read_request(rows, k) for k in range(len(rows))]
    done = read_answered(out, [request.copied for request in requests], run)
    remaining = [k for k in range(len(rows)) if k not in done]
    free_text = [k for k in remaining if not (requests[k].choices or choices)]
    failed, order = {}, []  # row -> error; rows in the order of their prompts
    with tqdm(total=len(rows), initial=len(done), unit="row") as bar, _open(out) as file:

        def write(k: int, values: dict) -> None:
            row = done[k] = {**requests[k].copied, **values, "row": k, "run": run}
            file.write(json_line(row))
            file.flush()
            bar.update()

        def prompts() -> Iterator[Tokens]:
            for k in free_text:
                try:
                    tokens = chat.encode_prompt(requests[k].prompt, requests[k].images)
                except InputError as error:
                    failed[k] = error
                    bar.update()
                else:
                    order.append(k)
                    yield tokens

        for k, reply in chat.generate_replies(prompts(), sampling, stop, n_rows, order.__getitem__):
            words = [chat.processor.tokenizer.id_to_token(t) for t in reply.tokens]
            details = {"tokens": words, "logprobs": [round(x, 4) for x in reply.logprobs]}
            write(k, {"answer": reply.text} | (details if logprobs else {}))
        for k in sorted(set(remaining) - set(free_text)):
            options = requests[k].choices or list(choices)
            try:
                tokens = chat.encode_prompt(requests[k].prompt, requests[k].images)
                probabilities = chat.choice_probabilities(tokens, options)
            except InputError as error:
                failed[k] = error
                bar.update()
                continue
            best = max(range(len(options)), key=probabilities.__getitem__)
            write(k, {"answer": options[best], "shares": [round(p, 6) for p in probabilities]})
    # Answers were appended as they finished: sort them like the questions.
    write_atomic(out, "".join(json_line(done[k]) for k in sorted(done)))
    if failed:
        k, n = next(iter(failed)), f"{len(failed)} of {len(rows)} rows"
        raise InputError(f"{out}: {n} have no answer; the first is {rows.where(k)}: {failed[k]}")


def _read_request(rows: Any, k: int) -> Request:
    row = rows[k]
    prompt = row.get("question") or row.get("prompt")
    images = row.get("images") or row.get("image") or []
    images = [images] if isinstance(images, str) else images
    choices = row.get("choices") or []
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{rows.where(k)}: expected text in 'question' or 'prompt'.")
    for name, value in (("image", images), ("choices", choices)):
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            kind = "a path or a list of paths" if name == "image" else "a list of strings"
            raise InputError(f"{rows.where(k)}: {name!r} must be {kind}.")
    copied = json.loads(json.dumps({n: row[n] for n in NAMES if n in row}, default=str))
    return Request(prompt, [str(rows.folder / image) for image in images], choices, copied)


def read_answered(out: Path, copied: Sequence[dict], run: str) -> dict[int, dict]:
    """Row number -> answer's row, from an earlier run; an incomplete last line is truncated.

    `copied` are the fields that each answer copies from its question.
    """
    if not out.exists():
        return {}
    done, n_bytes = {}, 0
    for line in out.read_bytes().splitlines(keepends=True):
        is_cut, row = not line.endswith(b"\n"), {}
        try:
            row = json.loads(line)
            fields = {name: row[name] for name in NAMES if name in row}
            is_same = copied[row["row"]] == fields and row["run"] == run
        except (KeyError, IndexError, TypeError):
            is_same = False
        except ValueError:
            is_same = is_cut and line.startswith(b"{")
        if not is_same:
            reason = "holds answers to other questions, of another model or with other settings"
            raise InputError(f"{out}: {reason}; choose another file, or delete it.")
        if is_cut:
            os.truncate(out, n_bytes)
            break
        done[row["row"]], n_bytes = row, n_bytes + len(line)
    return done


def _open(out: Path) -> TextIO:
    try:
        return open(out, "a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"out = {out}: cannot be written ({error.strerror}).") from None

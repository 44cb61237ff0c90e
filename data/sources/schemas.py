"""Rows of published datasets -> turns and images. The column names select the schema.

Pure functions: they take a dictionary and return turns with one `<image>` per image, and the images
unresolved. Not here: reading rows (open.py), resolving images (fetch.py).
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image

from config_tools import InputError
from data.types import Turn

IMAGE = "<image>"
CAPTION_PROMPT = "Describe the picture."
LABEL_PROMPT = "What is this?"
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "model": "assistant"}  # fmt: skip
Location = tuple[str, int, str]  # column, turn, key; for error messages
IMAGE_COLUMNS = ("image", "images", "file_name")
# The turns of a row, and for each `<image>` in them: the image itself if the turn contains it, None
# for the next image of the row's image column.
ParsedTurns = tuple[list[Turn], list[Any]]


class Conversation(NamedTuple):
    family: str  # the chat column, or "columns"; all rows of a source share one
    schema: str  # description of the schema, for messages
    turns: tuple[Turn, ...]
    images: tuple[Any, ...]  # str, bytes, {"bytes", "path"} or PIL images


def parse_conversation(row: dict) -> Conversation:
    """Parse a row of any supported schema. Raises `InputError` without the name of the row.

    Turns after the last answer are dropped, as they contain no targets.
    """
    family = ([c for c in CHATS if row.get(c) is not None] or ["columns"])[0]
    name, read = CHATS.get(family) or (_column_names(row), _from_columns)
    turns, places = read(row)
    given = _image_values(row)
    if not places and given and turns:  # no placeholder: insert before the first question
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
        turns[first] = Turn(turns[first].role, IMAGE * len(given) + turns[first].text)
        places = [None] * len(given)
    n_missing = places.count(None)
    if n_missing != len(given):
        n_given = len(places) - n_missing + len(given)
        raise InputError(f"{len(places)} {IMAGE} placeholders for {n_given} images.")
    rest = iter(given)
    images = [next(rest) if place is None else place for place in places]
    while turns and turns[-1].role != "assistant" and IMAGE not in turns[-1].text:
        turns.pop()
    if not turns or turns[-1].role != "assistant":
        raise InputError("no answer to train on; expected a last turn of the assistant.")
    return Conversation(family, name, tuple(turns), tuple(map(_check_image, images)))


def drop_low_rated(row: dict, minimum: dict[str, int]) -> dict | None:
    """Drop question-answer pairs rated below the minimum; None if no pair is left.

    `minimum`: minimum rating by FineVision column. Unrated pairs are kept.
    """
    kept = row.get("texts")
    if not isinstance(kept, list):
        return row
    low = set()
    for column, smallest in minimum.items():
        ratings = row.get(column)
        ratings = ratings if isinstance(ratings, list) else []
        low |= {i for i, r in enumerate(ratings) if isinstance(r, int) and r < smallest}
    if not low:
        return row
    kept = [pair for i, pair in enumerate(kept) if i not in low]
    return row | {"texts": kept} if kept else None


# --- Chats --------------------------------------------------------------------------------------


def _from_texts(row: dict) -> ParsedTurns:
    """`texts`: pairs of `user` and `assistant` (The Cauldron, FineVision)."""
    pairs = enumerate(_objects(row, "texts"), 1)
    return _with_row_images([
        Turn(role, _text(pair.get(role), role, ("texts", number, role)))
        for number, pair in pairs for role in ("user", "assistant")
    ])  # fmt: skip


def _from_conversations(row: dict) -> ParsedTurns:
    """`conversations`: `from` human or gpt, and `value`. LLaVA's newline at `<image>` is cut."""
    turns = []
    for number, item in enumerate(_objects(row, "conversations"), 1):
        speaker = item.get("from") if item.get("from") is not None else item.get("role")
        value = item.get("value") if item.get("value") is not None else item.get("content")
        role = _role(speaker, ("conversations", number, "from"))
        text = _text(value, role, ("conversations", number, "value"))
        if IMAGE in text:
            text = re.sub(f"{IMAGE}\n|\n{IMAGE}$", IMAGE, text)
        turns.append(Turn(role, text))
    return _with_row_images(turns)


def _from_messages(row: dict) -> ParsedTurns:
    """`messages`: `role` and `content`, a string or a list of parts (OpenAI, TRL)."""
    turns, places = [], []
    for number, message in enumerate(_objects(row, "messages"), 1):
        at = "messages", number, "content"
        role = _role(message.get("role"), ("messages", number, "role"))
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = ""
        for part in parts:
            new, inside = _part(part, at)
            text, places = text + new, places + inside
        turns.append(Turn(role, _text(text, role, at)))
    return turns, places


def _part(part: Any, at: Location) -> tuple[str, list]:
    """(text, one entry per `<image>`) of a part of a message; see ParsedTurns."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], [None] * part["text"].count(IMAGE)
    if kind in ("image", "image_url"):
        names = ("image", "image_url", "url", "path", "base64", "bytes")
        value = next((part[name] for name in names if part.get(name) is not None), None)
        return IMAGE, [value["url"] if isinstance(value, dict) and "url" in value else value]
    expected = 'expected text, or a list of parts {"type": "text" or "image", ...}.'
    raise InputError(f"{_location_text(at)}: {expected}")


def _with_row_images(turns: list[Turn]) -> ParsedTurns:
    return turns, [None] * sum([turn.text.count(IMAGE) for turn in turns])


def _objects(row: dict, column: str) -> list[dict]:
    """The turns of a row; a table may store them as JSON text."""
    value = _parse_json_list(row[column], column)
    if not isinstance(value, list) or not value or {type(v) for v in value} != {dict}:
        raise InputError(f"{column!r}: expected a list of objects, one per turn.")
    return value


def _parse_json_list(value: object, column: str) -> object:
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{column!r} is not JSON ({error}).") from None


def _location_text(at: Location) -> str:
    return "{} {}: {!r}".format(*at)


def _kind(value: object) -> str:
    """The type of a JSON value, for messages."""
    names = {"NoneType": "missing", "list": "a list", "dict": "an object", "str": "text",
             "int": "a number", "float": "a number", "bool": "true or false"}  # fmt: skip
    return names.get(type(value).__name__, type(value).__name__)


def _role(value: object, at: Location) -> str:
    if not isinstance(value, str) or value not in ROLES:
        raise InputError(f"{_location_text(at)} is {value!r}; expected one of {', '.join(ROLES)}.")
    return ROLES[value]


def _text(value: object, role: str, at: Location) -> str:
    if not isinstance(value, str):
        raise InputError(f"{_location_text(at)} is {_kind(value)}; expected text.")
    if role == "assistant" and not value.strip():
        raise InputError(f"{_location_text(at)} is empty; expected text.")
    return value


# --- Columns ------------------------------------------------------------------------------------


def _from_columns(row: dict) -> ParsedTurns:
    """question + answer (+ choices), or image + caption, text or label."""
    row = {name: value for name, value in row.items() if value is not None}
    names = {"question": "question", "answer": "answer"}  # for messages
    for column, prompt in (("caption", CAPTION_PROMPT), ("text", CAPTION_PROMPT),
                           ("label", LABEL_PROMPT)):  # fmt: skip
        if column in row and _image_values(row):
            names["answer"] = names["answer"] if "answer" in row else column
            row = {"question": prompt, "answer": row[column]} | row
    if "choices" in row:
        row = _multiple_choice(row)
    for key, name in names.items():
        if (value := row.get(key)) is None:
            expected = "expected 'question' and 'answer', an image with a 'caption', or a chat in "
            expected += f"one of {', '.join(CHATS)}"
            columns = ", ".join(row) or "none"
            raise InputError(f"no {key!r} in the columns ({columns}); {expected}.")
        if not isinstance(value, str):
            raise InputError(f"{name!r} is {_kind(value)}; expected text.")
        if not value.strip():
            raise InputError(f"{name!r} is empty; expected text.")
    return _with_row_images([Turn("user", row["question"]), Turn("assistant", row["answer"])])


def _column_names(row: dict) -> str:
    """The columns that `_from_columns` reads, for messages."""
    names = ("question", "choices", "answer", "caption", "text", "label")
    return " + ".join(name for name in IMAGE_COLUMNS + names if row.get(name) is not None)


def _multiple_choice(row: dict) -> dict:
    """Append the choices to the question, one per line; the answer becomes a letter.

    `answer` may be the text of a choice, its letter, or its index from 0. An integer is always an
    index, even if a choice has the same text.
    """
    choices, answer = _parse_json_list(row["choices"], "choices"), row.get("answer")
    letters: str = string.ascii_uppercase
    fits = isinstance(choices, list) and 2 <= len(choices) <= len(letters)
    if not fits or not all(isinstance(choice, str) for choice in choices):
        raise InputError("'choices': expected a list of 2 to 26 texts.")
    ways = [choices, list(letters[: len(choices)]), list(map(str, range(len(choices))))]
    ways = ways[2:] if isinstance(answer, int) else ways
    found = next((way.index(str(answer)) for way in ways if str(answer) in way), None)
    if found is None or isinstance(answer, bool):
        expected = "expected a choice, its letter or its index from 0"
        raise InputError(f"'answer' is {answer!r}; {expected}.")
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, choices))
    question = f"{row.get('question', LABEL_PROMPT)}{listed}\nAnswer with the letter."
    return row | {"question": question, "answer": letters[found]}


# --- Images -------------------------------------------------------------------------------------


def _image_values(row: dict) -> list:
    """The values of the row's image column; an empty list without one."""
    columns = [c for c in IMAGE_COLUMNS if row.get(c) is not None and row[c] != []]
    if not columns:
        return []
    if len(columns) > 1:
        raise InputError(f"images in both {columns[0]!r} and {columns[1]!r}; keep one of them.")
    value = _parse_json_list(row[columns[0]], columns[0])
    return value if isinstance(value, list) else [value]


def _check_image(value: object) -> object:
    is_file = isinstance(value, dict) and (value.get("bytes") or value.get("path"))
    if not is_file and not (isinstance(value, (str, bytes, Image.Image)) and value):
        kinds = 'a path, URL, base64, bytes or {"bytes": ...}'
        found = "empty" if value == "" or isinstance(value, dict) else _kind(value)
        raise InputError(f"an image is {found}; expected {kinds}.")
    return value


CHATS: dict[str, tuple[str, Callable[[dict], ParsedTurns]]] = {
    "texts": ("texts[user, assistant] (Cauldron, FineVision)", _from_texts),
    "conversations": ("conversations[from, value] (LLaVA)", _from_conversations),
    "messages": ("messages[role, content] (OpenAI, TRL)", _from_messages),
}

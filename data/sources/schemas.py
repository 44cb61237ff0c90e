"""Rows as people publish them -> turns and pictures, by the names of their columns alone.

Pure: a dictionary in; turns holding one `<image>` per picture, and the pictures as the row spells
them, out. Not here: reading rows (readers.py), finding the pictures (sources.py).
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
Place = tuple[str, int, str]  # column, turn, key: put into words only where something is wrong
PICTURE_COLUMNS = ("image", "images", "file_name")


class Read(NamedTuple):
    """What a schema makes of a row.

    `places` has an entry per `<image>` in the turns: the picture where the turn itself holds it,
    None where it is the next one of the row's picture column.
    """

    turns: list[Turn]
    places: list[Any]


class Conversation(NamedTuple):
    family: str  # the column a chat is in, or "columns"; never two in one source
    schema: str  # the same for people
    turns: tuple[Turn, ...]
    pictures: tuple[Any, ...]  # str, bytes, {"bytes", "path"} or PIL images


def conversation(row: dict) -> Conversation:
    """A row of any known schema. Raises `InputError` saying what it lacks, without naming the row.

    Turns after the last answer teach nothing and are left out.
    """
    family = ([c for c in CHATS if row.get(c) is not None] or ["columns"])[0]
    name, read = CHATS.get(family) or (_column_names(row), _columns)
    turns, places = read(row)
    given = _pictures(row)
    if not places and given and turns:  # no place is named: in front of the first question
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
        turns[first] = Turn(turns[first].role, IMAGE * len(given) + turns[first].text)
        places = [None] * len(given)
    n_missing = places.count(None)
    if n_missing != len(given):
        n_given = len(places) - n_missing + len(given)
        raise InputError(f"{len(places)} {IMAGE} placeholders for {n_given} images.")
    rest = iter(given)
    pictures = [next(rest) if place is None else place for place in places]
    while turns and turns[-1].role != "assistant" and IMAGE not in turns[-1].text:
        turns.pop()
    if not turns or turns[-1].role != "assistant":
        raise InputError("no answer to learn from; the assistant must speak last.")
    return Conversation(family, name, tuple(turns), tuple(map(_picture, pictures)))


def rated(row: dict, least: dict[str, int]) -> dict | None:
    """The row without the questions and answers that FineVision rates lower; None if none is left.

    `least`: the smallest rating by its column's name; what is not rated stays.
    """
    kept = row.get("texts")
    if not isinstance(kept, list):
        return row
    low = set()
    for column, smallest in least.items():
        ratings = row.get(column)
        for i, rating in enumerate(ratings if isinstance(ratings, list) else []):
            if isinstance(rating, int) and rating < smallest:
                low.add(i)
    if not low:
        return row
    kept = [pair for i, pair in enumerate(kept) if i not in low]
    return row | {"texts": kept} if kept else None


# --- Chats --------------------------------------------------------------------------------------


def _texts(row: dict) -> Read:
    """`texts`: pairs of `user` and `assistant`, as in the Cauldron and FineVision."""
    turns = []
    for number, pair in enumerate(_objects(row, "texts"), 1):
        for role in ("user", "assistant"):
            turns.append(Turn(role, _said(pair.get(role), role, ("texts", number, role))))
    return _read(turns)


def _conversations(row: dict) -> Read:
    """`conversations`: `from` human or gpt, `value`, as in LLaVA.

    LLaVA writes a placeholder on a line of its own; that newline is not part of the text.
    """
    turns = []
    for number, item in enumerate(_objects(row, "conversations"), 1):
        spoken = item.get("from") if item.get("from") is not None else item.get("role")
        value = item.get("value") if item.get("value") is not None else item.get("content")
        role = _role(spoken, ("conversations", number, "from"))
        said = _said(value, role, ("conversations", number, "value"))
        if IMAGE in said:
            said = re.sub(f"{IMAGE}\n|\n{IMAGE}$", IMAGE, said)
        turns.append(Turn(role, said))
    return _read(turns)


def _messages(row: dict) -> Read:
    """`messages`: `role`, `content`, a string or typed parts, as OpenAI and TRL have them."""
    turns, places = [], []
    for number, message in enumerate(_objects(row, "messages"), 1):
        at = "messages", number, "content"
        role = _role(message.get("role"), ("messages", number, "role"))
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        said = ""
        for part in parts:
            text, inside = _part(part, at)
            said, places = said + text, places + inside
        turns.append(Turn(role, _said(said, role, at)))
    return Read(turns, places)


def _part(part: object, at: Place) -> tuple[str, list]:
    """(text, entry of `places` for each `<image>` in it) of one part of a message."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], [None] * part["text"].count(IMAGE)
    if kind in ("image", "image_url"):
        names = ("image", "image_url", "url", "path", "base64", "bytes")
        value = next((part[name] for name in names if part.get(name) is not None), None)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        return IMAGE, [value]
    says = 'must be a text, or parts {"type": "text" or "image", ...}.'
    raise InputError(f"{_in_words(at)} {says}")


def _read(turns: list[Turn]) -> Read:
    return Read(turns, [None] * sum([turn.text.count(IMAGE) for turn in turns]))


def _objects(row: dict, column: str) -> list[dict]:
    """The turns of a row, also where a table keeps them as JSON."""
    value = _unpacked(row[column], column)
    if not isinstance(value, list) or not value or {type(v) for v in value} != {dict}:
        raise InputError(f"{column!r} must be a list of objects, one a turn.")
    return value


def _unpacked(value: object, column: str) -> object:
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{column!r} is not JSON ({error}).") from None


def _in_words(at: Place) -> str:
    return "{} {}: {!r}".format(*at)


def _role(value: object, at: Place) -> str:
    if not isinstance(value, str) or value not in ROLES:
        raise InputError(f"{_in_words(at)} is {value!r}, must be one of {', '.join(ROLES)}.")
    return ROLES[value]


def _said(value: object, role: str, at: Place) -> str:
    if not isinstance(value, str):
        raise InputError(f"{_in_words(at)} must be a text.")
    if role == "assistant" and not value.strip():
        raise InputError(f"{_in_words(at)} is empty; an answer must say something.")
    return value


# --- Columns ------------------------------------------------------------------------------------


def _columns(row: dict) -> Read:
    """question + answer (+ choices), or a picture with a caption, text or label."""
    row = {name: value for name, value in row.items() if value is not None}
    for column, prompt in (("caption", CAPTION_PROMPT), ("text", CAPTION_PROMPT),
                           ("label", LABEL_PROMPT)):  # fmt: skip
        if column in row and _pictures(row):
            row = {"question": prompt, "answer": row[column]} | row
    if "choices" in row:
        row = _multiple_choice(row)
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise InputError(
                f"needs a text in {key!r}, or a picture with a 'caption', or 'messages', "
                f"'conversations' or 'texts'; it has {', '.join(row) or 'nothing'}."
            )
    return _read([Turn("user", row["question"]), Turn("assistant", row["answer"])])


def _column_names(row: dict) -> str:
    """The columns of a row that `_columns` reads."""
    names = ("question", "choices", "answer", "caption", "text", "label")
    return " + ".join(name for name in PICTURE_COLUMNS + names if row.get(name) is not None)


def _multiple_choice(row: dict) -> dict:
    """The choices behind the question, one a line, and the right one's letter as the answer.

    `answer` is the text of a choice, its letter, or its number counted from 0; an integer is a
    number even where a choice reads the same.
    """
    choices, answer = _unpacked(row["choices"], "choices"), row.get("answer")
    letters = string.ascii_uppercase
    fits = isinstance(choices, list) and 2 <= len(choices) <= len(letters)
    if not fits or not all(isinstance(choice, str) for choice in choices):
        raise InputError("'choices' must be a list of 2 to 26 texts.")
    ways = [choices, list(letters[: len(choices)]), list(map(str, range(len(choices))))]
    ways = ways[2:] if isinstance(answer, int) else ways
    found = next((way.index(str(answer)) for way in ways if str(answer) in way), None)
    if found is None or isinstance(answer, bool):
        raise InputError(f"'answer' {answer!r} is none of the choices, their letters or numbers.")
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, choices))
    question = f"{row.get('question', LABEL_PROMPT)}{listed}\nAnswer with the letter."
    return row | {"question": question, "answer": letters[found]}


# --- Pictures -----------------------------------------------------------------------------------


def _pictures(row: dict) -> list:
    """The values of the one picture column a row has; an empty list without any."""
    columns = [c for c in PICTURE_COLUMNS if c in row and row[c] is not None and row[c] != []]
    if not columns:
        return []
    if len(columns) > 1:
        raise InputError(f"has pictures in both {columns[0]!r} and {columns[1]!r}; keep one.")
    value = _unpacked(row[columns[0]], columns[0])
    return value if isinstance(value, list) else [value]


def _picture(value: object) -> object:
    is_file = isinstance(value, dict) and (value.get("bytes") or value.get("path"))
    if not is_file and not (isinstance(value, (str, bytes, Image.Image)) and value):
        raise InputError(
            f'a picture is {type(value).__name__}; it must be a path, base64, bytes or {{"bytes"}}.'
        )
    return value


CHATS: dict[str, tuple[str, Callable[[dict], Read]]] = {
    "texts": ("texts[user, assistant] (Cauldron, FineVision)", _texts),
    "conversations": ("conversations[from, value] (LLaVA)", _conversations),
    "messages": ("messages[role, content] (OpenAI, TRL)", _messages),
}

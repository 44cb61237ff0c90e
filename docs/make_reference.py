"""Writes docs/reference.md: every config field with its meaning, default, range and presets.

    make reference

Meanings are the field docstrings, defaults those of the first preset. Ranges are the error messages
of the validation itself, for values that are likely to be wrong.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import configs
import configs_classify
from cli import command
from config_tools import InputError

PAGE = Path(__file__).with_name("reference.md")
SCRIPTS = {
    "train.py": (configs.RunConfig, configs.PRESETS),
    "classify.py train": (configs_classify.ClassifyConfig, configs_classify.PRESETS),
}
WRONG_NUMBERS = (-1, 0, 1, 1.5, 7, 1e6, 2**63)
WRONG_TEXTS = ("no such value/", "a b")
INTRODUCTION = """\
# Reference: every setting

This page is generated from [configs.py](../configs.py) and
[configs_classify.py](../configs_classify.py) by `make reference`; a test keeps it up to date.

A field `data.batch_size` is the flag `--data.batch-size` and the entry `"batch_size"` under
`"data"` in a run's `config.json`. *Range* is what validation prints for a wrong value; its numbers
are those of the defaults. *Presets* lists the presets with another value.
"""


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the docstring under it, in a dataclass and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(inspect.getsource(base)).body[0].body
        for statement, following in zip(body, body[1:]):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                name, text = statement.target, following.value
                if isinstance(name, ast.Name) and isinstance(text, ast.Constant):
                    docs[name.id] = " ".join(str(text.value).split())
    return docs


def type_name(hint: Any) -> str:
    """`int`, `bool`, `list of vision, language`, ...: as a user would write it."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is tuple:
        kinds = [kind for kind in get_args(hint) if kind is not Ellipsis]
        n = "" if Ellipsis in get_args(hint) else f"{len(kinds)} values: "
        return f"{n}list of {type_name(kinds[0])}"
    if type(None) in get_args(hint):
        return f"{type_name(get_args(hint)[0])} or none"
    return {"str": "text"}.get(hint.__name__, hint.__name__)


def shown(value: Any) -> str:
    """A default as a table shows it."""
    if value is None or value in ("", ()):
        return "none" if value is None else "empty"
    if isinstance(value, tuple):
        return " ".join(f"`{x}`" for x in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def limits(default: Any, name: str, hint: Any) -> str:
    """What validation says about wrong values of a field, in every class that has the field."""
    kinds = {hint, *get_args(hint)}
    is_int, is_number = int in kinds, kinds & {int, float}
    values: tuple = WRONG_TEXTS if hint is str else WRONG_NUMBERS if is_number else ()
    found: dict[str, None] = {}
    for cls, value in itertools.product(reversed(type(default).__mro__), values):
        if name not in getattr(cls, "__dataclass_fields__", ()):
            continue
        value = int(value) if is_int else value
        try:
            if cls is type(default):
                dataclasses.replace(default, **{name: value})
            else:
                cls(**{name: value})
        except InputError as error:
            where, _, fix = str(error).partition(f" = {value!r}: ")
            if where == name:
                found[fix.removesuffix(".")] = None
        except (TypeError, ZeroDivisionError, OverflowError):
            continue
    return "; ".join(found)


def changed_by(presets: dict, part: str, name: str) -> str:
    """`preset: value` of every preset whose value is not the default's, equal values together."""
    base = getattr(getattr(next(iter(presets.values())), part), name)
    groups: dict[str, list[str]] = {}
    for preset, run in presets.items():
        value = getattr(getattr(run, part), name)
        if value != base:
            groups.setdefault(shown(value), []).append(preset)
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in groups.items())


def section(script: str, part: str, cls: type, presets: dict) -> str:
    """The table of one dataclass."""
    hints, docs = get_type_hints(cls), field_docs(cls)
    default = getattr(next(iter(presets.values())), part)
    lines = [
        f"## `{script}`: {part}",
        f"`{cls.__name__}`. {(cls.__doc__ or '').splitlines()[0]}",
        "| field | meaning | type | default | range | presets |\n|---|---|---|---|---|---|",
    ]
    rows = []
    for field in dataclasses.fields(cls):
        value, hint = getattr(default, field.name), hints[field.name]
        allowed = limits(default, field.name, hint)
        presets_with = changed_by(presets, part, field.name)
        name = f"`{part}.{field.name}`"
        cells = (name, docs[field.name], type_name(hint), shown(value), allowed, presets_with)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n\n".join(lines) + "\n" + "\n".join(rows)


def reference() -> str:
    """The whole page."""
    sections = [INTRODUCTION.strip()]
    for script, (cls, presets) in SCRIPTS.items():
        for part, hint in get_type_hints(cls).items():
            sections.append(section(script, part, hint, presets))
    return "\n\n".join(sections) + "\n"


def main(argv: list[str]) -> None:
    if argv:
        raise InputError(f"make_reference.py takes no arguments, not {' '.join(argv)}.")
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    command(main)

"""What every config is made of: checks that name the field and the fix, and JSON.

Not here: any field (configs.py, configs_classify.py), flags (cli.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

FORMAT_VERSION = 1
HUB_NAME = r"\w[\w.-]*"  # of a user, of a repository
# Old field name -> today's; a checkpoint written before a rename still loads.
RENAMED: dict[str, str] = {}


class InputError(Exception):
    """Something the user gave is wrong. The message is one sentence: the thing and the fix."""


class Checked:
    """Runs `validate()` of *every* base: plain inheritance would run only the first one's."""

    def __post_init__(self):
        for name, hint in get_type_hints(type(self)).items():
            allowed = get_args(hint)
            is_choice = getattr(hint, "__origin__", None) is Literal
            if is_choice and getattr(self, name) not in allowed:
                require(False, name, getattr(self, name), f"must be one of {', '.join(allowed)}")
        for base in type(self).__mro__:
            if "validate" in vars(base):
                base.validate(self)


def require(condition: bool, name: str, value: object, fix: str) -> None:
    """Raise `InputError` naming field, value and fix unless `condition` holds."""
    if not condition:
        raise InputError(f"{name} = {value!r}: {fix}.")


def need(condition: bool, config: object, name: str, fix: str) -> None:
    """`require`, of a field: its value is read by name."""
    require(condition, name, getattr(config, name), fix)


def require_positive(config: object, names: str) -> None:
    for name in names.split():
        need(getattr(config, name) > 0, config, name, "must be greater than 0")


def require_rate(config: object, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        require(0 <= value < 1, name, value, "must be at least 0 and below 1")


def require_seed(config: object) -> None:
    need(0 <= config.seed < 2**63, config, "seed", "must be from 0 to 2**63 - 1")


def to_dict(config: object) -> dict:
    """A config as plain JSON values, with `format_version`."""
    return {"format_version": FORMAT_VERSION} | dataclasses.asdict(config)


def from_dict(cls: type, values: dict, where: str = "config"):
    """The inverse of `to_dict`.

    Raises `InputError` on an unknown key (with the nearest name) or a wrong type.
    """
    require(isinstance(values, dict), where, values, "must be an object of fields")
    values = {RENAMED.get(key, key): value for key, value in values.items()}
    version = values.pop("format_version", FORMAT_VERSION)
    require(isinstance(version, int), f"{where}: format_version", version, "must be int")
    require(
        version <= FORMAT_VERSION,
        f"{where}: format_version",
        version,
        f"is newer than this code reads ({FORMAT_VERSION}), so update picoVLM",
    )
    hints = get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known fields are {', '.join(known)}."
            raise InputError(f"{where}: unknown field {key!r}; {hint}")
        if dataclasses.is_dataclass(known[key]):
            values[key] = from_dict(known[key], value, f"{where}.{key}")
        else:
            values[key] = _typed(value, known[key], f"{where}: {key}")
    return cls(**values)


def _typed(value: object, hint: type, name: str) -> object:
    if isinstance(value, list):
        value = tuple(value)
    if get_origin(hint) is tuple:  # (float, float, float), or (a Literal, ...)
        item, *rest = get_args(hint)
        fits = isinstance(value, tuple) and (rest == [...] or len(value) == 1 + len(rest))
        fits = fits and all(isinstance(v, (int, float) if item is float else str) for v in value)
        what = "three numbers" if rest[1:] else "names"
        require(fits, name, value, f"must be a list of {what}")
    kinds = {int: int, float: (int, float), bool: bool, str: str, int | None: (int, type(None))}
    wrong = (wanted := kinds.get(hint)) and (
        not isinstance(value, wanted) or (hint is not bool and isinstance(value, bool))
    )
    require(not wrong, name, value, f"must be {getattr(hint, '__name__', hint)}")
    return float(value) if hint is float else value


def read_json(path: str | Path) -> dict:
    """A JSON object from a file. Raises `InputError` naming file and line."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8, numbers too long
        raise InputError(f"{path}: not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, not {type(value).__name__}.")
    return value


def by_step(checkpoint: Path) -> tuple[int, str]:
    """To order a run's `step-...` folders: from the millionth step on they have a digit more."""
    return len(checkpoint.name), checkpoint.name


def write_whole(path: str | Path, text: str) -> None:
    """A text file, all of it or, where the disk refuses, what was there before."""
    beside = Path(f"{path}.writing")
    try:
        beside.write_text(text, encoding="utf-8", errors="surrogateescape")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def json_line(row: dict) -> str:
    """A line of JSON for UTF-8, in which half a surrogate has no place: it stays an escape."""
    text = json.dumps(row, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")

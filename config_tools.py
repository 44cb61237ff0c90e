"""Validation and JSON of config dataclasses, and small helpers for files.

Not here: any field (configs.py, configs_classify.py), flags (cli.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

FORMAT_VERSION = 1
HUB_NAME = r"\w[\w.-]*"  # name of a user or repository on the Hub
HUB_ID = rf"{HUB_NAME}/{HUB_NAME}"  # of a repository with its user
# Old field name -> current name: configs written before a rename still load.
RENAMED: dict[str, str] = {
    "world_first": "world_captions_first",
    "world_described": "world_caption_fraction",
    "world_shapes": "world_min_shapes",
    "answers_every": "answer_sheet_every",
    "crop": "crop_min_scale",
    "stretch": "crop_max_ratio",
    "flip": "horizontal_flip",
    "magnitude": "randaugment_magnitude",
    "erase": "random_erasing",
}
# Deleted field -> the value that the code now always uses. Other values are refused.
REMOVED: dict[str, object] = {"muon_momentum": 0.95}


class InputError(Exception):
    """An invalid input. The message says what is wrong and how to fix it."""


class Validated:
    """Checks choices and finite numbers, then runs the `validate()` of the class and its bases.

    Plain inheritance would run only the `validate()` of the first base.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                allowed = get_args(hint)
                require(value in allowed, name, value, f"must be one of {', '.join(allowed)}")
            numbers = value if isinstance(value, tuple) else (value,)
            is_finite = all(math.isfinite(x) for x in numbers if isinstance(x, float))
            require(is_finite, name, value, "must be finite, not nan or inf")
        for base in type(self).__mro__:
            if "validate" in vars(base):
                base.validate(self)


def require(condition: object, name: str, value: object, fix: str) -> None:
    """Raise `InputError` naming field, value and fix unless `condition` holds."""
    if not condition:
        raise InputError(f"{name} = {value!r}: {fix}.")


def check(condition: object, config: Any, name: str, fix: str) -> None:
    """`require` for a field of a config, whose value it reads by name."""
    require(condition, name, getattr(config, name), fix)


def require_positive(config: Any, names: str) -> None:
    """Raise `InputError` unless every field in `names` (separated by spaces) is above 0."""
    for name in names.split():
        check(getattr(config, name) > 0, config, name, "must be greater than 0")


def require_rate(config: Any, names: str) -> None:
    """Raise `InputError` unless every field in `names` is in [0, 1)."""
    for name in names.split():
        value = getattr(config, name)
        require(0 <= value < 1, name, value, "must be at least 0 and below 1")


def require_seed(config: Any) -> None:
    """Raise `InputError` unless `seed` fits a torch generator."""
    check(0 <= config.seed < 2**63, config, "seed", "must be from 0 to 2**63 - 1")


def import_optional(module: str, user: str, package: str = "") -> Any:
    """Import an optional module; the `InputError` names the feature (`user`) and the package."""
    top = module.partition(".")[0]
    package = package or top
    try:
        importlib.import_module(top)
        return importlib.import_module(module)
    except ImportError:
        fix = f"run `pip install {package}`"
        raise InputError(f"{user} needs the package {package}; {fix}.") from None


def to_dict(config: Any) -> dict:
    """A config as JSON values, with `format_version`."""
    return {"format_version": FORMAT_VERSION} | dataclasses.asdict(config)


def from_dict(cls: type, values: dict, where: str = "config"):
    """Build a config from the result of `to_dict`; renamed fields are migrated.

    Raises `InputError` for an unknown field (naming the nearest) or a wrong type.
    """
    require(isinstance(values, dict), where, values, "must be a JSON object")
    values = _migrate(cls, values, where)
    version = values.pop("format_version", FORMAT_VERSION)
    require(isinstance(version, int), f"{where}: format_version", version, "must be int")
    require(
        version <= FORMAT_VERSION,
        f"{where}: format_version",
        version,
        f"must be at most {FORMAT_VERSION}; update picoVLM to read this file",
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


def _migrate(cls: type, values: dict, where: str) -> dict:
    """Give fields of earlier versions their current names, and drop deleted ones."""
    fields = {f.name for f in dataclasses.fields(cls)}
    migrated = {}
    for key, value in values.items():
        if key in REMOVED and key not in fields:
            fix = f"no longer a setting; it is always {REMOVED[key]}, so remove it"
            require(value == REMOVED[key], f"{where}: {key}", value, fix)
            continue
        new = RENAMED.get(key, key)
        migrated[new if new in fields else key] = value
    return migrated


def _typed(value: Any, hint: type, name: str) -> object:
    if isinstance(value, list):
        value = tuple(value)
    if get_origin(hint) is tuple:  # (float, float, float), or (a Literal, ...)
        item, *rest = get_args(hint)
        fits = isinstance(value, tuple) and (rest == [...] or len(value) == 1 + len(rest))
        fits = fits and all(isinstance(v, (int, float) if item is float else str) for v in value)
        kind = "three numbers" if rest[1:] else "names"
        require(fits, name, value, f"must be a list of {kind}")
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


def checkpoint_order(checkpoint: Path) -> tuple[int, str]:
    """Sort key of a run's `step-...` folders; a longer number is a later step."""
    return len(checkpoint.name), checkpoint.name


def newest_checkpoint(directory: Path) -> Path:
    """The newest checkpoint of a run folder; any other directory unchanged."""
    return max(directory.glob("step-*"), key=checkpoint_order, default=directory)


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text file completely, or leave the old one if writing fails."""
    temporary = Path(f"{path}.writing")
    try:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def json_line(row: dict) -> str:
    """A row as a line of JSON; lone surrogates, which UTF-8 cannot encode, stay escaped."""
    text = json.dumps(row, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")

"""The command line: flags from dataclasses by tyro, presets, and errors as one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import get_origin, get_type_hints

import configs_classify
from config_tools import (
    InputError,
    from_dict,
    read_json,
)
from configs import PRESETS, RunConfig


def parse_known(cls: type, argv: list[str], **options) -> tuple:
    """(a dataclass, the words that are no flags of it), by tyro; raises `InputError`."""
    import tyro

    said = Counter(word.partition("=")[0].replace("_", "-") for word in argv if word[:2] == "--")
    for flag, hint in flags(cls).items():
        if said[flag] > 1 and get_origin(hint) is tuple:  # of which tyro would keep the last
            raise InputError(f"{flag}: given {said[flag]} times; put all its values behind one.")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(cls, args=[*argv], return_unknown_args=True, **options)
    except SystemExit as stop:
        if stop.code != 2:  # --help
            raise
        raise InputError(unboxed(box.getvalue())) from None


def parse(cls: type, argv: list[str], **options):
    """Flags -> a dataclass; raises `InputError`, of an unknown flag with the nearest."""
    value, unknown = parse_known(cls, argv, **options)
    if unknown:
        near = difflib.get_close_matches(unknown[0].replace("_", "-"), flags(cls), n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all flags."
        raise InputError(f"unknown argument {unknown[0]!r}; {hint}")
    return value


def parse_preset(cls: type, presets: dict, argv: list[str]):
    """`[preset | run.json] [--field value ...]` -> a dataclass, by default of the first preset.

    Raises `InputError`.
    """
    base = next(iter(presets))
    if argv and not argv[0].startswith("-"):
        base, *argv = argv
    if base in presets:
        default = presets[base]
    elif base.endswith(".json"):
        default = from_dict(cls, read_json(base), base)
    else:
        near = difflib.get_close_matches(base, presets, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"presets are {', '.join(presets)}."
        raise InputError(f"{base!r} is neither a preset nor a .json file; {hint}")
    description = f"Presets: {', '.join(presets)}. Shown here: {base}."
    return parse(cls, argv, default=default, description=description)


def unboxed(box: str) -> str:
    """What tyro says in a frame, between its title and its first rule, as a sentence."""
    _title, said, *_ = *re.split("^.*[─-]{3}.*$", box, flags=re.M), ""
    return f"{' '.join(re.sub('[│|]', ' ', said).split()).rstrip('.')}; --help lists all flags."


def flags(cls: type, prefix: str = "--") -> dict[str, object]:
    """Every flag of a dataclass and its type, those of nested ones after a dot."""
    found = {}
    for name, hint in get_type_hints(cls).items():
        flag = prefix + name.replace("_", "-")
        found |= flags(hint, flag + ".") if dataclasses.is_dataclass(hint) else {flag: hint}
    return found


def command(main, argv: list[str] | None = None) -> None:
    """Run a script's `main(argv)`; a wrong input becomes one sentence on stderr and exit code 2.

    Names of files may hold any bytes, and so may what is typed: all pass in and out as they are.
    """
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # read before
            stream.reconfigure(errors="surrogateescape")
    try:
        main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a folder that may not be written
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}.", file=sys.stderr)
        sys.exit(2)


def parse_run(argv: list[str]) -> RunConfig:
    """`[preset | run.json] [--field value ...]` -> RunConfig.

    Raises `InputError`.
    """
    return parse_preset(RunConfig, PRESETS, together(argv, "--data.source"))


def together(argv: list[str], flag: str) -> list[str]:
    """All words behind a flag as one value: `--data.source a=0.7 b=0.3`."""
    if flag not in argv:
        return argv
    first = argv.index(flag) + 1
    last = next((i for i in range(first, len(argv)) if argv[i].startswith("--")), len(argv))
    return [*argv[:first], *[" ".join(argv[first:last])][: last - first], *argv[last:]]


def run_command(words: str, commands: dict[str, Callable], argv: list[str]) -> None:
    """The first of `argv` names one of `commands`, which gets the rest; without any, `words`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(words.strip())
        return
    if argv[0] not in commands:
        raise InputError(f"{argv[0]!r}: must be one of {', '.join(commands)}.")
    commands[argv[0]](argv[1:])


def parse_classify(argv: list[str]) -> configs_classify.ClassifyConfig:
    """`[preset | run.json] [--field value ...]` -> ClassifyConfig; raises `InputError`."""
    return parse_preset(configs_classify.ClassifyConfig, configs_classify.PRESETS, argv)

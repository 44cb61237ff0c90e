"""The command line: flags from dataclasses by tyro, presets, and errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Container
from typing import Any, get_origin, get_type_hints

import configs_classify
from config_tools import RENAMED, InputError, from_dict, read_json
from configs import PRESETS, RunConfig

# Old flag or subcommand -> its names today; a script knows at most one of them.
RENAMED_FLAGS: dict[str, tuple[str, ...]] = {
    "--sheet": ("--answer-sheet", "--contact-sheet"),
    "look": ("rollout",),
} | {
    f"--{part}.{old}".replace("_", "-"): (f"--{part}.{new}".replace("_", "-"),)
    for part in ("data", "train")
    for old, new in RENAMED.items()
}


def current_name(word: str, known: Container[str]) -> str:
    """The name today of a renamed flag or subcommand, if `known` has it; else empty."""
    return next((new for new in RENAMED_FLAGS.get(word, ()) if new in known), "")


def parse_known(cls: type, argv: list[str], **options) -> tuple:
    """Parse flags with tyro; return (dataclass, arguments that are not its flags).

    Raises `InputError` for a wrong value, a renamed flag, or a list that is given twice.
    """
    import tyro

    known = flags(cls)
    counts = Counter(word.partition("=")[0].replace("_", "-") for word in argv if word[:2] == "--")
    for flag, n in counts.items():
        if flag not in known and (new := current_name(flag, known)):
            raise InputError(f"{flag} is now {new}; use the new name.")
        if n > 1 and get_origin(known.get(flag)) is tuple:  # tyro would keep only the last
            raise InputError(f"{flag}: given {n} times; put all its values behind one.")
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(cls, args=[*argv], return_unknown_args=True, **options)
    except SystemExit as stop:
        if stop.code != 2:  # --help
            raise
        raise InputError(message_of(stderr.getvalue())) from None


def parse(cls: type, argv: list[str], **options):
    """Parse flags into a dataclass; raises `InputError`, for an unknown flag with the nearest."""
    value, unknown = parse_known(cls, argv, **options)
    if unknown:
        near = difflib.get_close_matches(unknown[0].replace("_", "-"), flags(cls), n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all flags."
        raise InputError(f"unknown argument {unknown[0]!r}; {hint}")
    return value


def parse_preset(cls: type, presets: dict, argv: list[str]):
    """Parse `[preset | run.json] [--field value ...]`; the first preset is the default."""
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


def parse_run(argv: list[str]) -> RunConfig:
    """Parse the arguments of train.py; raises `InputError`."""
    return parse_preset(RunConfig, PRESETS, join_values(argv, "--data.source"))


def parse_classify(argv: list[str]) -> configs_classify.ClassifyConfig:
    """Parse the arguments of classify.py train; raises `InputError`."""
    return parse_preset(configs_classify.ClassifyConfig, configs_classify.PRESETS, argv)


def join_values(argv: list[str], flag: str) -> list[str]:
    """Join all words behind a flag into one value: `--data.source a=0.7 b=0.3`."""
    if flag not in argv:
        return argv
    first = argv.index(flag) + 1
    last = next((i for i in range(first, len(argv)) if argv[i].startswith("--")), len(argv))
    return [*argv[:first], *[" ".join(argv[first:last])][: last - first], *argv[last:]]


def message_of(box: str) -> str:
    """The text inside the frame that tyro draws around an error, as a sentence."""
    _title, text, *_ = *re.split("^.*[─-]{3}.*$", box, flags=re.M), ""
    return f"{' '.join(re.sub('[│|]', ' ', text).split()).rstrip('.')}; --help lists all flags."


def flags(cls: type, prefix: str = "--") -> dict[str, object]:
    """All flags of a dataclass and their types; those of nested dataclasses follow a dot."""
    found = {}
    for name, hint in get_type_hints(cls).items():
        flag = prefix + name.replace("_", "-")
        found |= flags(hint, flag + ".") if dataclasses.is_dataclass(hint) else {flag: hint}
    return found


def run_command(usage: str, commands: dict[str, Callable], argv: list[str]) -> None:
    """Call the subcommand that `argv[0]` names with the other arguments; without one, print usage.

    Raises `InputError` for an unknown or renamed subcommand.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage.strip())
        return
    if new := current_name(argv[0], commands):
        raise InputError(f"{argv[0]} is now {new}; use the new name.")
    if argv[0] not in commands:
        raise InputError(f"{argv[0]!r}: must be one of {', '.join(commands)}.")
    commands[argv[0]](argv[1:])


def command(main, argv: list[str] | None = None) -> None:
    """Run a script's `main(argv)`; an `InputError` is printed on stderr, with exit code 2.

    File names may hold any bytes: stdin and stdout pass them on unchanged (surrogateescape).
    """
    streams: tuple[Any, Any] = sys.stdin, sys.stdout
    for stream in streams:
        # It may be replaced, or already read.
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            stream.reconfigure(errors="surrogateescape")
    try:
        main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout has closed it, like `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # full disk, missing permission
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}.", file=sys.stderr)
        sys.exit(2)

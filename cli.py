"""Command line: flags from dataclasses (by tyro), presets, and errors as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable
from typing import Any, get_origin, get_type_hints

import configs_classify
from config_tools import RENAMED, InputError, from_dict, read_json
from configs import PRESETS, RunConfig, VLMConfig

# Old flag or subcommand -> current names; each script has at most one of them.
RENAMED_FLAGS: dict[str, tuple[str, ...]] = {
    "--sheet": ("--answer-sheet", "--contact-sheet"),
    "look": ("rollout",),
} | {
    f"--{part}.{old}".replace("_", "-"): (f"--{part}.{new}".replace("_", "-"),)
    for part in ("data", "train")
    for old, new in RENAMED.items()
}


def current_name(word: str, known: Container[str]) -> str:
    """The current name of a renamed flag or subcommand if it is in `known`, else empty."""
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
            raise InputError(f"{flag}: given {n} times; give it once with all its values.")
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(cls, args=[*argv], return_unknown_args=True, **options)
    except SystemExit as stop:
        if stop.code != 2:  # --help
            raise
        raise InputError(message_of(stderr.getvalue())) from None


def parse(cls: type, argv: list[str], **options):
    """Parse flags into a dataclass; raises `InputError`, which names the nearest known flag."""
    value, unknown = parse_known(cls, argv, **options)
    if unknown:
        near = difflib.get_close_matches(unknown[0].replace("_", "-"), flags(cls), n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all flags."
        raise InputError(f"unknown argument {unknown[0]!r}; {hint}")
    return value


def parse_preset(cls: type, presets: dict, argv: list[str], script: str):
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
    description = f"Presets: {', '.join(presets)}. Defaults below are those of {base}."
    for flag in ("-h", "--help"):
        if flag in argv:
            prog = f"{script} [PRESET | RUN.json]"
            part = next(iter(argv[argv.index(flag) + 1 :]), "")
            print_help(default, part if part[:1] != "-" else "", prog, description)
    return parse(cls, argv, default=default, description=description)


def print_help(default: Any, part: str, prog: str, description: str) -> None:
    """Print the flags of one part of a run config, or of all but the model, and exit.

    A model has more fields than data and training together, and presets set them.
    """
    parts = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    if part and part not in parts:
        raise InputError(f"--help {part}: must be one of {', '.join(parts)}, or --help alone.")
    names = [part] if part else [name for name in parts if name != "model"]
    fields = [(n, type(parts[n]), dataclasses.field(default=parts[n])) for n in names]
    shown = dataclasses.make_dataclass("Options", fields, frozen=True)
    if not part:
        description += " The model's options: --help model."
    parse_known(shown, ["--help"], prog=prog, description=description)


def parse_run(argv: list[str]) -> RunConfig:
    """Parse the arguments of train.py; raises `InputError`."""
    return parse_preset(RunConfig, PRESETS, join_values(argv, "--data.source"), "train.py")


def parse_classify(argv: list[str]) -> configs_classify.ClassifyConfig:
    """Parse the arguments of classify.py train; raises `InputError`."""
    cls, presets = configs_classify.ClassifyConfig, configs_classify.PRESETS
    return parse_preset(cls, presets, argv, "classify.py train")


# Model fields that a loaded model can change, because they need no other weights.
CHANGEABLE = ("max_img_size", "vit_dropout", "vit_drop_path", "lm_dropout", "vlm_base_models")


def model_fields_of(argv: list[str]) -> list[str]:
    """The fields that `--model.*` flags in the arguments of train.py set."""
    words = [word[8:].partition("=")[0] for word in argv if word.startswith("--model.")]
    return [word.replace("-", "_").removeprefix("no_") for word in words]


def change_loaded(
    loaded: VLMConfig, wanted: VLMConfig, asked: Iterable[str], source: str
) -> VLMConfig:
    """The config of a loaded model with the fields in `asked` from `wanted`.

    Raises `InputError` for a field that differs and needs other weights than those of `source`.
    """
    changes = {name: getattr(wanted, name) for name in asked}
    for name, value in changes.items():
        if value != getattr(loaded, name) and name not in CHANGEABLE:
            flags = ", ".join(f"--model.{field.replace('_', '-')}" for field in CHANGEABLE)
            raise InputError(
                f"{name} = {value!r}: {source} was trained with {getattr(loaded, name)!r}; with "
                f"--train.init-from only these can change: {flags}."
            )
    return dataclasses.replace(loaded, **changes)


def join_values(argv: list[str], flag: str) -> list[str]:
    """Join all words after a flag into one value: `--data.source a=0.7 b=0.3`."""
    if flag not in argv:
        return argv
    first = argv.index(flag) + 1
    last = next((i for i in range(first, len(argv)) if argv[i].startswith("--")), len(argv))
    return [*argv[:first], *[" ".join(argv[first:last])][: last - first], *argv[last:]]


def message_of(box: str) -> str:
    """The text inside tyro's error box, as one sentence."""
    _title, text, *_ = *re.split("^.*[─-]{3}.*$", box, flags=re.M), ""
    return f"{' '.join(re.sub('[│|]', ' ', text).split()).rstrip('.')}; --help lists all flags."


def flags(cls: type, prefix: str = "--") -> dict[str, object]:
    """Flag -> type for every field of a dataclass; nested ones look like `--data.seed`."""
    found = {}
    for name, hint in get_type_hints(cls).items():
        flag = prefix + name.replace("_", "-")
        found |= flags(hint, flag + ".") if dataclasses.is_dataclass(hint) else {flag: hint}
    return found


def run_command(usage: str, commands: dict[str, Callable], argv: list[str]) -> None:
    """Call the subcommand `argv[0]` with the other arguments; print usage if there is none.

    Raises `InputError` for an unknown or renamed subcommand.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage.strip())
        return
    if new := current_name(argv[0], commands):
        raise InputError(f"{argv[0]} is now {new}; use the new name.")
    if argv[0] not in commands:
        raise InputError(f"unknown subcommand {argv[0]!r}; must be one of {', '.join(commands)}.")
    commands[argv[0]](argv[1:])


def command(main, argv: list[str] | None = None) -> None:
    """Run a script's `main(argv)`; an `InputError` is printed on stderr, with exit code 2.

    File names may contain any bytes: stdin and stdout pass them unchanged (surrogateescape).
    """
    streams: tuple[Any, Any] = sys.stdin, sys.stdout
    for stream in streams:
        # A replaced stream may lack `reconfigure`; one already read refuses it.
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
    except BrokenPipeError:  # the reader closed the pipe, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # full disk, missing permission
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}.", file=sys.stderr)
        sys.exit(2)

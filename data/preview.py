"""What the model will see of a source, before a minute is spent on training it.

python -m data.preview my.jsonl                    the built-in tiny model's view of it
python -m data.preview my.jsonl 460m --data.max-length 2048
The words behind the source are those of train.py. `check_before_training` looks at fewer rows of
the same run and refuses to start when none of them teaches anything.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from cli import command, flags, parse_known, parse_run
from config_tools import InputError, by_step
from configs import DataConfig
from data import processor as processors
from data.processor import Processor
from data.sources.open import open_source
from data.types import Tokens

GREEN, PLAIN = "\033[1;32m", "\033[0m"
BAR = 40  # columns of the longest bar
SIDE, GAP = 144, 12  # the sheet: side of a tile and distance between two, in pixels


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Show what a model will see of a source. More words and flags: those of train.py."""

    source: Annotated[str, tyro.conf.Positional]
    """A file, a folder, a data set, as for --data.source."""
    n: int = 3
    """Samples shown."""
    rows: int = 200
    """Rows checked with their pictures, spread over the source; every row's fields are checked."""
    sheet: Path = Path("preview.png")
    """Where the picture of the shown samples' tiles goes."""


# --- Checking -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A row as it is before and after it is cut to fit; `cut` is None when it is skipped."""

    whole: Tokens | None
    cut: Tokens | None
    reason: str = ""  # why it is skipped


def look(source, processor: Processor, cfg: DataConfig, i: int) -> Seen:
    """Row `i` as training meets it."""
    whole = None
    try:
        whole = processor.encode_whole(source[i], cfg.max_tiles)
        return Seen(whole, processor.cut(whole, cfg.max_length))
    except InputError as error:
        return Seen(whole, None, str(error))


def spread(n_rows: int, n: int) -> list[int]:
    """At most `n` rows, from the first to the last at equal distances."""
    return np.unique(np.linspace(0, n_rows - 1, min(n, n_rows)).astype(int)).tolist()


def check_before_training(source, processor: Processor, cfg: DataConfig, n: int = 16) -> str:
    """One line about `n` rows of the source.

    Raises `InputError` when none of them can be learned from, after showing one with its mask.
    """
    seen = [look(source, processor, cfg, i) for i in spread(len(source), n)]
    kept = [s.cut for s in seen if s.cut is not None]
    if not kept:
        for s in [s for s in seen if s.whole is not None][:1]:
            print(f"{s.whole.row}: {marked(s.whole, processor, use_color())}")
        raise InputError(
            f"{cfg.source}: none of {len(seen)} rows looked at teaches anything, the first: "
            f"{seen[0].reason}"
        )
    n_tokens, n_learned = sum(map(len, kept)), sum(int(t.supervised.sum()) for t in kept)
    n_cut = sum(s.cut is not None and len(s.whole) > len(s.cut) for s in seen)
    return (
        f"looked at {len(seen)} rows: {n_tokens / len(kept):.0f} tokens and "
        f"{sum(len(t.tiles) for t in kept) / len(kept):.1f} tiles each, "
        f"{n_learned / n_tokens:.1%} of tokens supervised, {n_cut} cut, "
        f"{len(seen) - len(kept)} skipped"
    )


# --- Text ---------------------------------------------------------------------------------------


def use_color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def marked(tokens: Tokens, processor: Processor, color: bool) -> str:
    """The decoded row, what the model must say in green or in [[ ]], placeholders counted."""
    start, end = (GREEN, PLAIN) if color else ("[[", "]]")
    edges = np.flatnonzero(np.diff(tokens.supervised)) + 1
    said = ""
    for at in np.split(np.arange(len(tokens)), edges):
        run = processor.tokenizer.decode(tokens.ids[at].tolist(), skip_special_tokens=False)
        said += f"{start}{run}{end}" if len(at) and tokens.supervised[at[0]] else run
    return re.sub("(<image>){2,}", lambda m: f"<image> x {len(m[0]) // 7}", said)


def histogram(title: str, values: Sequence[int], n_bins: int = 8) -> str:
    """Bars of how many rows have how much; every value its own line when there are few."""
    if not values:
        return f"{title}: none"
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // n_bins))
    counts = Counter((value - low) // width for value in values)
    lines = [f"{title}: {low} to {high}, mean {sum(values) / len(values):.1f}"]
    for b in range((high - low) // width + 1):
        first = low + b * width
        label = str(first) if width == 1 else f"{first}-{first + width - 1}"
        bar = "#" * -(-BAR * counts[b] // max(counts.values()))
        lines.append(f"  {label:>13} {counts[b]:6} {bar}".rstrip())
    return "\n".join(lines)


def report(source, seen: Sequence[Seen], cfg: DataConfig) -> str:
    """The figures: what was found, skipped, cut and supervised."""
    kept = [s for s in seen if s.cut is not None]
    skipped = [s.reason for s in seen if s.cut is None]
    cut = [s for s in kept if len(s.cut) < len(s.whole)]
    lost = sum(int(s.whole.supervised.sum() - s.cut.supervised.sum()) for s in cut)
    n_all = sum(int(s.whole.supervised.sum()) for s in kept)
    n_tokens = sum(len(s.cut) for s in kept)
    share = (n_all - lost) / max(1, n_tokens)
    lines = [*source.notes, f"checked {len(seen):,} of {len(source):,} training rows"]
    lines += [f"skipped: {len(skipped)} of them, {len(source.bad)} more when the source was opened"]
    lines += [f"  {reason}" for reason in skipped[:10]] + ["  ..."] * (len(skipped) > 10)
    lines.append(histogram("tokens a row", [len(s.whole) for s in kept]))
    lines.append(histogram("tiles a row", [len(s.whole.tiles) for s in kept]))
    lines.append(
        f"cut at data.max_length = {cfg.max_length}: {len(cut)} rows lose {lost} of {n_all} "
        "supervised tokens"
    )
    return "\n".join([*lines, f"supervised: {share:.1%} of {n_tokens:,} tokens"])


# --- Sheet --------------------------------------------------------------------------------------


def tile_places(tokens: Tokens, processor: Processor) -> list[tuple[str, int, int]]:
    """For each tile the special token in front of it, its first token's place and its last's."""
    size = processor.cfg.tokens_per_tile
    starts = np.flatnonzero(tokens.ids == processor.cfg.vlm_image_token_id)[::size].tolist()
    names = [processor.tokenizer.id_to_token(int(tokens.ids[at - 1])) for at in starts]
    return [(name.strip("<>"), at, at + size - 1) for name, at in zip(names, starts)]


def arrange(names: Sequence[str]) -> list[tuple[int, int]]:
    """(line, column) of every tile on the sheet: a picture's as they lie in it, its view beside."""
    at, top, n_lines, n_columns = [], 0, 1, 0
    for name in names:
        if found := re.fullmatch(r"row_(\d+)_col_(\d+)", name):
            line, column = int(found[1]) - 1, int(found[2]) - 1
            n_lines, n_columns = line + 1, max(n_columns, column + 1)
            at.append((top + line, column))
        else:  # the global view ends a picture
            at.append((top, n_columns))
            top, n_lines, n_columns = top + n_lines, 1, 0
    return at


def draw_sheet(shown: Sequence[Tokens], processor: Processor, path: Path) -> None:
    """Write the tiles of some samples with their tokens' places: what the model will see."""
    font, label, step = ImageFont.load_default(15), ImageFont.load_default(12), SIDE + 46
    places = [tile_places(tokens, processor) for tokens in shown]
    spots = [arrange([name for name, _, _ in of_sample]) for of_sample in places]
    heights = [24 + step * (1 + max((line for line, _ in spot), default=-1)) for spot in spots]
    n_columns = max([5] + [column + 1 for spot in spots for _, column in spot])  # room for a title
    sheet = Image.new("RGB", (n_columns * (SIDE + GAP) + GAP, sum(heights) + GAP), "white")
    pen, top = ImageDraw.Draw(sheet), GAP
    for tokens, of_sample, spot, height in zip(shown, places, spots, heights, strict=True):
        title = f"{tokens.row}: {len(tokens)} tokens, {len(tokens.tiles)} tiles"
        pen.text((GAP, top), title, fill="black", font=font)
        for i, (tile, (name, first, last)) in enumerate(zip(tokens.tiles, of_sample, strict=True)):
            x, y = GAP + spot[i][1] * (SIDE + GAP), top + 24 + spot[i][0] * step
            sharp = Image.Resampling.NEAREST if len(tile) < SIDE else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(tile).resize((SIDE, SIDE), sharp), (x, y))
            pen.text((x, y + SIDE + 2), f"{i}: {name}", fill="black", font=label)
            pen.text((x, y + SIDE + 18), f"tokens {first}-{last}", fill="gray", font=label)
        top += height
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix Pillow does not write
        raise InputError(f"sheet = {path}: cannot be written ({error}).") from None


# --- Command ------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    args, rest = parse_known(Arguments, argv)
    for name, value in (("n", args.n), ("rows", args.rows)):
        if value < 1:
            raise InputError(f"{name} = {value}: must be at least 1.")
    if args.sheet.is_dir() or not args.sheet.parent.is_dir():
        raise InputError(f"sheet = {args.sheet}: must be a file in a folder that exists.")
    if unknown := [word for word in rest if word.startswith("--") and "." not in word]:
        known = ", ".join([*flags(Arguments)][1:])
        raise InputError(f"unknown argument {unknown[0]!r}; known are {known}, and train.py's.")
    cfg = parse_run(rest)
    data = replace(cfg.data, source=args.source)
    source = open_source(data, "train")
    folder = Path(cfg.train.init_from)
    processor = (
        processors.load(max(folder.glob("step-*"), key=by_step, default=folder))
        if cfg.train.init_from
        else processors.build(cfg.model)
    )
    seen = [look(source, processor, data, i) for i in spread(len(source), args.rows)]
    print(report(source, seen, data))
    shown = [s.cut for s in seen if s.cut is not None][: args.n]
    for tokens in shown:
        print(f"\n{tokens.row}\n{marked(tokens, processor, use_color())}")
    if not shown:
        raise InputError(f"{args.source}: nothing to learn from; {seen[0].reason}")
    draw_sheet(shown, processor, args.sheet)
    print(f"\nwhat the model must say is {'green' if use_color() else 'in [[ ]]'}; "
          f"its tiles are in {args.sheet}")  # fmt: skip


if __name__ == "__main__":
    command(main)

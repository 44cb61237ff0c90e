"""Show what the model will see of a source before training on it.

python -m data.preview my.jsonl                    as the preset tiny sees it
python -m data.preview my.jsonl 460m --data.max-length 2048
Arguments after the source are those of train.py. Training itself calls `check_before_training`,
which checks fewer rows and raises an error if none of them has supervised tokens.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from cli import change_loaded, command, flags, model_fields_of, parse_known, parse_run
from config_tools import InputError, newest_checkpoint
from configs import DataConfig
from data import processor as processors
from data.processor import Processor
from data.sources.open import open_dataset
from data.types import Dataset, Tokens

GREEN, PLAIN = "\033[1;32m", "\033[0m"
BAR = 40  # columns of the longest bar
SIDE, GAP = 144, 12  # contact sheet: side of a tile and gap between two, in pixels


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Show what the model will see of a source. All arguments and flags of train.py work, too."""

    source: Annotated[str, tyro.conf.Positional]
    """A file, a folder or a dataset of the Hub, as for --data.source."""
    n: int = 3
    """Number of samples to print."""
    rows: int = 200
    """Number of evenly spaced rows to check with their images; fields are checked in all rows."""
    contact_sheet: Path = Path("preview.png")
    """Image file to write: the image tiles of the printed samples."""


class InspectedRow(NamedTuple):
    """A row before and after truncation; None, with the reason, if a step failed."""

    encoded: Tokens | None
    truncated: Tokens | None
    reason: str = ""


def inspect_row(dataset: Dataset, processor: Processor, cfg: DataConfig, i: int) -> InspectedRow:
    """Sample `i` as training encodes it."""
    sample = encoded = None
    try:
        sample = dataset[i]
        encoded = processor.encode_whole(sample, cfg.max_tiles)
        return InspectedRow(encoded, processor.truncate(encoded, cfg.max_length))
    except InputError as error:
        row = sample.row if sample else ""  # the message may name an image file only
        return InspectedRow(encoded, None, str(error) if row in str(error) else f"{row}: {error}")


def kept_rows(seen: Sequence[InspectedRow]) -> list[tuple[Tokens, Tokens]]:
    """(before, after truncation) of the usable rows."""
    return [(s.encoded, s.truncated) for s in seen if s.encoded and s.truncated]


def evenly_spaced(n_rows: int, n: int) -> list[int]:
    """At most `n` indices from 0 to n_rows - 1, evenly spaced."""
    return np.unique(np.linspace(0, n_rows - 1, min(n, n_rows)).astype(int)).tolist()


def check_before_training(
    dataset: Dataset, processor: Processor, cfg: DataConfig, n: int = 16
) -> str:
    """Check `n` rows of the dataset; return one line about them.

    If none has supervised tokens, print one with its mask and raise `InputError`.
    """
    seen = [inspect_row(dataset, processor, cfg, i) for i in evenly_spaced(len(dataset), n)]
    pairs = kept_rows(seen)
    if not pairs:
        if encoded := next((s.encoded for s in seen if s.encoded), None):
            print(f"{encoded.row}: {mark_supervised(encoded, processor, use_color())}")
        none = f"none of the {len(seen)} checked rows is usable"
        raise InputError(f"{cfg.source}: {none}; the first: {seen[0].reason}")
    n, kept = len(pairs), [truncated for _, truncated in pairs]
    n_tokens, n_tiles = sum(map(len, kept)), sum(len(t.tiles) for t in kept)
    n_cut = sum(len(encoded) > len(truncated) for encoded, truncated in pairs)
    share = sum(int(t.supervised.sum()) for t in kept) / n_tokens
    return (
        f"checked {len(seen)} rows: mean {n_tokens / n:.0f} tokens and {n_tiles / n:.1f} tiles, "
        f"{share:.1%} of tokens supervised, {n_cut} rows truncated, {len(seen) - n} unusable"
    )


# --- Text ---------------------------------------------------------------------------------------


def use_color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def mark_supervised(tokens: Tokens, processor: Processor, color: bool) -> str:
    """The decoded row; supervised text is green or in [[ ]], repeated `<image>` is counted."""
    start, end = (GREEN, PLAIN) if color else ("[[", "]]")
    edges = np.flatnonzero(np.diff(tokens.supervised)) + 1
    text = ""
    for at in np.split(np.arange(len(tokens)), edges):
        run = processor.tokenizer.decode(tokens.ids[at].tolist(), skip_special_tokens=False)
        text += f"{start}{run}{end}" if len(at) and tokens.supervised[at[0]] else run
    return re.sub("(<image>){2,}", lambda m: f"<image> x {len(m[0]) // 7}", text)


def histogram(title: str, values: Sequence[int], n_bins: int = 8) -> str:
    """A text histogram of at most `n_bins` bins, one per value if they fit."""
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


def describe_rows(dataset: Dataset, seen: Sequence[InspectedRow], cfg: DataConfig) -> str:
    """Counts of usable rows, tokens and tiles per row, truncated and supervised tokens."""
    kept, skipped = kept_rows(seen), [s.reason for s in seen if s.truncated is None]
    n_cut = sum(len(truncated) < len(encoded) for encoded, truncated in kept)
    n_all = sum(int(encoded.supervised.sum()) for encoded, _ in kept)
    n_left = sum(int(truncated.supervised.sum()) for _, truncated in kept)
    n_tokens = sum(len(truncated) for _, truncated in kept)
    n_opened, lost = len(dataset.skipped), f"{n_all - n_left} of {n_all} supervised tokens"
    return "\n".join([
        *dataset.notes,
        f"checked {len(seen):,} of {len(dataset):,} training rows",
        f"unusable rows: {len(skipped)} of the checked ones; {n_opened} more on opening the source",
        *[f"  {reason}" for reason in skipped[:10]] + ["  ..."] * (len(skipped) > 10),
        histogram("tokens per row", [len(encoded) for encoded, _ in kept]),
        histogram("tiles per row", [len(encoded.tiles) for encoded, _ in kept]),
        f"truncated at data.max_length = {cfg.max_length}: {n_cut} rows, which lose {lost}",
        f"supervised: {n_left:,} of {n_tokens:,} tokens ({n_left / max(1, n_tokens):.1%})",
    ])  # fmt: skip


# --- Contact sheet ------------------------------------------------------------------------------


def tile_spans(tokens: Tokens, processor: Processor) -> list[tuple[str, int, int]]:
    """For each tile: the special token before it, and the positions of its first and last token."""
    size = processor.cfg.tokens_per_tile
    starts = np.flatnonzero(tokens.ids == processor.cfg.vlm_image_token_id)[::size].tolist()
    names = [str(processor.tokenizer.id_to_token(int(tokens.ids[at - 1]))) for at in starts]
    return [(name.strip("<>"), at, at + size - 1) for name, at in zip(names, starts)]


def arrange_tiles(names: Sequence[str]) -> list[tuple[int, int]]:
    """(line, column) of every tile on the sheet: as in its image, global view on the right."""
    at, top, n_lines, n_columns = [], 0, 1, 0
    for name in names:
        if found := re.fullmatch(r"row_(\d+)_col_(\d+)", name):
            line, column = int(found[1]) - 1, int(found[2]) - 1
            n_lines, n_columns = line + 1, max(n_columns, column + 1)
            at.append((top + line, column))
        else:  # the global view is the last tile of an image
            at.append((top, n_columns))
            top, n_lines, n_columns = top + n_lines, 1, 0
    return at


def draw_contact_sheet(shown: Sequence[Tokens], processor: Processor, path: Path) -> None:
    """Draw the tiles of the samples with the positions of their tokens, and save the image."""
    font, label, step = ImageFont.load_default(15), ImageFont.load_default(12), SIDE + 46
    spans = [tile_spans(tokens, processor) for tokens in shown]
    positions = [arrange_tiles([name for name, _, _ in of_sample]) for of_sample in spans]
    lines, columns = ([[at[k] + 1 for at in of_sample] for of_sample in positions] for k in (0, 1))
    heights = [24 + step * max(of_sample, default=0) for of_sample in lines]
    n_columns = max([5, *chain.from_iterable(columns)])  # 5: wide enough for a title
    sheet = Image.new("RGB", (n_columns * (SIDE + GAP) + GAP, sum(heights) + GAP), "white")
    pen, top = ImageDraw.Draw(sheet), GAP
    for tokens, of_sample, position, height in zip(shown, spans, positions, heights, strict=True):
        title = f"{tokens.row}: {len(tokens)} tokens, {len(tokens.tiles)} tiles"
        pen.text((GAP, top), title, fill="black", font=font)
        for i, (tile, (name, first, last)) in enumerate(zip(tokens.tiles, of_sample, strict=True)):
            x, y = GAP + position[i][1] * (SIDE + GAP), top + 24 + position[i][0] * step
            sharp = Image.Resampling.NEAREST if len(tile) < SIDE else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(tile).resize((SIDE, SIDE), sharp), (x, y))
            pen.text((x, y + SIDE + 2), f"{i}: {name}", fill="black", font=label)
            pen.text((x, y + SIDE + 18), f"tokens {first}-{last}", fill="gray", font=label)
        top += height
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix Pillow does not write
        raise InputError(f"contact_sheet = {path}: cannot be written ({error}).") from None


def main(argv: list[str]) -> None:
    args, rest = parse_known(Arguments, argv)
    for name, value in (("n", args.n), ("rows", args.rows)):
        if value < 1:
            raise InputError(f"{name} = {value}: must be at least 1.")
    sheet = args.contact_sheet
    if sheet.is_dir() or not sheet.parent.is_dir():
        raise InputError(f"contact_sheet = {sheet}: must be a file in an existing folder.")
    if unknown := [word for word in rest if word.startswith("--") and "." not in word]:
        known = ", ".join([*flags(Arguments)][1:])
        raise InputError(f"unknown argument {unknown[0]!r}; use {known} or flags of train.py.")
    cfg = parse_run(rest)
    data = replace(cfg.data, source=args.source)
    dataset = open_dataset(data, "train")
    if cfg.train.init_from:
        processor = processors.load(newest_checkpoint(Path(cfg.train.init_from)))
        fields = model_fields_of(rest)
        new = change_loaded(processor.cfg, cfg.model, fields, cfg.train.init_from)
        processor = replace(processor, cfg=new)
    else:
        processor = processors.build(cfg.model)
    indices = evenly_spaced(len(dataset), args.rows)
    seen = [inspect_row(dataset, processor, data, i) for i in indices]
    print(describe_rows(dataset, seen, data))
    shown = [truncated for _, truncated in kept_rows(seen)][: args.n]
    for tokens in shown:
        print(f"\n{tokens.row}\n{mark_supervised(tokens, processor, use_color())}")
    if not shown:
        raise InputError(f"{args.source}: no usable row; the first: {seen[0].reason}")
    draw_contact_sheet(shown, processor, sheet)
    marked = "green" if use_color() else "in [[ ]]"
    print(f"\nsupervised text is {marked}; image tiles of these samples: {sheet}")


if __name__ == "__main__":
    command(main)

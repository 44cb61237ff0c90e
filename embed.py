"""The ViT alone: pictures as vectors, the nearest to a picture, near-duplicates and leaks.

python embed.py build my-pictures --model runs/classifier --out runs/index
python embed.py search runs/index --image cat.png -k 5 --sheet found.png
python embed.py duplicates runs/index --threshold 0.95
python embed.py duplicates runs/train-index runs/test-index      leaks between two folders
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cli import command, parse, run_command
from config_tools import InputError, write_whole
from data.sources.folders import PICTURES
from engine.training.distributed import setup
from engine.vit.embedding import (
    ENGINES,
    SKIPPED,
    alike,
    build,
    describe,
    embed,
    open_encoder,
    open_index,
    require_same,
)
from engine.vit.figures import draw_files

SHOWN = 30  # pairs on a sheet


@dataclass(frozen=True, kw_only=True)
class Build:
    """Embed all pictures of a folder; run again, only what is new is added."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of pictures, at any depth."""
    model: str
    """Encoder: a classifier, a VLM checkpoint, a run folder, one of transformers, a Hub id."""
    out: Path
    """Folder of the index."""
    pool: Literal["auto", "cls", "mean", "map"] = "auto"
    """How tokens become one vector. auto: CLS where there is one, else the mean of the patches."""
    batch_size: int = 64
    """Pictures embedded together."""
    npz: bool = False
    """Also write embeddings.npz: `embeddings` and `files`."""


def build_main(argv: list[str]) -> None:
    import numpy as np

    args = parse(Build, argv)
    if args.batch_size < 1:
        raise InputError(f"batch_size = {args.batch_size}: must be at least 1.")
    if not args.folder.is_dir():
        raise InputError(f"{args.folder}: no such folder.")
    inside = sorted(p for p in args.folder.rglob("*") if p.suffix.lower() in PICTURES)
    if not inside:
        raise InputError(f"{args.folder}: no pictures ({' '.join(PICTURES)}) in this folder.")
    vit = open_encoder(args.model, args.pool).to(setup().device)
    about = describe(vit, args.model)
    index = build(vit, [str(p) for p in inside], args.out, about, args.batch_size)
    if args.npz:
        np.savez(args.out / "embeddings.npz", embeddings=index.rows, files=np.array(index.files))
    n_skipped = len(set(map(str, inside)) - set(index.files))
    left_out = f"; {n_skipped:,} left out, see {args.out / SKIPPED}" if n_skipped else ""
    print(f"{len(index.files):,} pictures of {index.rows.shape[1]} numbers in {args.out}{left_out}")


@dataclass(frozen=True, kw_only=True)
class Search:
    """The pictures of an index that are most alike to others."""

    index: Annotated[Path, tyro.conf.Positional]
    """Folder made by build."""
    image: tuple[str, ...]
    """Pictures to find the like of."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 5
    """Pictures found for each."""
    engine: Literal["exact", "faiss"] = "exact"
    """faiss: an approximate search for millions of pictures, by the package faiss-cpu."""
    sheet: Path | None = None
    """Picture to write: each query and what was found."""


def search_main(argv: list[str]) -> None:
    args = parse(Search, argv)
    if args.k < 1:
        raise InputError(f"k = {args.k}: must be at least 1.")
    index = open_index(args.index)
    vit = open_encoder(index.about["model"], index.about["pool"]).to(setup().device)
    require_same(args.index, index.about, describe(vit, index.about["model"]))
    queries, problems = embed(vit, args.image)
    if wrong := next((problem for problem in problems if problem), None):
        raise InputError(wrong.rstrip("."))
    numbers, cosines = ENGINES[args.engine](queries, index.rows, args.k)
    lines = []
    for name, row, scores in zip(args.image, numbers.tolist(), cosines.tolist()):
        found = [(index.files[i], score) for i, score in zip(row, scores)]
        print(name, *(f"  {score:.4f} {file}" for file, score in found), sep="\n")
        lines.append([(name, "query"), *((file, f"{s:.3f} {file}") for file, s in found)])
    if args.sheet:
        draw_files(lines, args.sheet)
        print(f"wrote {args.sheet}")


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Pairs of pictures that are nearly the same, within an index or between two."""

    index: Annotated[Path, tyro.conf.Positional]
    """Folder made by build."""
    other: Annotated[Path | None, tyro.conf.Positional] = None
    """Another, by the same encoder: then only pairs between both, as leaks from train to test."""
    threshold: float = 0.95
    """Least cosine of a pair, at most 1."""
    out: Path | None = None
    """CSV file for the pairs; else they are printed."""
    sheet: Path | None = None
    """Picture to write: the least alike pairs that were found."""


def duplicates_main(argv: list[str]) -> None:
    args = parse(Duplicates, argv)
    if not -1 <= args.threshold <= 1:
        raise InputError(f"threshold = {args.threshold}: must be between -1 and 1.")
    one = open_index(args.index)
    other = open_index(args.other) if args.other else None
    made = [{k: v for k, v in i.about.items() if k != "model"} for i in (one, other) if i]
    if made[0] != made[-1]:
        raise InputError(f"{args.index} and {args.other}: made by different encoders or pools.")
    files = other.files if other else one.files
    pairs = [
        (one.files[i], files[j], cosine)
        for i, j, cosine in alike(one.rows, other.rows if other else None, args.threshold)
    ]
    pairs.sort(key=lambda pair: -pair[2])
    if args.out is None:
        write_pairs(pairs, sys.stdout)
    else:
        try:
            file = io.StringIO()
            write_pairs(pairs, file)
            write_whole(args.out, file.getvalue())
        except OSError as error:
            raise InputError(f"out = {args.out}: cannot be written ({error.strerror}).") from None
    print(f"{len(pairs):,} pairs at least {args.threshold} alike", file=sys.stderr)
    if args.sheet and pairs:
        lines = [[(a, f"{cosine:.4f} {a}"), (b, b)] for a, b, cosine in pairs[-SHOWN:]]
        draw_files(lines, args.sheet)


def write_pairs(pairs: list[tuple[str, str, float]], file) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["one", "other", "cosine"])
    writer.writerows([a, b, f"{cosine:.6f}"] for a, b, cosine in pairs)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "build": build_main, "search": search_main, "duplicates": duplicates_main,
}  # fmt: skip


def main(argv: list[str]) -> None:
    run_command(__doc__, COMMANDS, argv)


if __name__ == "__main__":
    command(main)

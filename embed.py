"""Image embeddings with the ViT: build an index, search it, find near-duplicates and leaks.

python embed.py build my-images --model runs/classifier --out runs/index
python embed.py search runs/index --image cat.png -k 5 --contact-sheet found.png
python embed.py duplicates runs/index --threshold 0.95
python embed.py duplicates runs/train-index runs/test-index      leaks between two folders
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cli import command, parse, run_command
from config_tools import InputError, check, write_atomic
from data.sources.folders import find_images
from engine.training.distributed import setup
from engine.vit import embedding
from engine.vit.figures import draw_files

MAX_PAIRS = 30  # on a contact sheet


@dataclass(frozen=True, kw_only=True)
class Build:
    """Embed all images of a folder; run it again to add new images."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of images, at any depth."""
    model: str
    """Encoder: a classifier, VLM or transformers checkpoint, a run folder, or a Hub id."""
    out: Path
    """Folder of the index to write."""
    pool: Literal["auto", "cls", "mean", "map"] = "auto"
    """Pooling of the tokens. auto: CLS if there is one, else the mean of the patches."""
    batch_size: int = 64
    """Images per batch."""
    npz: bool = False
    """Also write embeddings.npz, with `embeddings` and `files`."""


def build_main(argv: list[str]) -> None:
    import numpy as np

    args = parse(Build, argv)
    check(args.batch_size >= 1, args, "batch_size", "must be at least 1")
    if not args.folder.is_dir():
        raise InputError(f"{args.folder}: no such folder.")
    inside = [args.folder / name for name in find_images(args.folder)]
    vit = embedding.open_encoder(args.model, args.pool).to(setup().device)
    about = embedding.describe(vit, args.model)
    index = embedding.build(vit, [str(p) for p in inside], args.out, about, args.batch_size)
    if args.npz:
        np.savez(args.out / "embeddings.npz", embeddings=index.rows, files=np.array(index.files))
    n_skipped = len(set(map(str, inside)) - set(index.files))
    skipped = f"; {n_skipped:,} skipped, see {args.out / embedding.SKIPPED}" if n_skipped else ""
    n, width = index.rows.shape
    print(f"{n:,} images with {width} dimensions in {args.out}{skipped}")


@dataclass(frozen=True, kw_only=True)
class Search:
    """Find the images of an index that are most similar to given ones."""

    index: Annotated[Path, tyro.conf.Positional]
    """Index folder, written by build."""
    image: tuple[str, ...]
    """Query images."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 5
    """Number of results per query."""
    engine: Literal["exact", "faiss"] = "exact"
    """faiss: approximate search for millions of images; needs faiss-cpu."""
    contact_sheet: Path | None = None
    """Image to write: each query with its results."""


def search_main(argv: list[str]) -> None:
    args = parse(Search, argv)
    check(args.k >= 1, args, "k", "must be at least 1")
    index = embedding.open_index(args.index)
    vit = embedding.open_encoder(index.about["model"], index.about["pool"]).to(setup().device)
    embedding.require_same(args.index, index.about, embedding.describe(vit, index.about["model"]))
    queries, errors = embedding.embed(vit, args.image)
    if error := next((e for e in errors if e), ""):
        raise InputError(error)
    indices, cosines = embedding.ENGINES[args.engine](queries, index.rows, args.k)
    lines = []
    for name, row, scores in zip(args.image, indices.tolist(), cosines.tolist()):
        found = [(index.files[i], score) for i, score in zip(row, scores)]
        print(name, *(f"  {score:.4f} {file}" for file, score in found), sep="\n")
        lines.append([(name, "query"), *((file, f"{s:.3f} {file}") for file, s in found)])
    if args.contact_sheet:
        draw_files(lines, args.contact_sheet)
        print(f"wrote {args.contact_sheet}")


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Find pairs of nearly identical images, within an index or between two."""

    index: Annotated[Path, tyro.conf.Positional]
    """Index folder, written by build."""
    other: Annotated[Path | None, tyro.conf.Positional] = None
    """A second index of the same encoder: find pairs between both, for example leaks."""
    threshold: float = 0.95
    """Minimum cosine similarity of a pair, from -1 to 1."""
    out: Path | None = None
    """CSV file for the pairs; without it they are printed."""
    contact_sheet: Path | None = None
    """Image to write: the found pairs with the lowest similarity."""


def duplicates_main(argv: list[str]) -> None:
    args = parse(Duplicates, argv)
    check(-1 <= args.threshold <= 1, args, "threshold", "must be between -1 and 1")
    one = embedding.open_index(args.index)
    other = embedding.open_index(args.other) if args.other else None
    about = [{k: v for k, v in i.about.items() if k != "model"} for i in (one, other) if i]
    if about[0] != about[-1]:
        names = f"{args.index} and {args.other}"
        raise InputError(f"{names}: built with different encoders or pooling; build one again.")
    files = other.files if other else one.files
    found = embedding.similar_pairs(one.rows, other.rows if other else None, args.threshold)
    pairs = [(one.files[i], files[j], cosine) for i, j, cosine in found]
    pairs.sort(key=lambda pair: -pair[2])
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["one", "other", "cosine"])
    writer.writerows([a, b, f"{cosine:.6f}"] for a, b, cosine in pairs)
    if args.out is None:
        sys.stdout.write(file.getvalue())
    else:
        try:
            write_atomic(args.out, file.getvalue())
        except OSError as error:
            raise InputError(f"out = {args.out}: cannot be written ({error.strerror}).") from None
    print(f"{len(pairs):,} pairs with a similarity of at least {args.threshold}", file=sys.stderr)
    if args.contact_sheet and pairs:
        lines = [[(a, f"{cosine:.4f} {a}"), (b, b)] for a, b, cosine in pairs[-MAX_PAIRS:]]
        draw_files(lines, args.contact_sheet)


COMMANDS = {"build": build_main, "search": search_main, "duplicates": duplicates_main}


def main(argv: list[str]) -> None:
    run_command(__doc__, COMMANDS, argv)


if __name__ == "__main__":
    command(main)

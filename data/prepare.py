"""Copy a source into Parquet files that contain the images, to train without network.

python -m data.prepare hf:owner/name runs/data/name
python -m data.prepare my.jsonl runs/data/mine --fetch-images
Unusable rows are left out. If interrupted, the same command continues after the last complete file.
Not here: the schemas of rows (sources/schemas.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import tyro

from cli import command, parse
from config_tools import InputError, write_atomic
from configs import RATINGS, DataConfig
from data.sources.fetch import resolve_image
from data.sources.open import open_rows, stream_reader
from data.sources.split import max_bad_rows, parse_row
from data.sources.streaming import StreamPart, require_row

MANIFEST = "prepared.json"  # progress; in the folder of the files


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Copy the usable rows of a source, images included, into Parquet files."""

    source: Annotated[str, tyro.conf.Positional]
    """A file, a folder or a dataset of the Hub, as for --data.source."""
    out: Annotated[Path, tyro.conf.Positional]
    """Output folder; train on it with --data.source."""
    rows: int = 1000
    """Rows per file."""
    limit: int = 0
    """Maximum number of source rows to read; 0: all."""
    fetch_images: bool = False
    """Download images given as URLs."""
    min_relevance: int = DataConfig.min_relevance
    """Minimum `relevance_ratings` (1 to 5), as in training."""
    min_image_correspondence: int = DataConfig.min_image_correspondence
    """Minimum `image_correspondence_ratings` (1 to 5), as in training."""
    min_visual_dependency: int = DataConfig.min_visual_dependency
    """Minimum `visual_dependency_ratings` (1 to 5), as in training."""
    min_formatting: int = DataConfig.min_formatting
    """Minimum `formatting_ratings` (1 to 5), as in training."""


def read_rows(cfg: DataConfig, start: int) -> Iterator[tuple[int, str, dict | InputError, Path]]:
    """(number, name for messages, row or its error, its folder), from row `start` on."""
    if cfg.source.startswith("hf:"):
        part = StreamPart(cfg, stream_reader(cfg.source), 0, 1)
        for number, row in islice(enumerate(chain.from_iterable(part.blocks())), start, None):
            yield number, part.where(number), row, Path()
        return
    rows = open_rows(cfg.source)
    for k in range(start, len(rows)):
        try:
            yield k, rows.where(k), rows[k], rows.folder
        except InputError as error:
            yield k, rows.where(k), error, rows.folder


def prepare_row(row: dict, cfg: DataConfig, folder: Path) -> dict | None:
    """The turns of a row and the bytes of its images; None if it is rated too low."""
    found = parse_row(row, cfg)
    if found is None:
        return None
    images = []
    for image in found.conversation.images:
        content = resolve_image(image, folder)
        if isinstance(content, str):
            try:
                content = Path(content).read_bytes()
            except OSError as error:
                raise InputError(f"{content}: cannot be read ({error.strerror}).") from None
        images.append({"bytes": content, "path": None})
    turns = [{"role": role, "content": text} for role, text in found.conversation.turns]
    return {"images": images, "messages": json.dumps(turns, ensure_ascii=False)}


def write(rows: list[dict], path: Path) -> None:
    """Write a temporary Parquet file and rename it to `path`: it is complete or missing."""
    from datasets import Dataset, Features, Image, List, Value

    features = Features({"images": List(Image(decode=False)), "messages": Value("string")})
    temporary = path.with_name(f".{path.name}")
    try:
        Dataset.from_list(rows, features=features).to_parquet(str(temporary))
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from None


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    for name, minimum in (("rows", 1), ("limit", 0)):
        if getattr(args, name) < minimum:
            raise InputError(f"{name} = {getattr(args, name)}: must be at least {minimum}.")
    settings = {name: getattr(args, name) for name in ("fetch_images", *RATINGS)}
    cfg = DataConfig(source=args.source, **settings)
    done: dict[str, Any] = {"source": args.source, "read": 0, "files": 0, "kept": 0, "bad": []}
    note = args.out / MANIFEST
    if note.is_file():
        done = json.loads(note.read_text(encoding="utf-8"))
        if done["source"] != args.source:
            other = f"contains rows of {done['source']}"
            raise InputError(f"{args.out}: {other}; choose another folder.")
    elif args.out.exists() and any(args.out.iterdir()):
        raise InputError(f"{args.out}: holds something else; choose a new folder.")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(cfg, done["read"])
    rows = islice(rows, max(0, args.limit - done["read"])) if args.limit else rows
    while found := list(islice(rows, args.rows)):
        content = []
        for _, where, row, folder in found:
            try:
                content += [new] if (new := prepare_row(require_row(row), cfg, folder)) else []
            except InputError as error:
                done["bad"].append(f"{where}: {error}")
        done["read"] = found[-1][0] + 1
        if len(done["bad"]) > max_bad_rows(done["read"], is_stream=True):
            n_bad, first = len(done["bad"]), done["bad"][0]
            raise InputError(f"{n_bad} of {done['read']} rows are unusable; the first: {first}")
        if content:
            write(content, args.out / f"rows-{done['files']:05d}.parquet")
            done["files"] += 1
            done["kept"] += len(content)
        write_atomic(note, json.dumps(done, indent=2) + "\n")
        print(f"{done['read']:,} rows read, {done['kept']:,} kept in {done['files']} files")
    for reason in done["bad"]:
        print(f"skipped: {reason}")
    if not done["kept"]:
        raise InputError(f"{args.source}: no usable rows.")
    print(f"to train on it: python train.py --data.source {args.out}")


if __name__ == "__main__":
    command(main)

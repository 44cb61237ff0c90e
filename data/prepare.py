"""Read a source once and keep it: Parquet files with their pictures, for runs without network.

python -m data.prepare hf:owner/name runs/data/name
python -m data.prepare my.jsonl runs/data/mine --fetch-images
Rows stay as they are; those that training would leave out are left out here. What is interrupted
goes on behind its last whole file. Not here: what a row means (schemas.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import tyro

from cli import command, parse
from config_tools import InputError, write_whole
from configs import RATINGS, DataConfig
from data.sources.fetch import resolve_image
from data.sources.rows import open_rows
from data.sources.split import max_bad_rows_in_stream, meaning
from data.sources.streaming import Part, StreamSource, checked

NOTE = "prepared.json"  # what was read so far, beside the files


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Read a source once and keep its usable rows, pictures included, as Parquet files."""

    source: Annotated[str, tyro.conf.Positional]
    """A file, a folder or a data set of the Hub, as for --data.source."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder for the files; train with --data.source on it."""
    rows: int = 1000
    """Rows of a file."""
    limit: int = 0
    """Stop behind so many rows of the source; 0: read all."""
    fetch_images: bool = False
    """Download pictures that rows name by web address."""
    min_relevance: int = DataConfig.min_relevance
    """Least rating of FineVision's, as for training."""
    min_image_correspondence: int = DataConfig.min_image_correspondence
    """Least rating of FineVision's, as for training."""
    min_visual_dependency: int = DataConfig.min_visual_dependency
    """Least rating of FineVision's, as for training."""
    min_formatting: int = DataConfig.min_formatting
    """Least rating of FineVision's, as for training."""


def rows_of(cfg: DataConfig, start: int):
    """(number, where, row or what is wrong with it, its folder), from row `start` on."""
    if cfg.source.startswith("hf:"):
        part, state, number = Part(StreamSource(cfg, cfg.source, None, ()), 0, 1), None, 0
        while True:
            rows, state = part.block(state)
            for row in rows:
                if number >= start:
                    yield number, part.where(number), row, Path()
                number += 1
            if not rows:
                return
    reader = open_rows(cfg.source)
    for k in range(start, len(reader)):
        try:
            yield k, reader.where(k), reader[k], reader.folder
        except InputError as error:
            yield k, reader.where(k), error, reader.folder


def kept(row: dict, cfg: DataConfig, folder: Path) -> dict | None:
    """What is written of a row: its turns, and every picture's bytes; None of one rated too low."""
    found = meaning(row, cfg)
    if found is None:
        return None
    pictures = []
    for picture in found.conversation.pictures:
        content = resolve_image(picture, folder)
        if isinstance(content, str):
            try:
                content = Path(content).read_bytes()
            except OSError as error:
                raise InputError(f"{content}: cannot be read ({error.strerror}).") from None
        pictures.append({"bytes": content, "path": None})
    turns = [{"role": turn.role, "content": turn.text} for turn in found.conversation.turns]
    return {"images": pictures, "messages": json.dumps(turns, ensure_ascii=False)}


def write(rows: list[dict], path: Path) -> None:
    """A Parquet file, whole or not at all."""
    from datasets import Dataset, Features, Image, List, Value

    kinds = Features({"images": List(Image(decode=False)), "messages": Value("string")})
    beside = path.with_name(f".{path.name}")
    try:
        Dataset.from_list(rows, features=kinds).to_parquet(str(beside))
        beside.rename(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from None


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    for name, least in (("rows", 1), ("limit", 0)):
        if getattr(args, name) < least:
            raise InputError(f"{name} = {getattr(args, name)}: must be at least {least}.")
    same = {name: getattr(args, name) for name in ("fetch_images", *RATINGS)}
    cfg = DataConfig(source=args.source, **same)
    done = {"source": args.source, "read": 0, "files": 0, "kept": 0, "bad": []}
    note = args.out / NOTE
    if note.is_file():
        done = json.loads(note.read_text(encoding="utf-8"))
        if done["source"] != args.source:
            raise InputError(f"{args.out}: holds {done['source']}; name another folder.")
    elif args.out.exists() and any(args.out.iterdir()):
        raise InputError(f"{args.out}: holds something else; name a new folder.")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = rows_of(cfg, done["read"])
    rows = islice(rows, max(0, args.limit - done["read"])) if args.limit else rows
    while found := list(islice(rows, args.rows)):
        content = []
        for _, where, row, folder in found:
            try:
                content += [new] if (new := kept(checked(row), cfg, folder)) else []
            except InputError as error:
                done["bad"].append(f"{where}: {error}")
        done["read"] = found[-1][0] + 1
        if len(done["bad"]) > max_bad_rows_in_stream(done["read"]):
            n_bad, first = len(done["bad"]), done["bad"][0]
            raise InputError(f"{n_bad} of {done['read']} rows are bad, the first: {first}")
        if content:
            write(content, args.out / f"rows-{done['files']:05d}.parquet")
            done["files"] += 1
            done["kept"] += len(content)
        write_whole(note, json.dumps(done, indent=2) + "\n")
        print(f"{done['read']:,} rows read, {done['kept']:,} kept in {done['files']} files")
    for reason in done["bad"]:
        print(f"left out: {reason}")
    if not done["kept"]:
        raise InputError(f"{args.source}: no rows to keep.")
    print(f"train on it: --data.source {args.out}")


if __name__ == "__main__":
    command(main)

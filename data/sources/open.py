"""The name or path of a source -> Rows or a Dataset. FORMATS lists all supported formats.

To add a format, write a function that returns Rows and one that returns a RowStream, and add a line
to FORMATS.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from config_tools import InputError
from configs import RATINGS, DataConfig
from data.sources import streaming
from data.sources.arrow import open_hub, open_parquet, open_saved
from data.sources.folders import IMAGE_SUFFIXES, find_files, image_rows, is_image
from data.sources.split import RowIndex, index_rows, select_split
from data.sources.streaming import RowStream, StreamReader, open_stream
from data.sources.text_files import open_csv, open_json, open_jsonl
from data.types import Dataset, Rows, Sample
from data.world.dataset import WorldDataset


class Format(NamedTuple):
    """How a format is read: functions of (path or name, split), or a text why it is not supported.

    `stream` is called in every worker and epoch and must be picklable: a module-level function.
    """

    rows: Callable[[str, str], Rows] | str
    stream: Callable[[str, str], RowStream] | str


def _open_folder(path: str, split: str) -> Rows:
    """Open the first of: a saved dataset, a metadata file, images, Parquet files."""
    folder = Path(path)
    if any((folder / f).is_file() for f in ("dataset_dict.json", "state.json")):
        return open_saved(folder, split)
    if split:
        raise InputError(f"{folder}: has no splits; leave out @{split}.")
    for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
        if (folder / name).is_file():
            return open_rows(str(folder / name))
    files = find_files(folder)
    images = [f for f in files if is_image(f)]
    tables = [f for f in files if f.suffix == ".parquet"]
    if images and tables:
        both = f"both images ({images[0]}) and Parquet files ({tables[0]})"
        raise InputError(f"{folder}: contains {both}; give the path of the one to use.")
    if images:
        return image_rows(folder, images)
    if tables:
        return open_parquet([folder / f for f in tables])
    others = "no metadata.jsonl, no Parquet file and no saved dataset in this folder."
    raise InputError(f"{folder}: no images ({' '.join(IMAGE_SUFFIXES)}), {others}")


FORMATS: dict[str, Format] = {
    "world": Format(
        "world has no rows; its scenes are generated on access",
        "world is generated on access; leave out --data.stream",
    ),
    "hf:": Format(open_hub, streaming.stream_hub),
    "folder": Format(_open_folder, streaming.stream_parquet),
    ".jsonl": Format(lambda path, _: open_jsonl(Path(path)), streaming.stream_jsonl),
    ".json": Format(
        lambda path, _: open_json(Path(path)),
        "a .json file cannot be streamed; save it as .jsonl, or leave out --data.stream",
    ),
    ".csv": Format(lambda path, _: open_csv(Path(path)), streaming.stream_csv),
    ".tsv": Format(lambda path, _: open_csv(Path(path)), streaming.stream_csv),
    ".parquet": Format(lambda path, _: open_parquet([Path(path)]), streaming.stream_parquet),
}
SUFFIXES = [key for key in FORMATS if key.startswith(".")]


def find_format(source: str) -> tuple[Format, str, str]:
    """(format, path or name, split) of `world`, a file, a folder or `hf:owner/name`.

    `@split` at the end names a split. Raises `InputError` for an unusable source.
    """
    name, split = source, ""
    if "@" in source and not Path(source).exists():
        name, _, split = source.rpartition("@")
    path = Path(name)
    if name == "world" and not split:
        return FORMATS["world"], name, ""
    if name.startswith("hf:"):
        return FORMATS["hf:"], name.removeprefix("hf:"), split
    if path.is_dir() and path.suffix not in SUFFIXES:
        return FORMATS["folder"], name, split
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"data.source = {name!r}: must be `world`, an existing folder, a file "
            f"({' '.join(SUFFIXES)}), or hf:owner/name for a Hub dataset."
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: no rows.")
    if split:
        raise InputError(f"{path}: a file has no splits; leave out @{split}.")
    if suffix != ".parquet":
        with open(path, "rb") as file:
            if b"\0" in file.read(4096):
                raise InputError(f"{path}: not UTF-8 (perhaps UTF-16 or binary); save it as UTF-8.")
    return FORMATS[suffix], name, ""


def open_rows(source: str) -> Rows:
    """The rows of a file, a folder or `hf:owner/name`. Raises `InputError` naming the source."""
    found, name, split = find_format(source)
    if isinstance(found.rows, str):
        raise InputError(f"data.source = {source!r}: {found.rows}.")
    return found.rows(name, split)


def stream_reader(source: str) -> StreamReader:
    """The reader of a stream. Raises `InputError` if the source cannot be streamed."""
    found, name, split = find_format(source)
    if isinstance(found.stream, str):
        raise InputError(f"data.source = {source!r}, data.stream = True: {found.stream}.")
    return StreamReader(source, found.stream, name, split)


# --- Mixtures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixtureDataset:
    """Several datasets, concatenated, and the share of samples that training takes from each."""

    members: tuple[Dataset, ...]
    names: tuple[str, ...]
    shares: tuple[Fraction, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    fingerprint: str
    n_rows: int
    n_first: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.members))

    def __getitem__(self, i: int) -> Sample:
        member, i = self._locate(i)
        return member[i]

    def row_number(self, i: int) -> int:
        """The row number in the source of the member dataset."""
        member, i = self._locate(i)
        return member.row_number(i)

    def _locate(self, i: int) -> tuple[Dataset, int]:
        for member in self.members:
            if i < len(member):
                return member, i
            i -= len(member)
        raise IndexError(i)


def parse_mixture(source: str) -> list[tuple[str, Fraction]]:
    """Parse `a=0.7 b=0.3` into [(name, share)]; empty for a single source. Raises `InputError`."""
    words = [word.rpartition("=") for word in source.split()]
    if not words or not all(re.fullmatch(r"[0-9.]+", share) and name for name, _, share in words):
        return []
    try:
        found = [(name, Fraction(share)) for name, _, share in words]
    except ValueError:
        raise InputError(f"data.source = {source!r}: expected shares such as 0.7.") from None
    names = [name for name, _ in found]
    if min(share for _, share in found) <= 0 or len(set(names)) < len(names):
        raise InputError(f"data.source = {source!r}: give each source once, with a share above 0.")
    return found


def _open_mixture(mixture: list, cfg: DataConfig, split: str) -> MixtureDataset:
    names, shares = zip(*mixture)
    members = tuple(open_dataset(replace(cfg, source=name), split) for name in names)
    skipped = tuple(chain.from_iterable(m.skipped for m in members))
    percent = ", ".join(f"{name} {float(s / sum(shares)):.0%}" for name, s in mixture)
    notes = chain.from_iterable(m.notes for m in members)
    notes = (f"mixture: {percent} of the samples", *notes)
    fingerprint, n_rows = " ".join(m.fingerprint for m in members), sum(m.n_rows for m in members)
    return MixtureDataset(members, names, shares, skipped, notes, fingerprint, n_rows)


# --- Datasets -----------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _index(name: str, cfg: DataConfig, _changed: tuple) -> RowIndex:
    """Cached, because every evaluation opens its split again."""
    return index_rows(open_rows(name), name, cfg)


def open_dataset(cfg: DataConfig, split: str) -> Dataset:
    """Open `cfg.source` for split train, val or test. Raises `InputError` if it is unusable."""
    if mixture := parse_mixture(cfg.source):
        return _open_mixture(mixture, cfg, split)
    if cfg.source == "world" and not cfg.stream:
        return WorldDataset(cfg, split)
    if cfg.stream and split != "test":
        return open_stream(cfg, stream_reader(cfg.source), split)
    found = os.stat(cfg.source) if Path(cfg.source).exists() else None
    changed = (found.st_mtime_ns, found.st_size) if found else ()
    # Only fields that the index depends on, so that other changes do not read all rows again.
    key = DataConfig(**{name: getattr(cfg, name) for name in ("fetch_images", *RATINGS)})
    return select_split(_index(cfg.source, key, changed), cfg.source, split, cfg)

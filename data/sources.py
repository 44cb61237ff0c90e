"""Name or path -> Samples, one at a time and in any order: the built-in world, or your own data.

A source has a length and gives `source[i]`, the same Sample every time; opening it checks every
row's fields and tells training rows from validation rows, but opens no picture.
Not here: file formats (readers.py), what columns mean (schemas.py), encoding (processor.py).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs import DataConfig, InputError
from data import world
from data.readers import open_rows
from data.sample import Sample
from data.schemas import conversation
from data.tables import TAIL

WORLD_SCENES = {"train": 1_000_000, "val": 2_000, "test": 10_000}
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0A", "Qk")  # PNG, JPEG, ...
LARGEST_DOWNLOAD = 64 * 2**20  # bytes


@dataclass(frozen=True)
class WorldSource:
    """Built-in scenes, drawn when asked for."""

    cfg: DataConfig
    split: str
    bad: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> int:
        """So many rows come before all others in the first epoch."""
        return self.cfg.world_first if self.split == "train" else 0

    def __len__(self) -> int:
        return WORLD_SCENES[self.split]

    def __getitem__(self, i: int) -> Sample:
        described = 1.0 if i < self.first else self.cfg.world_described
        n_questions = self.cfg.world_questions
        return world.train_sample(self.cfg.seed, self.split, i, n_questions, described)


@dataclass(frozen=True)
class RowSource:
    """One split of rows that stay where they are until asked for."""

    rows: Any  # a reader
    chosen: np.ndarray  # [n] int64, indices into the reader
    bad: tuple[str, ...]  # what is wrong with rows left out
    notes: tuple[str, ...]  # what a person should hear before training
    first: int = 0

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Sample:
        k = int(self.chosen[i])
        where, row = self.rows.where(k), self.rows[k]
        try:
            found = conversation(row)
            pictures = tuple(locate(p, self.rows.folder) for p in found.pictures)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return Sample(found.turns, pictures, where)


def most_bad_rows(n_rows: int) -> int:
    """How many bad rows are skipped and listed before a run stops: five, or one per cent."""
    return max(5, n_rows // 100)


# --- Pictures -----------------------------------------------------------------------------------


def locate(picture: Any, folder: Path) -> str | bytes | Image.Image:
    """What `open_image` opens: a path from the source's folder, bytes, or the image itself."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture["path"]
    if not isinstance(picture, str):
        return picture
    if picture.startswith(("http://", "https://")):
        return _download(picture)
    if picture.startswith("data:") or _is_base64(picture):
        try:
            return base64.b64decode(picture.partition(",")[2] or picture)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"a picture is not base64 ({error}).") from None
    return str(folder / picture)


def _is_base64(picture: str) -> bool:
    """Whether a text is a picture, not a path: those are short, or hold a dot."""
    return len(picture) >= 64 and picture.startswith(BASE64_STARTS) and "." not in picture


def _download(address: str) -> bytes:
    from urllib.request import urlopen

    try:
        with urlopen(address, timeout=20) as answer:
            content = answer.read(LARGEST_DOWNLOAD + 1)
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
        raise InputError(f"{address}: cannot be fetched ({error}).") from None
    if len(content) > LARGEST_DOWNLOAD:
        raise InputError(f"{address}: more than {LARGEST_DOWNLOAD // 2**20} MiB.")
    return content


def _refuse_address(picture: Any) -> None:
    path = picture.get("path") if isinstance(picture, dict) else picture
    if isinstance(path, str) and path.startswith(("http://", "https://")):
        raise InputError(
            f"{path} is a web address; download it, or allow that with --data.fetch-images."
        )


def _identity(picture: Any) -> str:
    """The same for the same path or content; of bytes the last few are enough, and cheap."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture["path"]
    if isinstance(picture, Image.Image):
        picture = picture.tobytes()
    return picture[-TAIL :].hex() if isinstance(picture, bytes) else picture


# --- Index and splits ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """What one pass over all rows found, without keeping any."""

    rows: Any  # the reader
    schemas: dict[str, int]  # how many rows have each
    good: np.ndarray  # [n] int64, usable rows
    digests: np.ndarray  # [n] uint64, of turns and pictures
    pictures: np.ndarray  # [m] uint64, digests of pictures alone
    owners: np.ndarray  # [m] int64, which of `good` shows the picture
    bad: tuple[str, ...]


def _digest(parts: Iterable[str]) -> int:
    content = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def index_rows(rows: Any, name: str, fetch: bool = False) -> Index:
    """Check every row's fields.

    Raises `InputError` on mixed schemas, no rows, or more bad ones than `most_bad_rows`.
    """
    good, digests, pictures, owners, bad = [], [], [], [], []
    schemas, families = Counter(), {}
    for k, row in enumerate(rows.scan()):
        try:
            if isinstance(row, InputError):
                bad.append(str(row))
                continue
            found = conversation(row)
            for picture in () if fetch else found.pictures:
                _refuse_address(picture)
        except InputError as error:
            bad.append(f"{rows.where(k)}: {error}")
            continue
        if found.family not in families:
            families[found.family] = f"{rows.where(k)} has {found.schema}"
            if len(families) > 1:
                raise InputError(
                    f"{name}: mixed schemas, {' and '.join(families.values())}; put each into a "
                    "source of its own."
                )
        schemas[found.schema] += 1
        shown = [_identity(picture) for picture in found.pictures]
        owners += [len(good)] * len(shown)
        pictures += [_digest([identity]) for identity in shown]
        good.append(k)
        digests.append(_digest([turn.text.strip() for turn in found.turns] + shown))
    if len(bad) > most_bad_rows(len(rows)):
        raise InputError(f"{len(bad)} of {len(rows)} rows are bad, the first: {bad[0]}")
    if not good:
        raise InputError(f"{name}: no rows" + (f"; {bad[0]}" if bad else "."))
    unsigned = [np.array(values, dtype=np.uint64) for values in (digests, pictures)]
    return Index(rows, schemas, np.array(good), *unsigned, np.array(owners, dtype=int), tuple(bad))


def choose(index: Index, name: str, split: str, val_fraction: float) -> RowSource:
    """The rows of a split.

    train and val are told apart by a hash of the row's content, so that no edit elsewhere moves a
    row across and equal rows stay together; test is every row.
    """
    is_val = index.digests < np.uint64(min(val_fraction * 2**64, 2**64 - 1))
    wanted = {"train": ~is_val, "val": is_val, "test": np.ones_like(is_val)}[split]
    if split == "train" and not wanted.any():
        raise InputError(f"{name}: all {len(is_val)} rows are for validation; lower val_fraction.")
    n_val, n = int(is_val.sum()), len(is_val)
    found = "; ".join(f"{times:,} rows of {schema}" for schema, times in index.schemas.items())
    notes = [f"{name}: {found}; {n_val:,} of them for validation"]
    notes += [f"left out: {reason}" for reason in index.bad]
    if n_repeated := n - len(np.unique(index.digests)):
        notes.append(f"{n_repeated:,} rows are copies of others; copies stay on one side")
    shown = is_val[index.owners]
    leaked = shown & np.isin(index.pictures, index.pictures[~shown])
    if n_leaked := len(np.unique(index.owners[leaked])):
        notes.append(f"{n_leaked:,} validation rows show a picture that training rows show too")
    return RowSource(index.rows, index.good[wanted], index.bad, tuple(notes))


@lru_cache(maxsize=4)
def _index(name: str, fetch: bool, _changed: tuple) -> Index:
    """Once per process: every evaluation opens its split anew."""
    return index_rows(open_rows(name), name, fetch)


def open_source(cfg: DataConfig, split: str) -> WorldSource | RowSource:
    """`cfg.source` for split train, val or test. Raises `InputError` if it cannot be used."""
    if cfg.source == "world":
        return WorldSource(cfg, split)
    path = Path(cfg.source)
    changed = (os.stat(path).st_mtime_ns, os.stat(path).st_size) if path.exists() else ()
    index = _index(cfg.source, cfg.fetch_images, changed)
    return choose(index, cfg.source, split, cfg.val_fraction)

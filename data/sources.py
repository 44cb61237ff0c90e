"""Name or path -> Samples, one at a time and in any order: the built-in world, or your own data.

A source has a length and gives `source[i]`, the same Sample every time; opening it checks every
row's fields and tells training rows from validation rows, but opens no picture.
Not here: file formats (readers.py), what columns mean (schemas.py), encoding (processor.py).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from configs import RATINGS, DataConfig, InputError
from data import world
from data.readers import open_rows
from data.sample import Sample
from data.schemas import Conversation, conversation, rated
from data.tables import mark_of

WORLD_SCENES = {"train": 1_000_000, "val": 2_000, "test": 10_000}
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0A", "Qk")  # PNG, JPEG, ...
LARGEST_DOWNLOAD = 64 * 2**20  # bytes
BUSY = (429, 500, 502, 503, 504)  # answers of servers that may have time later


@dataclass(frozen=True)
class WorldSource:
    """Built-in scenes, drawn when asked for."""

    cfg: DataConfig
    split: str
    bad: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fingerprint: str = "world"

    @property
    def first(self) -> int:
        """So many rows come before all others in the first epoch."""
        return self.cfg.world_first if self.split == "train" else 0

    def __len__(self) -> int:
        return WORLD_SCENES[self.split]

    def __getitem__(self, i: int) -> Sample:
        cfg = self.cfg
        described = 1.0 if i < self.first else cfg.world_described
        fewest = cfg.world_shapes if self.split == "train" else DataConfig.world_shapes
        return world.train_sample(cfg.seed, self.split, i, cfg.world_questions, described, fewest)


@dataclass(frozen=True)
class RowSource:
    """One split of rows that stay where they are until asked for."""

    rows: Any  # a reader
    chosen: np.ndarray  # [n] int64, indices into the reader
    bad: tuple[str, ...]  # what is wrong with rows left out
    notes: tuple[str, ...]  # what a person should hear before training
    cfg: DataConfig = DataConfig()
    fingerprint: str = ""  # of what the rows say and show, in their order
    first: int = 0

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Sample:
        k = int(self.chosen[i])
        where, row = self.rows.where(k), self.rows[k]
        try:
            found = conversation(rated(row, ratings(self.cfg)) or row)
            return sample_of(found, self.rows.folder, where)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True)
class MixtureSource:
    """Several sources with their shares of the samples; its rows are theirs, one after another."""

    members: tuple[Any, ...]
    names: tuple[str, ...]
    shares: tuple[Fraction, ...]
    first: int = 0

    @property
    def bad(self) -> tuple[str, ...]:
        return tuple(reason for member in self.members for reason in member.bad)

    @property
    def notes(self) -> tuple[str, ...]:
        total = sum(self.shares)
        shares = [f"{name} {float(s / total):.0%}" for name, s in zip(self.names, self.shares)]
        mine = f"a mixture: {', '.join(shares)} of the samples"
        return (mine, *(note for member in self.members for note in member.notes))

    @property
    def fingerprint(self) -> str:
        return " ".join(member.fingerprint for member in self.members)

    def __len__(self) -> int:
        return sum(map(len, self.members))

    def __getitem__(self, i: int) -> Sample:
        for member in self.members:
            if i < len(member):
                return member[i]
            i -= len(member)
        raise IndexError(i)


class Meaning(NamedTuple):
    """What a row says, and on which side it is."""

    conversation: Conversation
    digest: int
    is_val: bool


def ratings(cfg: DataConfig) -> dict[str, int]:
    """FineVision's columns and the least of each; empty where nothing is asked."""
    least = {f"{name.removeprefix('min_')}_ratings": getattr(cfg, name) for name in RATINGS}
    return {column: value for column, value in least.items() if value > 1}


def meaning(row: dict, cfg: DataConfig) -> Meaning | None:
    """A row read and placed by a hash of what it says and shows; None if it is rated too low.

    Raises `InputError`.
    """
    row = rated(row, ratings(cfg))
    if row is None:
        return None
    found = conversation(row)
    for picture in () if cfg.fetch_images else found.pictures:
        _refuse_address(picture)
    shown = [_identity(picture) for picture in found.pictures]
    digest = _digest([turn.text.strip() for turn in found.turns] + shown)
    return Meaning(found, digest, digest < threshold(cfg.val_fraction))


def threshold(val_fraction: float) -> int:
    """Digests below it are for validation."""
    return int(min(val_fraction * 2**64, 2**64 - 1))


def sample_of(found: Conversation, folder: Path, where: str) -> Sample:
    return Sample(found.turns, tuple(locate(p, folder) for p in found.pictures), where)


def most_bad_rows(n_rows: int) -> int:
    """How many bad rows are skipped and listed before a run stops: five, or one per cent."""
    return max(5, math.ceil(n_rows / 100))


def most_bad_of(n_rows: int) -> int:
    """The same of the beginning of a stream, which by chance has more than its share of them.

    Three deviations more, so that of a thousand sources with one bad row in a hundred one stops.
    """
    return max(5, math.ceil(n_rows / 100 + 3 * math.sqrt(n_rows / 100)))


def number_in_file(source: Any, i: int) -> int:
    """Where a source's i-th row stands among all that were read, of which it may be a split."""
    return int(source.chosen[i]) if isinstance(source, RowSource) else i


def n_read(source: Any) -> int:
    """How many rows were read, the bad ones and those of other splits too."""
    return len(source.rows) if isinstance(source, RowSource) else len(source) + len(source.bad)


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

    for wait in (1, 4, 0):  # seconds before another try; none after the last
        try:
            with urlopen(address, timeout=20) as answer:
                content = answer.read(LARGEST_DOWNLOAD + 1)
            break
        except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
            timed_out = isinstance(getattr(error, "reason", error), TimeoutError)
            if not wait or not (timed_out or getattr(error, "code", 0) in BUSY):
                raise InputError(f"{address}: cannot be fetched ({error}).") from None
            time.sleep(wait)
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
    """The same for the same path or content."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture["path"]
    if isinstance(picture, Image.Image):
        content = f"{picture.mode} {picture.size} ".encode() + picture.tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    return mark_of(picture).hex() if isinstance(picture, bytes) else picture


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
    n_low: int = 0  # rows that are rated too low


def _digest(parts: Iterable[str]) -> int:
    content = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def index_rows(rows: Any, name: str, cfg: DataConfig) -> Index:
    """Check every row's fields.

    Raises `InputError` on mixed schemas, no rows, or more bad ones than `most_bad_rows`.
    """
    good, digests, pictures, owners, bad = [], [], [], [], []
    schemas, families, n_low = Counter(), {}, 0
    for k, row in enumerate(rows.scan()):
        try:
            if isinstance(row, InputError):
                bad.append(str(row))
                continue
            read = meaning(row, cfg)
        except InputError as error:
            bad.append(f"{rows.where(k)}: {error}")
            continue
        if read is None:
            n_low += 1
            continue
        found = read.conversation
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
        digests.append(read.digest)
    if len(bad) > most_bad_rows(len(rows)):
        raise InputError(f"{len(bad)} of {len(rows)} rows are bad, the first: {bad[0]}")
    if not good:
        low = f"; all {n_low} are rated too low" if n_low else "."
        raise InputError(f"{name}: no rows" + (f"; {bad[0]}" if bad else low))
    unsigned = [np.array(values, dtype=np.uint64) for values in (digests, pictures)]
    found = [np.array(good), *unsigned, np.array(owners, dtype=int)]
    return Index(rows, schemas, *found, tuple(bad), n_low)


def choose(index: Index, name: str, split: str, cfg: DataConfig) -> RowSource:
    """The rows of a split.

    train and val are told apart by a hash of the row's content, so that no edit elsewhere moves a
    row across and equal rows stay together; test is every row.
    """
    is_val = index.digests < np.uint64(threshold(cfg.val_fraction))
    wanted = {"train": ~is_val, "val": is_val, "test": np.ones_like(is_val)}[split]
    if split == "train" and not wanted.any():
        raise InputError(f"{name}: all {len(is_val)} rows are for validation; lower val_fraction.")
    n_val, n = int(is_val.sum()), len(is_val)
    found = "; ".join(f"{times:,} rows of {schema}" for schema, times in index.schemas.items())
    notes = [f"{name}: {found}; {n_val:,} of them for validation"]
    notes += [f"left out: {reason}" for reason in index.bad]
    if index.n_low:
        notes.append(f"{index.n_low:,} rows are rated too low and left out")
    if n_repeated := n - len(np.unique(index.digests)):
        notes.append(f"{n_repeated:,} rows are copies of others; copies stay on one side")
    shown = is_val[index.owners]
    leaked = shown & np.isin(index.pictures, index.pictures[~shown])
    if n_leaked := len(np.unique(index.owners[leaked])):
        notes.append(f"{n_leaked:,} validation rows show a picture that training rows show too")
    fingerprint = print_of_rows(index.digests[wanted])
    return RowSource(index.rows, index.good[wanted], index.bad, tuple(notes), cfg, fingerprint)


def print_of_rows(digests: Sequence[int]) -> str:
    """What tells these rows, in this order, from others."""
    content = np.array(digests, dtype=np.uint64).tobytes()
    return f"{len(digests):,} rows ({hashlib.blake2b(content, digest_size=8).hexdigest()})"


@lru_cache(maxsize=8)
def _index(name: str, cfg: DataConfig, _changed: tuple) -> Index:
    """Once per process: every evaluation opens its split anew."""
    return index_rows(open_rows(name), name, cfg)


def shares_of(source: str) -> list[tuple[str, Fraction]]:
    """[(name, share)] of `a=0.7 b=0.3`; empty of a single source. Raises `InputError`."""
    words = [word.rpartition("=") for word in source.split()]
    if not words or not all(re.fullmatch(r"[0-9.]+", share) and name for name, _, share in words):
        return []
    try:
        found = [(name, Fraction(share)) for name, _, share in words]
    except ValueError:
        raise InputError(f"data.source = {source!r}: shares are numbers, as 0.7.") from None
    names = [name for name, _ in found]
    if min(share for _, share in found) <= 0 or len(set(names)) < len(names):
        raise InputError(f"data.source = {source!r}: give each source once, with a share above 0.")
    return found


def open_source(cfg: DataConfig, split: str) -> WorldSource | RowSource | MixtureSource:
    """`cfg.source` for split train, val or test. Raises `InputError` if it cannot be used."""
    if mixed := shares_of(cfg.source):
        names, shares = zip(*mixed)
        members = tuple(open_source(replace(cfg, source=name), split) for name in names)
        return MixtureSource(members, names, shares)
    if cfg.source == "world" and not cfg.stream:
        return WorldSource(cfg, split)
    if cfg.stream and split != "test":
        from data.streams import open_stream

        return open_stream(cfg, cfg.source, split)
    path = Path(cfg.source)
    changed = (os.stat(path).st_mtime_ns, os.stat(path).st_size) if path.exists() else ()
    # What the index depends on, so that other settings do not read all rows again.
    names = ("fetch_images", *RATINGS)
    key = DataConfig(**{name: getattr(cfg, name) for name in names})
    return choose(_index(cfg.source, key, changed), cfg.source, split, cfg)

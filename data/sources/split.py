"""One pass over all rows: which are usable, and which are for validation."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config_tools import InputError
from configs import RATINGS, DataConfig
from data.sources.fetch import _identity, _refuse_address, resolve_image
from data.sources.schemas import Conversation, conversation, rated
from data.types import Sample


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


def max_bad_rows(n_rows: int) -> int:
    """How many bad rows are skipped and listed before a run stops: five, or one per cent."""
    return max(5, math.ceil(n_rows / 100))


def max_bad_rows_in_stream(n_rows: int) -> int:
    """The same of the beginning of a stream, which by chance has more than its share of them.

    Three deviations more, so that of a thousand sources with one bad row in a hundred one stops.
    """
    return max(5, math.ceil(n_rows / 100 + 3 * math.sqrt(n_rows / 100)))


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
    if len(bad) > max_bad_rows(len(rows)):
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


def sample_of(found: Conversation, folder: Path, where: str) -> Sample:
    return Sample(found.turns, tuple(resolve_image(p, folder) for p in found.pictures), where)

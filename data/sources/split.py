"""One pass over all rows selects the usable ones and those for validation."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config_tools import InputError
from configs import RATINGS, DataConfig
from data.sources.fetch import image_identity, refuse_web_address, resolve_image
from data.sources.schemas import Conversation, drop_low_rated, parse_conversation
from data.types import Rows, Sample

MIN_VAL_ROWS = 20  # with fewer, an accuracy moves by more than five points per answer


class ParsedRow(NamedTuple):
    """The conversation of a row, a hash of its content, and its split."""

    conversation: Conversation
    digest: int  # of texts and images, 64 bits
    is_val: bool


def minimum_ratings(cfg: DataConfig) -> dict[str, int]:
    """Minimum rating by FineVision column, without minimums of 1, which filter nothing."""
    minimum = {f"{name.removeprefix('min_')}_ratings": getattr(cfg, name) for name in RATINGS}
    return {column: value for column, value in minimum.items() if value > 1}


def parse_row(row: dict, cfg: DataConfig) -> ParsedRow | None:
    """Parse a row; a hash of its content decides its split. None if it is rated too low.

    Raises `InputError` without the name of the row.
    """
    rated = drop_low_rated(row, minimum_ratings(cfg))
    if rated is None:
        return None
    found = parse_conversation(rated)
    for image in () if cfg.fetch_images else found.images:
        refuse_web_address(image)
    identities = [image_identity(image) for image in found.images]
    digest = _digest([turn.text.strip() for turn in found.turns] + identities)
    return ParsedRow(found, digest, digest < val_threshold(cfg.val_fraction))


def val_threshold(val_fraction: float) -> int:
    """Rows with a digest below this are for validation."""
    return int(min(val_fraction * 2**64, 2**64 - 1))


def max_bad_rows(n_rows: int, is_stream: bool = False) -> int:
    """Maximum number of unusable rows before training stops: 1 % of the rows, but at least five.

    The first `n_rows` of a stream may have three standard deviations more: about one in 1,000
    streams with 1 % unusable rows is then stopped by chance.
    """
    return max(5, math.ceil(n_rows / 100 + 3 * math.sqrt(n_rows / 100) * is_stream))


@dataclass(frozen=True)
class RowIndex:
    """The result of one pass over all rows; the rows themselves are not kept."""

    rows: Rows
    schemas: dict[str, int]  # number of rows by schema
    good: np.ndarray  # [n] int64, usable rows
    digests: np.ndarray  # [n] uint64, of texts and images
    images: np.ndarray  # [m] uint64, digests of single images
    owners: np.ndarray  # [m] int64, index into `good` of the row with the image
    skipped: tuple[str, ...]
    n_low: int = 0  # rows rated too low


def _digest(parts: Iterable[str]) -> int:
    content = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def index_rows(rows: Rows, name: str, cfg: DataConfig) -> RowIndex:
    """Check the fields of every row; images are not opened.

    Raises `InputError` for mixed schemas, no usable rows, or more than `max_bad_rows` bad ones.
    """
    good, digests, images, owners, skipped = [], [], [], [], []
    schemas, families, n_low = Counter(), {}, 0
    for k, row in enumerate(rows.scan()):
        try:
            parsed = str(row) if isinstance(row, InputError) else parse_row(row, cfg)
        except InputError as error:
            parsed = f"{rows.where(k)}: {error}"
        if isinstance(parsed, str):
            skipped.append(parsed)
            continue
        if parsed is None:
            n_low += 1
            continue
        found = parsed.conversation
        if found.family not in families:
            families[found.family] = f"{rows.where(k)} has {found.schema}"
            if len(families) > 1:
                mixed = " and ".join(families.values())
                raise InputError(f"{name}: mixed schemas: {mixed}; use one source per schema.")
        schemas[found.schema] += 1
        identities = [image_identity(image) for image in found.images]
        owners += [len(good)] * len(identities)
        images += [_digest([identity]) for identity in identities]
        good.append(k)
        digests.append(parsed.digest)
    if len(skipped) > max_bad_rows(len(rows)):
        n_bad = f"{len(skipped)} of {len(rows)}"
        raise InputError(f"{n_bad} rows are unusable; the first: {skipped[0]}")
    if not good:
        if skipped:
            raise InputError(f"{name}: no usable rows; the first: {skipped[0]}")
        low = f"; all {n_low} are rated below the minimum" if n_low else ""
        raise InputError(f"{name}: no rows{low}.")
    digests, images = np.array(digests, dtype=np.uint64), np.array(images, dtype=np.uint64)
    owners = np.array(owners, dtype=int)
    return RowIndex(rows, schemas, np.array(good), digests, images, owners, tuple(skipped), n_low)


def select_split(index: RowIndex, name: str, split: str, cfg: DataConfig) -> RowDataset:
    """The rows of split train or val; test means all rows.

    A hash of the row's content decides between train and val. Equal rows are therefore in the same
    split, and a row stays in its split when other rows change.
    """
    is_val = index.digests < np.uint64(val_threshold(cfg.val_fraction))
    selected = {"train": ~is_val, "val": is_val, "test": np.ones_like(is_val)}[split]
    if split == "train" and not selected.any():
        problem = f"all {len(is_val)} rows are for validation"
        raise InputError(f"{name}: {problem}; lower data.val_fraction.")
    n_val, n = int(is_val.sum()), len(is_val)
    found = "; ".join(f"{times:,} rows of {schema}" for schema, times in index.schemas.items())
    notes = [f"{name}: {found}; {n_val:,} of them for validation"]
    notes += [f"skipped: {reason}" for reason in index.skipped]
    if index.n_low:
        notes.append(f"rows left out because they are rated below the minimum: {index.n_low:,}")
    if n_repeated := n - len(np.unique(index.digests)):
        notes.append(f"duplicate rows: {n_repeated:,}; duplicates are in the same split")
    of_val = is_val[index.owners]
    leaked = of_val & np.isin(index.images, index.images[~of_val])
    if n_leaked := len(np.unique(index.owners[leaked])):
        notes.append(f"validation rows whose image is also in training rows: {n_leaked:,}")
    if cfg.val_fraction and n_val < MIN_VAL_ROWS:
        effect = "`best` is chosen by few answers" if n_val else "nothing is evaluated"
        notes.append(f"{n_val} validation rows: {effect}; raise data.val_fraction for more")
    fingerprint, indices = hash_digests(index.digests[selected]), index.good[selected]
    return RowDataset(index.rows, indices, index.skipped, tuple(notes), cfg, fingerprint)


def hash_digests(digests: Sequence[int] | np.ndarray) -> str:
    """A fingerprint of the rows, their order and their number."""
    content = np.array(digests, dtype=np.uint64).tobytes()
    return f"{len(digests):,} rows ({hashlib.blake2b(content, digest_size=8).hexdigest()})"


@dataclass(frozen=True)
class RowDataset:
    """One split of rows, which are read on access. A `Dataset`."""

    rows: Rows
    indices: np.ndarray  # [n] int64, of `rows`
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    cfg: DataConfig = DataConfig()
    fingerprint: str = ""
    n_first: int = 0

    @property
    def n_rows(self) -> int:
        return len(self.rows)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:
        k = int(self.indices[i])
        where, row = self.rows.where(k), self.rows[k]
        try:
            found = parse_conversation(drop_low_rated(row, minimum_ratings(self.cfg)) or row)
            return make_sample(found, self.rows.folder, where)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def row_number(self, i: int) -> int:
        return int(self.indices[i]) + 1


def make_sample(found: Conversation, folder: Path, where: str) -> Sample:
    """A Sample whose images are resolved from `folder`; raises `InputError`."""
    return Sample(found.turns, tuple(resolve_image(i, folder) for i in found.images), where)

"""Name or path -> a Dataset of Samples: the built-in world, your own data, or a mixture."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from config_tools import InputError
from configs import RATINGS, DataConfig
from data.sources.rows import open_rows
from data.sources.split import Index, RowSource, choose, index_rows
from data.types import Sample
from data.world import questions

WORLD_SCENES = {"train": 1_000_000, "val": 2_000, "test": 10_000}


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
        return questions.train_sample(
            cfg.seed, self.split, i, cfg.world_questions, described, fewest
        )


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


def number_in_file(source: Any, i: int) -> int:
    """Where a source's i-th row stands among all that were read, of which it may be a split."""
    return int(source.chosen[i]) if isinstance(source, RowSource) else i


def n_rows_read(source: Any) -> int:
    """How many rows were read, the bad ones and those of other splits too."""
    return len(source.rows) if isinstance(source, RowSource) else len(source) + len(source.bad)


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
        from data.sources.streaming import open_stream

        return open_stream(cfg, cfg.source, split)
    path = Path(cfg.source)
    changed = (os.stat(path).st_mtime_ns, os.stat(path).st_size) if path.exists() else ()
    # What the index depends on, so that other settings do not read all rows again.
    names = ("fetch_images", *RATINGS)
    key = DataConfig(**{name: getattr(cfg, name) for name in names})
    return choose(_index(cfg.source, key, changed), cfg.source, split, cfg)

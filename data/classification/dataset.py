"""Name or path -> images with one class each, as Samples whose answer is the class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from config_tools import InputError
from configs import DataConfig
from configs_classify import ClassesConfig
from data.sources.folders import open_class_folder
from data.sources.idx import _find_idx, _open_idx
from data.sources.open import WORLD_SCENES
from data.sources.rows import open_rows
from data.sources.schemas import LABEL_PROMPT, PICTURE_COLUMNS
from data.sources.split import RowSource, choose, index_rows
from data.types import Sample, Turn
from data.world import drawing, scenes

SAVED = ("dataset_dict.json", "state.json", "metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Classes:
    """One split: `source[i]` -> Sample, and which class each row has."""

    rows: Any  # Samples by number
    labels: tuple[str, ...]  # of each row
    names: tuple[str, ...]  # the classes, in order
    notes: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    fingerprint: str = ""
    first: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Sample:
        return self.rows[i]


def label_of(sample: Sample) -> str:
    return sample.turns[-1].text


@dataclass(frozen=True)
class LabelRows:
    """Rows of any reader, of which a column names the class."""

    rows: Any
    label: str

    @property
    def folder(self) -> Path:
        return self.rows.folder

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, k: int) -> str:
        return self.rows.where(k)

    def __getitem__(self, k: int) -> dict:
        return self._plain(self.rows[k])

    def _plain(self, row: dict) -> dict:
        value = row.get(self.label)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or str(value).strip() == "":
            raise InputError(f"no class in {self.label!r}, of its columns {', '.join(row)}.")
        pictures = {c: row[c] for c in PICTURE_COLUMNS if row.get(c) is not None}
        if not pictures:
            raise InputError(f"no picture in any of {', '.join(PICTURE_COLUMNS)}.")
        return pictures | {"label": str(value).strip()}

    def scan(self) -> Iterator[dict | InputError]:
        for k, row in enumerate(self.rows.scan()):
            try:
                yield row if isinstance(row, InputError) else self._plain(row)
            except InputError as error:
                yield InputError(f"{self.where(k)}: {error}")


@dataclass(frozen=True)
class WorldClasses:
    """Built-in scenes by their most frequent shape."""

    seed: int
    split: str

    def label(self, i: int) -> str:
        return scenes.label(scenes.make_scene(self.seed, self.split, i))

    def __getitem__(self, i: int) -> Sample:
        scene = scenes.make_scene(self.seed, self.split, i)
        turns = Turn("user", f"<image>{LABEL_PROMPT}"), Turn("assistant", scenes.label(scene))
        return Sample(turns, (drawing.draw(scene),), f"world {self.split} {i}")


@dataclass(frozen=True)
class Endless:
    """The class of every scene is known when it is drawn."""

    n: int

    def __len__(self) -> int:
        return self.n


def _rows(source: str, label: str):
    path = Path(source)
    if idx := _find_idx(source):
        return _open_idx(idx)
    is_table = any((path / name).is_file() for name in SAVED) or list(path.glob("*.parquet"))
    if path.is_dir() and not is_table:
        return open_class_folder(path)
    return LabelRows(open_rows(source), label)


def open_classes(cfg: ClassesConfig, split: str, names: Sequence[str] = ()) -> Classes:
    """`cfg.source` for split train or val; `test` is every row.

    `names`: the classes there may be, in their order; else those found. Raises `InputError`.
    """
    if split == "val" and cfg.val:
        return open_classes(replace(cfg, source=cfg.val, val="", limit=0), "test", names)
    if cfg.source == "world":
        return _world(cfg, split, names)
    rows = _rows(cfg.source, cfg.label)
    return from_rows(rows, cfg, split, names)


def from_rows(rows: Any, cfg: ClassesConfig, split: str, names: Sequence[str] = ()) -> Classes:
    """`open_classes` of rows that are open already: a reader of rows with a `label`."""
    index = index_rows(rows, cfg.source, DataConfig(fetch_images=cfg.fetch_images))
    labels = {k: row["label"] for k, row in enumerate(rows.scan()) if isinstance(row, dict)}
    found = in_order({labels[k] for k in index.good.tolist()})
    for k in index.good.tolist() if names else ():
        if labels[k] not in names:
            raise InputError(
                f"{rows.where(k)}: class {labels[k]!r} is none of the {len(names)} of the model "
                f"({few(names)})."
            )
    if split == "train" and len(found) < 2:
        raise InputError(f"{cfg.source}: one class only ({found[0]!r}); to tell needs two.")
    fraction = 0.0 if cfg.val and split == "train" else cfg.val_fraction
    data = DataConfig(val_fraction=fraction)
    chosen: RowSource = choose(index, cfg.source, split, data)
    kept = np.arange(len(chosen))
    if split == "train" and cfg.limit:
        kept = evenly([labels[k] for k in chosen.chosen.tolist()], cfg.limit, cfg.seed)
        chosen = replace(chosen, chosen=chosen.chosen[kept])
    of_rows = tuple(labels[k] for k in chosen.chosen.tolist())
    names = tuple(names) or found
    return Classes(chosen, of_rows, names, chosen.notes, chosen.bad, chosen.fingerprint)


def _world(cfg: ClassesConfig, split: str, names: Sequence[str]) -> Classes:
    found = tuple(scenes.SHAPES)
    if names and set(found) - set(names):
        missing = sorted(set(found) - set(names))[0]
        raise InputError(f"world: class {missing!r} is none of the model's ({few(names)}).")
    n = min(cfg.limit or WORLD_SCENES["train"], WORLD_SCENES["train"]) if split == "train" else 1000
    rows = WorldClasses(cfg.seed, split)
    drawn = n <= 1000  # counted only where that is quick
    labels = tuple(rows.label(i) for i in range(n)) if drawn else Endless(n)
    return Classes(rows, labels, tuple(names) or found)


def in_order(names: set[str]) -> tuple[str, ...]:
    """Numbers by their value, everything else by the alphabet."""
    numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if numbers else None))


def few(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def evenly(labels: Sequence[str], n: int, seed: int) -> np.ndarray:
    """`n` row numbers in order, drawn so that every class has as many as it can."""
    order = np.random.default_rng(seed).permutation(len(labels))
    seen, turns = Counter(), []
    for i in order.tolist():
        turns.append((seen[labels[i]], len(turns), i))  # the k-th of its class
        seen[labels[i]] += 1
    return np.array(sorted(i for _, _, i in sorted(turns)[:n]), dtype=int)


def balance(source: Classes) -> str:
    """One line about how many rows each class has."""
    if isinstance(source.labels, Endless):
        return f"{len(source):,} scenes, {len(source.names)} classes"
    times = Counter(source.labels)
    ordered = sorted(source.names, key=lambda name: (-times[name], name))
    most, least = ordered[0], ordered[-1]
    line = (
        f"{len(source):,} pictures, {len(source.names)} classes; most of {most!r} "
        f"({times[most]:,}), fewest of {least!r} ({times[least]:,})"
    )
    if times[least] == 0:
        return f"{line}; without a picture: {few([n for n in ordered if not times[n]])}"
    ratio = times[most] / times[least]
    return f"{line}; imbalance {ratio:.1f}" + (": accuracy hides the rare ones" * (ratio > 3))

"""Name or path -> pictures with one class each, as Samples whose answer is the class.

A picture's class stands in a column of its row, is its folder, comes from an IDX file (MNIST) or
the built-in world. Splits and checks are those of sources.py. Not here: tensors (views.py).
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs import DataConfig, InputError
from configs_classify import ClassesConfig
from data import world
from data.readers import PICTURES, open_rows, shown_files
from data.sample import Sample, Turn
from data.schemas import LABEL_PROMPT, PICTURE_COLUMNS
from data.sources import WORLD_SCENES, RowSource, choose, index_rows

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


# --- Readers ------------------------------------------------------------------------------------


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
class ClassFolder:
    """A folder that has one folder for each class, pictures at any depth within."""

    folder: Path
    names: np.ndarray  # [n] relative paths as bytes

    def __len__(self) -> int:
        return len(self.names)

    def where(self, k: int) -> str:
        return str(self.folder / os.fsdecode(self.names[k]))

    def __getitem__(self, k: int) -> dict:
        name = os.fsdecode(self.names[k])
        return {"image": name, "label": Path(name).parts[0]}

    def scan(self) -> Iterator[dict]:
        return (self[k] for k in range(len(self)))


@dataclass(frozen=True)
class ArrayRows:
    """Pictures and classes in memory, as of IDX files."""

    pixels: np.ndarray  # [n, H, W] or [n, H, W, 3] uint8
    labels: Sequence[str]
    name: str
    folder: Path = Path()

    def __len__(self) -> int:
        return len(self.pixels)

    def where(self, k: int) -> str:
        return f"{self.name} row {k + 1}"

    def __getitem__(self, k: int) -> dict:
        return {"image": Image.fromarray(self.pixels[k]), "label": self.labels[k]}

    def scan(self) -> Iterator[dict]:
        return (self[k] for k in range(len(self)))


def _open_folder(folder: Path) -> ClassFolder:
    names = [f for f in shown_files(folder) if f.suffix.lower() in PICTURES]
    if not names:
        raise InputError(f"{folder}: no pictures ({' '.join(PICTURES)}) in this folder.")
    if loose := next((name for name in names if len(name.parts) == 1), None):
        raise InputError(f"{folder / loose}: lies in no class's folder, as in {folder}/cat/1.png.")
    return ClassFolder(folder, np.array([os.fsencode(name) for name in names]))


# --- IDX, the format of MNIST -------------------------------------------------------------------


def read_idx(path: Path) -> np.ndarray:
    """A file of bytes: dimensions, then values. Plain or gzip; raises `InputError`."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
        zeros, kind, n_axes = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{n_axes}I", content[4 : 4 + 4 * n_axes])
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise InputError(f"{path}: not an IDX file ({error}).") from None
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * n_axes)
    if zeros != 0 or kind != 8 or values.size != np.prod(shape):
        raise InputError(
            f"{path}: not a whole IDX file of bytes (type {kind}, {values.size:,} values for "
            f"{' x '.join(map(str, shape))})."
        )
    return values.reshape(shape)


def _open_idx(images: Path) -> ArrayRows:
    beside = images.name.replace("images", "labels").replace("idx3", "idx1")
    labels = images.with_name(beside)
    if not labels.is_file() or labels == images:
        raise InputError(f"{images}: no {beside} beside it, which would say the classes.")
    pixels, numbers = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or numbers.ndim != 1 or len(pixels) != len(numbers):
        raise InputError(f"{images}: shape {pixels.shape} does not fit {numbers.shape} labels.")
    return ArrayRows(pixels, [str(n) for n in numbers], str(images))


def _find_idx(source: str) -> Path | None:
    """The file of pictures of `folder`, `folder@t10k` or itself; None where it is no IDX data."""
    path, part = Path(source), "train"
    if "@" in source and not path.exists():
        before, _, part = source.rpartition("@")
        path = Path(before)
    if path.is_file():
        return path if "idx3" in path.name else None
    return next(iter(sorted(path.glob(f"{part}-images*idx3*"))), None) if path.is_dir() else None


# --- By name ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorldClasses:
    """Built-in scenes by their most frequent shape."""

    seed: int
    split: str

    def label(self, i: int) -> str:
        return world.label(world.make_scene(self.seed, self.split, i))

    def __getitem__(self, i: int) -> Sample:
        scene = world.make_scene(self.seed, self.split, i)
        turns = Turn("user", f"<image>{LABEL_PROMPT}"), Turn("assistant", world.label(scene))
        return Sample(turns, (world.draw(scene),), f"world {self.split} {i}")


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
        return _open_folder(path)
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
    found = tuple(world.SHAPES)
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

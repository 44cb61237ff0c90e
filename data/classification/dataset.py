"""The name or path of a source -> images with one class each: Samples whose answer is the class."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np

from config_tools import InputError
from configs import DataConfig
from configs_classify import ClassifyDataConfig
from data.sources.folders import class_rows
from data.sources.idx import find_idx, open_idx
from data.sources.open import open_rows
from data.sources.schemas import IMAGE_COLUMNS, LABEL_PROMPT
from data.sources.split import RowDataset, index_rows, select_split
from data.types import Rows, Sample, Turn
from data.world import drawing, scenes
from data.world.dataset import N_SCENES

TABLE_FILES = ("dataset_dict.json", "state.json", "metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class ClassificationDataset:
    """One split of images with one class each. A `Dataset`."""

    samples: RowDataset | WorldShapes
    labels: Sequence[str] | range  # per sample; a range if unknown until the scene is drawn
    names: tuple[str, ...]  # the classes, in order
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    fingerprint: str = ""
    n_first: int = 0

    @property
    def n_rows(self) -> int:
        return len(self) + len(self.skipped)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Sample:
        return self.samples[i]

    def row_number(self, i: int) -> int:
        return self.samples.row_number(i)


def label_of(sample: Sample) -> str:
    return sample.turns[-1].text


@dataclass(frozen=True)
class LabelRows:
    """Rows whose column `label` contains the class."""

    rows: Rows
    label: str
    folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, k: int) -> str:
        return self.rows.where(k)

    def __getitem__(self, k: int) -> dict:
        return self._plain(self.rows[k])

    def _plain(self, row: dict) -> dict:
        value = row.get(self.label)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or str(value).strip() == "":
            fix = f"set data.label to one of {', '.join(row)}"
            raise InputError(f"no class in column {self.label!r}; {fix}.")
        images = {c: row[c] for c in IMAGE_COLUMNS if row.get(c) is not None}
        if not images:
            raise InputError(f"no image; expected it in column {', '.join(IMAGE_COLUMNS)}.")
        return images | {"label": str(value).strip()}

    def scan(self) -> Iterator[dict | InputError]:
        for k, row in enumerate(self.rows.scan()):
            try:
                yield row if isinstance(row, InputError) else self._plain(row)
            except InputError as error:
                yield InputError(f"{self.where(k)}: {error}")


@dataclass(frozen=True)
class WorldShapes:
    """Built-in scenes; the class is the most frequent shape."""

    seed: int
    split: str

    def __getitem__(self, i: int) -> Sample:
        scene = scenes.make_scene(self.seed, self.split, i)
        turns = Turn("user", f"<image>{LABEL_PROMPT}"), Turn("assistant", scenes.label(scene))
        return Sample(turns, (drawing.draw(scene),), f"world {self.split} {i}")

    def row_number(self, i: int) -> int:
        return i + 1


def _open_rows(source: str, label: str) -> Rows:
    """IDX files, a folder with one folder per class, or any other source with a label column."""
    path = Path(source)
    if idx := find_idx(source):
        return open_idx(idx)
    is_table = any((path / name).is_file() for name in TABLE_FILES) or list(path.glob("*.parquet"))
    if path.is_dir() and not is_table:
        return class_rows(path)
    rows = open_rows(source)
    return LabelRows(rows, label, rows.folder)


def open_classification(
    cfg: ClassifyDataConfig, split: str, names: Sequence[str] = ()
) -> ClassificationDataset:
    """Open `cfg.source` for split train or val; `test` means all rows.

    `names`: the allowed classes in order; default: the classes in the data. Raises `InputError`.
    """
    if split == "val" and cfg.val:
        cfg, split = replace(cfg, source=cfg.val, val="", limit=0), "test"
    if cfg.source == "world":
        return _world(cfg, split, names)
    return from_rows(_open_rows(cfg.source, cfg.label), cfg, split, names)


def from_rows(
    rows: Rows, cfg: ClassifyDataConfig, split: str, names: Sequence[str] = ()
) -> ClassificationDataset:
    """`open_classification` for rows that are already open and have a `label`."""
    index = index_rows(rows, cfg.source, DataConfig(fetch_images=cfg.fetch_images))
    labels = {k: row["label"] for k, row in enumerate(rows.scan()) if isinstance(row, dict)}
    good = index.good.tolist()
    found = sort_classes({labels[k] for k in good})
    if names and (others := [k for k in good if labels[k] not in names]):
        where, other = rows.where(others[0]), labels[others[0]]
        known = f"none of the model's {len(names)} classes ({list_names(names)})"
        raise InputError(f"{where}: class {other!r} is {known}.")
    if split == "train" and len(found) < 2:
        raise InputError(f"{cfg.source}: only one class ({found[0]!r}); expected at least two.")
    fraction = 0.0 if cfg.val and split == "train" else cfg.val_fraction
    chosen = select_split(index, cfg.source, split, DataConfig(val_fraction=fraction))
    if split == "train" and cfg.limit:
        kept = balanced_subset([labels[k] for k in chosen.indices.tolist()], cfg.limit, cfg.seed)
        chosen = replace(chosen, indices=chosen.indices[kept])
    of_samples = tuple(labels[k] for k in chosen.indices.tolist())
    about = chosen.notes, chosen.skipped, chosen.fingerprint
    return ClassificationDataset(chosen, of_samples, tuple(names) or found, *about)


def _world(cfg: ClassifyDataConfig, split: str, names: Sequence[str]) -> ClassificationDataset:
    found = tuple(scenes.SHAPES)
    if names and (missing := set(found) - set(names)):
        known = f"none of the model's classes ({list_names(names)})"
        raise InputError(f"world: class {min(missing)!r} is {known}.")
    n = min(cfg.limit or N_SCENES["train"], N_SCENES["train"]) if split == "train" else 1000
    drawn = (scenes.make_scene(cfg.seed, split, i) for i in range(n))
    labels = tuple(map(scenes.label, drawn)) if n <= 1000 else range(n)  # more would be slow
    return ClassificationDataset(WorldShapes(cfg.seed, split), labels, tuple(names) or found)


def sort_classes(names: set[str]) -> tuple[str, ...]:
    """Numbers by value, other names alphabetically."""
    numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if numbers else None))


def list_names(names: Sequence[str]) -> str:
    """The first five names, for messages."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def balanced_subset(labels: Sequence[str], n: int, seed: int) -> np.ndarray:
    """`n` random indices in order, spread over the classes as evenly as possible."""
    of_class = defaultdict(count)
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    turns = sorted(order, key=lambda i: next(of_class[labels[i]]))  # by number within the class
    return np.array(sorted(turns[:n]), dtype=int)


def describe_balance(source: ClassificationDataset) -> str:
    """One line about the number of samples per class."""
    if isinstance(source.labels, range):
        return f"{len(source):,} scenes, {len(source.names)} classes"
    times = Counter(source.labels)
    ordered = sorted(source.names, key=lambda name: (-times[name], name))
    largest, smallest = ordered[0], ordered[-1]
    line = (
        f"{len(source):,} images, {len(source.names)} classes; largest {largest!r} "
        f"({times[largest]:,}), smallest {smallest!r} ({times[smallest]:,})"
    )
    if times[smallest] == 0:
        return f"{line}; no images of {list_names([n for n in ordered if not times[n]])}"
    ratio = times[largest] / times[smallest]
    return f"{line}; imbalance {ratio:.1f}" + (": accuracy hides rare classes" * (ratio > 3))

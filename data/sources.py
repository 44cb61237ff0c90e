"""Name or path -> Samples, one at a time and in any order: the built-in world, or a JSONL file.

A source has a length and gives `source[i]`, the same Sample every time; opening it validates every
row's fields but opens no picture. Not here: encoding (processor.py), order and workers (loader.py).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from configs import DataConfig, InputError
from data import world
from data.sample import Sample, Turn

WORLD_SCENES = {"train": 1_000_000, "val": 2_000, "test": 10_000}
CAPTION_PROMPT = "Describe the picture."


@dataclass(frozen=True)
class WorldSource:
    """Built-in scenes, drawn when asked for."""

    cfg: DataConfig
    split: str

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
class JsonlSource:
    """Rows of a JSONL file, parsed when asked for; only their places in the file are kept."""

    path: Path
    rows: tuple[tuple[int, int], ...]  # (row number from 1, byte offset)
    bad: tuple[str, ...]  # what is wrong with rows left out
    first: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Sample:
        number, offset = self.rows[i]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return parse_row(file.readline(), self.path, number)


def parse_row(line: bytes, path: Path, number: int) -> Sample:
    """One JSON object with image + question + answer, or image + caption.

    Image paths start at the file's folder. Raises `InputError` naming file, row and field.
    """
    where = f"{path} row {number}"
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8, numbers too long
        raise InputError(f"{where}: not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise InputError(
            f'{where}: must be an object like {{"image": ..., "question": ..., "answer": ...}}.'
        )
    if "caption" in row:
        row = {"question": CAPTION_PROMPT, "answer": row["caption"], **row}
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise InputError(f'{where}: needs a text in {key!r}, or a "caption".')
    image = row.get("image")
    if image is not None and not isinstance(image, str):
        raise InputError(f'{where}: "image" must be a path.')
    pictures = () if image is None else (str(path.parent / image),)
    turns = (
        Turn("user", "<image>" * len(pictures) + row["question"]),
        Turn("assistant", row["answer"]),
    )
    return Sample(turns, pictures, where)


def most_bad_rows(n_rows: int) -> int:
    """How many bad rows are skipped and listed before a run stops: five, or one per cent."""
    return max(5, n_rows // 100)


def open_jsonl(path: Path, split: str, val_fraction: float) -> JsonlSource:
    """Index a file.

    train and val are told apart by a hash of the row, so that no edit elsewhere moves a row across;
    test is every row. Raises `InputError` on a missing or empty file or too many bad rows.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    rows, bad, offset, n_rows = [], [], 0, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            n_rows += 1
            try:
                parse_row(line, path, number)
            except InputError as error:
                bad.append(str(error))
                continue
            digest = hashlib.blake2b(line.strip(), digest_size=8).digest()
            is_val = int.from_bytes(digest, "big") < val_fraction * 2**64
            if split == "test" or is_val == (split == "val"):
                rows.append((number, start))
    if len(bad) > most_bad_rows(n_rows):
        raise InputError(f"{len(bad)} of {n_rows} rows are bad, the first: {bad[0]}")
    if not rows and split != "val":
        raise InputError(f"{path}: no rows" + (f"; {bad[0]}" if bad else "."))
    return JsonlSource(path, tuple(rows), tuple(bad))


def open_source(cfg: DataConfig, split: str) -> WorldSource | JsonlSource:
    """`cfg.source` for split train, val or test."""
    if cfg.source == "world":
        return WorldSource(cfg, split)
    if not cfg.source.endswith(".jsonl"):
        raise InputError(f"data.source = {cfg.source!r}: must be `world` or a .jsonl file.")
    return open_jsonl(Path(cfg.source), split, cfg.val_fraction)

"""Streams of rows: read once per epoch in parts, shuffled in blocks, resumable at any row."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from config_tools import InputError
from configs import DataConfig
from data.sources.arrow import _with_datasets, changing_of, plain_row
from data.sources.rows import ListRows
from data.sources.split import RowSource, max_bad_rows_in_stream, meaning, print_of_rows, sample_of
from data.sources.text_files import delimiter_of, parse_json
from data.types import Sample

PASSING = {".parquet": "parquet", ".jsonl": "text", ".csv": "csv"}  # what streams, and as what


def open_row_stream(source: str):
    """Files, a folder of Parquet files or a data set of the Hub as a stream of plain rows.

    Pictures stay bytes. Raises `InputError`.
    """
    name, _, part = source.partition("@") if source.startswith("hf:") else (source, "", "")
    path, options = Path(source), {"split": part or "train", "streaming": True}
    if name.startswith("hf:"):
        repository, _, configuration = name.removeprefix("hf:").partition(":")
        words = (repository, configuration or None)
    else:
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        kind = PASSING.get(files[0].suffix if files else "")
        if kind is None or not files[0].is_file():
            raise InputError(
                f"data.source = {source!r}: only a file ({' '.join(PASSING)}), a folder of Parquet "
                "files or hf:owner/name is a stream; leave out --data.stream."
            )
        words, options = (kind,), options | {"data_files": [str(f) for f in files]}
        if kind == "text":  # lines as bytes, for our own parser: the library's changes values
            options |= {"encoding": "latin-1"}
        if kind == "csv":  # else the library guesses that a column is numbers, from its beginning
            features, delimiter = _texts(files[0])
            options |= {"features": features, "sep": delimiter, "keep_default_na": False,
                        "encoding": "utf-8-sig"}  # fmt: skip
    opened = _with_datasets(source, lambda datasets: datasets.load_dataset(*words, **options))
    return opened if opened.features is None else opened.decode(False)


def _texts(path: Path) -> tuple[Any, str]:
    """The columns of a CSV file, all of them text, and what parts them; raises `InputError`."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            delimiter = delimiter_of(file.readline().encode())
            file.seek(0)
            names = next(csv.reader(file, delimiter=delimiter), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not CSV in UTF-8 ({error}).") from None

    def features(datasets):
        return datasets.Features({name: datasets.Value("string") for name in names})

    return _with_datasets(str(path), features), delimiter


TRIES = 6  # of a block; the waits between them double from a second
READING = (OSError, ValueError, RuntimeError, InputError)  # what reading may raise; Arrow's too
HEAD = 64  # rows looked at before training
MOST_SCANNED = 20_000  # rows read to find validation rows
MOST_VALIDATION = 256  # rows kept for validation


@dataclass(frozen=True)
class StreamSource:
    """A source that is read from its start, in parts, and again in the next epoch."""

    cfg: DataConfig
    name: str
    head: RowSource  # its first training rows
    notes: tuple[str, ...]
    fingerprint: str = ""
    bad: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Rows of the head: how many there are in all, nobody has counted."""
        return len(self.head)

    def __getitem__(self, i: int) -> Sample:
        return self.head[i]

    def part(self, number: int, of: int) -> Part:
        return Part(self, number, of)

    def sample(self, row: dict | InputError, where: str) -> Sample | None:
        """A training example; None of a row that is for validation, or rated too low.

        Raises `InputError` naming the row.
        """
        try:
            found = meaning(checked(row), self.cfg)
            if found is None or found.is_val:
                return None
            return sample_of(found.conversation, folder_of(self.name), where)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def checked(row: dict | InputError) -> dict:
    """A row; raises what it is where it could not be read."""
    if isinstance(row, InputError):
        raise row
    return row


class Part:
    """One of `of` parts of a stream, of which every row is in exactly one."""

    def __init__(self, source: StreamSource, number: int, of: int):
        self.source, self.number, self.of = source, number, of
        self.rows = self.data = self.after = None

    def block(self, state: dict | None) -> tuple[list[dict | InputError], dict]:
        """(rows from the library's place `state` on, at most `stream_block`; the place after).

        A row that cannot be read is its `InputError`. Raises one when the source cannot be read,
        after some tries.
        """
        for attempt in range(TRIES):
            try:
                if self.rows is None or state != self.after:
                    self._open(state)
                found = list(islice(self.rows, self.source.cfg.stream_block))
                self.after = self.data.state_dict()
                return found, self.after
            except Exception as error:
                if not (is_lost(error) or isinstance(error, READING)):
                    raise  # a mistake of this code
                self.rows, reason = None, error
                if not may_pass(error):
                    break
                if attempt + 1 < TRIES:
                    time.sleep(2**attempt)
        if isinstance(reason, InputError):
            raise reason
        words = (str(reason) or type(reason).__name__).splitlines()[0][:200]
        later = "; continue later with --train.resume auto" if may_pass(reason) else ""
        raise InputError(
            f"{self.source.name}: cannot be read ({words}), tried {attempt + 1} times{later}."
        ) from None

    def _open(self, state: dict | None) -> None:
        from datasets.distributed import split_dataset_by_node

        self.data = split_dataset_by_node(open_row_stream(self.source.name), self.number, self.of)
        if state is not None:
            self.data.load_state_dict(state)
        read = reader(self.source.name, self.data.features)
        # One by one through `iter`, which, unlike a loop, does not deal rows to workers of its own.
        rows = ({name: v[0] for name, v in one.items()} for one in self.data.iter(1))
        self.rows = (row for row in map(read, rows) if row is not None)

    def shuffled(self, rows: list, epoch: int, block: int) -> list[tuple[int, dict | InputError]]:
        """(number in the part, row) of a block, in the order it is read in."""
        seed = (self.source.cfg.seed, epoch, self.number, block)
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        first = block * self.source.cfg.stream_block
        return [(first + i, rows[i]) for i in order]

    def where(self, number: int) -> str:
        return f"{self.source.name} row {number + 1} of part {self.number + 1} of {self.of}"


def reader(name: str, features: dict | None) -> Callable[[dict], dict | InputError | None]:
    """What a row of the library's is in a source read at any place (data/sources/rows.py)."""
    kind = "" if name.startswith("hf:") or Path(name).is_dir() else Path(name).suffix

    def line(row: dict) -> dict | InputError | None:
        try:
            return parse_json(row["text"].encode("latin-1")) if row["text"].strip() else None
        except InputError as error:
            return error

    def cells(row: dict) -> dict:
        return {column: cell for column, cell in row.items() if cell}

    changing = changing_of(features)
    return {".jsonl": line, ".csv": cells}.get(kind, lambda row: plain_row(row, changing))


def folder_of(name: str) -> Path:
    """What paths of pictures are relative to: where the file is, or the folder itself."""
    path = Path(name)
    return path if path.is_dir() else path.parent if path.is_file() else Path()


def is_lost(error: BaseException) -> bool:
    """A time-out or lost connection of the Hub's client, httpx of any version: no OSError."""
    kinds = type(error).__mro__
    return any(k.__name__ == "TransportError" and k.__module__.startswith("httpx") for k in kinds)


def may_pass(error: BaseException) -> bool:
    """Whether trying again may help: a time-out or a lost connection, whoever reports it."""
    if isinstance(error, InputError):
        return error.__cause__ is not None and may_pass(error.__cause__)
    for_good = isinstance(error, (FileNotFoundError, PermissionError))
    for_good = for_good or type(error).__name__ == "OfflineModeIsEnabled"
    return (isinstance(error, OSError) or is_lost(error)) and not for_good


@lru_cache(maxsize=4)
def _first_rows(cfg: DataConfig, name: str, is_val: bool) -> tuple[RowSource, str]:
    """The first usable rows of a side, and the columns of the first one."""
    part, state = Part(StreamSource(cfg, name, None, ()), 0, 1), None
    kept, digests, n_read, n_bad, reason, columns = [], [], 0, 0, "", ""
    most = MOST_VALIDATION if is_val else HEAD
    while len(kept) < most and n_read < MOST_SCANNED:
        rows, state = part.block(state)
        if not rows:
            break
        for row in rows:
            n_read += 1
            try:
                found = meaning(checked(row), cfg)
            except InputError as error:
                n_bad, reason = n_bad + 1, reason or f"{part.where(n_read - 1)}: {error}"
                continue
            columns = columns or (found.conversation.schema if found else "")
            if found is not None and found.is_val == is_val and len(kept) < most:
                kept.append(row)
                digests.append(found.digest)
    if n_bad > max_bad_rows_in_stream(n_read):
        raise InputError(f"{n_bad} of the first {n_read} rows are bad, the first: {reason}")
    if not kept and not is_val:
        raise InputError(f"{name}: no rows to train on" + (f"; {reason}" if reason else "."))
    print_of = f"{name}, the beginning {print_of_rows(digests)}"
    head = RowSource(ListRows(kept, folder_of(name)), np.arange(len(kept)), (), (), cfg, print_of)
    return head, columns


def open_stream(cfg: DataConfig, name: str, split: str) -> Any:
    """A stream to train on; for validation, rows of its beginning whose hash says so."""
    if name == "world":
        raise InputError(
            "data.stream = True: world is drawn when it is asked for, so leave the flag out."
        )
    head, columns = _first_rows(cfg, name, split == "val")
    if split == "val":
        return head
    note = f"{name}: a stream of {columns}; {cfg.val_fraction:.1%} of it for validation"
    return StreamSource(cfg, name, head, (note,), head.fingerprint)

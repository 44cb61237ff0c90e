"""Files and folders -> rows: dictionaries as they stand there, before anyone says what they mean.

A reader has a length, `rows[k]`, `where(k)` for messages, the `folder` relative paths start at, and
`scan()`: all rows once, an unreadable one as its InputError, bytes of pictures perhaps shortened.
Only places are kept, never rows. Not here: Parquet and the Hub (tables.py), what columns mean
(schemas.py), splits (sources.py).
"""

from __future__ import annotations

import csv
import io
import json
import mmap
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from configs import InputError
from data.tables import ArrowRows, delimiter_of, open_hub, open_parquet, open_saved

PICTURES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2",
            ".ppm", ".pgm")  # fmt: skip
JSON_MARK = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.S)  # strings whole, or a bracket


# --- Text files ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextRows:
    """Rows of a JSONL, JSON or CSV file, parsed when asked for."""

    path: Path
    spans: np.ndarray  # [n, 3] int64: first byte, byte after the last, number for people
    parse: Callable[[bytes], dict]

    @property
    def folder(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, k: int) -> str:
        return f"{self.path} row {self.spans[k, 2]}"

    def __getitem__(self, k: int) -> dict:
        with open(self.path, "rb") as file:
            return self._read(file, k)

    def scan(self) -> Iterator[dict | InputError]:
        with open(self.path, "rb") as file:
            for k in range(len(self)):
                try:
                    yield self._read(file, k)
                except InputError as error:
                    yield error

    def _read(self, file, k: int) -> dict:
        start, end, _ = self.spans[k].tolist()
        file.seek(start)
        try:
            return self.parse(file.read(end - start))
        except InputError as error:
            raise InputError(f"{self.where(k)}: {error}") from None


def _text_rows(path: Path, spans: list[tuple[int, int, int]], parse: Callable) -> TextRows:
    return TextRows(path, np.array(spans, dtype=np.int64).reshape(-1, 3), parse)


def parse_json(content: bytes) -> dict:
    """A row of a JSONL file; raises `InputError`."""
    try:
        row = json.loads(content.removeprefix(BOM_UTF8).decode())
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8, numbers too long
        raise InputError(f"not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise InputError('must be an object like {"image": ..., "question": ..., "answer": ...}.')
    return row


def _open_jsonl(path: Path) -> TextRows:
    spans, start = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                spans.append((start, start + len(line), number))
            start += len(line)
    return _text_rows(path, spans, parse_json)


def _open_json(path: Path) -> TextRows:
    """A list of rows; only its commas and brackets are read here. Or JSON Lines by another name."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        first = re.search(rb"[^\s\xef\xbb\xbf]", content)
        opening = first[0] if first else b""
        if opening == b"{" and content.readline().rstrip().endswith(b"}"):
            return _open_jsonl(path)
        if opening != b"[":
            raise InputError(f"{path}: must hold a list of rows, [{{...}}, {{...}}].")
        spans, depth, start = [], 1, first.end()
        for found in JSON_MARK.finditer(content, start):
            mark = content[found.start()]
            depth += (mark in b"[{") - (mark in b"]}")
            if depth == 0 or (depth == 1 and mark == ord(",")):
                if content[start : found.start()].strip():
                    spans.append((start, found.start(), len(spans) + 1))
                start = found.end()
            if depth == 0:
                return _text_rows(path, spans, parse_json)
    raise InputError(f"{path}: not JSON (its list is never closed); the file may be cut off.")


def _open_csv(path: Path) -> TextRows:
    """Comma, semicolon or tab, whichever the header has most of; quoted cells may hold newlines."""
    csv.field_size_limit(2**31 - 1)  # a picture in base64 is one cell
    end = number = 0

    def lines() -> Iterator[str]:
        nonlocal end, number
        for line in file:
            end, number = end + len(line), number + 1
            yield line.decode("latin-1")  # finds the same commas as UTF-8, and never fails

    with open(path, "rb") as file:
        header = file.readline()
        delimiter = delimiter_of(header)
        file.seek(0)
        spans, start, first = [], 0, 1
        try:
            # strict, or a quote that is never closed would take in all rows behind it
            for cells in csv.reader(lines(), delimiter=delimiter, strict=True):
                if cells:
                    spans.append((start, end, first))
                start, first = end, number + 1
        except csv.Error as error:
            raise InputError(f"{path} row {first}: not CSV ({error}).") from None
    try:
        columns = tuple(_cells(header, delimiter))
    except InputError as error:
        raise InputError(f"{path} row 1: {error}") from None
    return _text_rows(path, spans[1:], partial(_parse_csv, columns, delimiter))


def _cells(content: bytes, delimiter: str) -> list[str]:
    csv.field_size_limit(2**31 - 1)  # again, for workers that did not open the file
    try:
        text = io.StringIO(content.decode("utf-8-sig"), "")
        return next(csv.reader(text, delimiter=delimiter, strict=True), [])
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 ({error.reason}); save the file as UTF-8.") from None
    except csv.Error as error:
        raise InputError(f"not CSV ({error}).") from None


def _parse_csv(columns: tuple[str, ...], delimiter: str, content: bytes) -> dict:
    cells = _cells(content, delimiter)
    if len(cells) != len(columns):
        raise InputError(f"{len(cells)} cells for the {len(columns)} columns {', '.join(columns)}.")
    return {column: cell for column, cell in zip(columns, cells) if cell}


# --- Folders of pictures ------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderRows:
    """Pictures with a .txt beside each, or named for what they show."""

    folder: Path
    names: np.ndarray  # [n] relative paths as bytes
    sidecars: bool
    by_folder: bool  # the label is the name of the picture's folder, not its own

    def __len__(self) -> int:
        return len(self.names)

    def where(self, k: int) -> str:
        return str(self.folder / os.fsdecode(self.names[k]))

    def __getitem__(self, k: int) -> dict:
        name = Path(os.fsdecode(self.names[k]))
        if self.sidecars:
            beside = (self.folder / name).with_suffix(".txt")
            try:
                return {"image": str(name), "caption": beside.read_text(encoding="utf-8-sig")}
            except FileNotFoundError:
                raise InputError(f"{self.where(k)}: no {beside.name} beside it.") from None
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{beside}: not a UTF-8 text ({error}).") from None
        without_number = re.sub(r"[\W\d_]+$", "", name.stem)
        named = name.parent.name if self.by_folder else without_number
        label = re.sub(r"[\W_]+", " ", named).strip()
        if not label:
            raise InputError(
                f"{self.where(k)}: its name says nothing; put a caption beside it in "
                f"{name.stem}.txt, or all of them into metadata.jsonl."
            )
        return {"image": str(name), "label": label}

    def scan(self) -> Iterator[dict | InputError]:
        for k in range(len(self)):
            try:
                yield self[k]
            except InputError as error:
                yield error


def shown_files(folder: Path) -> list[Path]:
    """Relative paths of all files at any depth, in order; none that is hidden, or its folder."""
    files = (f.relative_to(folder) for f in sorted(folder.rglob("*")) if f.is_file())
    return [f for f in files if not any(part[0] == "." for part in f.parts)]


def _open_folder(folder: Path, part: str):
    """What a folder holds, the most explicit first."""
    if any((folder / f).is_file() for f in ("dataset_dict.json", "state.json")):
        return open_saved(folder, part)
    for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
        if (folder / name).is_file() and not part:
            return READERS[Path(name).suffix](folder / name)
    if part:
        raise InputError(f"{folder}: has no splits, so leave out @{part}.")
    files = shown_files(folder)
    names = [f for f in files if f.suffix.lower() in PICTURES]
    tables = [f for f in files if f.suffix == ".parquet"]
    if names and tables:
        raise InputError(
            f"{folder}: holds both pictures ({names[0]}) and Parquet files "
            f"({tables[0]}); name the file or the folder that you mean."
        )
    if names:
        sidecars = any((folder / name).with_suffix(".txt").is_file() for name in names)
        by_folder = len({name.parent for name in names}) > 1
        array = np.array([os.fsencode(name) for name in names])
        return FolderRows(folder, array, sidecars, by_folder)
    if tables:
        return open_parquet([folder / f for f in tables])
    raise InputError(
        f"{folder}: no pictures ({' '.join(PICTURES)}), no metadata.jsonl, no Parquet file and no "
        "saved data set in this folder."
    )


# --- Rows in memory -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ListRows:
    """Rows somebody made in Python; pictures may be PIL images."""

    rows: list[dict]
    folder: Path = Path()

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, k: int) -> str:
        return f"row {k + 1}"

    def __getitem__(self, k: int) -> dict:
        return self.rows[k]

    def scan(self) -> Iterator[dict]:
        return iter(self.rows)


# --- By name ------------------------------------------------------------------------------------

READERS = {".jsonl": _open_jsonl, ".json": _open_json, ".csv": _open_csv, ".tsv": _open_csv,
           ".parquet": open_parquet}  # fmt: skip


def open_rows(source: str) -> TextRows | FolderRows | ArrowRows:
    """A file, a folder, or `hf:owner/name` of the Hub; `@split` at the end picks a split.

    Raises `InputError` naming the file and what is wrong with it.
    """
    path, part = Path(source), ""
    if "@" in source and not path.exists():
        source, _, part = source.rpartition("@")
        path = Path(source)
    if source.startswith("hf:"):
        return open_hub(source.removeprefix("hf:"), part)
    if path.is_dir() and path.suffix not in READERS:
        return _open_folder(path, part)
    opens = READERS.get(path.suffix.lower())
    if opens is None:
        raise InputError(
            f"data.source = {source!r}: must be `world`, a folder that exists, a file "
            f"({' '.join(READERS)}), or hf:owner/name for a data set of the Hub."
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: no rows.")
    if part:
        raise InputError(f"{path}: a file has no splits, so leave out @{part}.")
    if opens is not open_parquet:
        with open(path, "rb") as file:
            if b"\0" in file.read(4096):
                raise InputError(f"{path}: not UTF-8 (UTF-16, or no text); save it as UTF-8.")
    return opens(path)

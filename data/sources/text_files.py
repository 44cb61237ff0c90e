"""JSONL, JSON and CSV files -> rows, parsed on access; only byte offsets stay in memory."""

from __future__ import annotations

import csv
import io
import json
import mmap
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from config_tools import InputError

# A whole string, a bracket or a comma.
JSON_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.S)


@dataclass(frozen=True)
class TextRows:
    """Rows of a JSONL, JSON or CSV file, parsed on access."""

    path: Path
    spans: np.ndarray  # [n, 3] int64: first byte, end (exclusive), line or row number
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
        raise InputError('expected an object like {"image": ..., "question": ..., "answer": ...}.')
    return row


def open_jsonl(path: Path) -> TextRows:
    """One object per line; blank lines are skipped."""
    spans, start = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                spans.append((start, start + len(line), number))
            start += len(line)
    return _text_rows(path, spans, parse_json)


def open_json(path: Path) -> TextRows:
    """A list of rows, split at its commas without parsing it. JSON Lines in .json works, too."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        first = re.search(rb"[^\s\xef\xbb\xbf]", content)
        if first and first[0] == b"{" and content.readline().rstrip().endswith(b"}"):
            return open_jsonl(path)
        if not first or first[0] != b"[":
            raise InputError(f"{path}: expected a list of rows, [{{...}}, {{...}}].")
        spans, depth, start = [], 1, first.end()
        for found in JSON_TOKEN.finditer(content, start):
            mark = content[found.start()]
            depth += (mark in b"[{") - (mark in b"]}")
            if depth == 0 or (depth == 1 and mark == ord(",")):
                if content[start : found.start()].strip():
                    spans.append((start, found.start(), len(spans) + 1))
                start = found.end()
            if depth == 0:
                return _text_rows(path, spans, parse_json)
    raise InputError(f"{path}: not JSON (the list is not closed); the file may be truncated.")


def open_csv(path: Path) -> TextRows:
    """CSV with the delimiter of `find_delimiter`; quoted cells may contain newlines."""
    csv.field_size_limit(2**31 - 1)  # a cell may contain a base64 image
    end = number = 0

    def lines() -> Iterator[str]:
        nonlocal end, number
        for line in file:
            end, number = end + len(line), number + 1
            yield line.decode("latin-1")  # never fails, and keeps delimiters and quotes

    with open(path, "rb") as file:
        header = file.readline()
        delimiter = find_delimiter(header)
        file.seek(0)
        spans, start, first = [], 0, 1
        try:
            # strict: otherwise an unclosed quote swallows all following rows
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
    csv.field_size_limit(2**31 - 1)  # set again: workers did not call open_csv
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
        raise InputError(f"{len(cells)} cells; expected {len(columns)}: {', '.join(columns)}.")
    return {column: cell for column, cell in zip(columns, cells) if cell}


def find_delimiter(header: bytes) -> str:
    """The most frequent of comma, semicolon and tab in the first line of a CSV file."""
    return max(",;\t", key=lambda mark: header.count(mark.encode()))

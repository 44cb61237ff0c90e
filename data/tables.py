"""Tables -> rows through the `datasets` library: Parquet, saved data sets, data sets of the Hub.

Memory-mapped, so that any row is read at any time; pictures stay bytes. The library is imported by
these functions alone: nothing else here needs it. Not here: what columns mean (schemas.py).
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import InputError

PASSING = {".parquet": "parquet", ".jsonl": "text", ".csv": "csv"}  # what streams, and as what
TAIL = 64  # bytes at the end of a picture that tell it from others: compressed data and checksums
WHOLE = 1 << 12  # pictures of up to so many bytes are told apart by all of them
PLAIN = (b"BM", b"P5", b"P6", b"II", b"MM")  # how files begin that may end in many equal pixels


class Mark(bytes):
    """What tells a picture's bytes from others."""


def mark_of(content: bytes | memoryview) -> Mark:
    """A hash of its length and its end, which alone are read; of all where that may not do."""
    if isinstance(content, Mark):
        return content
    is_whole = len(content) <= WHOLE or bytes(content[:2]) in PLAIN
    seen = content if is_whole else b"%d " % len(content) + bytes(content[-TAIL:])
    return Mark(hashlib.blake2b(seen, digest_size=16).digest())


@dataclass(frozen=True)
class ArrowRows:
    """A data set of the `datasets` library, memory-mapped; pictures come as bytes, not decoded."""

    data: Any  # datasets.Dataset with format "arrow"
    name: str
    folder: Path
    changing: dict[str, Any]  # see `plain_row`

    def __len__(self) -> int:
        return len(self.data)

    def where(self, k: int) -> str:
        return f"{self.name} row {k + 1}"

    def __getitem__(self, k: int) -> dict:
        return plain_row(self.data[k].to_pylist()[0], self.changing)

    def scan(self) -> Iterator[dict]:
        for table in self.data.iter(batch_size=1000):
            columns = {name: _light_column(table[name]) for name in table.column_names}
            for values in zip(*columns.values(), strict=True):
                yield plain_row(dict(zip(columns, values)), self.changing)


def plain_row(row: dict, changing: dict[str, Any]) -> dict:
    """A row with the names of its classes, not their numbers, and what is kept as JSON as it was.

    As such the library keeps a column whose values have several types. `changing`: the features of
    the columns that have either.
    """
    return row | {column: _as_it_was(row[column], f) for column, f in changing.items()}


def changing_of(features: dict[str, Any] | None) -> dict[str, Any]:
    return {column: f for column, f in (features or {}).items() if _changes(f)}


def _changes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_changes, feature.values()))
    within = getattr(feature, "feature", None)  # of a list
    return _changes(within) if within else type(feature).__name__ in ("ClassLabel", "Json")


def _as_it_was(value: Any, feature: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, dict):
        return {name: _as_it_was(value[name], inner) for name, inner in feature.items()}
    if within := getattr(feature, "feature", None):
        return [_as_it_was(each, within) for each in value]
    kind = type(feature).__name__
    if kind == "ClassLabel" and isinstance(value, int) and 0 <= value < len(feature.names):
        return feature.names[value]
    return json.loads(value) if kind == "Json" else value


def _light_column(column) -> list:
    """Python values of an Arrow column, of pictures their marks alone."""
    return [_light(v) for v in column] if "binary" in str(column.type) else column.to_pylist()


def _light(scalar):
    if not scalar.is_valid:
        return None
    kind = str(scalar.type)
    if kind in ("binary", "large_binary"):
        buffer = scalar.as_buffer()
        return mark_of(memoryview(buffer))
    if kind.startswith("struct"):
        return {name: _light(value) for name, value in scalar.items()}
    if kind.startswith(("list", "large_list")):
        return [_light(value) for value in scalar.values]
    return scalar.as_py()


def _arrow_rows(opened, name: str, part: str, folder: Path) -> ArrowRows:
    """One split of what `datasets` opened: the one asked for, `train`, or the only one."""
    from datasets import DatasetDict

    if isinstance(opened, DatasetDict):
        chosen = part or ("train" if "train" in opened else "")
        if not chosen and len(opened) == 1:
            chosen = next(iter(opened))
        if chosen not in opened:
            says = f"no split {part!r}" if part else "no split named train"
            raise InputError(
                f"{name}: {says}; add @ and one of {', '.join(map(str, opened))} to the name."
            )
        opened, name = opened[chosen], f"{name}@{chosen}"
    elif part:
        raise InputError(f"{name}: has no splits; leave out @{part}.")
    return ArrowRows(opened.with_format("arrow"), name, folder, changing_of(opened.features))


def _with_datasets(name: str, opens: Callable):
    """What `opens(datasets)` returns; every way to fail becomes one sentence."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{name}: needs the package `datasets`: pip install datasets.") from None
    try:
        return opens(datasets)
    # ArrowInvalid is a ValueError; a DatasetsError is neither, a missing or offline one an OSError.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        # All lines: where a configuration is missing, they name those that there are.
        reason = " ".join((str(cause) or type(cause).__name__).split())[:400]
        raise InputError(f"{name}: cannot be opened as a data set ({reason}).") from error


def open_parquet(path: Path | list[Path]) -> ArrowRows:
    files = path if isinstance(path, list) else [path]
    name = str(files[0] if files[1:] == [] else files[0].parent)
    for file in files:
        if file.stat().st_size == 0:
            raise InputError(f"{file}: no rows.")
    paths = [str(file) for file in files]
    opened = _with_datasets(name, lambda datasets: datasets.Dataset.from_parquet(paths))
    return _arrow_rows(opened, name, "", files[0].parent)


def open_passing(source: str):
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


def delimiter_of(header: bytes) -> str:
    """Comma, semicolon or tab, whichever the first line of a CSV file has most of."""
    return max(",;\t", key=lambda mark: header.count(mark.encode()))


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


def open_saved(folder: Path, part: str) -> ArrowRows:
    opened = _with_datasets(str(folder), lambda datasets: datasets.load_from_disk(str(folder)))
    return _arrow_rows(opened, str(folder), part, folder)


def open_hub(name: str, part: str) -> ArrowRows:
    """`owner/name` or `owner/name:configuration` of the Hub; downloaded once, then cached."""
    repository, _, configuration = name.partition(":")
    opened = _with_datasets(
        name, lambda datasets: datasets.load_dataset(repository, configuration or None)
    )
    return _arrow_rows(opened, name, part, Path())

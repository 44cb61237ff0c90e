"""Parquet files, saved datasets and Hub datasets -> rows, read by the `datasets` library.

Tables are memory-mapped; images stay encoded bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config_tools import InputError
from data.sources.fetch import hash_image


@dataclass(frozen=True)
class ArrowRows:
    """The rows of a `datasets.Dataset`; images are bytes, not decoded."""

    data: Any  # datasets.Dataset with format "arrow"
    name: str
    folder: Path
    encoded: dict[str, Any]  # see `decode_row`

    def __len__(self) -> int:
        return len(self.data)

    def where(self, k: int) -> str:
        return f"{self.name} row {k + 1}"

    def __getitem__(self, k: int) -> dict:
        return decode_row(self.data[k].to_pylist()[0], self.encoded)

    def scan(self) -> Iterator[dict]:
        for table in self.data.iter(batch_size=1000):
            columns = {name: _column_values(table[name]) for name in table.column_names}
            for values in zip(*columns.values(), strict=True):
                yield decode_row(dict(zip(columns, values)), self.encoded)


def decode_row(row: dict, encoded: dict[str, Any]) -> dict:
    """Replace class numbers by class names, and JSON text by its value.

    `datasets` stores columns of mixed types as JSON text. `encoded`: see `encoded_columns`.
    """
    return row | {column: _decode(row[column], f) for column, f in encoded.items()}


def encoded_columns(features: dict[str, Any] | None) -> dict[str, Any]:
    """The features of columns that contain a ClassLabel or Json at any depth."""
    return {column: f for column, f in (features or {}).items() if _is_encoded(f)}


def _is_encoded(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_is_encoded, feature.values()))
    element = getattr(feature, "feature", None)  # of a list
    return _is_encoded(element) if element else type(feature).__name__ in ("ClassLabel", "Json")


def _decode(value: Any, feature: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, dict):
        return {name: _decode(value[name], inner) for name, inner in feature.items()}
    if element := getattr(feature, "feature", None):
        return [_decode(each, element) for each in value]
    kind = type(feature).__name__
    if kind == "ClassLabel" and isinstance(value, int) and 0 <= value < len(feature.names):
        return feature.names[value]
    return json.loads(value) if kind == "Json" else value


def _column_values(column: Any) -> list:
    """Python values of an Arrow column; image bytes are replaced by a hash."""
    return [_value(v) for v in column] if "binary" in str(column.type) else column.to_pylist()


def _value(scalar: Any) -> Any:
    if not scalar.is_valid:
        return None
    kind = str(scalar.type)
    if kind in ("binary", "large_binary"):
        return hash_image(memoryview(scalar.as_buffer()))
    if kind.startswith("struct"):
        return {name: _value(value) for name, value in scalar.items()}
    if kind.startswith(("list", "large_list")):
        return [_value(value) for value in scalar.values]
    return scalar.as_py()


def _arrow_rows(opened: Any, name: str, split: str, folder: Path) -> ArrowRows:
    """The requested split, `train`, or the only split of an opened dataset."""
    from datasets import DatasetDict

    if isinstance(opened, DatasetDict):
        chosen = split or ("train" if len(opened) != 1 else next(iter(opened)))
        if chosen not in opened:
            problem = f"no split {split!r}" if split else "no split named train"
            known = ", ".join(map(str, opened))
            raise InputError(f"{name}: {problem}; add @ and one of {known} to the name.")
        opened, name = opened[chosen], f"{name}@{chosen}"
    elif split:
        raise InputError(f"{name}: has no splits; leave out @{split}.")
    return ArrowRows(opened.with_format("arrow"), name, folder, encoded_columns(opened.features))


def call_datasets(name: str, opens: Callable) -> Any:
    """The result of `opens(datasets)`; any failure becomes an `InputError` naming `name`."""
    try:
        import datasets.exceptions
    except ImportError:
        fix = "run `pip install datasets`"
        raise InputError(f"{name}: needs the package datasets; {fix}.") from None
    try:
        return opens(datasets)
    # ArrowInvalid is a ValueError. Missing or offline datasets raise OSError, others DatasetsError.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        # Keep all lines: for a missing configuration they list the existing ones.
        reason = " ".join((str(cause) or type(cause).__name__).split())[:400]
        raise InputError(f"{name}: cannot be opened as a dataset ({reason}).") from error


def open_parquet(files: list[Path]) -> ArrowRows:
    """One table of one or several Parquet files with the same columns."""
    name = str(files[0] if len(files) == 1 else files[0].parent)
    if empty := [file for file in files if file.stat().st_size == 0]:
        raise InputError(f"{empty[0]}: no rows.")
    paths = list(map(str, files))
    opened = call_datasets(name, lambda datasets: datasets.Dataset.from_parquet(paths))
    return _arrow_rows(opened, name, "", files[0].parent)


def open_saved(folder: Path, split: str) -> ArrowRows:
    """A folder written by `datasets.Dataset.save_to_disk`."""
    opened = call_datasets(str(folder), lambda datasets: datasets.load_from_disk(str(folder)))
    return _arrow_rows(opened, str(folder), split, folder)


def open_hub(name: str, split: str) -> ArrowRows:
    """A Hub dataset `owner/name` or `owner/name:configuration`; downloaded once, then cached."""
    repository, _, configuration = name.partition(":")
    args = repository, configuration or None
    opened = call_datasets(name, lambda datasets: datasets.load_dataset(*args))
    return _arrow_rows(opened, name, split, Path())

"""Tables -> rows through the `datasets` library: Parquet, saved data sets, data sets of the Hub.

Memory-mapped; images stay bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config_tools import InputError
from data.sources.fetch import mark_of


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

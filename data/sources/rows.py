"""Names and paths -> rows: one registry of formats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config_tools import InputError
from data.sources.arrow import ArrowRows, open_hub, open_parquet, open_saved
from data.sources.folders import PICTURES, FolderRows, shown_files
from data.sources.text_files import TextRows, _open_csv, _open_json, _open_jsonl


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

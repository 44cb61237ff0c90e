"""Folders of images -> rows: captions beside them, names, or one folder per class."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config_tools import InputError

PICTURES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2",
            ".ppm", ".pgm")  # fmt: skip


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


def open_class_folder(folder: Path) -> ClassFolder:
    names = [f for f in shown_files(folder) if f.suffix.lower() in PICTURES]
    if not names:
        raise InputError(f"{folder}: no pictures ({' '.join(PICTURES)}) in this folder.")
    if loose := next((name for name in names if len(name.parts) == 1), None):
        raise InputError(f"{folder / loose}: lies in no class's folder, as in {folder}/cat/1.png.")
    return ClassFolder(folder, np.array([os.fsencode(name) for name in names]))

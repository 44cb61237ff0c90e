"""Folders of images -> rows; the text is a caption file, the class folder or the file name.

Labels follow torchvision's ImageFolder: the class of an image is the name of the first folder
below the root, at any depth. Classifiers use that name unchanged. For a VLM, separators become
spaces ("red_panda" -> "red panda"). Files and folders whose name starts with a dot are skipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config_tools import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif",
                  ".jp2", ".ppm", ".pgm")  # fmt: skip


def find_files(folder: Path) -> list[Path]:
    """All files at any depth, sorted, relative to `folder`, without hidden files and folders."""
    files = (f.relative_to(folder) for f in sorted(folder.rglob("*")) if f.is_file())
    return [f for f in files if not any(part[0] == "." for part in f.parts)]


def find_images(folder: Path) -> list[Path]:
    """The images among `find_files`; raises `InputError` if there is none."""
    found = [f for f in find_files(folder) if is_image(f)]
    if not found:
        raise InputError(f"{folder}: no images ({' '.join(IMAGE_SUFFIXES)}) in this folder.")
    return found


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class FolderRows:
    """One row per image of a folder, made by `read(folder, name)`."""

    folder: Path
    names: np.ndarray  # [n] relative paths as bytes, which take less memory than Path objects
    read: Callable[[Path, Path], dict]

    def __len__(self) -> int:
        return len(self.names)

    def where(self, k: int) -> str:
        return str(self.folder / os.fsdecode(self.names[k]))

    def __getitem__(self, k: int) -> dict:
        return self.read(self.folder, Path(os.fsdecode(self.names[k])))

    def scan(self) -> Iterator[dict | InputError]:
        for k in range(len(self)):
            try:
                yield self[k]
            except InputError as error:
                yield error


def _folder_rows(folder: Path, names: Iterable[Path], read: Callable) -> FolderRows:
    return FolderRows(folder, np.array([os.fsencode(name) for name in names]), read)


def image_rows(folder: Path, names: list[Path]) -> FolderRows:
    """Images to train a VLM on: with captions, if any image has a .txt file of the same name.

    Otherwise with labels: the class folder if there are several folders, else the file name.
    """
    if any((folder / name).with_suffix(".txt").is_file() for name in names):
        return _folder_rows(folder, names, read_caption)
    has_folders = len({name.parent for name in names}) > 1
    return _folder_rows(folder, names, read_class_text if has_folders else read_file_name)


def class_rows(folder: Path) -> FolderRows:
    """Images to train a classifier on: one folder per class. Raises `InputError`."""
    names = find_images(folder)
    for name in names:
        class_name(folder, name)
    return _folder_rows(folder, names, read_class)


def class_name(folder: Path, name: Path) -> str:
    """The first folder of the relative path `name`; raises `InputError` if there is none."""
    if len(name.parts) == 1:
        example = f"for example {folder}/cat/1.png."
        raise InputError(f"{folder / name}: expected one folder per class, {example}")
    return name.parts[0]


def read_class(folder: Path, name: Path) -> dict:
    return {"image": str(name), "label": class_name(folder, name)}


def read_class_text(folder: Path, name: Path) -> dict:
    return {"image": str(name), "label": _label_text(class_name(folder, name), folder / name)}


def read_file_name(folder: Path, name: Path) -> dict:
    """The label is the file name without the number at its end."""
    without_number = re.sub(r"[\W\d_]+$", "", name.stem)
    return {"image": str(name), "label": _label_text(without_number, folder / name)}


def _label_text(name: str, path: Path) -> str:
    """`name` with separators replaced by spaces; raises `InputError` if nothing is left."""
    text = re.sub(r"[\W_]+", " ", name).strip()
    if not text:
        fix = f"add a caption file {path.stem}.txt, or list all captions in metadata.jsonl."
        raise InputError(f"{path}: the file name contains no label; {fix}")
    return text


def read_caption(folder: Path, name: Path) -> dict:
    path = (folder / name).with_suffix(".txt")
    try:
        return {"image": str(name), "caption": path.read_text(encoding="utf-8-sig")}
    except FileNotFoundError:
        raise InputError(f"{folder / name}: no caption file {path.name}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not UTF-8 text ({error}).") from None

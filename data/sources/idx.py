"""IDX files (the format of MNIST) -> rows in memory."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from config_tools import InputError


@dataclass(frozen=True)
class ArrayRows:
    """Images and their classes in memory."""

    pixels: np.ndarray  # [n, H, W] or [n, H, W, 3] uint8
    labels: Sequence[str]
    name: str
    folder: Path = Path()

    def __len__(self) -> int:
        return len(self.pixels)

    def where(self, k: int) -> str:
        return f"{self.name} row {k + 1}"

    def __getitem__(self, k: int) -> dict:
        return {"image": Image.fromarray(self.pixels[k]), "label": self.labels[k]}

    def scan(self) -> Iterator[dict]:
        return (self[k] for k in range(len(self)))


def read_idx(path: Path) -> np.ndarray:
    """Read the uint8 array of an IDX file, plain or gzip; raises `InputError`."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
        zeros, kind, n_axes = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{n_axes}I", content[4 : 4 + 4 * n_axes])
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise InputError(f"{path}: not an IDX file ({error}).") from None
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * n_axes)
    if zeros != 0 or kind != 8 or values.size != np.prod(shape):
        found = f"type {kind}, {values.size:,} values for {' x '.join(map(str, shape))}"
        raise InputError(f"{path}: not a complete IDX file of bytes ({found}).")
    return values.reshape(shape)


def open_idx(images: Path) -> ArrayRows:
    """A file of images and the file of their labels in the same folder; raises `InputError`."""
    labels_name = images.name.replace("images", "labels").replace("idx3", "idx1")
    labels = images.with_name(labels_name)
    if not labels.is_file() or labels == images:
        raise InputError(f"{images}: expected the labels in {labels_name} in the same folder.")
    pixels, numbers = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or numbers.ndim != 1 or len(pixels) != len(numbers):
        shapes = f"image shape {pixels.shape}, label shape {numbers.shape}"
        raise InputError(f"{images}: {shapes}; expected [n, H, W] and [n].")
    return ArrayRows(pixels, [str(n) for n in numbers], str(images))


def find_idx(source: str) -> Path | None:
    """The file of images for `folder`, `folder@t10k` or a file; None if it is not IDX data."""
    path, part = Path(source), "train"
    if "@" in source and not path.exists():
        before, _, part = source.rpartition("@")
        path = Path(before)
    if path.is_file():
        return path if "idx3" in path.name else None
    return min(path.glob(f"{part}-images*idx3*"), default=None) if path.is_dir() else None

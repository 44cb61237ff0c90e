"""Planted near-duplicates among emoji and flags: precision and recall of embed.py.

python -m benchmarks.quality.duplicates PATH/TO/datasets runs/duplicates
python -m benchmarks.quality.duplicates PATH/TO/datasets runs/duplicates --trunk runs/demo
Without --trunk, one is trained on the pictures without their labels: each is a class of its own,
seen in other crops every time (Dosovitskiy et al. 2014, Exemplar-CNN). Every fourth
picture stands there three times more: at 60 per cent of its size, as a JPEG, without the outer 5
per cent. The threshold is chosen on one half of the pictures, the figures are those of the other.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import classify
import embed
from cli import command
from data.images import open_image
from engine.vit.embedding import open_index

TRAIN = (
    "small --data.source {out}/each.jsonl --data.val-fraction 0 --model.vit-img-size 64 "
    "--model.vit-patch-size 16 "
    "--data.crop 0.8 --data.stretch 1.1 "
    "--train.steps {steps} --train.eval-every 0 --train.out {out}/trunk --train.resume auto"
)


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(buffer)


def crop(image: Image.Image) -> Image.Image:
    """Without a twentieth of the width and height, half of it at each side."""
    x, y = image.width * 0.025, image.height * 0.025
    box = (round(x), round(y), image.width - round(x), image.height - round(y))
    return image.crop(box)


PLANTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resized": lambda image: image.resize((round(image.width * 0.6), round(image.height * 0.6))),
    "jpeg": jpeg,
    "cropped": crop,
}


def name_of(file: Path) -> str:
    """A name that no file of the other set has."""
    return f"{file.parent.parent.name}-{file.stem}"


def plant(files: list[Path], folder: Path, every: int = 4) -> dict[str, str]:
    """Write all pictures and the plants; returns file -> which picture it shows."""
    shows: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    looks: dict[bytes, str] = {}
    for number, file in enumerate(files):
        name = name_of(file)
        image = open_image(file)
        # Some flags are one flag: Norway's is also that of Bouvet Island and of Svalbard.
        same = looks.setdefault(image.resize((32, 32)).tobytes(), name)
        plants = PLANTS.items() if number % every == 0 else ()
        for end, change in (("", lambda x: x), *((f"-{kind}", c) for kind, c in plants)):
            path = folder / f"{name}{end}.png"
            if not path.is_file():  # else the index of an earlier run would be of older files
                change(image).save(path)
            shows[str(path)] = same
    return shows


def scores(rows: np.ndarray, shows: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, whether both show the same picture) of every pair of rows. Both [N (N - 1) / 2]"""
    of = np.unique(shows, return_inverse=True)[1]  # [N]
    i, j = np.triu_indices(len(rows), 1)
    return (rows @ rows.T)[i, j], of[i] == of[j]


def shrink(files: list[Path], folder: Path, side: int = 96) -> list[dict]:
    """Write every picture small enough to be opened at every step; returns a row for each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for file in files:
        name = name_of(file)
        if not (folder / f"{name}.png").is_file():
            image = open_image(file)
            image.thumbnail((side, side))
            image.save(folder / f"{name}.png")
        rows.append({"image": str((folder / f"{name}.png").absolute()), "label": name})
    return rows


def rates(cosine: np.ndarray, same: np.ndarray, threshold: float) -> tuple[float, float]:
    """(precision, recall) of the pairs at least `threshold` alike."""
    hit = (same & (cosine >= threshold)).sum()
    return hit / max(1, (cosine >= threshold).sum()), hit / max(1, same.sum())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--trunk", help="an encoder that is there already")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    sets = ("noto_emoji_72", "flags")
    files = [f for name in sets for f in sorted((args.shared / name / "images").glob("*.png"))]
    trunk = args.trunk or f"{args.out}/trunk"
    if not args.trunk and not (args.out / "trunk" / f"step-{args.steps:06d}").is_dir():
        rows = shrink(files, args.out / "small")
        (args.out / "each.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        classify.main(["train", *TRAIN.format(out=args.out, steps=args.steps).split()])
    indices, owners = {}, {}
    for half in (0, 1):
        folder = args.out / f"half-{half}"
        owners[half] = plant(files[half::2], folder)
        index = args.out / f"index-{half}-{Path(trunk).name}"
        embed.main(["build", str(folder), "--model", trunk, "--out", str(index)])
        indices[half] = open_index(index)
    pairs = {
        half: scores(index.rows, [owners[half][f] for f in index.files])
        for half, index in indices.items()
    }
    thresholds = 1 - np.geomspace(0.5, 1e-6, 250)
    best = max(thresholds, key=lambda t: min(rates(*pairs[0], t)))
    (p0, r0), (p1, r1) = (rates(*pairs[half], best) for half in (0, 1))
    print(f"{len(files):,} pictures, {pairs[1][1].sum():,} pairs in the measured half")
    print(f"threshold {best:.5f} from the other half (precision {p0:.3f}, recall {r0:.3f})")
    print(f"precision {p1:.3f}, recall {r1:.3f}")


if __name__ == "__main__":
    command(main)

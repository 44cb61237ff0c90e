"""Near-duplicates planted among emoji and flags: precision and recall of embed.py.

python -m benchmarks.quality.duplicates PATH/TO/datasets runs/duplicates [--trunk runs/demo]
Without --trunk one is trained without labels: each image is its own class, seen in random crops
(Dosovitskiy et al. 2014, Exemplar-CNN). Every fourth image is added three times: resized to 60 %,
as a JPEG, without its outer 5 %. Half of the images choose the threshold, the others measure it.
"""

from __future__ import annotations

import argparse
import io
import json
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
    "--model.vit-patch-size 16 --data.crop-min-scale 0.8 --data.crop-max-ratio 1.1 "
    "--train.steps {steps} --train.eval-every 0 --train.out {out}/trunk --train.resume auto"
)


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(buffer)


def crop(image: Image.Image) -> Image.Image:
    """Cut 2.5 % off each side."""
    x, y = round(image.width * 0.025), round(image.height * 0.025)
    return image.crop((x, y, image.width - x, image.height - y))


def resize(image: Image.Image) -> Image.Image:
    return image.resize((round(image.width * 0.6), round(image.height * 0.6)))


PLANTS = {"resized": resize, "jpeg": jpeg, "cropped": crop}


def name_of(file: Path) -> str:
    """A name that is unique across the sets."""
    return f"{file.parent.parent.name}-{file.stem}"


def plant(files: list[Path], folder: Path, every: int = 4) -> dict[str, str]:
    """Write all images and near-duplicates; returns file -> name of the image it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    shows: dict[str, str] = {}
    by_pixels: dict[bytes, str] = {}
    for number, file in enumerate(files):
        name, image = name_of(file), open_image(file)
        # Some flags are equal: Norway, Bouvet Island, Svalbard.
        same = by_pixels.setdefault(image.resize((32, 32)).tobytes(), name)
        images = {name: lambda x: x}
        images |= {f"{name}-{kind}": c for kind, c in PLANTS.items() if number % every == 0}
        for stem, change in images.items():
            path = folder / f"{stem}.png"
            if not path.is_file():  # an earlier run's index stores its time stamp
                change(image).save(path)
            shows[str(path)] = same
    return shows


def scores(rows: np.ndarray, shows: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarity, and whether both show the same image, of all pairs: [N (N - 1) / 2]."""
    of = np.unique(shows, return_inverse=True)[1]  # [N]
    i, j = np.triu_indices(len(rows), 1)
    return (rows @ rows.T)[i, j], of[i] == of[j]


def shrink(files: list[Path], folder: Path, side: int = 96) -> list[dict]:
    """Write thumbnails, which are fast to open in every step; returns a row for each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for file in files:
        path = folder / f"{name_of(file)}.png"
        if not path.is_file():
            image = open_image(file)
            image.thumbnail((side, side))
            image.save(path)
        rows.append({"image": str(path.absolute()), "label": name_of(file)})
    return rows


def rates(cosine: np.ndarray, same: np.ndarray, threshold: float) -> tuple[float, float]:
    """(precision, recall) of pairs whose cosine similarity is `threshold` or more."""
    hit = (same & (cosine >= threshold)).sum()
    return hit / max(1, (cosine >= threshold).sum()), hit / max(1, same.sum())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--trunk", help="checkpoint of an encoder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    sets = ("noto_emoji_72", "flags")
    files = [f for name in sets for f in sorted((args.shared / name / "images").glob("*.png"))]
    trunk = args.trunk or f"{args.out}/trunk"
    if not args.trunk and not (args.out / "trunk" / f"step-{args.steps:06d}").is_dir():
        rows = shrink(files, args.out / "small")
        (args.out / "each.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        classify.main(["train", *TRAIN.format(out=args.out, steps=args.steps).split()])
    pairs = []
    for half in (0, 1):
        folder, out = args.out / f"half-{half}", args.out / f"index-{half}-{Path(trunk).name}"
        shows = plant(files[half::2], folder)
        embed.main(["build", str(folder), "--model", trunk, "--out", str(out)])
        index = open_index(out)
        pairs.append(scores(index.rows, [shows[f] for f in index.files]))
    thresholds = 1 - np.geomspace(0.5, 1e-6, 250)
    best = max(thresholds, key=lambda t: min(rates(*pairs[0], t)))
    (p0, r0), (p1, r1) = (rates(*half, best) for half in pairs)
    print(f"{len(files):,} images, {pairs[1][1].sum():,} pairs in the measured half")
    print(f"threshold {best:.5f} from the other half (precision {p0:.3f}, recall {r0:.3f})")
    print(f"precision {p1:.3f}, recall {r1:.3f}")


if __name__ == "__main__":
    command(main)

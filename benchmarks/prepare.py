"""Real pictures with classes, as files that classify.py reads.

python -m benchmarks.prepare easy_vqa SHARED/datasets/easy_vqa runs/data/easy_vqa
python -m benchmarks.prepare sprite SHARED/datasets/fashion_mnist_sprite runs/data/fashion
python -m benchmarks.prepare each SHARED/datasets/noto_emoji_72 runs/data/emoji
easy_vqa: train.jsonl and test.jsonl, a picture's class is its colour and shape, as its questions
tell. sprite: 900 pieces of Fashion-MNIST, a folder a class. each: every picture is its own class.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

SHAPES = ("circle", "rectangle", "triangle")
FASHION = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
           "Ankle boot")  # fmt: skip


def easy_vqa(source: Path, out: Path) -> None:
    for split in ("train", "test"):
        questions = json.loads((source / split / "questions.json").read_text())
        told: dict[int, dict[str, str]] = {}
        for text, answer, number in questions:
            found = told.setdefault(number, {})
            words = text.strip("?").split()
            if answer in SHAPES:
                found["shape"] = answer
            elif answer not in ("yes", "no"):
                found["colour"] = answer
            yes = (answer == "yes") != ("not" in words or "no" in words)
            if answer in ("yes", "no") and yes:  # "is there a red shape?" yes
                for word in words:
                    if word in SHAPES:
                        found["shape"] = word
            named = [word for word in words if word in SHAPES]
            if named and answer not in ("yes", "no"):  # "what color is the circle?"
                found["shape"] = named[0]
        lines = [
            {"image": str((source / split / "images" / f"{n}.png").absolute()),
             "label": f"{found['colour']} {found['shape']}", "shape": found["shape"]}
            for n, found in sorted(told.items()) if len(found) == 2
        ]  # fmt: skip
        (out / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        print(f"{out / split}.jsonl: {len(lines):,} of {len(told):,} pictures")


def sprite(source: Path, out: Path) -> None:
    """A grid of 30 x 30 pieces of 28 x 28 pixels; rows 3 k to 3 k + 2 are class k."""
    sheet = Image.open(next(source.glob("*.png"))).convert("L")
    for row in range(30):
        folder = out / FASHION[row // 3]
        folder.mkdir(parents=True, exist_ok=True)
        for column in range(30):
            box = (28 * column, 28 * row, 28 * column + 28, 28 * row + 28)
            sheet.crop(box).save(folder / f"{row:02d}-{column:02d}.png")


def each(source: Path, out: Path) -> None:
    files = sorted((source / "images").glob("*.png"))
    lines = [{"image": str(f.absolute()), "label": f.stem} for f in files]
    (out / "each.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


if __name__ == "__main__":
    name, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    {"easy_vqa": easy_vqa, "sprite": sprite, "each": each}[name](source, out)

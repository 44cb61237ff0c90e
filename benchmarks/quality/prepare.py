"""Convert public image sets to files that classify.py reads.

python -m benchmarks.quality.prepare easy_vqa PATH/TO/datasets/easy_vqa runs/data/easy_vqa
python -m benchmarks.quality.prepare sprite PATH/TO/datasets/fashion_mnist_sprite runs/data/fashion
easy_vqa writes train.jsonl and test.jsonl; the label is colour and shape, taken from the questions,
and both are also columns of their own. sprite: 900 images of Fashion-MNIST, one folder per class.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

KINDS = {
    "shape": ("circle", "rectangle", "triangle"),
    "colour": ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow"),
}
FASHION = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
           "Ankle boot")  # fmt: skip


def parse_answer(question: str, answer: str) -> dict[str, str]:
    """Colour and shape of the image's only object, as far as one question and answer give them."""
    words = question.strip("?").split()
    if answer in ("yes", "no"):
        denied = "not" in words or "no" in words  # "is there not a circle?" no
        words = words if (answer == "yes") != denied else []
    return {name: word for word in [*words, answer] for name in KINDS if word in KINDS[name]}


def easy_vqa(source: Path, out: Path) -> None:
    for split in ("train", "test"):
        folder, found = source / split, {}
        questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
        for question, answer, number in questions:
            found.setdefault(number, {}).update(parse_answer(question, answer))
        rows = [{"image": str((folder / "images" / f"{number}.png").absolute()),
                 "label": f"{labels['colour']} {labels['shape']}", **labels}
                for number, labels in sorted(found.items()) if len(labels) == 2]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{out / split}.jsonl: {len(rows):,} of {len(found):,} images")


def sprite(source: Path, out: Path) -> None:
    """Cut a grid of 30 x 30 images of 28 x 28 pixels; rows 3 k to 3 k + 2 are class k."""
    grid = Image.open(next(source.glob("*.png"))).convert("L")
    for row in range(30):
        folder = out / FASHION[row // 3]
        folder.mkdir(parents=True, exist_ok=True)
        for column in range(30):
            box = (28 * column, 28 * row, 28 * column + 28, 28 * row + 28)
            grid.crop(box).save(folder / f"{row:02d}-{column:02d}.png")


if __name__ == "__main__":
    name, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    {"easy_vqa": easy_vqa, "sprite": sprite}[name](source, out)

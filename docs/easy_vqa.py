"""Convert easy-VQA (github.com/vzhou842/easy-VQA) to JSONL for train.py and score.py.

    python docs/easy_vqa.py PATH/TO/easy_vqa/data runs/easy-vqa

The folder holds `train` and `test`, each with `questions.json` ([question, answer, image id] rows)
and `images/ID.png`, as in the public repository and its Python package. Writes `train.jsonl`
with up to three questions about an image per row, so that each encoded image serves several
answers, and `test.jsonl` with one question per row. Images are not copied.
"""

import json
import random
import sys
from itertools import groupby
from pathlib import Path

PER_ROW = {"train": 3, "test": 1}

source, target = map(Path, sys.argv[1:])
target.mkdir(parents=True, exist_ok=True)
for split, n in PER_ROW.items():
    images = (source / split / "images").resolve()
    rows = json.loads((source / split / "questions.json").read_text(encoding="utf-8"))
    with open(target / f"{split}.jsonl", "w", encoding="utf-8") as file:
        for image, group in groupby(sorted(rows, key=lambda row: row[2]), key=lambda row: row[2]):
            texts = [{"user": question, "assistant": answer} for question, answer, _ in group]
            random.Random(image).shuffle(texts)
            for start in range(0, len(texts), n):
                row = {"images": [str(images / f"{image}.png")], "texts": texts[start : start + n]}
                file.write(json.dumps(row) + "\n")
    print(f"{target / split}.jsonl: {len(rows)} questions")

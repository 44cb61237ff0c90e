"""Turn easy-VQA (github.com/vzhou842/easy-VQA) into JSONL that train.py and score.py read.

    python docs/easy_vqa.py PATH/TO/easy_vqa/data runs/easy-vqa

The folder holds `train` and `test`, each with `questions.json` ([question, answer, image id] rows)
and `images/ID.png`, as in the public repository and its Python package. Writes `train.jsonl`, up to
three questions about a picture in a row, so that a picture is encoded for more than one answer, and
`test.jsonl`, one question a row; the pictures stay where they are.
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
        for image, asked in groupby(sorted(rows, key=lambda row: row[2]), key=lambda row: row[2]):
            texts = [{"user": question, "assistant": answer} for question, answer, _ in asked]
            random.Random(image).shuffle(texts)
            for at in range(0, len(texts), n):
                row = {"images": [str(images / f"{image}.png")], "texts": texts[at : at + n]}
                file.write(json.dumps(row) + "\n")
    print(f"{target / split}.jsonl: {len(rows)} questions")

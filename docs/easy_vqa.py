"""Turn easy-VQA (github.com/vzhou842/easy-VQA) into JSONL that train.py and score.py read.

    python docs/easy_vqa.py PATH/TO/easy_vqa/data runs/easy-vqa

The folder holds `train` and `test`, each with `questions.json` ([question, answer, image id] rows)
and `images/ID.png`, as in the public repository and its Python package. Writes `train.jsonl` and
`test.jsonl`, one question a row; the pictures stay where they are.
"""

import json
import sys
from pathlib import Path

source, target = map(Path, sys.argv[1:])
target.mkdir(parents=True, exist_ok=True)
for split in ("train", "test"):
    images = (source / split / "images").resolve()
    rows = json.loads((source / split / "questions.json").read_text(encoding="utf-8"))
    with open(target / f"{split}.jsonl", "w", encoding="utf-8") as file:
        for question, answer, image in rows:
            row = {"image": str(images / f"{image}.png"), "question": question, "answer": answer}
            file.write(json.dumps(row) + "\n")
    print(f"{target / split}.jsonl: {len(rows)} questions")

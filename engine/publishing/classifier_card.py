"""What the Hub gets of a classifier: weights, curves, confusion, and a model card about them.

Every figure of the card is read from the run's own files. Not here: talking to the Hub
(models/pretrained/hub.py), cards of whole models (publish.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from config_tools import read_json, to_dict
from configs_classify import ClassifyConfig
from engine.publishing.model_card import CONFIG_NAME, CURVE, LICENCES, hours, read_record, section
from engine.training.checkpoint import STATE
from engine.vit.classification import open_classifier
from models.classifier import Classifier
from models.pretrained.hub import find
from models.pretrained.load import newest
from models.pretrained.save import reader_of

CONFUSION, RESULT = "confusion.png", "result.json"


def prepare(source: str, folder: Path, repo_id: str) -> str:
    """Write into `folder` everything that would be uploaded; returns what opens it, in words."""
    model = open_classifier(source)
    model.save_pretrained(folder)
    checkpoint = newest(find(source))
    run = checkpoint.parent if (checkpoint / STATE).is_file() else checkpoint
    for name in (CURVE, CONFUSION):
        if (run / name).is_file():
            shutil.copy(run / name, folder / name)
    record = read_record(checkpoint, ClassifyConfig)
    if record:
        config = json.dumps(to_dict(record["config"]), indent=2) + "\n"
        (folder / CONFIG_NAME).write_text(config, encoding="utf-8")
    result = read_json(run / RESULT) if (run / RESULT).is_file() else {}
    words = card(model, record, result, folder, repo_id)
    (folder / "README.md").write_text(words, encoding="utf-8")
    theirs = reader_of(model.vit)
    return f"for transformers' {theirs}" if theirs else "for picoVLM alone: no class there fits"


def card(model: Classifier, record: dict, result: dict, folder: Path, repo_id: str) -> str:
    """README.md of the repository, with the Hub's metadata at its head."""
    cfg, theirs = model.cfg, reader_of(model.vit)
    named = record["config"].model.vit_model_type if record else ""
    found = (licence for start, licence in LICENCES.items() if named.startswith(start))
    is_local = bool(named) and Path(named).exists()  # would mean nothing there
    head = {
        "library_name": "transformers" if theirs else "picovlm",
        "pipeline_tag": "image-classification",
        "license": next(found, "other") if named and not is_local else "mit",
        "base_model": [named] if named and not is_local else [],
        "tags": ["picovlm", "vit", "image-classification"],
    }
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items() if value)
    opens = f"transformers' {theirs}" if theirs else "picoVLM alone: no class of transformers fits"
    parts = [
        f"---\n{yaml}\n---",
        f"# {repo_id.split('/')[-1]}",
        f"A Vision Transformer that tells {cfg.vit_n_classes} classes apart in pictures of "
        f"{cfg.vit_img_size} x {cfg.vit_img_size} pixels, trained with picoVLM; for {opens}.",
        f"```\n{model}\n```",
    ]
    parts += [training(record)] if record else []
    for name, words in ((CURVE, "loss and accuracy"), (CONFUSION, "confusion matrix")):
        parts += [f"![{words}]({name})"] * (folder / name).is_file()
    parts += [scores(result)] if result else []
    return "\n\n".join([*parts, usage(repo_id, theirs)]) + "\n"


def training(record: dict) -> str:
    cfg: ClassifyConfig = record["config"]
    rows = {
        "data": record["data"],
        "trunk": cfg.model.vit_model_type or "from scratch",
        "steps": f"{record['step']:,} of {cfg.train.steps:,}, {cfg.data.batch_size} pictures each",
        "time": f"{hours(record['events']):.2f} hours",
        "hardware": record.get("hardware", "not recorded"),
        "code": f"commit {record['git']}, torch {record['torch']}",
    }
    return section(rows, "classify.py train")


def scores(result: dict) -> str:
    low, high = result["interval"]
    return (
        f"## Accuracy\n\n{result['val_accuracy']:.2%} of {result['pictures']:,} pictures that were "
        f"not trained on (95 % interval {low:.2%} to {high:.2%})."
    )


def usage(repo_id: str, theirs: str) -> str:
    code = f"""```python
from transformers import pipeline

print(pipeline("image-classification", "{repo_id}")("picture.png"))
```"""
    ours = f"```bash\npython classify.py predict {repo_id} picture.png\n```"
    return "\n\n".join(["## Use", *[code] * bool(theirs), "In a checkout of picoVLM:", ours])

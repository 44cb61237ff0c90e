"""A classifier's Hub repository: weights, curves, confusion matrix and model card.

All figures of the card come from the run's files. Not here: uploads (models/pretrained/hub.py),
cards of vision-language models (model_card.py).
"""

from __future__ import annotations

from pathlib import Path

from config_tools import newest_checkpoint, read_json
from configs_classify import ClassifyConfig
from engine.publishing import model_card
from engine.publishing.model_card import CURVE
from engine.vit.classification import CONFUSION, RESULT, open_classifier
from models.classifier import Classifier
from models.pretrained.hub import find
from models.pretrained.save import transformers_class

NO_LOADER = "only picoVLM loads it: transformers has no class for this architecture"


def write_repository(source: str, folder: Path, repo_id: str) -> str:
    """Write the repository into `folder`; return a line about what can load it."""
    model = open_classifier(source)
    model.vit.cfg = model_card.public_config(model.vit.cfg)
    model.save_pretrained(folder)
    checkpoint = newest_checkpoint(find(source))
    figures = (CURVE, CONFUSION)
    run, record = model_card.copy_run(checkpoint, folder, figures, ClassifyConfig)
    result = read_json(run / RESULT) if (run / RESULT).is_file() else {}
    words = card(model, record, result, folder, repo_id)
    (folder / "README.md").write_text(words, encoding="utf-8")
    loader = transformers_class(model.vit)
    return f"loads as transformers' {loader}" if loader else NO_LOADER


def card(model: Classifier, record: dict, result: dict, folder: Path, repo_id: str) -> str:
    """README.md of the repository, with the Hub's metadata as YAML header."""
    cfg, loader = model.cfg, transformers_class(model.vit)
    trunk = record["config"].model.vit_model_type if record else ""
    # A local directory is meaningless on the Hub.
    named = trunk if trunk and not Path(trunk).exists() else ""
    head = {
        "library_name": "transformers" if loader else "picovlm",
        "pipeline_tag": "image-classification",
        # Without a trunk, the weights are their owner's, and so is the choice of a license.
        "license": model_card.licence_of(model_card.without_folders(trunk)) if trunk else "",
        "base_model": [named] if named else [],
        "tags": ["picovlm", "vit", "image-classification"],
    }
    opens = f"loads as transformers' {loader}" if loader else NO_LOADER
    parts = [
        model_card.header(head, repo_id),
        f"A Vision Transformer that classifies images of {cfg.vit_img_size} x {cfg.vit_img_size} "
        f"pixels into {cfg.vit_n_classes} classes, trained with picoVLM; {opens}.",
        f"```\n{model}\n```",
    ]
    parts += [training(record)] if record else []
    for name, words in ((CURVE, "loss and accuracy"), (CONFUSION, "confusion matrix")):
        parts += [f"![{words}]({name})"] * (folder / name).is_file()
    parts += [scores(result)] if result else []
    return "\n\n".join([*parts, usage(repo_id, loader)]) + "\n"


def training(record: dict) -> str:
    """Data, steps, time and hardware of the run."""
    cfg: ClassifyConfig = record["config"]
    rows = {
        "data": record["data"],
        "trunk": model_card.without_folders(cfg.model.vit_model_type) or "random weights",
        "steps": f"{record['step']:,} of {cfg.train.steps:,}, {cfg.data.batch_size} images each",
        "time": f"{model_card.hours(record['events']):.2f} hours",
        "hardware": record.get("hardware", "not recorded"),
        "code": f"commit {record['git']}, torch {record['torch']}",
    }
    return model_card.section(rows, "classify.py train")


def scores(result: dict) -> str:
    """The accuracy with its interval."""
    low, high = result["interval"]
    n_images = result["images"] if "images" in result else result["pictures"]  # earlier versions
    return (
        f"## Accuracy\n\n{result['val_accuracy']:.2%} of {n_images:,} images that were "
        f"not used in training (95 % interval {low:.2%} to {high:.2%})."
    )


def usage(repo_id: str, loader: str) -> str:
    """Snippets for transformers, if a class there fits, and for picoVLM."""
    code = f"""```python
from transformers import pipeline

print(pipeline("image-classification", "{repo_id}")("image.png"))
```"""
    command = f"```bash\npython classify.py predict {repo_id} image.png\n```"
    return "\n\n".join(["## Use", *[code] * bool(loader), "In a checkout of picoVLM:", command])

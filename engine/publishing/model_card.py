"""The Hub repository of a run: checkpoint, loss curve, config and model card.

All figures of the card come from the run's files. Not here: uploads (models/pretrained/hub.py),
other formats (export.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from config_tools import HUB_ID, InputError, from_dict, read_json, to_dict
from configs import RunConfig, VLMConfig
from engine.inference.chat import open_checkpoint
from engine.training.checkpoint import STATE, read_state, resolve
from engine.training.logger import read_log
from models.pretrained import hub
from models.pretrained.save import unsupported_reason
from models.vision_language_model import VisionLanguageModel

CONFIG_NAME, CURVE, SCORE = "train_config.json", "loss.png", "score.json"
# Licenses of common backbones, by the start of their names.
LICENCES = {
    "google/siglip": "apache-2.0",
    "HuggingFaceTB/SmolLM": "apache-2.0",
    "HuggingFaceTB/SmolVLM": "apache-2.0",
    "Qwen/Qwen3-": "apache-2.0",
    "facebook/dinov2": "apache-2.0",
    "google/vit": "apache-2.0",
    "openai/clip": "mit",
}


def publish(source: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload a checkpoint, or the newest of a run, with its card; return the URL."""
    with tempfile.TemporaryDirectory() as folder:
        write_repository(source, Path(folder), repo_id)
        return hub.push(folder, repo_id, private)


def write_repository(
    source: str | Path, folder: Path, repo_id: str, dtype: torch.dtype | None = None
) -> None:
    """Write the repository into `folder`, with weights in `dtype` (None: unchanged)."""
    model, processor = open_checkpoint(source)
    model.cfg = public_config(model.cfg)
    model.to(dtype).save_pretrained(folder, processor)
    checkpoint = resolve(source)
    run, record = copy_run(checkpoint, folder, (CURVE,), RunConfig)
    score = read_json(run / SCORE) if (run / SCORE).is_file() else {}
    keys = {"accuracy", "interval", "n"}
    if score and not all(keys <= set(s) for s in (score, *score.get("skills", {}).values())):
        raise InputError(f"{run / SCORE}: not a result of score.py --json; move or delete it.")
    (folder / "README.md").write_text(card(model, record, score, folder, repo_id), encoding="utf-8")


def copy_run(checkpoint: Path, folder: Path, figures: tuple, cls: type) -> tuple[Path, dict]:
    """Copy figures and config of a checkpoint's run into `folder`; return (run, `read_record`)."""
    run = checkpoint.parent if (checkpoint / STATE).is_file() else checkpoint
    for name in figures:
        if (run / name).is_file():
            shutil.copy(run / name, folder / name)
    record = read_record(checkpoint, cls)
    if record:
        config = json.dumps(to_dict(public_config(record["config"])), indent=2) + "\n"
        (folder / CONFIG_NAME).write_text(config, encoding="utf-8")
    return run, record


def read_record(checkpoint: Path, cls: type = RunConfig) -> dict:
    """Config, step, log and versions of a checkpoint's run; {} without a training state."""
    if not (checkpoint / STATE).is_file():
        return {}
    state = read_state(checkpoint, mmap=True)
    provenance = state["provenance"]
    config = from_dict(cls, provenance["config"], str(checkpoint / STATE))
    log = checkpoint.parent / "log.jsonl"
    return provenance | {
        "config": config,
        "step": state["step"],
        "events": read_log(checkpoint.parent) if log.is_file() else [],
        "data": fingerprint(config.data.source, config.data.seed),
    }


def fingerprint(source: str, seed: int) -> str:
    """A name for the data: the seed of the built-in world, or the hash of a file."""
    if source == "world":
        return f"the built-in world, seed {seed}"
    path = Path(source)
    if path.is_dir():
        return f"{path.name}, a folder"
    if not path.is_file():
        return f"{path.name} (not available when this card was written)"
    return f"{path.name}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def hours(events: list[dict]) -> float:
    """Hours of training, over all resumes; `seconds` in the log restarts at 0 with each."""
    total = last = 0.0
    for event in events:
        if event["seconds"] < last:
            total += last
        last = event["seconds"]
    return (total + last) / 3600


def origins(cfg: VLMConfig) -> list[str]:
    """Names of the models and backbones that the weights come from."""
    named = (*cfg.vlm_base_models, cfg.vit_model_type, cfg.lm_model_type)
    return list(dict.fromkeys(without_folders(name) for name in named if name))


def without_folders(text: str) -> str:
    """A text without the folders of absolute paths in it, as these are private: `/x/y` becomes `y`.

    The text may hold several paths, as `data.source` does.
    """
    return re.sub(r"(?<![^\s=])(?:/|~/|[A-Za-z]:\\)(?:[^\s=/\\]+[/\\])*", "", text)


def public_config(config: Any) -> Any:
    """A config dataclass without the folders of absolute paths, in nested ones too."""
    changes = {}
    for name, value in vars(config).items():
        if isinstance(value, str):
            changes[name] = without_folders(value)
        elif dataclasses.is_dataclass(value):
            changes[name] = public_config(value)
    return dataclasses.replace(config, **changes)


def licence(cfg: VLMConfig) -> str:
    """The license of the models the weights come from; `other` if unknown or mixed.

    Empty for weights trained from random ones: their license is for their owner to choose.
    """
    found = {licence_of(name) for name in origins(cfg)}
    return "other" if len(found) > 1 else next(iter(found), "")


def licence_of(backbone: str) -> str:
    """The license of a backbone; `other` if unknown."""
    found = (licence for start, licence in LICENCES.items() if backbone.startswith(start))
    return next(found, "other")


def card(model: VisionLanguageModel, record: dict, score: dict, folder: Path, repo_id: str) -> str:
    """README.md of the repository, with the Hub's metadata as YAML header."""
    cfg, reason = model.cfg, unsupported_reason(model.cfg)
    head = {
        "library_name": "picovlm" if reason else "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": licence(cfg),
        # A local directory is meaningless on the Hub.
        "base_model": [name for name in origins(cfg) if re.fullmatch(HUB_ID, name)],
        "tags": ["picovlm", "vision-language-model"],
    }
    parts = [header(head, repo_id), architecture(model, reason)]
    parts += [training(record)] if record else []
    parts += [f"![training loss and validation accuracy]({CURVE})"] * (folder / CURVE).is_file()
    parts += [scores(score)] if score else []
    return "\n\n".join(parts + [usage(repo_id, reason)]) + "\n"


def header(metadata: dict, repo_id: str) -> str:
    """The Hub's metadata as YAML, without empty values, and the title."""
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value)
    return f"---\n{yaml}\n---\n\n# {repo_id.split('/')[-1]}"


def architecture(model: VisionLanguageModel, reason: str) -> str:
    """Parameters and sizes of the parts; `reason`: why the checkpoint is not in Idefics3 format."""
    cfg, total = model.cfg, sum(p.numel() for p in model.parameters())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts.items()}
    start = {"vision": cfg.vit_model_type, "language": cfg.lm_model_type}
    whole = ", then ".join(cfg.vlm_base_models)
    layout = "The checkpoint is in Idefics3 format, which transformers loads."
    if reason:
        layout = f"Only picoVLM loads this checkpoint: Idefics3 does not support {reason}."
    what = {
        "vision": f"ViT, {cfg.vit_n_blocks} blocks of {cfg.vit_hidden_dim}, tiles of "
        f"{cfg.vit_img_size} pixels, patches of {cfg.vit_patch_size}",
        "projector": f"pixel shuffle by {cfg.mp_pixel_shuffle_factor}, {cfg.tokens_per_tile} "
        "tokens per tile",
        "language": f"{cfg.lm_n_blocks} blocks of {cfg.lm_hidden_dim}, {cfg.lm_n_heads} heads "
        f"({cfg.lm_n_kv_heads} for keys), vocabulary of {cfg.lm_vocab_size:,}",
    }
    rows = [f"| {part} | {counts[part] / 1e6:.2f} M | {words} "
            f"| {without_folders(whole or start.get(part, '')) or 'random weights'} |"
            for part, words in what.items()]  # fmt: skip
    size = f"A vision-language model of {total / 1e6:.1f} M parameters, trained with picoVLM."
    if not licence(cfg):
        size += " No license is set; its owner can add one above."
    head = "| part | parameters | what | started from |\n|---|---|---|---|"
    return "\n".join([f"{size} {layout}\n", head, *rows])


def training(record: dict) -> str:
    """Data, steps, time, hardware and versions of the run."""
    cfg: RunConfig = record["config"]
    losses = [event["loss"] for event in record["events"] if "loss" in event]
    rows = {
        "data": record["data"],
        "steps": f"{record['step']:,} of {cfg.train.steps:,}",
        "time": f"{hours(record['events']):.2f} hours",
        "hardware": record.get("hardware", "not recorded"),
        "last loss": f"{losses[-1]:.4f}" if losses else "not recorded",
        "code": f"commit {record['git']}, torch {record['torch']}",
    }
    return section(rows, "train.py")


def section(rows: dict[str, str], script: str) -> str:
    """The section about training: `rows` as a table, and the command to repeat it."""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"## Training\n\n| | |\n|---|---|\n{table}\n\nTo repeat it, check out the commit above and "
        f"run, with [{CONFIG_NAME}]({CONFIG_NAME}):\n\n```bash\npython {script} {CONFIG_NAME}\n```"
    )


def scores(score: dict) -> str:
    """Results of score.py with 95 % intervals; blind: with blank images."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    rows = [
        f"| {name} | {percent(s['accuracy'])} | {s['interval'][0]:.1%} - {s['interval'][1]:.1%} "
        f"| {percent(s.get('blind'))} | {s['n']} |"
        for name, s in (score.get("skills", {}) | {"all": score}).items()
    ]
    head = "| skill | accuracy | 95 % interval | blind | questions |\n|---|---|---|---|---|\n"
    return "## Scores\n\n" + head + "\n".join(rows)


def usage(repo_id: str, reason: str) -> str:
    """Snippets for transformers, if it can load the checkpoint, and for picoVLM."""
    for_transformers = f"""```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{repo_id}")
model = AutoModelForImageTextToText.from_pretrained("{repo_id}")
content = [{{"type": "image", "url": "image.png"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
new = model.generate(**inputs, max_new_tokens=96)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(new, skip_special_tokens=True)[0])
```"""
    for_picovlm = f"""```python
from engine.inference.chat import Chat

print(Chat.load("{repo_id}")("What is this?", ["image.png"]))
```"""
    parts = ["## Use", *([] if reason else [for_transformers])]
    return "\n\n".join([*parts, "In a checkout of picoVLM:", for_picovlm])

"""Train an image classifier: build the model, load the data, run the training loop, report.

Not here: the loop (engine/training/loop.py), accuracy and its tables (classification.py).
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from config_tools import InputError
from configs_classify import ClassifyConfig
from data.classification.dataset import ClassificationDataset, describe_balance, open_classification
from data.classification.loader import ClassificationLoader, ClassificationProcessor, loader_config
from engine.publishing.classifier_card import write_repository
from engine.training import checkpoint, distributed
from engine.training.checkpoint import Best
from engine.training.loop import train
from engine.training.optim import build_optimizer
from engine.training.run_folder import claim_run_folder
from engine.vit.classification import evaluate, report_result
from models.classifier import Classifier
from models.inference.compile import compile_blocks
from models.pretrained import hub
from models.vision_transformer import ViT


def build_classifier(cfg: ClassifyConfig, labels: tuple[str, ...], weights: str = "") -> Classifier:
    """Build a classifier for `labels` from `weights`, `cfg.model.vit_model_type`, or at random."""
    if cfg.model.vit_n_classes not in (0, len(labels)):
        raise InputError(
            f"vit_n_classes = {cfg.model.vit_n_classes}: the data has {len(labels)} classes; "
            "omit it, or name all classes in vit_labels."
        )
    torch.manual_seed(cfg.train.seed)
    model = replace(cfg.model, vit_n_classes=len(labels), vit_labels=labels)
    source = weights or model.vit_model_type
    vit = ViT.from_pretrained(replace(model, vit_model_type=source)) if source else ViT(model)
    vit.cfg = replace(vit.cfg, vit_model_type=model.vit_model_type)
    return Classifier(vit)


def enable_checkpointing(model: Classifier, batch_size: int, dtype: torch.dtype) -> None:
    """Checkpoint activations, in place, if those of a batch would not fit in memory."""
    cfg = model.cfg
    n_tokens = batch_size * (cfg.vit_n_prefix + cfg.vit_n_patches)
    sizes = cfg.vit_n_blocks, n_tokens, cfg.vit_hidden_dim, cfg.vit_inter_dim
    if distributed.activation_bytes(*sizes, dtype) > distributed.memory_budget(model.device):
        model.vit.activation_checkpointing = True
        print("activation checkpointing: on, because a batch would not fit in memory")


def train_classifier(cfg: ClassifyConfig) -> None:
    """Train, print the result, and push it to the Hub repository `train.push`, if named."""
    run = Path(cfg.train.out)
    checkpoints = checkpoint.list_checkpoints(run) if cfg.train.resume == "auto" else []
    if cfg.train.push:
        hub.require_login()  # fail now, not after hours of training
    data = open_classification(cfg.data, "train", cfg.model.vit_labels)
    val_data = open_classification(cfg.data, "val", data.names)
    dist = distributed.setup()
    weights = str(checkpoints[-1]) if checkpoints else ""
    model = build_classifier(cfg, data.names, weights).to(dist.device)
    cfg = replace(cfg, model=model.cfg)
    precision = checkpoint.resumed_precision(checkpoints, cfg.train.precision)
    dtype = distributed.agree_on_dtype(dist, precision)
    autocast_context = distributed.autocast(dist.device, dtype)
    enable_checkpointing(model, cfg.data.batch_size, dtype)
    if distributed.should_compile(dist.device, cfg.train.compile):
        compile_blocks(model)
    optimizer = build_optimizer(model.parts, cfg.train, dtype)
    indices = {name: i for i, name in enumerate(data.names)}
    processor = ClassificationProcessor(cfg.model, cfg.data, indices)
    loader_cfg, skipped = loader_config(cfg.data), run / "skipped.jsonl"
    loader = ClassificationLoader(data, processor, loader_cfg, dist.rank, dist.world_size, skipped)
    checkpoint.seed_generators(cfg.train.seed, dist.rank)
    step, best = 0, Best()
    if checkpoints:
        step, best = checkpoint.restore(
            checkpoints[-1], cfg, model, optimizer, loader, dist, data.fingerprint
        )
    lock = claim_run_folder(cfg) if dist.is_main else None  # held until the file is closed
    if dist.is_main:
        describe(cfg, model, data, val_data, step)

    def evaluate_at(_step: int) -> dict:
        return evaluate(model, val_data, autocast_context).values() if len(val_data) else {}

    last_step = train(
        cfg, model, save_model, loader, optimizer, dist, autocast_context, evaluate_at,
        step, best, data.fingerprint
    )  # fmt: skip
    dist.shutdown()
    if lock is None:
        return
    lock.close()
    resume = f"python classify.py train {run}/config.json --train.resume auto"
    is_done = last_step == cfg.train.steps
    print(f"saved {run} at step {last_step}" + ("" if is_done else f"; continue with: {resume}"))
    if is_done and len(val_data):
        with optimizer.averaged():
            report_result(evaluate(model, val_data, autocast_context), run)
    if is_done and cfg.train.push:
        with tempfile.TemporaryDirectory() as folder:
            write_repository(str(run), Path(folder), cfg.train.push)
            print(f"pushed to {hub.push(folder, cfg.train.push)}")


def save_model(model: Classifier, folder: Path) -> None:
    """Write the model into a checkpoint folder."""
    model.save_pretrained(folder)


def describe(
    cfg: ClassifyConfig, model: Classifier, data: ClassificationDataset,
    val_data: ClassificationDataset, step: int,
) -> None:  # fmt: skip
    """Print model, data and steps before training starts."""
    print(model)
    frozen = f"; frozen: {', '.join(cfg.train.freeze)}" if cfg.train.freeze else ""
    start = f"; weights from {cfg.model.vit_model_type}" if cfg.model.vit_model_type else ""
    print(f"training on {describe_balance(data)}; {len(val_data):,} for validation{frozen}{start}")
    print(f"steps {step} to {cfg.train.steps}; run folder: {cfg.train.out}")
    for note in data.notes:
        print(note)

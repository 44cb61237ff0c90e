"""Train a vision-language model.

python train.py                                    the built-in tiny model on the built-in world
python train.py tiny --data.source my.jsonl        on your own questions and pictures
python train.py runs/tiny/config.json --train.resume auto
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from configs import InputError, RunConfig, command, parse_run
from data import processor as processors
from data.loader import Loader
from data.preview import check_before_training
from data.processor import Processor
from data.sources import open_source
from engine import checkpoint
from engine.chat import open_checkpoint
from engine.distributed import autocast, fast_dtype, settings, setup
from engine.evaluation import evaluate
from engine.loop import train
from engine.optim import build_optimizer
from engine.publish import publish
from models.checkpoint_files import misfit
from models.hub import require_login
from models.vision_language_model import VisionLanguageModel


def build(cfg: RunConfig) -> tuple[RunConfig, VisionLanguageModel, Processor]:
    """A model and its processor: new, on the backbones it names, or those of `train.init_from`.

    The sizes of backbones, and the whole config of `init_from`, then replace the model fields.
    """
    if cfg.train.init_from:
        model, processor = open_checkpoint(cfg.train.init_from)
        return replace(cfg, model=model.cfg), model.float(), processor
    if cfg.model.lm_model_type and cfg.model.lm_tokenizer == "world":
        raise InputError(
            f"lm_tokenizer = 'world': {cfg.model.lm_model_type} was trained on other tokens; name "
            "its own tokenizer, which most often is the same directory or Hub id."
        )
    torch.manual_seed(cfg.train.seed)
    model = VisionLanguageModel.from_backbones(cfg.model)
    return replace(cfg, model=model.cfg), model, processors.build(model.cfg)


def main(argv: list[str]) -> None:
    cfg = parse_run(argv)
    run = Path(cfg.train.out)
    found = checkpoint.folders(run) if cfg.train.resume == "auto" else []
    newest = replace(cfg.train, init_from=str(found[-1])) if found else cfg.train
    if cfg.train.push:
        require_login()  # now rather than after hours
    dist = setup()
    source = open_source(cfg.data, "train")
    built, model, processor = build(replace(cfg, train=newest))
    if cfg.train.init_from or cfg.model.vit_model_type or cfg.model.lm_model_type:
        cfg = replace(cfg, model=built.model)
    model.to(dist.device)
    dtype = fast_dtype(dist.device, cfg.train.precision)
    optimizer = build_optimizer(model.parts, cfg.train, dtype)
    loader = Loader(source, processor, cfg.data, dist.rank, dist.world, run / "skipped.jsonl")
    step = 0
    if found:
        state = checkpoint.load_state(found[-1], cfg)
        optimizer.load_state_dict(state["optimizer"])
        loader.restore(state["loader"])
        checkpoint.set_rng_state(state["rng"])
        step = state["step"]
    looked = check_before_training(source, processor, cfg.data)
    if dist.is_main:
        checkpoint.remember_config(cfg)
        describe(cfg, model, source, step)
        print(f"machine: {settings(dist.device, dtype)}")
        print(looked)
    region = autocast(dist.device, dtype)
    asked = partial(evaluate, model, processor, cfg.data, cfg.train.eval_samples, region)
    reached = train(cfg, model, processor, loader, optimizer, dist, region, asked, step)
    dist.close()
    if dist.is_main:
        resume = f"python train.py {run}/config.json --train.resume auto"
        print(
            f"saved {run} at step {reached}"
            + ("" if reached == cfg.train.steps else f"; continue with: {resume}")
        )
        if cfg.train.push and reached == cfg.train.steps:
            print(f"pushed to {publish(run, cfg.train.push)}")


def describe(cfg: RunConfig, model: VisionLanguageModel, source, step: int) -> None:
    """A few lines about what is going to happen."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts.items()}
    parts = ", ".join(
        f"{name} {n / 1e6:.2f} M{' (frozen)' if name in cfg.train.freeze else ''}"
        for name, n in counts.items()
    )
    print(
        f"model: {parts}; {len(source):,} rows of {cfg.data.source}; "
        f"steps {step} to {cfg.train.steps} into {cfg.train.out}"
    )
    named = [name for name in (cfg.model.vit_model_type, cfg.model.lm_model_type) if name]
    if named and step == 0 and not cfg.train.init_from:
        print(f"weights: from {' and '.join(named)}, the rest random")
    if reason := misfit(cfg.model):
        print(f"checkpoints: for this code alone, as Idefics3 has no place for {reason}")
    for note in source.notes:
        print(note)


if __name__ == "__main__":
    command(main)

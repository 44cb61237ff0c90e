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

from cli import command, parse_run
from config_tools import InputError
from configs import RunConfig
from data import processor as processors
from data.batches.stream_loader import open_loader
from data.preview import check_before_training
from data.processor import Processor
from data.sources.open import open_source
from engine.evaluation.answer_sheet import draw_answer_sheet
from engine.evaluation.evaluate import evaluate
from engine.inference.chat import open_checkpoint
from engine.publishing.model_card import publish
from engine.training import adapters, checkpoint
from engine.training.distributed import (
    Dist,
    autocast,
    compiles,
    fast_dtype,
    keep_freed_memory,
    settings,
    setup,
)
from engine.training.dry_run import dry_run
from engine.training.logger import answers_path
from engine.training.loop import Best, train
from engine.training.optim import build_optimizer
from models.inference.compile import compile_blocks
from models.pretrained.hub import require_login
from models.pretrained.save import unsupported_reason
from models.vision_language_model import VisionLanguageModel


def build(cfg: RunConfig) -> tuple[RunConfig, VisionLanguageModel, Processor]:
    """A model and its processor: new, on the backbones it names, or those of `train.init_from`.

    The sizes of backbones, and the whole config of `init_from`, then replace the model fields.
    """
    torch.manual_seed(cfg.train.seed)
    if cfg.train.init_from:
        model, processor = open_checkpoint(cfg.train.init_from)
        return replace(cfg, model=model.cfg), model.float(), processor
    if cfg.model.lm_model_type and cfg.model.lm_tokenizer == "world":
        raise InputError(
            f"lm_tokenizer = 'world': {cfg.model.lm_model_type} was trained on other tokens; name "
            "its own tokenizer, which most often is the same directory or Hub id."
        )
    model = VisionLanguageModel.from_backbones(cfg.model)
    return replace(cfg, model=model.cfg), model, processors.build(model.cfg)


def main(argv: list[str]) -> None:
    cfg = parse_run(argv)
    run = Path(cfg.train.out)
    if cfg.train.push:
        require_login()  # now rather than after hours
    dist = setup(cfg.train.parallel)
    found = checkpoint.seen_by_all(run, dist) if cfg.train.resume == "auto" else []
    # Found by measuring, so one process does for all.
    wanted = checkpoint.precision_of(found, cfg.train.precision)
    dtype = dist.gather(fast_dtype(dist.device, wanted))[0]
    compiled = compiles(dist.device, cfg.train.compile)
    source = open_source(cfg.data, "train")
    start = adapters.start_of(found[-1]) if found else cfg.train.init_from
    built, model, processor = build(replace(cfg, train=replace(cfg.train, init_from=str(start))))
    if cfg.train.init_from or cfg.model.vit_model_type or cfg.model.lm_model_type:
        cfg = replace(cfg, model=built.model)
    looked = check_before_training(source, processor, cfg.data)
    adapters.attach(model, cfg.train)
    for name in cfg.train.activation_checkpointing:
        model.parts[name].activation_checkpointing = True
    if cfg.train.activation_checkpointing and dist.device.type == "cpu":
        keep_freed_memory(1 << 23)  # room matters more than time then: a third of it was holes
    model.to(dist.device)
    dist.shard(model, dtype)
    if compiled:
        compile_blocks(model)
    optimizer = build_optimizer(model.parts, cfg.train, dtype)
    if found and cfg.train.lora:
        adapters.load(model, found[-1])
    skipped = None if cfg.train.dry_run else run / "skipped.jsonl"
    loader = open_loader(source, processor, cfg.data, dist.rank, dist.world, skipped)
    checkpoint.seed_generators(cfg.train.seed, dist.rank)
    step, best, data = 0, Best(), source.fingerprint
    if found:
        step, best = checkpoint.restore(found[-1], cfg, model, optimizer, loader, dist, data)
        best = Best(*best)
    if dist.is_main and not cfg.train.dry_run:
        lock = checkpoint.remember_config(cfg)  # ours while this function runs
        if not found:
            adapters.keep_base(model, processor, cfg.train)
    if dist.is_main:
        describe(cfg, model, source, step)
        print(f"machine: {settings(dist.device, dtype, compiled)}")
        print(looked)
    region = autocast(dist.device, dtype)
    if cfg.train.dry_run:
        said = dry_run(cfg, model, processor, loader, optimizer, dist, region)
        if dist.is_main:
            print(said)
        return dist.close()
    asked = partial(examine, cfg, model, processor, dist, region)
    write = partial(adapters.write, processor=processor, cfg=cfg.train)
    reached = train(cfg, model, write, loader, optimizer, dist, region, asked, step, best, data)
    dist.close()
    if dist.is_main:
        finish(cfg, reached)
        lock.close()


def examine(cfg: RunConfig, model, processor, dist: Dist, region, step: int) -> dict:
    """Evaluate; the main process also draws sample answers, as often as the settings say."""
    t = cfg.train
    number = step // t.eval_every if t.eval_every else 0
    wanted = t.answers_every and (step == t.steps or number % t.answers_every == 0)
    draw = partial(show_answers, path=answers_path(t.out, step))
    show = draw if wanted and dist.is_main else None
    return evaluate(model, processor, cfg.data, t.eval_samples, region, show)


def show_answers(answered, path: Path) -> None:
    """Draw them; what cannot be written is no reason to stop training."""
    try:
        draw_answer_sheet(answered, path)
    except OSError as error:
        print(f"{path}: cannot be drawn ({error.strerror}); training goes on.")


def finish(cfg: RunConfig, reached: int) -> None:
    """The last words, and the way to the Hub."""
    run, is_done = Path(cfg.train.out), reached == cfg.train.steps
    resume = f"python train.py {run}/config.json --train.resume auto"
    print(f"saved {run} at step {reached}" + ("" if is_done else f"; continue with: {resume}"))
    if cfg.train.push and is_done:
        print(f"pushed to {publish(run, cfg.train.push)}")


def describe(cfg: RunConfig, model: VisionLanguageModel, source, step: int) -> None:
    """A few lines about what is going to happen."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts.items()}
    parts = ", ".join(
        f"{name} {n / 1e6:.2f} M{' (frozen)' if name in cfg.train.freeze else ''}"
        for name, n in counts.items()
    )
    rows = "a stream" if cfg.data.stream else f"{len(source):,} rows"
    print(
        f"model: {parts}; {rows} of {cfg.data.source}; "
        f"steps {step} to {cfg.train.steps} into {cfg.train.out}"
    )
    named = [name for name in (cfg.model.vit_model_type, cfg.model.lm_model_type) if name]
    if named and step == 0 and not cfg.train.init_from:
        print(f"weights: from {' and '.join(named)}, the rest random")
    if reason := unsupported_reason(cfg.model):
        print(f"checkpoints: for this code alone, as Idefics3 has no place for {reason}")
    for note in source.notes:
        print(note)


if __name__ == "__main__":
    command(main)

"""Train a vision-language model.

python train.py                                    the built-in tiny model on the built-in data
python train.py tiny --data.source my.jsonl        on your own questions and images
python train.py runs/tiny/config.json --train.resume auto
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cli import change_loaded, command, model_fields_of, parse_run
from config_tools import InputError
from configs import RunConfig
from data import processor as processors
from data.batches.stream_loader import open_loader
from data.preview import check_before_training
from data.processor import Processor
from data.sources.open import open_dataset
from engine.evaluation.answer_sheet import try_draw_answer_sheet
from engine.evaluation.evaluate import evaluate
from engine.inference.chat import open_checkpoint
from engine.publishing.model_card import publish
from engine.training import adapters, checkpoint
from engine.training.checkpoint import Best
from engine.training.distributed import (
    Dist,
    agree_on_dtype,
    autocast,
    describe_machine,
    memory_budget,
    set_malloc_thresholds,
    setup,
    should_compile,
)
from engine.training.dry_run import choose_checkpointing, dry_run
from engine.training.logger import answer_sheet_path, describe_run
from engine.training.loop import train
from engine.training.optim import build_optimizer
from engine.training.run_folder import claim_run_folder
from models.inference.compile import compile_blocks
from models.pretrained.hub import require_login
from models.pretrained.load import load_tensors
from models.vision_language_model import VisionLanguageModel


def main(argv: list[str]) -> None:
    cfg = parse_run(argv)
    if cfg.train.push:
        require_login()  # fail now, not after hours of training
    dist = setup(cfg.train.parallel)
    checkpoints = find_checkpoints(cfg, dist)
    precision = checkpoint.resumed_precision(checkpoints, cfg.train.precision)
    dtype = agree_on_dtype(dist, precision)
    compiled = should_compile(dist.device, cfg.train.compile)
    autocast_context = autocast(dist.device, dtype)

    source = open_dataset(cfg.data, "train")
    cfg, model, processor = build(cfg, checkpoints, model_fields_of(argv))
    data_report = check_before_training(source, processor, cfg.data)
    prepare_model(model, cfg, dist, dtype, compiled)
    optimizer = build_optimizer(model.parts, cfg.train, dtype)
    if checkpoints and cfg.train.lora:
        adapters.load_adapter(model, checkpoints[-1])
    skipped = None if cfg.train.dry_run else Path(cfg.train.out) / "skipped.jsonl"
    loader = open_loader(source, processor, cfg.data, dist.rank, dist.world_size, skipped)
    checkpoint.seed_generators(cfg.train.seed, dist.rank)
    step, best = 0, Best()
    if checkpoints:
        step, best = checkpoint.restore(
            checkpoints[-1], cfg, model, optimizer, loader, dist, source.fingerprint
        )

    lock = None
    if dist.is_main and not cfg.train.dry_run:
        lock = claim_run_folder(cfg)  # an open file; the folder is locked until it closes
        if not checkpoints:
            adapters.save_base(model, processor, cfg.train)
    if dist.is_main:
        describe_run(cfg, model, source, step)
        print(f"machine: {describe_machine(dist.device, dtype, compiled)}")
        print(data_report)
    if cfg.train.dry_run:
        summary = dry_run(cfg, model, processor, loader, optimizer, dist, autocast_context)
        if dist.is_main:
            print(summary)
        return dist.shutdown()

    save_model = partial(adapters.save_model, processor=processor, cfg=cfg.train)
    evaluate_step = partial(evaluate_at, cfg, model, processor, dist, autocast_context)
    last_step = train(
        cfg, model, save_model, loader, optimizer, dist, autocast_context, evaluate_step,
        step, best, source.fingerprint
    )  # fmt: skip
    dist.shutdown()
    if dist.is_main:
        finish(cfg, last_step)
    if lock:
        lock.close()


def find_checkpoints(cfg: RunConfig, dist: Dist) -> list[Path]:
    """The run's checkpoints, oldest first; none if `train.resume` is no."""
    if cfg.train.resume == "no":
        return []
    return checkpoint.list_shared_checkpoints(Path(cfg.train.out), dist)


def build(
    cfg: RunConfig, checkpoints: list[Path] | None = None, asked: Iterable[str] = ()
) -> tuple[RunConfig, VisionLanguageModel, Processor]:
    """Build model and processor: from the newest of `checkpoints`, `train.init_from`, or backbones.

    `asked` are the model fields that a user set: a loaded model changes those that need no new
    weights. Returns `cfg` with the model fields of what was loaded. Raises `InputError` for other
    such fields, and if pretrained text weights are combined with the built-in tokenizer.
    """
    torch.manual_seed(cfg.train.seed)
    # With LoRA these are the base weights; `main` loads the adapter into them.
    source = adapters.initial_weights(checkpoints[-1]) if checkpoints else cfg.train.init_from
    if source:
        model, processor = open_checkpoint(source)
        model = model.float()  # autocast casts; the optimizer needs fp32
        if cfg.train.init_from:
            new = change_loaded(model.cfg, cfg.model, asked, cfg.train.init_from)
            if new != model.cfg:
                model = load_tensors(VisionLanguageModel, new, model.state_dict())
                processor = replace(processor, cfg=new)
    elif cfg.model.lm_model_type and cfg.model.lm_tokenizer == "world":
        raise InputError(
            f"lm_tokenizer = 'world': {cfg.model.lm_model_type} needs the tokenizer it was trained "
            "with; set --model.lm-tokenizer, usually to the same directory or Hub id."
        )
    else:
        model = VisionLanguageModel.from_backbones(cfg.model)
        processor = processors.build(model.cfg)
    # Loaded weights define the model fields. A run from random weights keeps its own, so that
    # `restore` can refuse to resume it with other sizes.
    if cfg.train.init_from or cfg.model.vit_model_type or cfg.model.lm_model_type:
        cfg = replace(cfg, model=model.cfg)
    return cfg, model, processor


def prepare_model(
    model: VisionLanguageModel, cfg: RunConfig, dist: Dist, dtype: torch.dtype, compiled: bool
) -> None:
    """Prepare the model in place: adapters, activation checkpointing, device, FSDP, compile."""
    adapters.attach_adapters(model, cfg.train)
    checkpointed = choose_checkpointing(cfg, dtype, memory_budget(dist.device))
    for name in checkpointed:
        part: Any = model.parts[name]
        part.activation_checkpointing = True
    if checkpointed and dist.is_main:
        print(f"activation checkpointing: {', '.join(checkpointed)}")
    if checkpointed and dist.device.type == "cpu":
        set_malloc_thresholds(8 * 2**20)  # bytes; a lower limit causes less fragmentation
    model.to(dist.device)
    dist.shard(model, dtype)
    if compiled:
        compile_blocks(model)


def evaluate_at(
    cfg: RunConfig,
    model: VisionLanguageModel,
    processor: Processor,
    dist: Dist,
    autocast_context: torch.autocast,
    step: int,
) -> dict:
    """Evaluate; every `answer_sheet_every`-th time, also draw an answer sheet."""
    t = cfg.train
    n_evaluations = step // t.eval_every if t.eval_every else 0
    is_due = t.answer_sheet_every and (step == t.steps or n_evaluations % t.answer_sheet_every == 0)
    draw = partial(try_draw_answer_sheet, path=answer_sheet_path(t.out, step))
    on_answers = draw if is_due and dist.is_main else None
    return evaluate(model, processor, cfg.data, t.eval_samples, autocast_context, on_answers)


def finish(cfg: RunConfig, last_step: int) -> None:
    """Print how to continue an interrupted run; push a finished one to the Hub."""
    run, is_done = Path(cfg.train.out), last_step == cfg.train.steps
    resume = f"python train.py {run}/config.json --train.resume auto"
    print(f"saved {run} at step {last_step}" + ("" if is_done else f"; continue with: {resume}"))
    if cfg.train.push and is_done:
        print(f"pushed to {publish(run, cfg.train.push)}")


if __name__ == "__main__":
    command(main)

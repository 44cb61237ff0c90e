"""picoVLM and transformers' SmolVLM with the same weights, and the same inputs for both.

Not here: what is timed (the other files), how it is timed (timing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.speed.timing import clock
from config_tools import InputError
from configs import RunConfig, VLMConfig
from data.batches.packing import collate
from data.types import IGNORE_INDEX, Batch, Tokens
from models.vision_language_model import VisionLanguageModel

SIDES = ("picoVLM", "transformers")
N_WORDS = 32  # of a prompt
# After a preset's name: random weights and the built-in world's tokenizer, so no downloads.
OFFLINE_FLAGS = ("--model.vit-model-type=", "--model.lm-model-type=", "--model.lm-tokenizer=world",
         "--model.vlm-pad-token-id=0", "--model.vlm-bos-token-id=1", "--model.vlm-eos-token-id=2",
         "--model.vlm-image-token-id=3")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Both models with the same weights, and how long to measure a row."""

    run: RunConfig
    folder: Path  # the checkpoint both are loaded from
    model: VisionLanguageModel
    hf_model: nn.Module
    dtype: torch.dtype
    seconds: float = 0  # of a row
    turns: int = 3  # minimum
    peak: float = 1  # FLOP/s of the machine
    bandwidth: float = 1  # bytes/s of its memory

    @property
    def cfg(self) -> VLMConfig:
        return self.run.model

    @property
    def kind(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"


def without_pretrained(run: RunConfig) -> RunConfig:
    """The preset with random weights instead of the backbones it would download."""
    return replace(run, model=replace(run.model, vit_model_type="", lm_model_type=""))


def load_hf_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    embedding = model.get_input_embeddings()
    if torch.equal(model.lm_head.weight, embedding.weight):  # loaded as a copy
        model.lm_head.weight = embedding.weight
    model.generation_config.eos_token_id = None  # always generate all tokens
    return model


def load_model(side: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    if side == "transformers":
        return load_hf_model(folder, dtype)
    return VisionLanguageModel.from_pretrained(folder).to(dtype)


def open_case(run: RunConfig, folder: Path, dtype: torch.dtype, **options: float) -> Case:
    models = (load_model(side, folder, dtype) for side in SIDES)
    return Case(run, folder, *models, dtype, **options)


def random_conversations(cfg: VLMConfig, lengths: Sequence[int]) -> list[Tokens]:
    """Conversations of one image and random words; the last third of the words is supervised."""
    rng = np.random.default_rng(0)
    special = (cfg.vlm_pad_token_id, cfg.vlm_bos_token_id, cfg.vlm_eos_token_id,
               cfg.vlm_image_token_id)  # fmt: skip
    words = np.setdiff1d(np.arange(cfg.lm_vocab_size, dtype=np.int32), special)
    size, found = cfg.vit_img_size, []
    for length in lengths:
        ids = rng.choice(words, length)
        ids[1 : 1 + cfg.tokens_per_tile] = cfg.vlm_image_token_id
        n_words = length - 1 - cfg.tokens_per_tile
        tiles = rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8)
        found.append(Tokens(ids, np.arange(length) >= length - n_words // 3, tiles))
    return found


def pad_samples(samples: Sequence[Tokens], cfg: VLMConfig) -> tuple[dict, dict]:
    """One conversation per row: arguments of picoVLM's and of transformers' model."""
    n_tiles = {len(s.tiles) for s in samples}
    if len(n_tiles) > 1:
        raise InputError(
            f"conversations have {sorted(n_tiles)} tiles; expected the same number in each."
        )
    batch = collate([[s] for s in samples], cfg)
    return batch.tensors(), hf_inputs(batch, cfg.vlm_pad_token_id)


def hf_inputs(batch: Batch, pad: int) -> dict:
    """Arguments of transformers' model for a batch with one conversation per row."""
    labels = torch.full_like(batch.targets, IGNORE_INDEX)
    labels[:, 1:] = batch.targets[:, :-1]  # transformers shifts them itself
    pixels = batch.images.unflatten(0, (len(labels), -1))  # [B, N, 3, H, W]
    mask = (batch.input_ids != pad).long()
    return {"input_ids": batch.input_ids, "attention_mask": mask, "pixel_values": pixels,
            "labels": labels}  # fmt: skip


def train_step(
    loss: Callable[[], Tensor], optimizer: Any, region: torch.autocast, max_norm: float = 0
) -> None:
    """One optimizer step on `loss()`, computed in `region`; max_norm 0: gradients not clipped."""
    with region:
        value = loss()
    value.backward()
    if max_norm:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(params, max_norm)
    optimizer.step()
    optimizer.zero_grad()


def loss_of(model: nn.Module, inputs: dict) -> Callable[[], Tensor]:
    if isinstance(model, VisionLanguageModel):
        return lambda: model(**inputs)[1]
    return lambda: model(**inputs, use_cache=False).loss


def hf_train_step(
    model: nn.Module, optimizer: Any, batch: Batch, region: torch.autocast, pad: int
) -> None:
    """A training step of transformers' model as its users usually write it."""
    train_step(loss_of(model, hf_inputs(batch, pad)), optimizer, region, max_norm=1.0)


def check_equal(what: str, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Raise `InputError` unless both are equal up to rounding in `dtype`."""
    error = (a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-9)
    if not error < (5e-2 if dtype == torch.bfloat16 else 1e-3):
        raise InputError(f"{what}: differs by {error:.1e} of its largest value; nothing was timed.")


def prompt(cfg: VLMConfig, n_rows: int) -> tuple[Tensor, Tensor]:
    """Prompts of an image and 32 words: ids [B, T] and images [B, 3, H, W]."""
    samples = random_conversations(cfg, [1 + cfg.tokens_per_tile + N_WORDS] * n_rows)
    tensors = pad_samples(samples, cfg)[0]
    return tensors["input_ids"], tensors["images"]


def hf_generate(
    model: nn.Module, ids: Tensor, images: Tensor, n_new: int
) -> tuple[Tensor, list[float]]:
    """Greedy tokens [B, n] of transformers' model, and the time when each had its logits."""
    from transformers import LogitsProcessor

    ticks = []

    class Clock(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[0, 0].item()  # waits for the GPU
            ticks.append(clock())
            return scores

    tokens = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images[:, None],
        do_sample=False, max_new_tokens=n_new, logits_processor=[Clock()],
    )  # fmt: skip
    return tokens[:, ids.shape[1] :], ticks


def weight_bytes_per_token(decoder: nn.Module) -> int:
    """Bytes of weights a decoding step reads; embeddings are left out, as it reads one row."""
    weights = [x for m in decoder.modules() if not isinstance(m, nn.Embedding)
               for x in (*m.parameters(recurse=False), *m.buffers(recurse=False))]  # fmt: skip
    return sum(x.numel() * x.element_size() for x in weights)

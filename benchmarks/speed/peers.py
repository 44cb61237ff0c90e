"""A model of ours beside transformers' of the same weights, and the same inputs for both.

Not here: what is timed of them (the other files), how it is timed (timing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.speed.timing import clock
from config_tools import InputError
from configs import RunConfig, VLMConfig
from data.batches.packing import collate
from data.types import IGNORE, Batch, Tokens
from models.vision_language_model import VisionLanguageModel

WORDS = 32  # of a prompt
# Behind a preset: nothing is downloaded, weights are random, the tokenizer is the world's.
ALONE = ("--model.vit-model-type=", "--model.lm-model-type=", "--model.lm-tokenizer=world",
         "--model.vlm-pad-token-id=0", "--model.vlm-bos-token-id=1", "--model.vlm-eos-token-id=2",
         "--model.vlm-image-token-id=3")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Both models of one shape, and how long a row may take."""

    run: RunConfig
    folder: Path  # the checkpoint that both have opened
    ours: VisionLanguageModel
    theirs: nn.Module
    dtype: torch.dtype
    seconds: float  # of a row, once every turn has been taken
    turns: int = 3

    @property
    def cfg(self) -> VLMConfig:
        return self.run.model

    @property
    def kind(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"


def random_weights(run: RunConfig) -> RunConfig:
    """The preset's shapes, without the weights and the tokenizer it would download."""
    return replace(run, model=replace(run.model, vit_model_type="", lm_model_type=""))


def their_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    embedding = model.get_input_embeddings()
    if torch.equal(model.lm_head.weight, embedding.weight):  # they read a tied head as a copy
        model.lm_head.weight = embedding.weight
    model.generation_config.eos_token_id = None  # greedy tokens are counted, not read
    return model


def open_case(
    run: RunConfig, folder: Path, dtype: torch.dtype, seconds: float = 0, turns: int = 3
) -> Case:
    ours = VisionLanguageModel.from_pretrained(folder).to(dtype)
    return Case(run, folder, ours, their_model(folder, dtype), dtype, seconds, turns)


def synthetic(cfg: VLMConfig, lengths: Sequence[int], seed: int = 0) -> list[Tokens]:
    """Conversations of one picture and random words, of which the last third is learned."""
    rng = np.random.default_rng(seed)
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


def padded(samples: Sequence[Tokens], cfg: VLMConfig) -> tuple[dict, dict]:
    """One conversation a row: (our arguments, theirs)."""
    n_tiles = {len(s.tiles) for s in samples}
    if len(n_tiles) > 1:
        raise InputError(f"conversations have {sorted(n_tiles)} tiles; take those of one number.")
    batch = collate([[s] for s in samples], cfg)
    return batch.tensors(), as_theirs(batch, cfg.vlm_pad_token_id)


def as_theirs(batch: Batch, pad: int) -> dict:
    """The arguments of transformers' model for a batch of one conversation a row."""
    labels = torch.full_like(batch.targets, IGNORE)
    labels[:, 1:] = batch.targets[:, :-1]  # it shifts them itself
    pixels = batch.images.unflatten(0, (len(labels), -1))  # [B, N, 3, H, W]
    mask = (batch.input_ids != pad).long()
    return {"input_ids": batch.input_ids, "attention_mask": mask, "pixel_values": pixels,
            "labels": labels}  # fmt: skip


def their_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    region: torch.autocast,
    pad: int,
) -> None:
    """A step as their users write it."""
    with region:
        loss = model(**as_theirs(batch, pad), use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def agree(what: str, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Raises `InputError` unless both computed the same."""
    most = (a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-9)
    if not most < (5e-2 if dtype == torch.bfloat16 else 1e-3):
        raise InputError(f"{what}: differs by {most:.1e} of its largest value; nothing was timed.")


def prompt(cfg: VLMConfig, n_rows: int) -> tuple[Tensor, Tensor]:
    """A picture and 32 words a row: ids [B, T] and images [B, 3, H, W]."""
    samples = synthetic(cfg, [1 + cfg.tokens_per_tile + WORDS] * n_rows)
    tensors = padded(samples, cfg)[0]
    return tensors["input_ids"], tensors["images"]


def their_words(
    model: nn.Module, ids: Tensor, images: Tensor, n_new: int
) -> tuple[Tensor, list[float]]:
    """transformers' greedy tokens [B, n] behind prompts, and when the logits of each were there."""
    from transformers import LogitsProcessor

    ticks = []

    class Clock(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[0, 0].item()  # a GPU is waited for
            ticks.append(clock())
            return scores

    said = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images[:, None],
        do_sample=False, max_new_tokens=n_new, logits_processor=[Clock()],
    )  # fmt: skip
    return said[:, ids.shape[1] :], ticks


def bytes_of_a_token(decoder: nn.Module) -> int:
    """Bytes of the weights that a decoding step reads; of the embedding it reads one row."""
    weights = [x for m in decoder.modules() if not isinstance(m, nn.Embedding)
               for x in (*m.parameters(recurse=False), *m.buffers(recurse=False))]  # fmt: skip
    return sum(x.numel() * x.element_size() for x in weights)

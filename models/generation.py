"""Prefill once, decode with the cache, sample, stop each row at its end of turn, stream.

Not here: text and pictures (engine/chat.py); this file knows token ids only.

Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import KVCache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0 and top_p 1 filter nothing."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # Keskar et al. 2019; over prompt and answer
    seed: int | None = None

    def __post_init__(self):
        checks = {
            "max_new_tokens": (self.max_new_tokens > 0, "greater than 0"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "repetition_penalty": (self.repetition_penalty > 0, "greater than 0"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"{name} = {getattr(self, name)} must be {wanted}")


def choose(
    logits: Tensor, seen: Tensor | None, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """Logits [B, V] -> tokens [B]. `seen` [B, V] marks tokens the repetition penalty applies to.

    The order is penalty, temperature, top-k, top-p: the nucleus is that of the distribution
    sampled from.
    """
    logits = logits.float()
    if seen is not None:
        penalised = torch.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)  # [B, V]
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= sampling.top_p  # the first token is always inside
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def pad_at_end(input_ids: Tensor, attention_mask: Tensor | None, pad: int) -> tuple[Tensor, Tensor]:
    """Move each row's real tokens [B, T] to its front; also their number [B].

    Accepts padding on either side. Raises ValueError on a row of nothing else.
    """
    if attention_mask is None:
        return input_ids, input_ids.new_full((len(input_ids),), input_ids.shape[1])
    attention_mask = attention_mask.long()
    lengths = attention_mask.sum(1)  # [B]
    if int(lengths.min()) == 0:
        raise ValueError(f"row {int(lengths.argmin())} is nothing but padding")
    order = torch.argsort(attention_mask, dim=1, descending=True, stable=True)  # [B, T]
    rows = input_ids.gather(1, order)[:, : int(lengths.max())]  # [B, T]
    steps = torch.arange(rows.shape[1], device=rows.device)
    return rows.masked_fill(steps >= lengths[:, None], pad), lengths


@torch.inference_mode()
def stream(
    model,
    input_ids: Tensor,
    images: Tensor | None,
    attention_mask: Tensor | None,
    sampling: Sampling,
) -> Iterator[Tensor]:
    """Yield the next token of every row, [B], until all have stopped; pad for rows that had.

    Prompts are [B, T] with padding marked in `attention_mask`. Raises ValueError when prompt and
    answer cannot fit the context.
    """
    cfg = model.cfg
    rows, lengths = pad_at_end(input_ids, attention_mask, cfg.vlm_pad_token_id)
    room = cfg.lm_max_position_embeddings - int(lengths.max())
    if room <= 0:
        raise ValueError(
            f"a prompt of {int(lengths.max())} tokens leaves no room in a context of "
            f"{cfg.lm_max_position_embeddings}"
        )
    n_new = min(sampling.max_new_tokens, room)
    generator = torch.Generator(rows.device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    cache = KVCache(
        cfg, len(rows), rows.shape[1] + n_new, rows.device, model.decoder.norm.weight.dtype
    )
    seen = None
    if sampling.repetition_penalty != 1:
        padding = torch.arange(rows.shape[1], device=rows.device) >= lengths[:, None]  # [B, T]
        seen = torch.zeros(
            len(rows), cfg.lm_vocab_size, dtype=torch.bool, device=rows.device
        ).scatter(1, rows.where(~padding, rows[:, :1]), True)  # padding repeats the first token
    logits, positions = model.prefill(rows, images, lengths, cache), lengths.clone()
    done = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for step in range(n_new):
        tokens = choose(logits, seen, sampling, generator).masked_fill(done, cfg.vlm_pad_token_id)
        yield tokens
        done = done | (tokens == cfg.vlm_eos_token_id)
        if done.all() or step == n_new - 1:
            return
        if seen is not None:
            seen[torch.arange(len(rows), device=rows.device), tokens] = True
        logits = model.decode(tokens, positions, cache)
        positions = positions + 1


def generate(
    model,
    input_ids: Tensor,
    images: Tensor | None,
    attention_mask: Tensor | None,
    sampling: Sampling,
) -> Tensor:
    """All tokens of `stream` as [B, n]: each row ends with the end of turn, then pad."""
    return torch.stack(list(stream(model, input_ids, images, attention_mask, sampling)), dim=1)

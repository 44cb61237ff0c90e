"""Sampling the next token: greedy, temperature, top-k, top-p, repetition penalty.

Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Sampling options. temperature 0 is greedy; top_k 0 and top_p 1 filter nothing."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # of prompt and answer (Keskar et al. 2019)
    seed: int | None = None

    def __post_init__(self):
        checks = {
            "max_new_tokens": (self.max_new_tokens > 0, "greater than 0"),
            "temperature": (0 <= self.temperature < math.inf, "at least 0, and finite"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "repetition_penalty": (
                0 < self.repetition_penalty < math.inf,
                "greater than 0, and finite",
            ),
            "seed": (0 <= (self.seed or 0) < 2**63, "in [0, 2 ** 63)"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"{name} = {getattr(self, name)} must be {wanted}")


def sample(
    logits: Tensor, seen: Tensor | None, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """Logits [B, V] -> tokens [B]. `seen` [B, V] marks tokens the repetition penalty applies to.

    The order is penalty, temperature, top-k, top-p, as in transformers: top-p applies to the
    distribution after temperature.
    """
    logits = logits.float()
    if seen is not None:
        penalised = torch.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.max(-1, keepdim=True).values  # a low temperature would overflow
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


def seen_tokens(rows: Tensor, lengths: Tensor, n_vocab: int) -> Tensor:
    """Mask [B, V] of the tokens in prompts [B, T], without padding."""
    padding = torch.arange(rows.shape[1], device=rows.device) >= lengths[:, None]  # [B, T]
    marks = torch.zeros(len(rows), n_vocab, dtype=torch.bool, device=rows.device)
    return marks.scatter(1, rows.where(~padding, rows[:, :1]), True)  # padding: the first token


def new_generator(device: torch.device, seed: int | None) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator

"""Generation: prefill once, decode with the cache, sample, stop each row at its end of turn.

Not here: text and images (engine/inference/chat.py). This file handles token ids only.

Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.inference.cuda_graph import cuda_graph
from models.inference.kv_cache import KVCache
from models.inference.sampling import Sampling, new_generator, sample, seen_tokens


class Prompt(NamedTuple):
    """An encoded prompt: placeholders in `ids` stand for the tiles, in reading order."""

    ids: Tensor  # [T]
    images: Tensor  # [N, 3, H, W]


def pad_at_end(input_ids: Tensor, attention_mask: Tensor | None, pad: int) -> tuple[Tensor, Tensor]:
    """Move the padding of each row [B, T] to its end; also return the lengths [B].

    Accepts padding on either side. Raises ValueError on a row that is all padding.
    """
    if attention_mask is None:
        return input_ids, input_ids.new_full((len(input_ids),), input_ids.shape[1])
    attention_mask = attention_mask.long()
    lengths = attention_mask.sum(1)  # [B]
    if int(lengths.min()) == 0:
        raise ValueError(f"attention_mask, row {int(lengths.argmin())}: all tokens are padding")
    order = torch.argsort(attention_mask, dim=1, descending=True, stable=True)  # [B, T]
    rows = input_ids.gather(1, order)[:, : int(lengths.max())]  # [B, T]
    steps = torch.arange(rows.shape[1], device=rows.device)
    return rows.masked_fill(steps >= lengths[:, None], pad), lengths


def max_answer_tokens(cfg, n_tokens: int, max_new_tokens: int) -> int:
    """How many new tokens fit after a prompt of `n_tokens`. Raises ValueError when none does."""
    n_free = cfg.lm_max_position_embeddings - n_tokens
    if n_free <= 0:
        raise ValueError(
            f"the prompt has {n_tokens} tokens and leaves no space for an answer in a context of "
            f"lm_max_position_embeddings = {cfg.lm_max_position_embeddings}; shorten it"
        )
    return min(max_new_tokens, n_free)


class Step(NamedTuple):
    """One token of every row, and the logits it was sampled from, before any sampling option."""

    tokens: Tensor  # [B]
    logits: Tensor  # [B, V]


@torch.inference_mode()
def steps(
    model,
    input_ids: Tensor,
    images: Tensor | None,
    attention_mask: Tensor | None,
    sampling: Sampling | None = None,
    cache: KVCache | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """Yield the next token of every row until all rows have stopped; stopped rows yield padding.

    Prompts are [B, T] with padding marked in `attention_mask`. A `cache` with enough slots may
    already hold their first `start` tokens; `images` are then those of the remaining tokens. Raises
    ValueError when a prompt fills the context.
    """
    cfg, sampling = model.cfg, sampling or Sampling()
    rows, lengths = pad_at_end(input_ids, attention_mask, cfg.vlm_pad_token_id)
    n_new = max_answer_tokens(cfg, int(lengths.max()), sampling.max_new_tokens)
    generator = new_generator(rows.device, sampling.seed)
    if cache is None:
        cache = KVCache(
            cfg, len(rows), rows.shape[1] + n_new, rows.device, model.decoder.norm.weight.dtype
        )
    seen = None
    if sampling.repetition_penalty != 1:
        seen = seen_tokens(rows, lengths, cfg.lm_vocab_size)
    logits = model.prefill(rows[:, start:], images, lengths - start, cache, start)
    positions, decode = lengths, None
    done = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for step in range(n_new):
        tokens = sample(logits, seen, sampling, generator).masked_fill(done, cfg.vlm_pad_token_id)
        yield Step(tokens, logits)
        done = done | (tokens == cfg.vlm_eos_token_id)
        if done.all() or step == n_new - 1:
            return
        if seen is not None:
            seen[torch.arange(len(rows), device=rows.device), tokens] = True
        decode = decode or decode_function(model, cache, tokens, positions)
        logits = decode(tokens, positions)
        positions = positions + 1


def decode_function(
    model, cache: KVCache, tokens: Tensor, positions: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The fastest available (tokens [B], positions [B]) -> logits [B, V].

    The given `tokens` and `positions` are those of its first call. A model with forward hooks is
    neither compiled nor captured, so that its hooks are called.
    """
    has_hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if model.compiled_decode is not None and not has_hooks:
        return model.compiled_decode(cache, tokens, positions)
    if tokens.device.type == "cuda" and not has_hooks:
        return cuda_graph(model.decode, cache, tokens, positions)
    return lambda tokens, positions: model.decode(tokens, positions, cache)

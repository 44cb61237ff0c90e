"""Prefill once, decode with the cache, sample, stop each row at its end of turn, stream.

Not here: text and images (engine/inference/chat.py); this file knows token ids only.

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


def max_answer_tokens(cfg, n_tokens: int, max_new_tokens: int) -> int:
    """How many new tokens fit behind so many; ValueError when none does."""
    room = cfg.lm_max_position_embeddings - n_tokens
    if room <= 0:
        raise ValueError(
            f"a prompt of {n_tokens} tokens leaves no room in a context of "
            f"{cfg.lm_max_position_embeddings}"
        )
    return min(max_new_tokens, room)


class Step(NamedTuple):
    """One token of every row, and the logits it was chosen from, before any sampling option."""

    tokens: Tensor  # [B]
    logits: Tensor  # [B, V]


@torch.inference_mode()
def steps(
    model,
    input_ids: Tensor,
    images: Tensor | None,
    attention_mask: Tensor | None,
    sampling: Sampling,
    cache: KVCache | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """Yield the next token of every row until all have stopped; pad for rows that had.

    Prompts are [B, T] with padding marked in `attention_mask`. Of a `cache` of enough slots their
    first `start` tokens are taken as they stand there; `images` are those of the rest. Raises
    ValueError when prompt and answer cannot fit the context.
    """
    cfg = model.cfg
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
    """(tokens [B], positions [B]) -> logits [B, V], of which these are the first; the device's way.

    Where somebody listens to the model's modules, they run one by one.
    """
    on_gpu, is_compiled = tokens.device.type == "cuda", model.compiled_decoder is not None
    if not (on_gpu or is_compiled) or any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    ):
        return lambda tokens, positions: model.decode(tokens, positions, cache)
    if is_compiled:
        return model.compiled_decoder(cache, tokens, positions)
    return cuda_graph(model.decode, cache, tokens, positions)


def stream(
    model,
    input_ids: Tensor,
    images: Tensor | None,
    attention_mask: Tensor | None,
    sampling: Sampling,
) -> Iterator[Tensor]:
    """The tokens of `steps`, [B] each."""
    for step in steps(model, input_ids, images, attention_mask, sampling):
        yield step.tokens


def generate(
    model,
    input_ids: Tensor,
    images: Tensor | None,
    attention_mask: Tensor | None,
    sampling: Sampling,
) -> Tensor:
    """All tokens of `stream` as [B, n]: each row ends with the end of turn, then pad."""
    return torch.stack(list(stream(model, input_ids, images, attention_mask, sampling)), dim=1)


class Prompt(NamedTuple):
    ids: Tensor  # [T]
    images: Tensor  # [N, 3, H, W]

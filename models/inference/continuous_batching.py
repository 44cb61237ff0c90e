"""Continuous batching: a row that finishes its answer takes the next prompt.

Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.inference.generate import Prompt, max_answer_tokens
from models.inference.kv_cache import KVCache
from models.inference.sampling import Sampling, new_generator, sample, seen_tokens

MAX_SLOTS = 1 << 14  # maximum rows x slots of the cache, unless one prompt needs more
SLOT_MULTIPLE = 64  # the cache grows in steps of this many slots


class Completion(NamedTuple):
    """The answer to a prompt: its tokens, including the end-of-turn token if it has one."""

    index: int  # the number of the prompt
    tokens: list[int]
    logprobs: list[float]  # of each token, before any sampling option


@dataclass
class _Row:
    completion: Completion
    max_tokens: int  # of the completion
    position: int  # of the next token
    generator: torch.Generator
    seen: Tensor | None  # [1, V]


@torch.inference_mode()
def generate_continuous(
    model,
    prompts: Iterable[Prompt],
    sampling: Sampling,
    n_rows: int = 64,
    stop: Callable[[list[int]], bool] = lambda tokens: False,
    number: Callable[[int], int] = int,
) -> Iterator[Completion]:
    """Yield completions as they finish; prompts are read as rows become free.

    Short answers do not wait for long ones. Prefill starts when an eighth of the rows are free,
    because it costs at least one decoding step. `stop(tokens)` ends an answer early. The i-th
    prompt has the index `number(i)` and samples with seed + index, so its answer does not depend
    on the other rows.
    """
    waiting, pending = ((number(i), prompt) for i, prompt in enumerate(prompts)), []
    rows: list[Any] = []  # a _Row or None each
    cache: Any = None
    logits: Any = None  # [rows, V]
    while True:
        n_busy = sum(row is not None for row in rows)
        if n_busy <= len(rows) - max(1, len(rows) // 8) or not rows:
            pending += islice(waiting, n_rows - n_busy - len(pending))
            cache, rows, logits, n_new = _allocate(
                model, cache, rows, logits, pending, sampling, n_rows
            )
            if n_new:
                _admit(model, cache, rows, logits, pending[:n_new], sampling)
            pending = pending[n_new:]
        live = [r for r, row in enumerate(rows) if row is not None]
        if not live:
            return
        tokens = _sample_rows(logits, rows, live, sampling)  # [rows]
        logprobs = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        for r, token, logprob in zip(live, tokens[live].tolist(), logprobs[live].tolist()):
            row = rows[r]
            row.completion.tokens.append(token)
            row.completion.logprobs.append(logprob)
            if (
                token == model.cfg.vlm_eos_token_id
                or len(row.completion.tokens) == row.max_tokens
                or stop(row.completion.tokens)
            ):
                yield row.completion
                rows[r] = None
            elif row.seen is not None:
                row.seen[0, token] = True
        if any(row is not None for row in rows):
            positions = [0 if row is None else row.position for row in rows]
            logits = model.decode(tokens, torch.tensor(positions, device=tokens.device), cache)
            for row in filter(None, rows):
                row.position += 1


def _allocate(model, cache, rows, logits, pending, sampling: Sampling, n_rows: int):
    """Resize so that the first n `pending` prompts get a row: (cache, rows, logits, n).

    Rows x slots stay within MAX_SLOTS, so there are fewer rows while prompts are long.
    """
    cfg, kept = model.cfg, [r for r, row in enumerate(rows) if row is not None]
    slots, n_new = 0 if cache is None else cache.n_slots, 0
    for _, prompt in pending:
        n_tokens = len(prompt.ids)
        need = max(slots, n_tokens + max_answer_tokens(cfg, n_tokens, sampling.max_new_tokens))
        fits = max(1, min(n_rows, MAX_SLOTS // need))
        if len(kept) + n_new >= fits:
            break
        slots = need if need == slots else -(-need // SLOT_MULTIPLE) * SLOT_MULTIPLE
        n_new += 1
    wanted = max(1, len(kept) + n_new)
    if cache is not None and slots == cache.n_slots and wanted <= len(rows) < 2 * wanted:
        return cache, rows, logits, n_new
    fresh = KVCache(cfg, wanted, slots, model.device, model.decoder.norm.weight.dtype)
    spread = torch.zeros(wanted, cfg.lm_vocab_size, device=model.device)
    if kept:
        cache.keep_rows(torch.tensor(kept, device=model.device))
        fresh.put(torch.arange(len(kept), device=model.device), cache)
        spread[: len(kept)] = logits[kept]
    moved = [rows[r] for r in kept] + [None] * (wanted - len(kept))
    return fresh, moved, spread, n_new


def _admit(model, cache: KVCache, rows: list, logits: Tensor, new, sampling: Sampling) -> None:
    """Prefill new prompts as one batch, into free rows of cache, `rows` and `logits`."""
    cfg, device = model.cfg, model.device
    lengths = torch.tensor([len(p.ids) for _, p in new], device=device)  # [B]
    ids = torch.full((len(new), int(lengths.max())), cfg.vlm_pad_token_id, device=device)
    for b, (_, prompt) in enumerate(new):
        ids[b, : len(prompt.ids)] = prompt.ids
    images = torch.cat([prompt.images for _, prompt in new]).to(device)
    n_prompts, n_slots = ids.shape
    part = KVCache(cfg, n_prompts, n_slots, device, cache.k[0].dtype)
    first = model.prefill(ids, images, lengths, part)  # [B, V]
    free = [r for r, row in enumerate(rows) if row is None][: len(new)]
    at = torch.tensor(free, device=device)
    cache.put(at, part)
    logits[at] = first.to(logits.dtype)
    for b, (r, (index, prompt)) in enumerate(zip(free, new)):
        n_tokens, seed = len(prompt.ids), sampling.seed
        rows[r] = _Row(
            Completion(index, [], []),
            max_answer_tokens(cfg, n_tokens, sampling.max_new_tokens),
            n_tokens,
            new_generator(device, None if seed is None else seed + index),
            seen_tokens(ids[b : b + 1], lengths[b : b + 1], cfg.lm_vocab_size)
            if sampling.repetition_penalty != 1
            else None,
        )


def _sample_rows(logits: Tensor, rows: list, live: list[int], sampling: Sampling) -> Tensor:
    """The next token of every row, [rows]; each draws from its own generator."""
    tokens = logits.argmax(-1)
    if sampling.temperature > 0 or sampling.repetition_penalty != 1:
        for r in live:
            tokens[r] = sample(logits[r : r + 1], rows[r].seen, sampling, rows[r].generator)[0]
    return tokens

"""Prefill once, decode with the cache, sample, stop each row at its end of turn, stream.

Also here: many prompts through few rows, a row refilled as soon as it has finished; and how likely
given continuations are.
Not here: text and pictures (engine/chat.py); this file knows token ids only.

Letters: B batch, T tokens, V vocabulary, C continuations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.attention import KVCache
from models.recorded import recorded

MOST_SLOTS = 1 << 14  # rows x slots of the cache that many prompts share, unless one needs more
STEP = 64  # a cache grows to a multiple of so many slots


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
            "temperature": (0 <= self.temperature < math.inf, "at least 0, and finite"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "repetition_penalty": (
                0 < self.repetition_penalty < math.inf, "greater than 0, and finite",
            ),
            "seed": (0 <= (self.seed or 0) < 2**63, "in [0, 2 ** 63)"),
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
    logits = logits - logits.max(-1, keepdim=True).values  # a cold one would overflow
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


def seen_tokens(rows: Tensor, lengths: Tensor, n_vocab: int) -> Tensor:
    """Marks [B, V] of the tokens that occur in prompts [B, T], padding apart."""
    padding = torch.arange(rows.shape[1], device=rows.device) >= lengths[:, None]  # [B, T]
    marks = torch.zeros(len(rows), n_vocab, dtype=torch.bool, device=rows.device)
    return marks.scatter(1, rows.where(~padding, rows[:, :1]), True)  # padding: the first again


def new_generator(device: torch.device, seed: int | None) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def room_for(cfg, n_tokens: int, max_new_tokens: int) -> int:
    """How many new tokens fit behind so many; ValueError when none does."""
    room = cfg.lm_max_position_embeddings - n_tokens
    if room <= 0:
        raise ValueError(
            f"a prompt of {n_tokens} tokens leaves no room in a context of "
            f"{cfg.lm_max_position_embeddings}"
        )
    return min(max_new_tokens, room)


# --- One batch, in step -------------------------------------------------------------------------


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
    n_new = room_for(cfg, int(lengths.max()), sampling.max_new_tokens)
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
        tokens = choose(logits, seen, sampling, generator).masked_fill(done, cfg.vlm_pad_token_id)
        yield Step(tokens, logits)
        done = done | (tokens == cfg.vlm_eos_token_id)
        if done.all() or step == n_new - 1:
            return
        if seen is not None:
            seen[torch.arange(len(rows), device=rows.device), tokens] = True
        decode = decode or decoder(model, cache, tokens, positions)
        logits = decode(tokens, positions)
        positions = positions + 1


def decoder(
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
    return recorded(model.decode, cache, tokens, positions)


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


# --- Many prompts through few rows --------------------------------------------------------------


class Prompt(NamedTuple):
    ids: Tensor  # [T]
    images: Tensor  # [N, 3, H, W]


class Said(NamedTuple):
    """What the model said to a prompt: tokens up to and with the end of turn, if it came."""

    index: int  # the number of the prompt
    tokens: list[int]
    logprobs: list[float]  # of each token, under the model alone: no sampling option changes them


@dataclass
class _Row:
    said: Said
    n_new: int  # most tokens it may say
    position: int  # of the next token
    generator: torch.Generator
    seen: Tensor | None  # [1, V]


@torch.inference_mode()
def serve(
    model,
    prompts: Iterable[Prompt],
    sampling: Sampling,
    n_rows: int = 64,
    stop: Callable[[list[int]], bool] = lambda tokens: False,
    number: Callable[[int], int] = int,
) -> Iterator[Said]:
    """Answers in the order in which they are done, read from `prompts` as rows become free.

    A row that has finished takes the next prompt, so that short answers do not wait for long ones;
    an eighth of the rows must be free, as a prefill costs a step or more. `stop` ends an answer
    early. The i-th prompt is called `number(i)` and samples with the seed + that, whatever the rows
    are.
    """
    waiting, hand = ((number(i), prompt) for i, prompt in enumerate(prompts)), []
    rows: list[_Row | None] = []
    cache, logits = None, None  # logits [rows, V]
    while True:
        n_busy = sum(row is not None for row in rows)
        if n_busy <= len(rows) - max(1, len(rows) // 8) or not rows:
            hand += _take(waiting, n_rows - n_busy - len(hand))
            room = _make_room(model, cache, rows, logits, hand, sampling, n_rows)
            cache, rows, logits, n_new = room
            if n_new:
                _admit(model, cache, rows, logits, hand[:n_new], sampling)
            hand = hand[n_new:]
        live = [r for r, row in enumerate(rows) if row is not None]
        if not live:
            return
        tokens = _choose_rows(logits, rows, live, sampling)  # [rows]
        logprobs = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        for r, token, logprob in zip(live, tokens[live].tolist(), logprobs[live].tolist()):
            row = rows[r]
            row.said.tokens.append(token)
            row.said.logprobs.append(logprob)
            if (
                token == model.cfg.vlm_eos_token_id
                or len(row.said.tokens) == row.n_new
                or stop(row.said.tokens)
            ):
                yield row.said
                rows[r] = None
            elif row.seen is not None:
                row.seen[0, token] = True
        if any(row is not None for row in rows):
            positions = [0 if row is None else row.position for row in rows]
            logits = model.decode(tokens, torch.tensor(positions, device=tokens.device), cache)
            for row in filter(None, rows):
                row.position += 1


def _take(waiting: Iterator, n: int) -> list:
    return [item for _, item in zip(range(n), waiting)]


def _make_room(model, cache, rows, logits, hand, sampling: Sampling, n_rows: int):
    """(cache, rows, logits, how many of `hand` get a row): larger where the next ones need it.

    Rows times slots stay below MOST_SLOTS: while prompts are long there are fewer rows.
    """
    cfg, kept = model.cfg, [r for r, row in enumerate(rows) if row is not None]
    slots, n_new = 0 if cache is None else cache.n_slots, 0
    for _, prompt in hand:
        n_tokens = len(prompt.ids)
        need = max(slots, n_tokens + room_for(cfg, n_tokens, sampling.max_new_tokens))
        fits = max(1, min(n_rows, MOST_SLOTS // need))
        if len(kept) + n_new >= fits:
            break
        slots, n_new = need if need == slots else -(-need // STEP) * STEP, n_new + 1
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
    """Prefill prompts together and put them into free rows of the cache, of `rows` and `logits`."""
    cfg, device = model.cfg, model.device
    lengths = torch.tensor([len(p.ids) for _, p in new], device=device)  # [B]
    ids = torch.full((len(new), int(lengths.max())), cfg.vlm_pad_token_id, device=device)
    for b, (_, prompt) in enumerate(new):
        ids[b, : len(prompt.ids)] = prompt.ids
    images = torch.cat([prompt.images for _, prompt in new]).to(device)
    part = KVCache(cfg, *ids.shape, device, cache.k[0].dtype)
    first = model.prefill(ids, images, lengths, part)  # [B, V]
    free = [r for r, row in enumerate(rows) if row is None][: len(new)]
    at = torch.tensor(free, device=device)
    cache.put(at, part)
    logits[at] = first.to(logits.dtype)
    for b, (r, (index, prompt)) in enumerate(zip(free, new)):
        n_tokens, seed = len(prompt.ids), sampling.seed
        rows[r] = _Row(
            Said(index, [], []),
            room_for(cfg, n_tokens, sampling.max_new_tokens),
            n_tokens,
            new_generator(device, None if seed is None else seed + index),
            seen_tokens(ids[b : b + 1], lengths[b : b + 1], cfg.lm_vocab_size)
            if sampling.repetition_penalty != 1
            else None,
        )


def _choose_rows(logits: Tensor, rows: list, live: list[int], sampling: Sampling) -> Tensor:
    """The next token of every row, [rows]; one by one where each draws or remembers by itself."""
    tokens = logits.argmax(-1)
    if sampling.temperature > 0 or sampling.repetition_penalty != 1:
        for r in live:
            tokens[r] = choose(logits[r : r + 1], rows[r].seen, sampling, rows[r].generator)[0]
    return tokens


# --- Given answers ------------------------------------------------------------------------------


@torch.inference_mode()
def likelihoods(model, prompt: Prompt, continuations: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities of each token of each continuation of one prompt.

    The prompt runs once; its keys and values serve all continuations, which run together.
    """
    cfg, device = model.cfg, model.device
    n_tokens, longest = len(prompt.ids), max(map(len, continuations))
    room_for(cfg, n_tokens + longest - 1, 1)
    cache = KVCache(cfg, 1, n_tokens + longest, device, model.decoder.norm.weight.dtype)
    lengths = torch.tensor([n_tokens], device=device)
    ids, images = prompt.ids[None].to(device), prompt.images.to(device)
    first = model.prefill(ids, images, lengths, cache)  # [1, V]
    rows = torch.full((len(continuations), longest), cfg.vlm_pad_token_id, device=device)  # [C, T]
    for c, continuation in enumerate(continuations):
        rows[c, : len(continuation)] = torch.tensor(continuation, device=device)
    logits = first[:, None].expand(len(rows), -1, -1)  # [C, 1, V]
    if longest > 1:
        cache.keep_rows(torch.zeros(len(rows), dtype=torch.long, device=device))
        positions = (n_tokens + torch.arange(longest - 1, device=device)).expand(len(rows), -1)
        x = model.decoder.token_embedding(rows[:, :-1])  # [C, T - 1, D]
        later = model.decoder.logits(model.decoder(x, positions, cache=cache))  # [C, T - 1, V]
        logits = torch.cat((logits, later), dim=1)  # [C, T, V]
    found = logits.float().log_softmax(-1).gather(2, rows[..., None])[..., 0]  # [C, T]
    return [row[: len(c)] for row, c in zip(found.cpu(), continuations, strict=True)]

"""A conversation of several turns, with a prefix cache that is reused across turns.

The cache holds keys and values of all tokens so far. Each turn runs the model only on the tokens
after the longest common prefix. The cache survives `reset`, so the same first images match again.
Not here: the terminal (terminal.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from config_tools import InputError
from configs import VLMConfig
from data.images import normalise
from data.text import START, TURN_SEPARATOR
from data.types import Tokens, Turn
from engine.inference.chat import Chat, Chunk, stream_text, user_turn
from models.inference.generate import Step, steps
from models.inference.kv_cache import KVCache
from models.inference.sampling import Sampling

CACHE_STEP = 256  # the cache grows to a multiple of this many slots


def cache_keys(tokens: Tokens, cfg: VLMConfig) -> np.ndarray:
    """A key per token, [T] int64: its id, or for image tokens a negative hash of the tile."""
    keys = tokens.ids.astype(np.int64)
    digests = [hashlib.blake2b(tile.tobytes(), digest_size=7).digest() for tile in tokens.tiles]
    hashes = np.array([-1 - int.from_bytes(d, "big") for d in digests], dtype=np.int64)
    keys[keys == cfg.vlm_image_token_id] = hashes.repeat(cfg.tokens_per_tile)
    return keys


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two arrays."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


class Conversation:
    """Ask several questions in turn: `for chunk in conversation.ask("What?", ["cat.png"]): ...`

    Each answer is the same as if the whole conversation were run without a cache.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.cache: KVCache | None = None
        self.cached_keys = np.zeros(0, dtype=np.int64)  # keys of the tokens in the cache
        self.reset()

    def reset(self) -> None:
        """Start a new conversation; the cache stays, in case the same images come again."""
        self.turns: list[Turn] = []
        self.images: list[Any] = []
        self.keys: list[np.ndarray] = []  # of each encoded turn
        self.tiles: list[np.ndarray] = []

    def ask(
        self, prompt: str, images: Sequence = (), sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
    ) -> Iterator[Chunk]:  # fmt: skip
        """Yield the answer as chunks; to interrupt it, stop iterating.

        Raises `InputError`; the conversation is then unchanged.
        """
        processor, turn = self.chat.processor, user_turn(prompt, images)
        opening = TURN_SEPARATOR if self.turns else START
        tokens = processor.encode_prompt([turn], images, opening=opening)
        parts = [*self.keys, cache_keys(tokens, processor.cfg)]
        whole, limit = np.concatenate(parts), processor.cfg.lm_max_position_embeddings
        if len(whole) >= limit:
            size = f"{len(whole)} tokens, but the model's context ends at {limit}"
            raise InputError(f"the conversation has {size}; start a new one.")
        tiles, text, has_answer = [*self.tiles, tokens.tiles], "", False
        try:
            for chunk in stream_text(processor, self._run(whole, tiles, sampling), stop):
                text, has_answer = text + chunk.text, True
                yield chunk
        finally:
            if has_answer:  # not if it was interrupted before the first token
                # Before any change, because it raises if the answer spells a special token.
                self.keys = [*parts, processor.encode_answer(text).astype(np.int64)]
                self.turns += [turn, Turn("assistant", text)]
                self.images += images
                self.tiles = tiles

    def _run(self, whole: np.ndarray, tiles: list, sampling: Sampling) -> Iterator[Step]:
        """Run the model on the part of `whole` that is not in the cache, then decode."""
        model, cfg = self.chat.model, self.chat.processor.cfg
        start = min(common_prefix_length(self.cached_keys, whole), len(whole) - 1)
        n_slots = min(len(whole) + sampling.max_new_tokens, cfg.lm_max_position_embeddings)
        if self.cache is None or self.cache.n_slots < n_slots:
            dtype, old = model.decoder.norm.weight.dtype, self.cache
            n_slots = -(-n_slots // CACHE_STEP) * CACHE_STEP
            self.cache = KVCache(cfg, 1, n_slots, model.device, dtype)
            if old is not None:
                self.cache.put(torch.tensor([0], device=model.device), old)
        self.cached_keys = whole[:start]
        n_seen = int((whole[:start] < 0).sum()) // cfg.tokens_per_tile
        new_tiles = np.concatenate(tiles)[n_seen:] if (whole[start:] < 0).any() else tiles[0][:0]
        ids = np.where(whole < 0, cfg.vlm_image_token_id, whole)
        ids = torch.from_numpy(ids)[None].to(model.device)  # [1, T]
        pixels = normalise(new_tiles, cfg).to(model.device)
        unfed = whole[start:]
        for step in steps(model, ids, pixels, None, sampling, self.cache, start):
            self.cached_keys = np.concatenate((self.cached_keys, unfed))
            unfed = step.tokens.cpu().numpy()
            yield step

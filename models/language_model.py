"""The decoder: a Llama-type language model (RMSNorm, RoPE, grouped-query attention, SwiGLU).

Embeddings in, hidden states out; `logits` and `loss` apply the head. Not here: sampling
(models/inference), images (vision_language_model.py).

Letters: B batch, T tokens, S cache slots, D width, H query heads, K key-value heads,
C head dimension, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from configs import LMConfig
from models.ops.activations import swiglu
from models.ops.attention import attention
from models.ops.cast_once import cast_once
from models.ops.init import init_weights
from models.ops.memory import run_blocks, to_device_async
from models.ops.packed import Packing, build_packing, packed_attention
from models.ops.rms_norm import rms_norm
from models.ops.rope import apply_rope, rope_frequencies, rope_tables
from models.ops.token_loss import token_loss
from models.pretrained.mixin import PretrainedMixin

if TYPE_CHECKING:
    from models.inference.kv_cache import KVCache


@dataclass(frozen=True)
class AttentionContext:
    """Inputs that all blocks of one forward pass share. Attention is always causal."""

    cos: Tensor  # [B, T, 1, C]
    sin: Tensor  # [B, T, 1, C]
    packing: Packing | None = None  # restricts attention to one sample of a packed row
    cache: KVCache | None = None
    mask: Tensor | None = None  # [B, 1, T, S], True where a query attends to a cache slot


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LanguageModelGroupedQueryAttention(nn.Module):
    """Causal attention; several query heads share a key-value head (Ainslie et al. 2023)."""

    def __init__(self, cfg: LMConfig, layer_idx: int):
        super().__init__()
        D, C = cfg.lm_hidden_dim, cfg.lm_head_width
        self.head_dim, self.dropout, self.layer_idx = C, cfg.lm_dropout, layer_idx
        # SmolLM3: every n-th block has no position embedding (NoPE).
        self.uses_rope = not cfg.lm_nope_every or (layer_idx + 1) % cfg.lm_nope_every != 0
        self.q_proj = nn.Linear(D, cfg.lm_n_heads * C, bias=cfg.lm_qkv_bias)
        self.k_proj = nn.Linear(D, cfg.lm_n_kv_heads * C, bias=cfg.lm_qkv_bias)
        self.v_proj = nn.Linear(D, cfg.lm_n_kv_heads * C, bias=cfg.lm_qkv_bias)
        self.o_proj = nn.Linear(cfg.lm_n_heads * C, D, bias=False)
        self.q_norm = RMSNorm(C, cfg.lm_rms_eps) if cfg.lm_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(C, cfg.lm_rms_eps) if cfg.lm_qk_norm else nn.Identity()

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        for_q, for_k, for_v = cast_once(x, 3)  # under autocast one copy for all three
        q = self.q_norm(self.q_proj(for_q).unflatten(-1, (-1, self.head_dim)))  # [B, T, H, C]
        k = self.k_norm(self.k_proj(for_k).unflatten(-1, (-1, self.head_dim)))  # [B, T, K, C]
        v = self.v_proj(for_v).unflatten(-1, (-1, self.head_dim))  # [B, T, K, C]
        if self.uses_rope:
            q, k = apply_rope(q, ctx.cos, ctx.sin), apply_rope(k, ctx.cos, ctx.sin)
        dtype = v.dtype  # under autocast norms and RoPE return fp32, projections bf16
        q, k, v = (y.to(dtype).transpose(1, 2) for y in (q, k, v))  # [B, H or K, T, C]
        if ctx.cache is not None:
            k, v = ctx.cache.write(self.layer_idx, k, v)  # [B, K, S, C]
        dropout = self.dropout if self.training else 0.0
        if ctx.packing is not None:
            out = packed_attention(q, k, v, ctx.packing, dropout)  # [B, H, T, C]
        else:
            out = attention(q, k, v, ctx.mask, causal=ctx.mask is None, dropout=dropout)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, T, D]


class LanguageModelMLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, bias=False)
        self.up_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, bias=False)
        self.down_proj = nn.Linear(cfg.lm_inter_dim, cfg.lm_hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for_gate, for_up = cast_once(x, 2)
        return self.down_proj(swiglu(self.gate_proj(for_gate), self.up_proj(for_up)))


class LanguageModelBlock(nn.Module):
    def __init__(self, cfg: LMConfig, layer_idx: int):
        super().__init__()
        self.norm1 = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)
        self.attn = LanguageModelGroupedQueryAttention(cfg, layer_idx)
        self.norm2 = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)
        self.mlp = LanguageModelMLP(cfg)
        self.dropout = nn.Dropout(cfg.lm_dropout) if cfg.lm_dropout else nn.Identity()

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x), ctx))
        return x + self.dropout(self.mlp(self.norm2(x)))


class LanguageModel(PretrainedMixin, nn.Module):
    """`lm(lm.token_embedding(ids))` -> hidden; `lm.logits(hidden)`; `lm.loss(hidden, targets)`."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.cfg: Any = cfg  # a VLMConfig inside a VisionLanguageModel
        self.activation_checkpointing = False
        self.token_embedding = nn.Embedding(cfg.lm_vocab_size, cfg.lm_hidden_dim)
        self.blocks = nn.ModuleList(LanguageModelBlock(cfg, i) for i in range(cfg.lm_n_blocks))
        self.norm = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)
        self.head = nn.Linear(cfg.lm_hidden_dim, cfg.lm_vocab_size, bias=False)
        if cfg.lm_tie_weights:
            self.head.weight = self.token_embedding.weight
        init_weights(self, n_residual=2 * cfg.lm_n_blocks)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Token embeddings [B, T, D] -> hidden states [B, T, D] after the final norm.

        `positions` [B, T] default to 0..T-1. Tokens attend only within equal `segments` [B, T].
        With a `cache`, x continues the cached tokens and fills the slots at `positions`. Raises
        ValueError if x is longer than the context, and for segments together with a cache.
        """
        B, T, _ = x.shape
        if self.cfg.lm_max_position_embeddings < T:
            limit = self.cfg.lm_max_position_embeddings
            raise ValueError(f"{T} tokens exceed lm_max_position_embeddings = {limit}")
        if cache is not None and segments is not None:
            raise ValueError("segments and cache cannot be combined: a cached row is one sample")
        if positions is None:
            positions = torch.arange(T, device=x.device).expand(B, T)  # [B, T]
        ctx = self.attention_context(x, positions, segments, cache)
        checkpointing = self.activation_checkpointing and self.training
        return self.norm(run_blocks(self.blocks, x, ctx, checkpointing=checkpointing))

    def attention_context(
        self, x: Tensor, positions: Tensor, segments: Tensor | None, cache: KVCache | None
    ) -> AttentionContext:
        """Build the context for x [B, T, D]; with a cache, call its `begin_step` first."""
        if cache is not None:
            cache.begin_step(positions)
            cos, sin = cache.rope()
            return AttentionContext(cos, sin, cache=cache, mask=cache.mask)
        cos, sin = rope_tables(rope_frequencies(self.cfg, x.device), positions, x.dtype)
        packing = None if segments is None else build_packing(self.cfg, segments, x)
        return AttentionContext(cos, sin, packing)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.head(hidden)

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of hidden states [B, T, D] where `targets` [B, T] are not -100.

        `mean` divides by the number of these supervised tokens, `sum` does not. Without any, the
        loss is 0, not NaN. Raises ValueError for another reduction or shape. Keep `targets` on the
        CPU, as `Batch.to` does, to avoid a GPU synchronisation.
        """
        if targets.shape != hidden.shape[:-1]:
            expected = list(hidden.shape[:-1])
            raise ValueError(f"targets have shape {list(targets.shape)}; expected {expected}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction = {reduction!r}: must be 'mean' or 'sum'")
        supervised = (targets.flatten() != -100).nonzero()[:, 0]  # [n] indices into B * T
        rows = to_device_async(supervised, hidden.device)
        hidden = hidden.flatten(0, 1).index_select(0, rows)  # [n, D]
        targets = to_device_async(targets.flatten()[supervised], hidden.device)  # [n]
        total = token_loss(hidden, self.head, targets)  # summed cross-entropy, in chunks
        return total / max(1, len(supervised)) if reduction == "mean" else total

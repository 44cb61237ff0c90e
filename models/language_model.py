"""The decoder: a Llama-type language model, and its token loss.

Llama-type: RMSNorm, RoPE, grouped-query attention, SwiGLU.
Embeddings in, hidden states out; the head meets only the positions somebody asks for.
Not here: sampling (models/inference/generate.py), images (models/vision_language_model.py).

Letters: B batch, T tokens, D width, H heads, K key-value heads, C head width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import LMConfig
from models.inference.kv_cache import KVCache
from models.ops.attention import attention
from models.ops.init import init_weights
from models.ops.memory import autocast_dtype, cast_once, run_blocks, to_device_async
from models.ops.packed import plan_packing
from models.ops.rope import apply_rope, rope_frequencies, rope_tables

# Logits that the loss sees together, 128 MiB on a CPU. Each such part is added to the gradient of
# the whole head, which takes a GPU longer than a small part's products.
AT_ONCE = {"cpu": 1 << 25, "cuda": 1 << 27}


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x normalised and scaled, what it was multiplied by [..., 1])."""
    wide = x.float()
    factor = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1]
    return weight * (wide * factor).to(x.dtype), factor


class _RMSNorm(torch.autograd.Function):
    """Its gradient by hand: two products of a matrix and a vector beside four passes.

    Autograd takes a dozen passes, which of a small model is a tenth of a training step.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, factor = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, factor)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, factor = ctx.saved_tensors
        wide, scale = x.float(), weight.float()
        each = (grad * wide).flatten(0, -2)  # [N, D]
        # A compiler goes back in the autocast of the way there, which would round these to bf16. By
        # `mv`, of which it makes sums in a loop with the rest; of `vector @ matrix` it does not.
        with torch.autocast(x.device.type, enabled=False):
            along, to_weight = each.mv(scale), each.t().mv(factor.flatten())  # [N], [D]
        along = along.view_as(factor) * factor**3 / x.shape[-1]  # [..., 1]
        to_x = (grad * scale).mul_(factor).addcmul_(wide, along, value=-1)
        return to_x.to(x.dtype), to_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """Statistics in fp32, cast back, *then* scale: transformers' LlamaRMSNorm rounds so."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.eps)
        if x.dtype == torch.float32:  # of others torch rounds once, after the scale
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _rms_norm(x, self.weight, self.eps)[0]


class LanguageModelGroupedQueryAttention(nn.Module):
    """Causal attention; several query heads share a key-value head (Ainslie et al. 2023)."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        D, C = cfg.lm_hidden_dim, cfg.lm_head_width
        self.n_heads, self.n_kv_heads, self.head_width = cfg.lm_n_heads, cfg.lm_n_kv_heads, C
        self.dropout = cfg.lm_dropout
        self.nope_every = cfg.lm_nope_every
        self.q_proj = nn.Linear(D, cfg.lm_n_heads * C, bias=cfg.lm_qkv_bias)
        self.k_proj = nn.Linear(D, cfg.lm_n_kv_heads * C, bias=cfg.lm_qkv_bias)
        self.v_proj = nn.Linear(D, cfg.lm_n_kv_heads * C, bias=cfg.lm_qkv_bias)
        self.o_proj = nn.Linear(cfg.lm_n_heads * C, D, bias=False)
        self.q_norm = RMSNorm(C, cfg.lm_rms_eps) if cfg.lm_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(C, cfg.lm_rms_eps) if cfg.lm_qk_norm else nn.Identity()

    def forward(self, x: Tensor, ctx: Context, block: int) -> Tensor:
        (B, T), H, K, C = ctx.positions.shape, self.n_heads, self.n_kv_heads, self.head_width
        for_q, for_k, for_v = cast_once(x, 3)
        q = self.q_norm(self.q_proj(for_q).view(B, T, H, C))  # [B, T, H, C]
        k = self.k_norm(self.k_proj(for_k).view(B, T, K, C))  # [B, T, K, C]
        v = self.v_proj(for_v).view(B, T, K, C)  # [B, T, K, C]
        if not self.nope_every or (block + 1) % self.nope_every:
            # Before heads and tokens change places, or a compiler would rotate and then copy.
            q, k = apply_rope(q, *ctx.rope), apply_rope(k, *ctx.rope)
        q, k, v = (y.to(v.dtype).transpose(1, 2) for y in (q, k, v))  # [B, H, T, C], [B, K, T, C]
        if ctx.cache is not None:
            k, v = ctx.cache.write(block, k, v, ctx.positions)  # [B, K, S, C]
        out = attention(
            q,
            k,
            v,
            causal=True,
            plan=ctx.plan,
            visible=ctx.visible,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.o_proj(out.transpose(1, 2).reshape(B * T, H * C))  # [B * T, D]


class _SwiGLU(torch.autograd.Function):
    """`silu(gate) * up`, of which only the two are kept: autograd would keep silu(gate), too."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        # torch 2.11's compiler goes back through what was done in place, unless detached, not by
        # our backward.
        return F.silu(gate).mul_(up).detach()

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class LanguageModelMLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, bias=False)
        self.up_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, bias=False)
        self.down_proj = nn.Linear(cfg.lm_inter_dim, cfg.lm_hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for_gate, for_up = cast_once(x, 2)
        gate, up = self.gate_proj(for_gate), self.up_proj(for_up)  # [B * T, I]
        inner = _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate) * up
        return self.down_proj(inner)


class LanguageModelBlock(nn.Module):
    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.norm1 = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)
        self.attn = LanguageModelGroupedQueryAttention(cfg)
        self.norm2 = RMSNorm(cfg.lm_hidden_dim, cfg.lm_rms_eps)
        self.mlp = LanguageModelMLP(cfg)
        self.dropout = nn.Dropout(cfg.lm_dropout) if cfg.lm_dropout else nn.Identity()

    def forward(self, x: Tensor, ctx: Context, block: int) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x), ctx, block))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Context:
    """What every block of one forward pass shares: rotary tables and who may see whom."""

    def __init__(
        self,
        cfg: LMConfig,
        like: Tensor,
        positions: Tensor,
        segments: Tensor | None,
        cache: KVCache | None,
    ):
        """For hidden states `like` [B, T, D]."""
        self.positions, self.cache = positions, cache
        self.plan = None if segments is None else plan_packing(cfg, segments, like)
        self.visible = None if cache is None else cache.visible(positions)  # [B, 1, T, S]
        if cache is None:
            freq = rope_frequencies(cfg, like.device)
            self.rope = rope_tables(freq, positions, like.dtype)  # two of [B, T, 1, C]
        else:
            self.rope = cache.rope(positions)


class _HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T` [N, V], and its gradients while logits are there.

    So no logits are kept, and none are computed again for the backward pass (Hsu et al. 2024,
    Liger). Of a tied head the embedding's gradient is added to this one, without a third.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, is_learning):
        of_hidden, of_weight = (is_learning and needed for needed in ctx.needs_input_grad[:2])
        at_once = AT_ONCE.get(hidden.device.type, AT_ONCE["cpu"])
        dtype, most = autocast_dtype(hidden), max(1, at_once // len(weight))
        narrow = weight.to(dtype)
        total, to_hidden, to_weight = 0, [], None
        for part, aims in zip(hidden.to(dtype).split(most), targets[:, None].split(most)):
            log_p = F.log_softmax(F.linear(part, narrow).float(), -1)  # [n, V]
            total = total - log_p.gather(1, aims).sum()
            if not of_hidden and not of_weight:
                continue
            grad = log_p.exp_()
            grad = grad.scatter_add_(1, aims, grad.new_full(aims.shape, -1.0)).to(dtype)
            if of_hidden:
                to_hidden.append(grad @ narrow)
            if of_weight:
                own = (grad.t() @ part).to(weight.dtype)  # [V, D]
                to_weight = own if to_weight is None else to_weight.add_(own)
        ctx.found = torch.cat(to_hidden).to(hidden.dtype) if of_hidden else None, to_weight
        return total

    @staticmethod
    def backward(ctx, grad):
        if ctx.found is None:
            raise RuntimeError("the loss of a LanguageModel has one backward pass")
        found, ctx.found = ctx.found, None
        return *(None if x is None else x.mul_(grad) for x in found), None, None


class LanguageModel(nn.Module):
    """`lm(lm.token_embedding(ids))` -> hidden; `lm.logits(hidden)`; `lm.loss(hidden, targets)`."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.cfg, self.activation_checkpointing = cfg, False
        self.token_embedding = nn.Embedding(cfg.lm_vocab_size, cfg.lm_hidden_dim)
        self.blocks = nn.ModuleList(LanguageModelBlock(cfg) for _ in range(cfg.lm_n_blocks))
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
        """Token embeddings [B, T, D] -> hidden states [B, T, D], after the last norm.

        `positions` [B, T] default to 0..T-1. `segments` [B, T] keep packed samples apart. With a
        `cache`, x continues what the cache holds and `positions` name the slots. Raises ValueError
        past the context.
        """
        B, T, _ = x.shape
        if positions is None:
            positions = torch.arange(T, device=x.device).expand(B, T)  # [B, T]
        if cache is not None and segments is not None:
            raise ValueError(
                "segments and a cache exclude each other: generation takes one sample a row"
            )
        if self.cfg.lm_max_position_embeddings < T:
            raise ValueError(
                f"{T} tokens exceed lm_max_position_embeddings = "
                f"{self.cfg.lm_max_position_embeddings}"
            )
        ctx = Context(self.cfg, x, positions, segments, cache)
        blocks = [partial(block, ctx=ctx, block=i) for i, block in enumerate(self.blocks)]
        flat = x.flatten(0, 1)  # [B * T, D], as a product of two dimensions needs fewer views
        wide, again = self.cfg.lm_inter_dim, self.activation_checkpointing
        return self.norm(run_blocks(blocks, flat, wide, self.training, again)).view_as(x)

    @classmethod
    def from_pretrained(cls, cfg: LMConfig) -> LanguageModel:
        """The weights `cfg.lm_model_type` names, a directory or Hub id.

        The sizes are the source's, the vocabulary at least `cfg.lm_vocab_size`; `lm.cfg` says what
        they are. Raises `InputError`.
        """
        from models.pretrained import load

        return load.load_lm(cfg)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a directory that transformers opens as the same kind of decoder."""
        from models.pretrained import save

        save.save_lm(self, directory)

    def push_to_hub(self, repo_id: str, private: bool = True) -> str:
        """Upload what `save_pretrained` writes to user/name; returns its address.

        Raises `InputError`.
        """
        from models.pretrained import hub

        return hub.push_saved(self.save_pretrained, repo_id, private)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.head(hidden)

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy where `targets` [B, T] are not -100; only those positions meet the head.

        `reduction` is "mean" or "sum" as in F.cross_entropy, but without any target the loss is 0,
        not NaN. At most AT_ONCE logits are there at a time. One backward pass: what it needs is
        handed on, not kept. A GPU waits for nothing where `targets` are on the CPU.
        """
        kept = (targets.flatten() != -100).nonzero()[:, 0]
        targets = to_device_async(targets.flatten()[kept], hidden.device)
        hidden = hidden.flatten(0, 1).index_select(0, to_device_async(kept, hidden.device))
        total = _HeadLoss.apply(hidden, self.head.weight, targets, torch.is_grad_enabled())
        return total / max(1, len(kept)) if reduction == "mean" else total

"""Rotary position embedding (Su et al. 2021), in Hugging Face's half-split layout.

Letters: B batch, T tokens, H heads, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from configs import LMConfig


def rope_frequencies(cfg: LMConfig, device: torch.device | None = None) -> Tensor:
    """Angle per position of each pair of channels, [C/2] fp32 (Su et al. 2021).

    `llama3` stretches long wavelengths by the factor, leaves short ones, and blends in between
    (transformers' `_compute_llama3_parameters`); `linear` stretches all.
    """
    exponent = (
        torch.arange(0, cfg.lm_head_width, 2, dtype=torch.float32, device=device)
        / cfg.lm_head_width
    )
    freq = 1.0 / cfg.lm_re_base**exponent  # [C/2]
    if cfg.lm_rope_type == "default":
        return freq
    stretched = freq / cfg.lm_rope_factor
    if cfg.lm_rope_type == "linear":
        return stretched
    turns = (
        cfg.lm_rope_original_max_positions * freq / (2 * torch.pi)
    )  # within the original context
    low, high = cfg.lm_rope_low_freq_factor, cfg.lm_rope_high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * stretched


def rope_tables(freq: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos of every angle, and sin, negated in the first half of the channels: each [B, T, 1, C].

    In fp32, then cast, as transformers does.
    """
    angles = positions[:, :, None, None].float() * freq  # [B, T, 1, C/2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # [B, T, 1, C/2]
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    other = x.roll(x.shape[-1] // 2, -1)  # the second half of the channels, then the first
    # Rounded as transformers rounds: a fused product and sum would be 2e-5 off in a logit.
    return (x * cos).add_(other * sin, alpha=way)


class _Rotate(torch.autograd.Function):
    """Its gradient turns back. By hand, as autograd would negate, join and add whole tensors."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1).detach()  # see _SwiGLU

    @staticmethod
    def backward(ctx, grad):
        return _rotate(grad, *ctx.saved_tensors, -1), None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, T, H, C] in Hugging Face's half-split layout: channel c pairs with c + C/2."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin, 1)

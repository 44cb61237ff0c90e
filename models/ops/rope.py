"""Rotary position embedding (Su et al. 2021), in Hugging Face's half-split layout.

Letters: B batch, T tokens, H heads, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from configs import LMConfig


def rope_frequencies(cfg: LMConfig, device: torch.device | None = None) -> Tensor:
    """Angle per position of each channel pair, [C/2] in fp32.

    `linear` divides every frequency by the factor. `llama3` divides low frequencies, keeps high
    ones and blends in between (transformers' `_compute_llama3_parameters`).
    """
    exponent = torch.arange(0, cfg.lm_head_width, 2, dtype=torch.float32, device=device)
    freq = 1.0 / cfg.lm_re_base ** (exponent / cfg.lm_head_width)  # [C/2]
    if cfg.lm_rope_type == "default":
        return freq
    stretched = freq / cfg.lm_rope_factor
    if cfg.lm_rope_type == "linear":
        return stretched
    n_turns = cfg.lm_rope_original_max_positions * freq / (2 * torch.pi)  # in the original context
    low, high = cfg.lm_rope_low_freq_factor, cfg.lm_rope_high_freq_factor
    keep = ((n_turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * stretched


def rope_tables(freq: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin of every angle at `positions` [B, T], each [B, T, 1, C].

    sin is negated in the first half of the channels. Computed in fp32 and then cast, as in
    transformers.
    """
    angles = positions[:, :, None, None].float() * freq  # [B, T, 1, C/2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # [B, T, 1, C/2]
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # [B, T, 1, C]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, T, H, C] by the tables: channel c pairs with channel c + C/2."""
    x = x.to(cos.dtype)  # under autocast x is bf16; fp32 sums its two gradients before rounding
    other_half = x.roll(x.shape[-1] // 2, dims=-1)  # [B, T, H, C]
    return x * cos + other_half * sin

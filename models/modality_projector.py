"""From patches to image tokens: pixel shuffle (space to depth), then one linear layer.

Letters: N tiles, P patches, G patches per side, F shuffle factor, D width.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from configs import VLMConfig


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """[N, P, D] -> [N, P / F^2, F^2 * D]: each F x F square of patches becomes one token.

    Channels are ordered (row, column, channel) within the square, as in transformers'
    Idefics3Connector. Raises ValueError unless the patches form a square grid that the factor
    divides."""
    N, P, D = x.shape
    grid = math.isqrt(P)
    if grid * grid != P or grid % factor:
        raise ValueError(
            f"{P} patches: expected a square grid whose side is a multiple of the factor {factor}"
        )
    x = x.reshape(N, grid // factor, factor, grid // factor, factor, D)  # [N, G/F, F, G/F, F, D]
    x = x.transpose(2, 3)  # [N, G/F, G/F, F, F, D]
    return x.reshape(N, P // factor**2, factor**2 * D)  # [N, P / F^2, F^2 * D]


class ModalityProjector(nn.Module):
    """Patches [N, P, vit_hidden_dim] -> image tokens [N, tokens_per_tile, lm_hidden_dim]."""

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.factor = cfg.mp_pixel_shuffle_factor
        self.proj = nn.Linear(cfg.vit_hidden_dim * self.factor**2, cfg.lm_hidden_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)  # keeps the variance

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(pixel_shuffle(patches, self.factor))  # [N, P / F^2, lm_hidden_dim]

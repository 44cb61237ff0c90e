"""The projector equals transformers' Idefics3Connector."""

from __future__ import annotations

import pytest
import torch
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from models.modality_projector import ModalityProjector, pixel_shuffle


@pytest.mark.parametrize("grid, factor", [(4, 2), (6, 3), (6, 2), (4, 1), (4, 4)])
@torch.no_grad()
def test_equals_idefics3_connector(grid, factor, small_config):
    cfg = small_config(vit_img_size=4 * grid, max_img_size=4 * grid, mp_pixel_shuffle_factor=factor)
    reference = Idefics3Connector(
        Idefics3Config(
            scale_factor=factor,
            vision_config=dict(hidden_size=cfg.vit_hidden_dim),
            text_config=dict(
                model_type="llama", hidden_size=cfg.lm_hidden_dim, num_attention_heads=4
            ),
        )
    )
    projector = ModalityProjector(cfg)
    projector.proj.load_state_dict(reference.modality_projection.proj.state_dict())
    x = torch.randn(3, grid * grid, cfg.vit_hidden_dim)
    assert projector(x).shape == (3, cfg.tokens_per_tile, cfg.lm_hidden_dim)
    torch.testing.assert_close(projector(x), reference(x), rtol=0, atol=1e-6)


def test_channels_come_in_the_order_row_column_channel():
    """The second token of a 4 x 4 grid holds patches 2, 3, 6 and 7."""
    x = torch.arange(16)[None, :, None] * 10 + torch.arange(2)  # patch p, channel c: 10 p + c
    out = pixel_shuffle(x, 2)
    assert out.shape == (1, 4, 8)
    assert out[0, 1].tolist() == [20, 21, 30, 31, 60, 61, 70, 71]


@pytest.mark.parametrize("n_patches, factor", [(12, 2), (9, 2), (16, 3), (15, 1), (4, 4)])
def test_grids_that_cannot_be_shuffled_raise(n_patches, factor):
    with pytest.raises(ValueError, match=f"{n_patches} patches: .* {factor}"):
        pixel_shuffle(torch.zeros(1, n_patches, 8), factor)


def test_initialisation_keeps_the_variance(small_config, monkeypatch):
    normal = torch.nn.init.normal_
    monkeypatch.setattr(  # NaN first, so that PyTorch's default cannot hide a miss
        torch.nn.init, "normal_", lambda p, **k: normal(torch.nn.init.constant_(p, torch.nan), **k)
    )
    torch.manual_seed(0)
    weight = ModalityProjector(small_config()).proj.weight
    assert weight.isfinite().all()
    assert 0.95 < weight.std() * weight.shape[1] ** 0.5 < 1.05

"""A spot on a tile is painted where that tile lies in its picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from configs import VLMConfig
from data.images import tile
from engine.inference.attention_overlay import (
    attention_overlay,
    merge_tile_maps,
    paint_heatmap,
    split_tiles,
)
from engine.inference.chat import Chat


def test_tiles_lie_as_in_the_picture():
    maps = np.zeros((7, 4, 4))
    maps[4, 1, 3] = 1  # second row, second column of tiles
    whole = merge_tile_maps(maps, 2, 3)
    assert whole.shape == (8, 12) and whole[4 + 1, 4 + 3] == 1 and whole.sum() == 1
    maps[6, 0, 0] = 1  # the global view's top left is the picture's
    glow = merge_tile_maps(maps, 2, 3) - whole
    assert np.unravel_index(glow.argmax(), glow.shape)[0] < 2 and glow[4:, 6:].max() < 1e-6
    assert merge_tile_maps(maps[:1], 0, 0).shape == (4, 4)


def test_each_picture_has_its_own_tiles(small_checkpoint):
    chat = Chat.load(small_checkpoint)
    pictures = [Image.new("RGB", size) for size in ((30, 20), (90, 10), (5, 5))]
    counts = [len(tile(p, chat.processor.cfg)[0]) for p in pictures]
    found = split_tiles(chat, pictures)
    assert [s.stop - s.start for s, _ in found] == counts == [1, 1, 1]
    chat = Chat(chat.model, type(chat.processor)(VLMConfig(max_img_size=96), None))
    found = split_tiles(chat, pictures)
    assert [cut for _, cut in found] == [tile(p, chat.processor.cfg)[1] for p in pictures]
    assert found[-1][0].stop == sum(len(tile(p, chat.processor.cfg)[0]) for p in pictures)


@pytest.mark.parametrize("size", [(40, 30), (700, 1000), (3, 900)])
def test_the_bright_spot_is_where_the_map_says(size):
    heat = np.zeros((6, 8))
    heat[1, 6] = 5.0
    painted = np.asarray(paint_heatmap(Image.new("RGB", size, (120, 120, 120)), heat)).astype(int)
    assert max(painted.shape) == 480
    warm = painted[..., 0] - painted[..., 2]
    y, x = np.unravel_index(warm.argmax(), warm.shape)
    assert abs(y / len(warm) - 1.5 / 6) < 0.1
    assert size[0] < 8 or abs(x / warm.shape[1] - 6.5 / 8) < 0.1
    paint_heatmap(Image.new("RGB", size), np.zeros((2, 2)))  # nothing to see is no error


def test_a_look_is_taken_before_each_token(small_checkpoint):
    """Token t is chosen at the position before it, so cutting later ones off changes nothing."""
    chat = Chat.load(small_checkpoint)
    picture = Image.effect_noise((40, 40), 90).convert("RGB")
    tokens = chat.encode_prompt("What is it?", [picture])
    said = [p.token for p in chat.stream_chunks(tokens) if p.token is not None][:5]
    whole, part = attention_overlay(chat, tokens, said), attention_overlay(chat, tokens, said[:2])
    assert whole.maps.shape == (5, 1, 2, 2) and (whole.on_images > 0).all()
    np.testing.assert_allclose(whole.maps[:2], part.maps, atol=1e-5)
    assert whole.maps.sum((1, 2, 3)) == pytest.approx(whole.on_images)

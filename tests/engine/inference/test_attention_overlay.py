"""Attention on a tile appears at that tile's place in its image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from configs import VLMConfig
from data.images import tile
from engine.figures.sheet import GAP, SIDE
from engine.inference.attention_overlay import (
    attention_overlay,
    draw_overlays,
    merge_tile_maps,
    paint_heatmap,
    split_tiles,
)
from engine.inference.chat import Chat


def test_tiles_are_placed_as_in_the_image():
    maps = np.zeros((7, 4, 4))
    maps[4, 1, 3] = 1  # second row, second column of tiles
    whole = merge_tile_maps(maps, 2, 3)
    assert whole.shape == (8, 12) and whole[4 + 1, 4 + 3] == 1 and whole.sum() == 1
    maps[6, 0, 0] = 1  # the top left of the global view is that of the image
    glow = merge_tile_maps(maps, 2, 3) - whole
    assert np.unravel_index(glow.argmax(), glow.shape)[0] < 2 and glow[4:, 6:].max() < 1e-6
    assert merge_tile_maps(maps[:1], 0, 0).shape == (4, 4)


def test_each_image_has_its_own_tiles(small_checkpoint):
    chat = Chat.load(small_checkpoint)
    images = [Image.new("RGB", size) for size in ((30, 20), (90, 10), (5, 5))]
    counts = [len(tile(p, chat.processor.cfg)[0]) for p in images]
    found = split_tiles(chat, images)
    assert [s.stop - s.start for s, _ in found] == counts == [1, 1, 1]
    chat = Chat(chat.model, type(chat.processor)(VLMConfig(max_img_size=96), None))
    found = split_tiles(chat, images)
    assert [cut for _, cut in found] == [tile(p, chat.processor.cfg)[1] for p in images]
    assert found[-1][0].stop == sum(len(tile(p, chat.processor.cfg)[0]) for p in images)


@pytest.mark.parametrize("size", [(40, 30), (700, 1000), (3, 900)])
def test_the_bright_spot_is_where_the_map_says(size):
    heat = np.zeros((6, 8))
    heat[1, 6] = 5.0
    painted = np.asarray(paint_heatmap(Image.new("RGB", size, (120, 120, 120)), heat)).astype(int)
    assert max(painted.shape) == 480
    colored = np.ptp(painted, axis=-1)  # 0 where it is gray
    y, x = np.unravel_index(colored.argmax(), colored.shape)
    assert abs(y / len(colored) - 1.5 / 6) < 0.1
    assert size[0] < 8 or abs(x / colored.shape[1] - 6.5 / 8) < 0.1
    paint_heatmap(Image.new("RGB", size), np.zeros((2, 2)))  # a constant map is no error


def test_attention_is_that_of_the_position_before_each_token(small_checkpoint):
    """Token t is predicted at the position before it, so later tokens change nothing."""
    chat = Chat.load(small_checkpoint)
    image = Image.effect_noise((40, 40), 90).convert("RGB")
    tokens = chat.encode_prompt("What is it?", [image])
    answer = [p.token for p in chat.stream_chunks(tokens) if p.token is not None][:5]
    whole, part = (
        attention_overlay(chat, tokens, answer),
        attention_overlay(chat, tokens, answer[:2]),
    )
    assert whole.maps.shape == (5, 1, 2, 2) and (whole.on_images > 0).all()
    np.testing.assert_allclose(whole.maps[:2], part.maps, atol=1e-5)
    assert whole.maps.sum((1, 2, 3)) == pytest.approx(whole.on_images)


def test_a_sheet_has_the_image_and_an_overlay_per_token(small_checkpoint):
    chat = Chat.load(small_checkpoint)
    image = Image.new("RGB", (40, 40), (10, 200, 30))
    prompt = chat.encode_prompt("What is it?", [image])
    answer = chat.processor.tokenizer.encode("no red", add_special_tokens=False).ids
    plain = draw_overlays(chat, prompt, answer, [image], "folder/cat.png")
    assert plain.width == (1 + len(answer)) * (SIDE + GAP) + GAP
    assert plain.height > SIDE + 100, "title, tokens and color scales"
    titled = draw_overlays(chat, prompt, answer, [image], "cat.png", "What is it?")
    assert titled.width == plain.width and titled.height > plain.height
    assert (10, 200, 30) in {color for _, color in titled.getcolors(1 << 20)}

"""Colors of a heatmap follow its values, and the color scale shows the same colors."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from engine.figures.heatmaps import VIRIDIS, color_scale, colorize, overlay, percent, to_unit


def test_the_minimum_is_dark_and_the_maximum_bright():
    colors = colorize(np.array([[0, 0.5, 1]]))
    np.testing.assert_allclose(colors[0], VIRIDIS[[0, 2, 4]])
    assert to_unit(np.array([[3.0, 5.0, 7.0]])).tolist() == [[0, 0.5, 1]]
    assert to_unit(np.full((2, 2), 3.0)).max() == 0


def test_an_overlay_leaves_the_image_visible_at_the_minimum():
    values = np.zeros((4, 4))
    values[0, 3] = 1
    pixels = np.asarray(overlay(Image.new("RGB", (80, 40), "white"), values)).astype(int)
    assert pixels.shape == (40, 80, 3)
    assert np.ptp(pixels[-5, 5]) == 0, "gray"
    assert pixels[3, -3, 0] - pixels[3, -3, 2] > 150, "yellow"


@pytest.mark.parametrize("is_overlay", [True, False])
def test_a_color_scale_goes_from_the_minimum_to_the_maximum(is_overlay):
    scale = np.asarray(color_scale(0.001, 0.2, 240, is_overlay)).astype(int)
    assert scale.shape[1] == 240 and (scale[-1] == 255).all(), "texts are not cut off"
    np.testing.assert_allclose(scale[0, -1], VIRIDIS[-1], atol=40)
    assert (scale[0, 0] != scale[0, -1]).any() and (scale[15:] < 255).any()


def test_percentages_have_two_digits():
    shares = (0, 0.0000012, 0.00042, 0.0123, 0.097, 0.12, 1)
    assert [percent(share) for share in shares] == [
        "0 %", "0.0001 %", "0.042 %", "1.2 %", "9.7 %", "12 %", "100 %"
    ]  # fmt: skip

"""What tests of pictures share: noise to look at, a processor that cuts it into tiles."""

import numpy as np
import pytest
from PIL import Image

from configs import VLMConfig
from data import processor as processors


@pytest.fixture(scope="session")
def noise():
    """`noise(width, height, seed=0)`: a picture of random pixels."""

    def noise(width: int, height: int, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return noise


@pytest.fixture(scope="session")
def tiled() -> processors.Processor:
    """Of pictures up to 4 x 4 tiles of 16 pixels, 4 tokens each."""
    sizes = dict(vit_img_size=16, vit_patch_size=4, max_img_size=64)
    return processors.build(VLMConfig(**sizes, lm_n_blocks=1, vit_n_blocks=1))

"""Fixtures: noise images, a processor with tiles, and answers decoded from batches."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from PIL import Image

from configs import VLMConfig
from data import processor as processors
from data.types import Batch


@pytest.fixture(scope="session")
def noise():
    """`noise(width, height, seed=0)`: an image of random pixels."""

    def noise(width: int, height: int, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return noise


@pytest.fixture(scope="session")
def tiled() -> processors.Processor:
    """A processor for images of up to 4 x 4 tiles of 16 pixels, 4 tokens each."""
    sizes = dict(vit_img_size=16, vit_patch_size=4, max_img_size=64)
    return processors.build(VLMConfig(**sizes, lm_n_blocks=1, vit_n_blocks=1))


@pytest.fixture(scope="session")
def numbers(tiny_processor) -> Callable[[Iterable[Batch]], list[int]]:
    """`numbers(batches)`: the number in the answer of each sample, decoded from the targets."""

    def numbers(batches: Iterable[Batch]) -> list[int]:
        found = []
        for row in (row for batch in batches for row in batch.targets.tolist()):
            ids = [token for token in row if token >= 0]
            text = tiny_processor.tokenizer.decode(ids, skip_special_tokens=False)
            found += [int(s.split()[-1]) for s in text.split("<end_of_utterance>") if s]
        return found

    return numbers

"""Augmentations follow their papers; equal generator states give equal images."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from configs_classify import ClassifyDataConfig
from data.classification.transforms import (
    OPERATIONS,
    augment,
    cutmix,
    mixup,
    mixup_or_cutmix,
    random_erasing,
    random_resized_crop,
    smooth_labels,
)


def gradient(size: tuple[int, int] = (40, 24), mode: str = "RGB") -> Image.Image:
    """Red increases to the right, green downwards: every position has a different colour."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack((x, y, 0 * x + 90), -1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_without_augmentation_an_image_is_only_resized():
    cfg = ClassifyDataConfig()
    found = augment(gradient(), 16, cfg, random.Random(0))
    wanted = np.asarray(gradient().resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(found, wanted)


def test_crops_have_the_configured_area_and_ratio():
    rng, areas, ratios, whole = random.Random(0), [], [], gradient((400, 400))
    for _ in range(200):
        out = np.asarray(random_resized_crop(whole, 64, 0.25, 4 / 3, rng)).astype(float)
        width, height = np.ptp(out[..., 0]) / 255, np.ptp(out[..., 1]) / 255
        areas.append(width * height)
        ratios.append(width / height)
    assert 0.2 < min(areas) < 0.3 and 0.9 < max(areas) <= 1.0
    assert 0.7 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.4
    assert 0.56 < np.mean(areas) < 0.65  # uniform in 0.25..1


def test_horizontal_flip_probability():
    cfg, plain = (
        ClassifyDataConfig(horizontal_flip=0.3),
        augment(gradient(), 16, ClassifyDataConfig(), random.Random(0)),
    )
    flips = 0
    for seed in range(300):
        found = augment(gradient(), 16, cfg, random.Random(seed))
        flips += np.array_equal(found, plain[:, ::-1])
        assert np.array_equal(found, plain) or np.array_equal(found, plain[:, ::-1])
    assert 60 < flips < 120  # 90 +- four standard deviations


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_change_more_with_higher_magnitude(name, mode):
    grain = np.random.default_rng(0).integers(0, 80, (32, 32, 3))  # texture for sharpness
    pixels = np.asarray(gradient((32, 32))) // 2 + grain
    image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
    before = np.asarray(image).astype(float)
    found = {
        s: np.mean([abs(np.asarray(OPERATIONS[name](image, s, random.Random(i))) - before).mean()
                    for i in range(8)])
        for s in (0.0, 0.3, 1.0)
    }  # fmt: skip
    if name in ("autocontrast", "equalize", "identity"):  # have no magnitude
        assert found[0.0] == found[1.0]
    elif (name, mode) == ("color", "L"):
        assert found[1.0] == 0.0
    else:
        assert found[0.0] <= 1.0 and found[0.0] <= found[0.3] < found[1.0]


def test_directions_of_translation_and_rotation():
    class Plus(random.Random):
        def random(self):
            return 0.0

    image = Image.new("L", (40, 40))
    image.putpixel((20, 20), 255)
    moved = np.asarray(OPERATIONS["translate_x"](image, 1.0, Plus()))
    assert np.unravel_index(moved.argmax(), moved.shape) == (20, 8)  # by 0.3 of the width
    corner = gradient((40, 40)).rotate(30, Image.Resampling.BILINEAR)
    turned = OPERATIONS["rotate"](gradient((40, 40)), 1.0, Plus())
    assert np.array_equal(np.asarray(turned), np.asarray(corner))


def test_random_erasing_changes_one_rectangle():
    rng, shares = random.Random(1), []
    pixels = np.full((50, 50, 3), 7, np.uint8)
    for _ in range(200):
        out = random_erasing(pixels, rng)
        gone = (out != 7).any(-1)
        rows, columns = np.where(gone)
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert gone.sum() == box  # one rectangle; no noise pixel equals the original here
        shares.append(box / 2500)
    assert (pixels == 7).all() and min(shares) < 0.06 and 0.25 < max(shares) < 0.4
    assert random_erasing(pixels[..., 0], rng).shape == (50, 50)


def test_label_smoothing():
    found = smooth_labels(torch.tensor([2, 0]), 4, 0.2)
    wanted = torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    torch.testing.assert_close(found, wanted)
    logits = torch.randn(2, 4)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0]), label_smoothing=0.2)
    found_loss = torch.nn.functional.cross_entropy(logits, found)
    torch.testing.assert_close(found_loss, expected)


def test_mixup_and_cutmix_mix_targets_like_pixels():
    """Images are uniform, so that the mean of a mixed one gives its proportions."""
    values = torch.tensor([0.0, 1.0, 2.0, 3.0])
    images = values.view(4, 1, 1, 1).expand(4, 2, 12, 8).clone()
    targets = torch.eye(4)
    for seed in range(50):
        for cfg in (ClassifyDataConfig(mixup=1.0), ClassifyDataConfig(cutmix=1.0)):
            mixed, soft = mixup_or_cutmix(images, targets, cfg, random.Random(seed))
            torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ values, rtol=0, atol=1e-5)
            torch.testing.assert_close(soft.sum(1), torch.ones(4))
    assert torch.equal(images[:, 0, 0, 0], values)
    mixed, share = mixup(images, 0.75, random.Random(0))
    assert share == 0.75 and mixed[0].unique().item() == pytest.approx(0.25 * 3)
    mixed, share = cutmix(images, 0.75, random.Random(0))
    assert set(mixed[0].unique().tolist()) == {0.0, 3.0} and share == 1 - 6 * 4 / 96
    same, soft = mixup_or_cutmix(images, targets, ClassifyDataConfig(), random.Random(0))
    assert same is images and soft is targets


def test_mixup_and_cutmix_are_both_used():
    images, targets = torch.rand(4, 1, 8, 8), torch.eye(4)
    cfg, kinds = ClassifyDataConfig(mixup=1.0, cutmix=1.0), set()
    for seed in range(30):
        mixed, _ = mixup_or_cutmix(images, targets, cfg, random.Random(seed))
        from_one = (mixed == images) | (mixed == images.flip(0))
        kinds.add("cutmix" if from_one.all() else "mixup")
    assert kinds == {"cutmix", "mixup"}


def test_equal_generator_states_give_equal_images():
    cfg = ClassifyDataConfig(
        crop_min_scale=0.3, horizontal_flip=0.5, randaugment=3, random_erasing=0.5
    )
    views = [augment(gradient(), 16, cfg, random.Random(s)).tobytes() for s in (1, 1, 2)]
    assert views[0] == views[1] != views[2]

"""Rollout sheets and contact sheets name every image and keep every score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config_tools import InputError
from configs import ViTConfig
from engine.figures.sheet import GAP, LINE, SIDE
from engine.vit import figures
from models.vision_transformer import ViT


@pytest.fixture
def files(tmp_path) -> list[str]:
    paths = [tmp_path / "a rather long folder name" / f"{i}.png" for i in range(9)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        Image.new("RGB", (30, 20 + i), (20 * i, 90, 40)).save(path)
    return list(map(str, paths))


def test_a_heatmap_is_bright_at_its_maximum():
    values = np.zeros((4, 4))
    values[0, 3] = 1
    pixels = np.asarray(figures.heatmap(values)).astype(int)
    assert pixels[20, -20].sum() > pixels[-20, 20].sum() + 200


def test_a_caption_keeps_its_score_and_the_file_name(files):
    cell = figures.file_cell(files[0], f"0.987 {files[0]}")
    name, score = (text.lines(SIDE) for text in cell.texts)
    assert name == ["…/0.png"] and score == ["0.987"]
    assert [text.text for text in figures.file_cell(files[0], "query").texts] == [files[0], "query"]
    assert figures.file_cell(files[0], files[0]).texts[1].text == ""


def test_a_long_line_continues_in_another_row(files, tmp_path):
    figures.draw_files([[(name, name) for name in files]], tmp_path / "sheet.png")
    size = Image.open(tmp_path / "sheet.png").size
    assert size == (6 * (SIDE + GAP) + GAP, GAP + 2 * (SIDE + 8 + 2 * LINE + GAP))
    with pytest.raises(InputError, match=r"x\.nothing: cannot be written"):
        figures.draw_files([[(files[0], "")]], tmp_path / "x.nothing")


def test_a_rollout_sheet_has_three_images_per_input(tmp_path):
    torch.manual_seed(0)
    vit = ViT(ViTConfig(vit_img_size=32, vit_patch_size=8)).eval()
    images = [Image.effect_noise((40, 40), 90).convert("RGB") for _ in range(3)]
    heights = []
    for names in ((), ("a.png", "b.png", "c.png")):
        figures.draw_rollout(vit, images, Path(tmp_path / "rollout.png"), names)
        sheet = Image.open(tmp_path / "rollout.png")
        assert sheet.width == 6 * (SIDE + GAP) + GAP
        heights.append(sheet.height)
    assert heights[0] == heights[1] > 2 * SIDE

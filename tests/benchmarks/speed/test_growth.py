"""Packed attention costs the sum of squared lengths; axes, counts and exponents are right."""

from __future__ import annotations

import pytest

from benchmarks.speed import growth, timing
from benchmarks.speed.growth import AXES, Axis, Point, exponent, make_conversation, measure
from benchmarks.speed.timing import count_flops
from config_tools import InputError
from data.batches.packing import collate
from models.vision_language_model import VisionLanguageModel


@pytest.fixture
def attention(minute_config):
    """`attention([[3, 5], [8]])` -> the decoder's attention FLOPs of a step on rows of lengths."""
    cfg = minute_config()
    model = VisionLanguageModel(cfg)

    def of(rows: list[list[int]]) -> int:
        samples = [[make_conversation(cfg, n) for n in row] for row in rows]
        total = count_flops(growth.step_of(model, collate(samples, cfg)))[1]
        images = collate(samples, cfg).images
        vision = count_flops(lambda: model.embed_images(images).sum().backward())[1]
        return total - vision

    return of


def test_packed_attention_costs_the_sum_of_squares(attention):
    cost = attention([[16]]) / 16**2
    assert cost > 0
    for row in ([16] * 8, [32] * 4, [64, 64], [64, 16, 16], [128]):
        assert attention([row]) == cost * sum(n * n for n in row), row
    # Lengths within a factor of two are padded into one call: less than twice the squares.
    uneven = [64, 50, 40, 32, 20, 16]
    squares = sum(n * n for n in uneven)
    assert cost * squares <= attention([uneven]) < 2 * cost * squares < cost * sum(uneven) ** 2
    assert attention([[16] * 4, [16] * 4]) == attention([[16] * 8])


def test_exponents(monkeypatch, minute_config):
    squares = [Point(x, 3.0 * x * x, x, 7) for x in (1, 2, 4, 8)]
    assert exponent(squares, "seconds") == pytest.approx(2)
    assert exponent(squares, "saved") == pytest.approx(1)
    assert exponent(squares, "attention") == pytest.approx(0)
    monkeypatch.setattr(growth, "BASE", minute_config())
    monkeypatch.setattr(growth, "PACKED_LENGTH", 16)
    points = measure(Axis(4, 3, growth.packed), 60)
    assert [p.x for p in points] == [4, 8, 16]
    assert exponent(points, "saved") == pytest.approx(1, abs=0.1)
    assert exponent(points, "attention") == pytest.approx(1, abs=0.01)
    assert len(measure(Axis(2, 3, growth.packed), 0)) == 1
    assert "| exponent |" in growth.table({"a": points})


@pytest.mark.parametrize("name", AXES)
def test_the_first_point_of_every_axis(name):
    axis = AXES[name]
    model, batch = axis.build(axis.first)
    cfg = model.cfg
    assert batch.n_targets > 0 and len(batch.images) > 0
    assert int((batch.input_ids == cfg.vlm_image_token_id).sum()) == (
        len(batch.images) * cfg.tokens_per_tile
    )


def test_a_page_without_the_block_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "AXES", {})
    monkeypatch.setattr(timing, "PAGE", tmp_path / "page.md")
    with pytest.raises(InputError, match="expected <!-- growth -->"):
        growth.main([])

"""Out of the box: what is timed of either side, and that both can be timed at all."""

from __future__ import annotations

import pytest
import torch

from benchmarks import out_of_the_box
from benchmarks.timing import PAGE, Watched
from configs import parse_run
from models.vision_language_model import VisionLanguageModel


def test_the_first_step_is_left_out(monkeypatch):
    log = [{"images_per_s": rate, "mfu": rate / 10} for rate in (1.0, 4.0, 2.0)]
    asked = []
    monkeypatch.setattr(
        out_of_the_box, "watch_run", lambda *args: asked.append(args) or Watched(0, 0, 0, log)
    )
    seconds, share = out_of_the_box.ours(["tiny"], 3)
    assert (seconds, share) == (pytest.approx((0.25 + 0.5) / 2), pytest.approx(0.3))
    assert asked == [(["tiny"], 3)]


def test_their_loop_learns_what_is_timed(tmp_path, monkeypatch):
    run = parse_run(["tiny", "--data.workers=0"])
    torch.manual_seed(0)
    VisionLanguageModel(run.model).save_pretrained(tmp_path)
    kept, seen = [], []
    their_model = out_of_the_box.their_model

    def watched(*args):
        model = their_model(*args)
        model.register_forward_hook(lambda _m, _in, out: seen.append(out.loss.item()))
        kept.append(model)
        return model

    monkeypatch.setattr(out_of_the_box, "their_model", watched)
    monkeypatch.setattr(out_of_the_box, "fast_dtype", lambda *_: torch.float32)
    ticks = iter((0.0, 1.0, 7.0))
    monkeypatch.setattr(out_of_the_box.time, "perf_counter", lambda: next(ticks))
    assert out_of_the_box.theirs(run, tmp_path, rows=2, steps=4) == (7 - 1) / 3 / 2
    first = VisionLanguageModel.from_pretrained(tmp_path).decoder.token_embedding.weight
    assert len(seen) == 4 and seen[-1] < seen[0]
    assert not torch.equal(kept[0].get_input_embeddings().weight, first)


def test_shares_are_of_the_same_work(monkeypatch):
    """Three turns: ours takes 1, 2, 3 s at a half of the peak, theirs twice as long."""
    turns = iter((1.0, 2.0, 3.0))
    monkeypatch.setattr(out_of_the_box, "ours", lambda *_: (next(turns), 0.5))
    said = iter(("2.0", "4.0", "6.0"))
    monkeypatch.setattr(out_of_the_box, "in_child", lambda _argv: next(said))
    row = out_of_the_box.measure(["tiny"], turns=3, steps=2, rows=4)
    assert row.cells[1:5] == ("2.00 s", "4.00 s", "2.00 (2.00 - 2.00)", "50%, 25%")


@pytest.mark.slow
def test_both_sides_beside_each_other():
    assert "<!-- out of the box -->" in PAGE.read_text()
    argv = ["tiny", "--data.batch-size=1", "--data.workers=0"]
    row = out_of_the_box.measure(argv, turns=1, steps=2, rows=4)
    assert 0 < row.ratio[0] < 100

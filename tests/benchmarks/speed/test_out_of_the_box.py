"""Out of the box: both sides run, and only the intended part of each is timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.speed import out_of_the_box, peers, timing
from cli import parse_run
from models.vision_language_model import VisionLanguageModel


def test_the_first_step_and_evaluations_are_left_out(monkeypatch):
    log = [{"loss": 7.0, "images_per_s": rate} for rate in (1.0, 4.0, 2.0)]
    log.insert(2, {"val_loss": 6.5})
    calls = []
    run = lambda *args: calls.append(args) or timing.TrainingRun(0, 0, 0, log)  # noqa: E731
    monkeypatch.setattr(timing, "run_training", run)
    assert out_of_the_box.picovlm_seconds(["tiny"], 3) == (0.25 + 0.5) / 2
    assert calls == [(["tiny"], 3)]


def test_the_timed_transformers_loop_trains(tmp_path, monkeypatch):
    run = parse_run(["tiny", "--data.workers=0"])
    torch.manual_seed(0)
    VisionLanguageModel(run.model).save_pretrained(tmp_path)
    model = peers.load_hf_model(tmp_path, torch.float32)
    monkeypatch.setattr(peers, "load_hf_model", lambda *_: model)
    monkeypatch.setattr(out_of_the_box, "choose_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(out_of_the_box, "N_ROWS", 2)
    ends = iter((1.0, 2.0, 5.0, 7.0))
    clock = SimpleNamespace(perf_counter=lambda: next(ends))
    monkeypatch.setattr(out_of_the_box, "time", clock)
    assert out_of_the_box.transformers_seconds(run, tmp_path, steps=4) == (7 - 1) / 3 / 2
    first = VisionLanguageModel.from_pretrained(tmp_path).decoder.token_embedding.weight
    last = model.get_input_embeddings().weight
    assert last is model.lm_head.weight and not torch.equal(last, first)


@pytest.mark.slow
def test_both_sides_are_measured():
    row = out_of_the_box.measure("tiny", turns=1)
    assert 0 < row.ratio[0] < 100 and row.picovlm.endswith("ms")

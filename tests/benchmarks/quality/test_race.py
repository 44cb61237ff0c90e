"""The race: both sides start from the same weights and data; only training time counts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.quality import race
from benchmarks.speed.peers import hf_inputs, load_hf_model
from configs import RunConfig
from models.vision_language_model import VisionLanguageModel


@pytest.fixture
def a_race(minute_config, tiny_processor, tmp_path, monkeypatch) -> race.Race:
    monkeypatch.setattr(race, "HF_BATCH_SIZE", 2)
    monkeypatch.setattr(race, "HF_RATE", 0.002)
    cfg = minute_config()
    torch.manual_seed(0)
    VisionLanguageModel(cfg).save_pretrained(tmp_path / "first")
    run = RunConfig(model=cfg)
    run = replace(run, data=replace(run.data, batch_size=1, max_length=128))
    return race.Race(run, tmp_path / "first", replace(tiny_processor, cfg=cfg), 9)


def test_both_sides_train_and_use_the_same_evaluation(a_race, monkeypatch):
    evaluated = []
    evaluate = race.evaluate
    monkeypatch.setattr(race, "evaluate", lambda m, *a: evaluated.append(m) or evaluate(m, *a))
    curves = {side: train(a_race, 2, 1, torch.float32) for side, train in race.SIDES.items()}
    for points in curves.values():
        assert [p.step for p in points] == [1, 2]
        assert 0 < points[0].seconds < points[1].seconds
        assert points[0].loss != points[1].loss and 0 <= points[1].accuracy <= 1
    assert len(evaluated) == 4 and all(type(m) is VisionLanguageModel for m in evaluated)


def test_both_models_give_the_same_loss(a_race):
    batch = next(iter(a_race.loader(packing=False, batch_size=3)))
    model = VisionLanguageModel.from_pretrained(a_race.folder)
    hf_model = load_hf_model(a_race.folder, torch.float32)
    with torch.no_grad():
        loss = model(**batch.tensors())[1]
        found = hf_model(**hf_inputs(batch, a_race.run.model.vlm_pad_token_id)).loss
        again = race.to_picovlm(hf_model)(**batch.tensors())[1]
    torch.testing.assert_close(loss, found, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, again, rtol=1e-6, atol=0)


def test_evaluations_are_not_counted(a_race, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(race, "clock", lambda: next(now))
    monkeypatch.setattr(race, "evaluate", lambda *_: {"val_loss": 1.0, "val_accuracy": 0.5})
    watch = race.Stopwatch(a_race)  # at 0, then 1 and 2 around the first evaluation, 3 and 4
    watch.evaluate(None, 1), watch.evaluate(None, 2)
    assert [p.seconds for p in watch.points] == [1, 2]


def test_table_and_chart(tmp_path):
    point = race.Point
    curves = {"picoVLM": [point(30, 10, 2, 0.3), point(60, 20, 1, 0.5)],
              "transformers": [point(600, 90, 1.5, 0.4)]}  # fmt: skip
    assert race.table(curves).endswith("reaches 40.0% in 600 s; picoVLM after 60 s.")
    curves["transformers"] = [point(600, 90, 1.5, 0.6)]
    assert race.table(curves).endswith("picoVLM does not.")
    pytest.importorskip("matplotlib")
    race.draw(curves, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_steps_fill_the_time(a_race, monkeypatch, capsys):
    """picoVLM uses the dtype train.py would choose, transformers the faster one."""
    calls = {"picoVLM": [], "transformers": []}

    def train(side, race_, steps, every, dtype):
        calls[side].append((steps, every, race_.n_questions, dtype))
        steps_at = range(every, steps + 1, every)
        per_step = {torch.float32: 0.5, torch.bfloat16: 1}[dtype]
        return [race.Point(5 + per_step * n, n, 1, 0.5) for n in steps_at]  # 5 s warm-up

    monkeypatch.setattr(race, "SIDES", {side: partial(train, side) for side in calls})
    monkeypatch.setattr(race, "choose_dtype", lambda *_: torch.bfloat16)
    race.measure(a_race, {"picoVLM": 60, "transformers": 200}, 10)
    slow, fast = torch.bfloat16, torch.float32
    assert calls["picoVLM"] == [(40, 20, 1, slow), (60, 10, 9, slow)]
    assert set(calls["transformers"][:2]) == {(40, 20, 1, slow), (40, 20, 1, fast)}
    assert calls["transformers"][2:] == [(400, 20, 9, fast)]
    assert "transformers: 500.0 ms a step in torch.float32, so 400" in capsys.readouterr().out

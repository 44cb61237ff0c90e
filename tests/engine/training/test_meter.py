"""FLOPs, rates and gradient norms in the log are correct."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from config_tools import read_json
from engine.training.distributed import Dist, autocast
from engine.training.meter import Meter, gradient_norms, measure_peak_flops, training_flops
from train import main

CPU = torch.device("cpu")


@pytest.mark.parametrize("frozen", [(), ("vision",)])
def test_training_flops_match_torch_flop_counter(small_model, make_sample, frozen):
    """Approximately: `training_flops` omits attention scores and the head.

    Only the encoder is frozen: through other frozen parts, torch also counts the gradient of the
    inputs.
    """
    model = small_model().train()
    for name in frozen:
        model.parts[name].requires_grad_(False)
    ids, images = make_sample(model.cfg, 3, 30, 0)
    with FlopCounterMode(display=False) as counter:
        _, loss = model(ids[None], images, targets=ids[None], reduction="sum")
        loss.backward()
    assert training_flops(model, len(ids), len(images)) == pytest.approx(
        counter.get_total_flops(), rel=0.15
    )


def test_norms_of_parts_add_up_to_the_total_norm(small_model, make_sample):
    model = small_model().train()
    ids, images = make_sample(model.cfg, 1, 9, 0)
    model.parts["vision"].requires_grad_(False)
    _, loss = model(ids[None], images, targets=ids[None])
    loss.backward()
    norms = gradient_norms(model.parts)
    assert set(norms) == {"grad_norm_projector", "grad_norm_language"}, "frozen parts have no norm"
    whole = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    assert sum(n**2 for n in norms.values()) ** 0.5 == pytest.approx(whole, rel=1e-5)
    assert all(p.grad is None for p in model.vision_encoder.parameters())


def test_rates_cover_the_time_since_the_last_call(small_model, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr("engine.training.meter.measure_peak_flops", lambda device, dtype: 1e9)
    model = small_model()
    meter = Meter(model, autocast(CPU, torch.float32))
    with meter.waiting_for_data():
        clock[0] += 1
    clock[0] += 3
    meter.tokens, meter.images = 80, 5
    rates = meter.rates(Dist(0, 1, CPU))
    assert (rates["tokens_per_s"], rates["images_per_s"]) == (20, 1.25)
    assert rates["data_wait"] == 0.25
    assert rates["mfu"] == round(training_flops(model, 80, 5) / 4 / 1e9, 4) > 0
    clock[0] += 1
    assert meter.rates(Dist(0, 1, CPU))["tokens_per_s"] == 0


def test_measured_peak_flops_are_plausible():
    peak = measure_peak_flops(CPU, torch.float32, 256)
    assert 1e8 < peak < 1e13


def test_a_run_logs_norms_rates_answers_and_an_answer_sheet(run_file):
    config = run_file("run", data={"val_fraction": 0.3}, steps=4, log_every=2, eval_every=2,
                      eval_samples=3, freeze=("vision",), answer_sheet_every=2)  # fmt: skip
    main([str(config)])
    run = Path(read_json(config)["train"]["out"])
    lines = list(map(json.loads, (run / "log.jsonl").read_text().splitlines()))
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4]
    for line in steps:
        assert line["grad_norm_language"] > 0 and "grad_norm_vision" not in line
        assert line["lr_language"] == pytest.approx(0.0015 * line["lr_factor"])
        assert "lr_vision" not in line and 0 < line["mfu"] < 1
        parts = line["grad_norm_language"] ** 2 + line["grad_norm_projector"] ** 2
        assert parts**0.5 == pytest.approx(line["grad_norm"], rel=1e-4)
    evaluated = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert len(evaluated[0]["val_answers"]) == 3
    assert sorted(p.name for p in run.glob("answers-*.png")) == ["answers-000004.png"]

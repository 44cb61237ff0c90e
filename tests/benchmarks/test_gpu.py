"""The GPU's script, on a CPU with a model so small that its figures mean nothing."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import gpu, timing
from configs import PRESETS, RunConfig


@pytest.fixture
def small(monkeypatch, minute_config) -> RunConfig:
    monkeypatch.setattr(timing, "PRODUCT", 32)
    monkeypatch.setattr(timing, "READ", 1 << 12)
    monkeypatch.setattr(gpu, "SAID", 4)
    monkeypatch.setattr(gpu, "ROW", 300)
    monkeypatch.setattr(gpu, "fast_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(gpu, "alternate", lambda calls, _: timing.alternate(calls, 0, least=1))
    run = RunConfig(model=minute_config(lm_vocab_size=128))
    monkeypatch.setitem(PRESETS, "tiny", run)
    return run


@pytest.mark.slow
def test_both_sides_of_a_preset(small, capsys):
    gpu.main(["tiny", "--most", "2"])
    out = capsys.readouterr().out
    found = re.findall(r"(picoVLM|transformers): ([12]) rows, .* images/s.* 1,700,000 samples", out)
    assert [side for side, _ in found] == ["picoVLM", "transformers"]
    assert re.findall(r"decode, (\d) rows", out) == ["1", "2"]


def test_memory_that_ends_keeps_the_best(small):
    def make(run, model, device, n_rows):
        if n_rows > 2:
            raise torch.OutOfMemoryError
        return (lambda: None), 100 ** n_rows, 10

    assert gpu.best_batch(make, small, None, torch.device("cpu"), 8)["rows"] == 2

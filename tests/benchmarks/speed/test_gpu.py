"""The GPU benchmark on a CPU, with a model so small that its figures mean nothing."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.speed import gpu, peers, timing
from config_tools import InputError
from configs import PRESETS, RunConfig
from models.vision_language_model import VisionLanguageModel


@pytest.fixture
def small(monkeypatch, minute_config) -> RunConfig:
    monkeypatch.setattr(timing, "MATRIX_SIZE", 32)
    monkeypatch.setattr(timing, "N_BYTES", 1 << 12)
    monkeypatch.setattr(gpu, "N_NEW_TOKENS", 4)
    monkeypatch.setattr(gpu, "ROW_TOKENS", 300)
    monkeypatch.setattr(gpu, "choose_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(gpu, "alternate", lambda calls, _: timing.alternate(calls, 0, min_turns=1))
    run = RunConfig(model=minute_config(lm_vocab_size=128))
    monkeypatch.setitem(PRESETS, "tiny", run)
    return run


@pytest.mark.slow
def test_both_sides_of_a_preset(small, capsys, monkeypatch, tmp_path):
    (tmp_path / "page.md").write_text("<!-- gpu tiny -->\nold\n<!-- /gpu tiny -->\n")
    monkeypatch.setattr(timing, "PAGE", tmp_path / "page.md")
    gpu.main(["tiny", "--max-rows", "2", "--no-write", "--compiled", "--kernels", "3"])
    out = capsys.readouterr().out
    assert "old" in (tmp_path / "page.md").read_text()
    sides = re.findall(r"\| (picoVLM|transformers) \| [12] \| [\d.]+% \| .* GiB \| .* h \|", out)
    assert sides == ["picoVLM", "transformers"]
    decoded = re.findall(r"\| (\d) (?:\| [\d,]+ tok/s ){4}\| \d+% \|", out)
    assert decoded == ["1", "2"]
    (busy,) = re.findall(r"busy (\d+)% of a step", out)
    slowest = [float(ms) for ms in re.findall(r"\| [^|]+ \| \d+ \| ([\d.]+) \|", out)]
    assert 50 < int(busy) <= 100 and len(slowest) == 3 and slowest == sorted(slowest)[::-1]
    gpu.main(["tiny", "--max-rows", "1"])
    page = (tmp_path / "page.md").read_text()
    assert (
        "old" not in page
        and "| transformers |" in page
        and "python -m benchmarks.speed.gpu" in page
    )


def test_models_with_different_losses_are_not_timed(small, monkeypatch, tmp_path):
    load_hf_model = peers.load_hf_model

    def other(folder, dtype):
        model = load_hf_model(folder, dtype)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.1)
        return model

    monkeypatch.setattr(peers, "load_hf_model", other)
    VisionLanguageModel(small.model).save_pretrained(tmp_path)
    case = gpu.Case(small, tmp_path, torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match=r"loss: differs by .*nothing was timed"):
        gpu.training_tables(case, 1.0)


def test_out_of_memory_keeps_the_best_batch(small, monkeypatch):
    def step(case, side, model, n_rows):
        if n_rows > 2:
            raise torch.OutOfMemoryError
        return (lambda: None), 100**n_rows, 10

    monkeypatch.setattr(gpu, "training_step", step)
    case = gpu.Case(small, None, torch.device("cpu"), torch.float32, max_rows=8)
    assert gpu.best_batch(case, "picoVLM", None)["rows"] == 2

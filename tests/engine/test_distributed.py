"""What the program finds out about its machine."""

from __future__ import annotations

import pytest
import torch

from configs import InputError
from engine import distributed
from engine.distributed import bf16_is_faster, fast_dtype, settings

CPU = torch.device("cpu")


def test_without_bf16_arithmetic_no_product_is_tried(monkeypatch):
    """A product in bf16 takes minutes on a CPU that has none."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch, "ones", lambda *_: 1 / 0)
    assert not bf16_is_faster(CPU)
    assert fast_dtype(CPU, "auto") == fast_dtype(CPU, "fp32") == torch.float32
    with pytest.raises(InputError, match=r"train\.precision = 'bf16': .*use fp32, or auto"):
        fast_dtype(CPU, "bf16")


def test_what_is_faster_is_timed(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for seconds, wanted in (((1.0, 0.5), torch.bfloat16), ((1.0, 0.9), torch.float32)):
        ticks = iter([0, seconds[0]] * 5 + [0, seconds[1]] * 5)
        monkeypatch.setattr(distributed.time, "perf_counter", lambda ticks=ticks: next(ticks))
        monkeypatch.setattr(torch.Tensor, "to", lambda x, _: x[:1, :1])
        assert fast_dtype(CPU, "auto") == wanted
    assert fast_dtype(CPU, "fp32") == torch.float32
    assert fast_dtype(CPU, "bf16") == torch.bfloat16


def test_settings_in_one_line(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    line = settings(CPU, torch.float32)
    assert line == "CPU, 2 threads, fp32, freed memory kept for the next step"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert settings(CPU, torch.bfloat16).startswith("CPU, 1 thread, bf16")

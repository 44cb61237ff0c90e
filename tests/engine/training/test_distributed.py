"""What the program finds out about its machine."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path

import pytest
import torch

from config_tools import InputError
from engine.training import distributed
from engine.training.distributed import (
    autocast,
    bf16_is_faster,
    choose_dtype,
    describe_machine,
    missing_compiler,
    precision_name,
    should_compile,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


def test_without_bf16_arithmetic_no_product_is_tried(monkeypatch):
    """A product in bf16 takes minutes on a CPU that has none."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch, "ones", lambda *_: 1 / 0)
    assert not bf16_is_faster(CPU)
    assert choose_dtype(CPU, "auto") == choose_dtype(CPU, "fp32") == torch.float32
    with pytest.raises(InputError, match=r"train\.precision = 'bf16': .*use fp32 or auto"):
        choose_dtype(CPU, "bf16")


def test_what_is_faster_is_timed(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for seconds, wanted in (((1.0, 0.5), torch.bfloat16), ((1.0, 0.9), torch.float32)):
        ticks = iter([0, seconds[0]] * 5 + [0, seconds[1]] * 5)
        monkeypatch.setattr(distributed.time, "perf_counter", lambda ticks=ticks: next(ticks))
        monkeypatch.setattr(torch.Tensor, "to", lambda x, _: x[:1, :1])
        assert choose_dtype(CPU, "auto") == wanted
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert choose_dtype(CPU, name) == dtype
        assert precision_name(autocast(CPU, dtype)) == name


def test_settings_in_one_line(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    line = describe_machine(CPU, torch.float32, False)
    assert line == ("CPU, 2 threads, fp32, blocks not compiled, freed memory is reused")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    line = describe_machine(CPU, torch.bfloat16, True)
    assert line.startswith("CPU, 1 thread, bf16, blocks compiled")


HELD = """
import resource, torch
from engine.training.distributed import describe_machine, setup
setup()
print(describe_machine(torch.device("cpu"), torch.float32, False))
tensors = [torch.ones(1 << 20) for _ in range(40)]  # 4 MiB each
del tensors
print([int(line.split()[1]) // 1024 for line in open("/proc/self/status") if "VmRSS" in line][0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own variables")
def test_what_the_user_told_glibc_counts(python, tmp_path):
    held = {}
    for told in ({}, {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}):
        done = python(["-c", HELD], tmp_path, PYTHONPATH=str(ROOT), **told)
        line, mib = done.stdout.splitlines()
        held[bool(told)] = int(mib)
        ending = "malloc set by MALLOC_*" if told else "freed memory is reused"
        assert line.endswith(ending), done.stderr
    assert held[False] - held[True] > 100, held


def test_the_last_tensor_is_back_before_a_process_ends(monkeypatch):
    """A thread of gloo may have it a while longer than the sum takes."""
    dropped = threading.Event()

    def all_reduce(tensor):
        in_hand = [tensor.view(1)]
        threading.Timer(0.05, lambda: (dropped.set(), in_hand.clear())).start()

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    distributed.Dist(rank=0, world_size=2, device=CPU).shutdown()
    assert dropped.is_set()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match=r"process 2 .* has 1; start torchrun with --nproc-per-no"):
        distributed.setup()


def test_blocks_are_compiled_where_asked_and_by_default_on_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(distributed, "missing_compiler", lambda _: "")
    asked = ("auto", "on", "off")
    assert [should_compile(CPU, choice) for choice in asked] == [False, True, False]
    assert [should_compile(gpu, choice) for choice in asked] == [True, True, False]
    monkeypatch.setattr(distributed, "missing_compiler", lambda _: "torch.compile needs g++")
    assert not should_compile(gpu, "auto")
    with pytest.raises(InputError, match=r"train\.compile = 'on': torch\.compile needs g\+\+"):
        should_compile(CPU, "on")


def test_what_a_compiler_needs(monkeypatch):
    monkeypatch.setenv("CXX", "no-such")
    assert missing_compiler(CPU) == "torch.compile needs no-such"
    monkeypatch.setenv("CXX", "ls")
    assert not missing_compiler(CPU)
    triton = importlib.import_module("torch.utils._triton")
    monkeypatch.setenv("CC", "ls")
    for there in (True, False):
        monkeypatch.setattr(triton, "has_triton", lambda there=there: there)
        assert bool(missing_compiler(torch.device("cuda"))) != there

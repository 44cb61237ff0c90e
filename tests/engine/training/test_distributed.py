"""Device, precision, compiler and malloc settings of a run."""

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


def test_bf16_is_not_timed_on_a_cpu_without_it(monkeypatch):
    """An emulated bf16 matrix product takes minutes."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch, "ones", lambda *_: 1 / 0)
    assert not bf16_is_faster(CPU)
    assert choose_dtype(CPU, "auto") == choose_dtype(CPU, "fp32") == torch.float32
    with pytest.raises(InputError, match=r"train\.precision = 'bf16': .*use fp32 or auto"):
        choose_dtype(CPU, "bf16")


def test_auto_precision_is_the_faster_one(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for seconds, expected in (((1.0, 0.5), torch.bfloat16), ((1.0, 0.9), torch.float32)):
        ticks = iter([0, seconds[0]] * 5 + [0, seconds[1]] * 5)
        monkeypatch.setattr(distributed.time, "perf_counter", lambda ticks=ticks: next(ticks))
        monkeypatch.setattr(torch.Tensor, "to", lambda x, _: x[:1, :1])
        assert choose_dtype(CPU, "auto") == expected
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert choose_dtype(CPU, name) == dtype
        assert precision_name(autocast(CPU, dtype)) == name


def test_describe_machine(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    line = describe_machine(CPU, torch.float32, False)
    assert line == "CPU, 2 threads, fp32, torch.compile off, malloc keeps freed memory"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    line = describe_machine(CPU, torch.bfloat16, True)
    assert line.startswith("CPU, 1 thread, bf16, torch.compile on")


HELD = """
import resource, torch
from engine.training.distributed import describe_machine, setup
setup()
print(describe_machine(torch.device("cpu"), torch.float32, False))
tensors = [torch.ones(1 << 20) for _ in range(40)]  # 4 MiB each
del tensors
print([int(line.split()[1]) // 1024 for line in open("/proc/self/status") if "VmRSS" in line][0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_malloc_environment_variables_take_precedence(python, tmp_path):
    held = {}
    for variables in ({}, {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}):
        done = python(["-c", HELD], tmp_path, PYTHONPATH=str(ROOT), **variables)
        line, mib = done.stdout.splitlines()
        held[bool(variables)] = int(mib)
        ending = "malloc set by MALLOC_*" if variables else "malloc keeps freed memory"
        assert line.endswith(ending), done.stderr
    assert held[False] - held[True] > 100, held


def test_shutdown_waits_until_gloo_releases_its_tensor(monkeypatch):
    """A gloo thread may hold the tensor for a while after the all-reduce has returned."""
    released = threading.Event()

    def all_reduce(tensor):
        held = [tensor.view(1)]
        threading.Timer(0.05, lambda: (released.set(), held.clear())).start()

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    distributed.Dist(rank=0, world_size=2, device=CPU).shutdown()
    assert released.is_set()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match=r"process 2 .* has 1; start torchrun with --nproc-per-no"):
        distributed.setup()


def test_auto_compiles_only_on_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(distributed, "missing_compiler", lambda _: "")
    choices = ("auto", "on", "off")
    assert [should_compile(CPU, choice) for choice in choices] == [False, True, False]
    assert [should_compile(gpu, choice) for choice in choices] == [True, True, False]
    monkeypatch.setattr(distributed, "missing_compiler", lambda _: "torch.compile needs g++")
    assert not should_compile(gpu, "auto")
    with pytest.raises(InputError, match=r"train\.compile = 'on': torch\.compile needs g\+\+"):
        should_compile(CPU, "on")


def test_missing_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such")
    assert missing_compiler(CPU) == "torch.compile needs no-such"
    monkeypatch.setenv("CXX", "ls")
    assert not missing_compiler(CPU)
    triton = importlib.import_module("torch.utils._triton")
    monkeypatch.setenv("CC", "ls")
    for has_triton in (True, False):
        monkeypatch.setattr(triton, "has_triton", lambda found=has_triton: found)
        assert bool(missing_compiler(torch.device("cuda"))) != has_triton

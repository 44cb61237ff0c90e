"""Processes, device, precision and compilation of a run.

`Dist` has the same calls for one process and for many, which `torchrun` starts. Only this file and
checkpoint.py use torch.distributed.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from config_tools import InputError


@dataclass(frozen=True)
class Dist:
    """This process, its device and how it works with the other processes."""

    rank: int
    world_size: int
    device: torch.device
    parallel: str = "ddp"

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a shard of every block (FSDP)."""
        return self.parallel == "fsdp" and self.world_size > 1

    @property
    def is_async(self) -> bool:
        """Whether the device computes asynchronously to Python."""
        return self.device.type == "cuda"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: float) -> float:
        """Sum a number over all processes (all-reduce)."""
        if self.world_size == 1:
            return value
        total = torch.tensor(float(value), dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def all_gather(self, value: object) -> list:
        """Return the values of all processes, ordered by rank, on every process."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def shard(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Shard the model over the processes with FSDP2 if `parallel` is fsdp; else do nothing.

        Call it before building the optimizer. A block is gathered in `dtype` when it computes.
        Gradients are averaged in float32, as DDP does.
        """
        if not self.is_sharded:
            return
        from torch.distributed import fsdp

        policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        parts: list[Any] = list(model.modules())
        for part in parts:
            for block in getattr(part, "blocks", ()):
                fsdp.fully_shard(block, mp_policy=policy)
        fsdp.fully_shard(model, mp_policy=policy)
        for name in ("prefill", "decode"):  # evaluation calls them directly
            if hasattr(model, name):
                fsdp.register_fsdp_forward_method(model, name)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model in DDP if there are several processes and it is not sharded."""
        if self.world_size == 1 or self.is_sharded:
            return model
        return DistributedDataParallel(model)

    def gradient_sync(self, model: Any, is_last: bool) -> contextlib.AbstractContextManager:
        """Synchronize gradients only in the backward pass of the last micro-batch of a step."""
        if self.is_sharded:
            model.set_requires_gradient_sync(is_last)
        needs_no_sync = self.world_size > 1 and not self.is_sharded and not is_last
        return model.no_sync() if needs_no_sync else contextlib.nullcontext()

    def full_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Gather a sharded model's tensors on the main process's CPU; {} on the others."""
        from torch.distributed.checkpoint import state_dict

        options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return state_dict.get_model_state_dict(model, options=options)

    def save_shards(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Write this process's shard of the optimizer state."""
        from torch.distributed.checkpoint import save, state_dict

        state = {"optimizer": state_dict.get_optimizer_state_dict(model, optimizer)}
        save(state, checkpoint_id=folder)

    def load_shards(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Load what `save_shards` wrote, in place."""
        from torch.distributed.checkpoint import load, state_dict

        state = {"optimizer": state_dict.get_optimizer_state_dict(model, optimizer)}
        load(state, checkpoint_id=folder)
        state_dict.set_optimizer_state_dict(model, optimizer, state["optimizer"])

    def shutdown(self) -> None:
        """Wait for all processes, then leave the process group.

        A process that leaves early can make the others fail. A tensor that gloo's thread still
        holds when the interpreter exits aborts the process, so wait up to 5 s for its release;
        `destroy_process_group` alone does not, as torch keeps references to the group.
        """
        if self.world_size > 1:
            last: Any = torch.zeros(1)
            dist.all_reduce(last)
            for _ in range(5000):
                if last._use_count() == 1:
                    break
                time.sleep(0.001)
            dist.destroy_process_group()


def setup(parallel: str = "ddp") -> Dist:
    """Choose the device and join the process group that torchrun's environment describes.

    Raises `InputError` if this process has no GPU of its own.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda, device = torch.cuda.is_available(), torch.device("cpu")
    if cuda:
        i, n = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if i >= n:
            reason = f"process {i + 1} has no GPU, because this machine has {n}"
            raise InputError(f"{reason}; start torchrun with --nproc-per-node {n}.")
        device = torch.device("cuda", i)
        torch.cuda.set_device(device)
    else:
        set_malloc_thresholds()
    if world_size > 1:
        # torchrun reuses its store after a restart; a prefix hides the old addresses.
        store, _, _ = next(dist.rendezvous("env://", rank, world_size))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        # gloo for CPU tensors: with NCCL they would wait for the GPU's queue.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return Dist(rank, world_size, device, parallel)


def has_malloc_settings() -> bool:
    """Whether the user configured glibc's malloc through MALLOC_* environment variables."""
    return bool({"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ))


def set_malloc_thresholds(max_bytes: int = 1 << 24) -> None:
    """Let glibc keep and reuse the memory of freed tensors of up to `max_bytes`.

    By default glibc returns it to the kernel, which costs page faults in every step. Larger tensors
    are still returned at once, as they would fragment the heap. No effect without `mallopt` (other
    C libraries), or if the user set MALLOC_* variables (`MALLOC_TRIM_THRESHOLD_=131072` opts out).
    """
    if has_malloc_settings():
        return
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(-3, max_bytes)  # M_MMAP_THRESHOLD


def memory_budget(device: torch.device) -> float:
    """Maximum bytes of activations; infinite if the memory size is unknown.

    Half of the GPU's memory, or half of this process's share of the machine's or container's.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    limits = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not POSIX
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # no cgroup, or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=math.inf) / 2 / n_processes


def activation_bytes(
    n_blocks: int, n_tokens: int, width: int, inter_dim: int, dtype: torch.dtype
) -> int:
    """An estimate of what transformer blocks keep for backward.

    About 8 tensors as wide as the model and 4 as wide as its MLP, for each block and token.
    """
    return n_blocks * n_tokens * (8 * width + 4 * inter_dim) * dtype.itemsize


def choose_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The dtype of matrix products for `precision`: fp32, bf16, or auto (bf16 if it is faster).

    Raises `InputError` for bf16 on a CPU that only emulates it.
    """
    if precision == "bf16" and is_bf16_emulated(device):
        reason = "no bf16 instructions, so one matrix product would take minutes"
        raise InputError(f"train.precision = 'bf16': this CPU has {reason}; use fp32 or auto.")
    is_bf16 = precision == "bf16" or (precision == "auto" and bf16_is_faster(device))
    return torch.bfloat16 if is_bf16 else torch.float32


def agree_on_dtype(dist: Dist, precision: str) -> torch.dtype:
    """The main process's `choose_dtype`, on all processes; with auto, timings could differ."""
    return dist.all_gather(choose_dtype(dist.device, precision))[0]


def missing_compiler(device: torch.device) -> str:
    """What torch.compile needs on this device but is not installed; empty if nothing."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        found = has_triton() and any(map(shutil.which, names))
        return "" if found else f"torch.compile needs triton and {' or '.join(names)}"
    name = os.environ.get("CXX", "g++")
    return "" if shutil.which(name) else f"torch.compile needs {name}"


def should_compile(device: torch.device, choice: str) -> bool:
    """Whether to compile blocks: `choice` is on, off or auto (on a GPU, if possible).

    Raises `InputError` if `choice` is on and a compiler is missing.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return False
    missing = missing_compiler(device)
    if missing and choice == "on":
        raise InputError(f"train.compile = 'on': {missing}, which is not installed; use off.")
    return not missing


def describe_machine(device: torch.device, dtype: torch.dtype, compiled: bool) -> str:
    """One line: device, threads, precision, compilation and malloc setting."""
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    blocks = f"torch.compile {'on' if compiled else 'off'}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {precision}, {blocks}"
    n = torch.get_num_threads()
    malloc = "malloc set by MALLOC_*" if has_malloc_settings() else "malloc keeps freed memory"
    return f"CPU, {n} thread{'s' * (n > 1)}, {precision}, {blocks}, {malloc}"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """An autocast context for `dtype`; disabled for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def precision_name(autocast_context: torch.autocast) -> str:
    """The `precision` of a context made by `autocast`: bf16 or fp32."""
    with autocast_context:
        return "bf16" if torch.is_autocast_enabled(autocast_context.device) else "fp32"


def is_bf16_emulated(device: torch.device) -> bool:
    """Whether this CPU lacks bf16 instructions; torch then falls back to slow scalar code."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def bf16_is_faster(device: torch.device) -> bool:
    """Time matrix products in fp32 and bf16: bf16 instructions do not guarantee a speedup."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if is_bf16_emulated(device):
        return False
    a = torch.ones(512, 512)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        b, times = a.to(dtype), []
        for _ in range(5):
            start = time.perf_counter()
            b @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]

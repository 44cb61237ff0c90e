"""One process or many: the same calls, so that no loop asks. And this machine's settings.

The settings are found once. Only this file and checkpoint.py touch torch.distributed. `torchrun`
starts several processes; world size 1 needs none.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config_tools import InputError


@dataclass(frozen=True)
class Dist:
    """This process among all."""

    rank: int
    world: int
    device: torch.device
    parallel: str = "ddp"

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of every block only."""
        return self.parallel == "fsdp" and self.world > 1

    @property
    def works_apart(self) -> bool:
        """Whether the device goes on with its work while the host does something else."""
        return self.device.type == "cuda"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.world == 1:
            return value
        total = torch.tensor(float(value), dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def gather(self, value: object) -> list:
        """Every process's value, to every process, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def shard(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Keep a part of every block here, and gather a block in `dtype` when it computes (FSDP2).

        Before the optimizer is made, and only where `parallel` says so. Gradients are averaged, in
        float32, as DDP does.
        """
        if not self.is_sharded:
            return
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for part in list(model.modules()):
            for block in getattr(part, "blocks", ()):
                fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        for name in ("prefill", "decode"):  # evaluation comes in by these doors too
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Average gradients over the processes; a lone process needs nothing."""
        if self.world == 1 or self.is_sharded:
            return model
        return DistributedDataParallel(model)

    def sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Talk to the other ranks in the last micro-batch of a step only."""
        if self.is_sharded:
            model.set_requires_gradient_sync(last)
        return contextlib.nullcontext() if last or self.world == 1 or self.is_sharded \
            else model.no_sync()  # fmt: skip

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """All tensors of a model in parts, on the CPU of the main process; elsewhere nothing."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(model, options=options)

    def save_shards(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Every process writes its part of the optimizer's state."""
        import torch.distributed.checkpoint as shards
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        shards.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)

    def load_shards(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """The inverse of `save_shards`, in place."""
        import torch.distributed.checkpoint as shards
        from torch.distributed.checkpoint.state_dict import (
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )

        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        shards.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])

    def close(self) -> None:
        """When all have come so far: one that leaves early may end the others by its absence.

        And when no thread of the group has the last tensor in hand, for which 5 s must do: dropped
        while the interpreter ends, it aborts the process. To destroy the group is no help, as
        torch's own defaults and caches keep it alive.
        """
        if self.world > 1:
            last = torch.zeros(1)
            dist.all_reduce(last)
            for _ in range(5000):
                if last._use_count() == 1:
                    break
                time.sleep(0.001)
            dist.destroy_process_group()


def setup(parallel: str = "ddp") -> Dist:
    """Read torchrun's environment, join the other processes if there are any, choose the device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda:
        n = torch.cuda.device_count()
        if device.index >= n:
            raise InputError(
                f"process {device.index + 1} of this machine has no GPU, as it has {n}; start "
                f"torchrun with --nproc-per-node {n}."
            )
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if world > 1:
        # torchrun keeps its store when it starts workers again: their old addresses are in it.
        store, _, _ = next(dist.rendezvous("env://", rank, world))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        # Numbers of the host go from host to host: by NCCL they would wait for the GPU's work.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return Dist(rank, world, device, parallel)


def told_glibc() -> bool:
    """Whether the user has said when freed memory goes back."""
    return bool({"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ))


def keep_freed_memory(most: int = 1 << 24) -> None:
    """Tell glibc to reuse the memory of freed tensors of up to `most` bytes.

    It would hand each back to the kernel and fault it in again on the next step. Larger ones still
    go back at once: kept, they would leave holes in the heap that nothing else fills. Other C
    libraries have no `mallopt`, and then nothing happens; nor where the user has told glibc
    (`MALLOC_TRIM_THRESHOLD_=131072` is how to refuse).
    """
    if told_glibc():
        return
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_trim_threshold, 1 << 30)
        libc.mallopt(m_mmap_threshold, most)


def fast_dtype(device: torch.device, precision: str) -> torch.dtype:
    """What matrices multiply in: `precision` fp32, bf16, or auto, bf16 where that is faster.

    Raises `InputError` of bf16 on a processor without its arithmetic.
    """
    if precision == "bf16" and lacks_bf16(device):
        raise InputError(
            "train.precision = 'bf16': this processor has no bf16 arithmetic, and a single product "
            "would take minutes; use fp32, or auto, which takes the faster one."
        )
    is_bf16 = precision == "bf16" or (precision == "auto" and bf16_is_faster(device))
    return torch.bfloat16 if is_bf16 else torch.float32


def lacks_compiler(device: torch.device) -> str:
    """Why torch.compile can make nothing for this device; empty where it can."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        found = has_triton() and any(map(shutil.which, names))
        return "" if found else f"torch.compile needs triton and {' or '.join(names)}"
    name = os.environ.get("CXX", "g++")
    return "" if shutil.which(name) else f"torch.compile needs {name}"


def compiles(device: torch.device, choice: str) -> bool:
    """Whether blocks are compiled: `choice` on, off, or auto, on a GPU where that is possible.

    Raises `InputError` of `on` where it is not.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return False
    lack = lacks_compiler(device)
    if lack and choice == "on":
        raise InputError(f"train.compile = 'on': {lack}, which is not here; use off.")
    return not lack


def settings(device: torch.device, dtype: torch.dtype, compiled: bool) -> str:
    """What was found to be best on this machine, for one line at the start of a run."""
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    blocks = "blocks compiled" if compiled else "blocks not compiled"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {precision}, {blocks}"
    n = torch.get_num_threads()
    kept = "freed memory as MALLOC_ says" if told_glibc() else "freed memory kept for the next step"
    return f"CPU, {n} thread{'s' * (n > 1)}, {precision}, {blocks}, {kept}"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The region in which matrices are multiplied in `dtype`; of float32 it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def precision(region: torch.autocast) -> str:
    """What `fast_dtype` calls the arithmetic of a region that `autocast` made."""
    with region:
        return "bf16" if torch.is_autocast_enabled(region.device) else "fp32"


def lacks_bf16(device: torch.device) -> bool:
    """Whether a product in bf16 takes minutes, one number after the other."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def bf16_is_faster(device: torch.device) -> bool:
    """Time a few products of each kind: kernels may not keep what instruction sets promise."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if lacks_bf16(device):
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

"""Checkpoints: everything a run needs to resume exactly where it stopped.

A folder `step-000600` holds the model (config.json, model.safetensors, tokenizer) and `state.pt`:
step, optimizer, random generators, loader position, best evaluation, config and versions. It is
written under a temporary name, then renamed. Not here: the run folder and its lock (run_folder.py).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config_tools import InputError, from_dict, require, to_dict
from configs import RunConfig
from configs_classify import ClassifyConfig
from engine.training.distributed import Dist
from engine.training.optim import Optimizers
from engine.training.run_folder import STATE, list_checkpoints, write_config
from models.pretrained.hub import find
from models.pretrained.load import load_tensors

SHARDS = "shards"  # folder of the optimizer state under FSDP


@dataclass
class Best:
    """The best evaluation so far: highest accuracy; among equals, lowest loss."""

    step: int = 0
    score: tuple[float, float] = (-1.0, 0.0)  # accuracy, minus loss

    def update(self, values: dict, step: int) -> bool:
        """Record `values` if they have `val_loss` and are better; return whether they are."""
        if "val_loss" not in values:
            return False
        score = (values["val_accuracy"], -values["val_loss"])
        is_better = score > self.score
        if is_better:
            self.step, self.score = step, score
        return is_better


def list_shared_checkpoints(run: Path, dist: Dist) -> list[Path]:
    """`list_checkpoints`; raises `InputError` if machines see different checkpoints."""
    found = list_checkpoints(run)
    names = {tuple(p.name for p in paths) for paths in dist.all_gather(found)}
    fix = "the machines see different checkpoints; use a folder that all machines share"
    require(len(names) == 1, "train.out", str(run), fix)
    return found


def resolve(path: str | Path) -> Path:
    """The model directory of a checkpoint, of a run folder (its newest checkpoint), or a Hub id."""
    path = find(path)
    if checkpoints := list_checkpoints(path):
        return checkpoints[-1]
    names = ("model.safetensors", "model.safetensors.index.json")
    if not any((path / name).is_file() for name in names):
        reason = "neither a checkpoint (no model.safetensors) nor a run folder with one"
        raise InputError(f"{path}: {reason}.")
    return path


def rng_state() -> dict:
    """The state of all random generators: torch, Python, numpy, CUDA."""
    version, internal, gauss = random.getstate()
    _, keys, pos, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": (version, list(internal), gauss),
        "numpy": (torch.from_numpy(np.asarray(keys, np.int64)), pos, has_gauss, cached),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def seed_generators(seed: int, rank: int) -> None:
    """Seed Python and numpy by rank, and torch on every rank but 0, so that dropout differs."""
    random.seed(f"{seed}/{rank}")
    np.random.seed((seed * 1_000_003 + rank) % 2**32)
    if rank:
        torch.manual_seed((seed * 1_000_003 + rank) % 2**64)


def save(
    cfg: RunConfig | ClassifyConfig, step: int, model: Any, save_model: Callable[[Any, Path], None],
    optimizer: Optimizers, dist: Dist, state: dict,
) -> None:  # fmt: skip
    """Write checkpoint `step`, then delete all but the newest `keep` and the best evaluated one.

    Every process calls it. Raises `InputError` if the disk is full or read-only; then nothing of
    the new checkpoint remains and earlier ones are untouched.
    """
    state = state | {"rng": dist.all_gather(rng_state())}
    if not dist.is_sharded:
        state["optimizer"] = optimizer.state_dict()
        if dist.is_main:
            _write(cfg, step, lambda folder: save_model(model, folder), state)
        dist.sum(0)  # wait until it is written
        return
    tensors = dist.full_state_dict(model)
    shards = Path(cfg.train.out) / f".shards-{step:06d}"
    try:
        dist.save_shards(model, optimizer.members[0], shards)
    except Exception as error:  # torch raises CheckpointException, an Exception
        shutil.rmtree(shards, ignore_errors=True)
        raise write_error(shards, str(error).splitlines()[0]) from None

    def write_all(folder: Path) -> None:
        full = load_tensors(type(model), model.cfg, tensors).train(model.training)
        save_model(full, folder)
        shards.rename(folder / SHARDS)

    if dist.is_main:
        _write(cfg, step, write_all, state)
    dist.sum(0)


def write_error(path: Path, reason: object) -> InputError:
    """The error for a checkpoint that cannot be written."""
    return InputError(
        f"{path}: the checkpoint could not be written ({reason}). Earlier checkpoints are "
        "intact; free disk space and continue with --train.resume auto."
    )


def _write(
    cfg: RunConfig | ClassifyConfig, step: int, write: Callable[[Path], None], state: dict
) -> None:
    run = Path(cfg.train.out)
    final, temporary = run / f"step-{step:06d}", run / f".saving-{step:06d}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        provenance = {"config": to_dict(cfg), "torch": str(torch.__version__),
                      "git": git_commit(), "hardware": hardware()}  # fmt: skip
        try:
            torch.save({"step": step, "provenance": provenance} | state, temporary / STATE)
        except RuntimeError as error:  # torch raises it on a full disk
            raise OSError(str(error)) from None
        _flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        if not (run / "config.json").exists():  # deleted during training
            write_config(cfg)
        temporary.rename(final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise write_error(final, error) from None
    best = f"step-{state.get('best', (0,))[0]:06d}"
    for old in list_checkpoints(run)[: -cfg.train.keep]:
        if old.name != best:
            shutil.rmtree(old, ignore_errors=True)  # another process may delete it too
    _point(run / "best", run / best)


def _point(link: Path, target: Path) -> None:
    """Make `link` a symlink to a checkpoint, atomically; no effect if symlinks are unsupported."""
    temporary = link.with_name(f".{link.name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        if target.is_dir():
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target.name)
            temporary.replace(link)


def _flush(folder: Path) -> None:
    """Flush all files to disk (fsync) before the folder gets its final name."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_state(folder: Path, mmap: bool = False) -> dict:
    """Read `state.pt` onto the CPU; raises `InputError` if it is damaged."""
    try:
        return torch.load(folder / STATE, "cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:120]
        fix = "delete this checkpoint; --train.resume auto then continues from the previous one"
        raise InputError(f"{folder / STATE}: damaged ({reason}); {fix}.") from None


def resumed_precision(checkpoints: list[Path], precision: str) -> str:
    """`precision`; for auto, the precision that the newest of `checkpoints` was trained in.

    A resumed run keeps its precision, even if this machine would choose another.
    """
    if precision != "auto" or not checkpoints:
        return precision
    return read_state(checkpoints[-1], mmap=True).get("precision", "auto")


def load_state(
    folder: Path,
    cfg: RunConfig | ClassifyConfig,
    world_size: int = 1,
    data_fingerprint: str = "",
) -> dict:
    """`read_state`; raises `InputError` if settings that change the result, or the data, differ."""
    state = read_state(folder)
    saved = from_dict(type(cfg), state["provenance"]["config"], str(folder / STATE))
    changed = [
        f"{part}.{name}: was {old!r}, now {new!r}"
        for part, fields in vars(saved).items()
        for (name, old), new in zip(vars(fields).items(), vars(getattr(cfg, part)).values())
        if old != new and f"{part}.{name}" not in MAY_CHANGE
    ]
    counts = ("world", "processes", world_size), ("data", "rows of the source", data_fingerprint)
    for key, label, now in counts:
        if (state.get(key) or now) != now:  # checkpoints of earlier versions may lack the key
            changed.append(f"{label}: was {state[key]}, now {now}")
    then, now = (max(1, c.data.workers) for c in (saved, cfg))
    if getattr(saved.data, "stream", False) and then != now:
        changed.append(f"data.workers (fixed with data.stream): was {then}, now {now}")
    if changed:
        is_vlm = "init_from" in vars(cfg.train)
        flag = "--train.init-from" if is_vlm else "--model.vit-model-type"
        raise InputError(
            f"{folder}: trained with other settings ({'; '.join(changed)}). Change them back, or "
            f"start a new run from its weights: {flag} {folder} --train.out another."
        )
    return state


def restore(
    folder: Path, cfg: RunConfig | ClassifyConfig, model: Any, optimizer: Optimizers, loader: Any,
    dist: Dist, data_fingerprint: str = "",
) -> tuple[int, Best]:  # fmt: skip
    """Restore everything but the weights, which `model` already has; return step and best."""
    state = load_state(folder, cfg, dist.world_size, data_fingerprint)
    if dist.is_sharded:
        dist.load_shards(model, optimizer.members[0], folder / SHARDS)
    else:
        optimizer.load_state_dict(state["optimizer"])
    loader.load_state_dict(_of_rank(state["loader"], dist.rank))
    set_rng_state(_of_rank(state["rng"], dist.rank))
    step, score = state.get("best", (0, (-1.0, 0.0)))
    return state["step"], Best(step, tuple(score))


def _of_rank(values: Any, rank: int) -> Any:
    """This rank's value; checkpoints of earlier versions hold one value for all ranks."""
    return values[rank] if isinstance(values, list) else values


# Settings that do not change the result, so a resumed run may change them.
MAY_CHANGE = {
    "data.workers", "train.out", "train.resume", "train.init_from", "train.log_every",
    "train.eval_every", "train.save_every", "train.keep", "train.wandb", "train.eval_samples",
    "train.max_bad_steps", "train.push", "train.answer_sheet_every",
    "train.activation_checkpointing", "train.dry_run",
}  # fmt: skip


def hardware() -> str:
    """Number and name of the GPUs, or of the CPU."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        return f"{world} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux has the model name
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{world} process(es) on {os.cpu_count()} cores of {name}"


def git_commit() -> str:
    """The commit of this code, with -dirty when the tree differs, or "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    folder, pipe = Path(__file__).parent, subprocess.DEVNULL
    try:
        text = subprocess.check_output(command, cwd=folder, stderr=pipe, text=True, timeout=10)
        return text.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"

"""The whole state of a run on disk, so that stopping loses nothing.

It is written to a temporary folder, then renamed.
A checkpoint folder `step-000600` is a model directory that every loader opens, plus `state.pt`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import platform
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from configs import InputError, RunConfig, from_dict, to_dict
from models.hub import find

STATE = "state.pt"


def folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in run.glob("step-*") if (p / STATE).is_file())


def resolve(path: str | Path) -> Path:
    """A model directory as it is, a run folder's newest checkpoint, or a Hub id's snapshot.

    Raises `InputError` if it is none of them.
    """
    path = find(path)
    if folders(path):
        return folders(path)[-1]
    if (
        not (path / "model.safetensors").is_file()
        and not (path / "model.safetensors.index.json").is_file()
    ):
        raise InputError(
            f"{path}: neither a checkpoint (no model.safetensors) nor a run folder with one."
        )
    return path


def rng_state() -> dict:
    """Every random generator a run may draw from."""
    version, internal, gauss = random.getstate()
    _, keys, pos, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": (version, list(internal), gauss),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), pos, has_gauss, cached),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def save(cfg: RunConfig, step: int, model, processor, state: dict) -> Path:
    """Write checkpoint `step`, then drop all but the newest `keep`.

    On failure nothing of it remains. Raises `InputError` when the disk refuses; earlier checkpoints
    are untouched.
    """
    run = Path(cfg.train.out)
    final, temporary = run / f"step-{step:06d}", run / f".saving-{step:06d}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary, processor)
        provenance = {
            "config": to_dict(cfg),
            "torch": str(torch.__version__),
            "git": git_commit(),
            "hardware": hardware(),
        }
        torch.save(
            {"step": step, "rng": rng_state(), "provenance": provenance} | state, temporary / STATE
        )
        _flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    # A full disk is a RuntimeError to torch.save and a SafetensorError to the weights.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"{final}: the checkpoint could not be written ({error}); "
            "earlier checkpoints are whole, free some space and continue with --train.resume auto."
        ) from None
    for old in folders(run)[: -cfg.train.keep]:
        shutil.rmtree(old)
    return final


def _flush(folder: Path) -> None:
    """Force the files to the disk before the rename makes them official."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_state(folder: Path, cfg: RunConfig) -> dict:
    """The state beside a checkpoint's weights; `InputError` where the settings have changed."""
    try:
        state = torch.load(folder / STATE, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{folder / STATE}: not the whole state of a run ({reason}).") from None
    saved = from_dict(RunConfig, state["provenance"]["config"], str(folder / STATE))
    changed = [
        f"{part}.{name}: {old!r} then, {new!r} now"
        for part in ("model", "data", "train")
        for (name, old), new in zip(
            vars(getattr(saved, part)).items(), vars(getattr(cfg, part)).values()
        )
        if old != new and (part, name) not in MAY_CHANGE
    ]
    if changed:
        raise InputError(
            f"{folder} was made with other settings ({'; '.join(changed)}); "
            "set them back, or start a new run with --train.init-from."
        )
    return state


# Settings that do not change what is computed.
MAY_CHANGE = {
    ("train", n)
    for n in (
        "out",
        "resume",
        "init_from",
        "log_every",
        "eval_every",
        "save_every",
        "keep",
        "wandb",
        "eval_samples",
        "max_bad_steps",
        "push",
    )
} | {("data", "workers")}


def remember_config(cfg: RunConfig) -> None:
    """Write the run's config.json, the file that `python train.py runs/x/config.json` reads.

    Raises `InputError` when the folder holds another run and this one does not resume it.
    """
    run = Path(cfg.train.out)
    if cfg.train.resume == "no" and folders(run):
        raise InputError(
            f"{run} holds the checkpoints of an earlier run; continue it with --train.resume auto, "
            "choose another --train.out, or delete it."
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
        if cfg.train.resume == "no":
            for stale in ("log.jsonl", "skipped.jsonl"):
                (run / stale).unlink(missing_ok=True)
        (run / "config.json").write_text(
            json.dumps(to_dict(cfg), indent=2) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise InputError(
            f"train.out = {str(run)!r}: cannot be written ({error.strerror})."
        ) from None


def hardware() -> str:
    """What this run computes on, in words."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        return f"{world} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux says more
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{world} process(es) on {os.cpu_count()} cores of {name}"


def git_commit() -> str:
    """The commit of this code, with -dirty when the tree differs, or "unknown" outside git."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"

"""The whole state of a run on disk, so that stopping loses nothing.

It is written to a temporary folder, then renamed.
A checkpoint folder `step-000600` is a model directory that every loader opens, plus `state.pt`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import platform
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from config_tools import InputError, by_step, from_dict, to_dict
from configs import RunConfig
from engine.training.distributed import Dist
from engine.training.optim import Optimizers
from models.pretrained.hub import find

STATE, SHARDS = "state.pt", "shards"


def folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (p for p in run.glob("step-*") if (p / STATE).is_file())
    return sorted(found, key=by_step)


def seen_by_all(run: Path, dist: Dist) -> list[Path]:
    """`folders`; raises `InputError` where processes, on different machines, see different ones."""
    found = folders(run)
    seen = {tuple(p.name for p in paths) for paths in dist.gather(found)}
    if len(seen) > 1:
        raise InputError(f"{run}: not the same on all machines; name a folder that they share.")
    return found


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


def seed_generators(seed: int, rank: int) -> None:
    """Python's and numpy's, and torch's of every rank but the first.

    That one goes on from where the initial weights left it; the others' dropout must not be its.
    """
    random.seed(f"{seed}/{rank}")
    np.random.seed((seed * 1_000_003 + rank) % 2**32)
    if rank:
        torch.manual_seed((seed * 1_000_003 + rank) % 2**64)


def save(
    cfg: RunConfig,
    step: int,
    model,
    write: Callable[[object, Path], None],
    optimizer: Optimizers,
    dist: Dist,
    state: dict,
) -> None:
    """Write checkpoint `step`, then drop all but the newest `keep` and the best evaluated one.

    Called by every process. On failure nothing of it remains. Raises `InputError` when the disk
    refuses; earlier checkpoints are untouched.
    """
    state = state | {"rng": dist.gather(rng_state())}
    if not dist.is_sharded:
        state["optimizer"] = optimizer.state_dict()
        if dist.is_main:
            _write(cfg, step, lambda folder: write(model, folder), state)
        dist.sum(0)  # none goes on before it is there
        return
    tensors = dist.whole(model)
    shards = Path(cfg.train.out) / f".shards-{step:06d}"
    try:
        dist.save_shards(model, optimizer.members[0], shards)
    except Exception as error:  # CheckpointException, which is no more than that
        shutil.rmtree(shards, ignore_errors=True)
        raise refused(shards, str(error).splitlines()[0]) from None

    def write_all(folder: Path) -> None:
        write(model.assembled(tensors), folder)
        shards.rename(folder / SHARDS)

    if dist.is_main:
        _write(cfg, step, write_all, state)
    dist.sum(0)


def refused(path: Path, why: object) -> InputError:
    """What is said when the disk does not take a checkpoint."""
    return InputError(
        f"{path}: the checkpoint could not be written ({why}); earlier checkpoints are whole, free "
        "some space and continue with --train.resume auto."
    )


def _write(cfg: RunConfig, step: int, write: Callable[[Path], None], state: dict) -> None:
    run = Path(cfg.train.out)
    final, temporary = run / f"step-{step:06d}", run / f".saving-{step:06d}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        provenance = {
            "config": to_dict(cfg),
            "torch": str(torch.__version__),
            "git": git_commit(),
            "hardware": hardware(),
        }
        try:
            torch.save({"step": step, "provenance": provenance} | state, temporary / STATE)
        except RuntimeError as error:  # of a full disk, too
            raise OSError(str(error)) from None
        _flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        if not (run / "config.json").exists():  # deleted under the run
            _write_config(cfg)
        temporary.rename(final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise refused(final, error) from None
    best = f"step-{state.get('best', (0,))[0]:06d}"
    for old in folders(run)[: -cfg.train.keep]:
        if old.name != best:
            shutil.rmtree(old, ignore_errors=True)  # somebody else may delete it too
    _point(run / "best", run / best)


def _point(link: Path, target: Path) -> None:
    """Let `link` name a checkpoint, at once; where the file system has no links, it does not."""
    beside = link.with_name(f".{link.name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        if target.is_dir():
            beside.unlink(missing_ok=True)
            beside.symlink_to(target.name)
            beside.replace(link)


def _flush(folder: Path) -> None:
    """Force the files to the disk before the rename makes them official."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_state(folder: Path, mmap: bool = False) -> dict:
    """All that a checkpoint holds beside its weights, on the CPU, wherever it was made.

    Raises `InputError` where it is torn.
    """
    try:
        return torch.load(folder / STATE, "cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"{folder / STATE}: not the whole state of a run ({reason}); delete that "
            "checkpoint, and --train.resume auto takes the one before."
        ) from None


def precision_of(found: list[Path], precision: str) -> str:
    """`precision`, or for auto what it came to when the newest of `found` was made.

    It is found by measuring, and a run goes on in the arithmetic it began with.
    """
    if precision != "auto" or not found:
        return precision
    return read_state(found[-1], mmap=True).get("precision", "auto")


def load_state(folder: Path, cfg: RunConfig, world: int = 1, data: str = "") -> dict:
    """The state beside a checkpoint's weights.

    Raises `InputError` where the settings, the number of processes or the `data` have changed.
    """
    state = read_state(folder)
    saved = from_dict(type(cfg), state["provenance"]["config"], str(folder / STATE))
    changed = [
        f"{part}.{name}: {old!r} then, {new!r} now"
        for part in ("model", "data", "train")
        for (name, old), new in zip(
            vars(getattr(saved, part)).items(), vars(getattr(cfg, part)).values()
        )
        if old != new and (part, name) not in MAY_CHANGE
    ]
    for what, now in (("world", world), ("data", data)):
        if (state.get(what) or now) != now:  # earlier versions did not always say
            changed.append(f"{SAYS[what]}: {state[what]} then, {now} now")
    then, now = (max(1, c.data.workers) for c in (saved, cfg))
    if getattr(saved.data, "stream", False) and then != now:
        changed.append(f"data.workers, which share a stream: {then} then, {now} now")
    if changed:
        is_vlm = "init_from" in vars(cfg.train)
        flag = "--train.init-from" if is_vlm else "--model.vit-model-type"
        raise InputError(
            f"{folder} was made with other settings ({'; '.join(changed)}); set them back, or "
            f"start a new run from its weights: {flag} {folder} --train.out another."
        )
    return state


def restore(
    folder: Path, cfg: RunConfig, model, optimizer: Optimizers, loader, dist: Dist, data: str = ""
) -> tuple[int, tuple]:
    """Go on from a checkpoint whose weights `model` has: (step, the best evaluation)."""
    state = load_state(folder, cfg, dist.world, data)
    if dist.is_sharded:
        dist.load_shards(model, optimizer.members[0], folder / SHARDS)
    else:
        optimizer.load_state_dict(state["optimizer"])
    loader.restore(_of_rank(state["loader"], dist.rank))
    set_rng_state(_of_rank(state["rng"], dist.rank))
    return state["step"], state.get("best", (0, (-1.0, 0.0)))


def _of_rank(values: object, rank: int) -> object:
    """A process's own; checkpoints of earlier versions have one for all."""
    return values[rank] if isinstance(values, list) else values


SAYS = {"world": "processes", "data": "rows of the source"}
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
        "answers_every",
        "activation_checkpointing",
        "dry_run",
    )
} | {("data", "workers")}


def claim(run: Path):
    """The open file whose lock says that this process trains in `run`, until it is closed.

    The lock ends with the process, however it ends, and is not inherited by others. Raises
    `InputError` while another process has it.
    """
    file = open(run / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
    try:
        import fcntl
    except ImportError:  # not POSIX: no lock
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise InputError(
            f"{run}: process {file.read().strip()} is training in it; choose another --train.out, "
            "or stop that one first."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return file  # a file system without locks
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def remember_config(cfg: RunConfig):
    """Write the run's config.json, the file that `python train.py runs/x/config.json` reads.

    Returns what `claim` does. Raises `InputError` when the folder holds another run and this one
    does not resume it, or another process trains in it.
    """
    run = Path(cfg.train.out)
    if cfg.train.resume == "no" and folders(run):
        raise InputError(
            f"{run} holds the checkpoints of an earlier run; continue it with --train.resume auto, "
            "choose another --train.out, or delete it."
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = claim(run)
        for torn in (*run.glob(".saving-*"), *run.glob(".shards-*")):  # left by a kill
            shutil.rmtree(torn)
        if cfg.train.resume == "no":
            for stale in (run / "log.jsonl", run / "skipped.jsonl", *run.glob("bad-step-*.pt")):
                stale.unlink(missing_ok=True)
        _write_config(cfg)
    except OSError as error:
        raise InputError(
            f"train.out = {str(run)!r}: cannot be written ({error.strerror})."
        ) from None
    return lock


def _write_config(cfg: RunConfig) -> None:
    path = Path(cfg.train.out, "config.json")
    path.write_text(json.dumps(to_dict(cfg), indent=2) + "\n", encoding="utf-8")


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

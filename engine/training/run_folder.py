"""The folder of a training run: its checkpoints, its config.json, its lock.

Not here: what a checkpoint holds (checkpoint.py), the log (logger.py).
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
from pathlib import Path
from typing import TextIO

from config_tools import InputError, checkpoint_order, to_dict
from configs import RunConfig
from configs_classify import ClassifyConfig

STATE = "state.pt"


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (p for p in run.glob("step-*") if (p / STATE).is_file())
    return sorted(found, key=checkpoint_order)


def lock_run_folder(run: Path) -> TextIO:
    """Lock the folder until the returned file is closed; raises `InputError` if it is locked.

    The lock ends with the process and is not inherited by child processes.
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
        owner, fix = file.read().strip(), "stop it first, or choose another --train.out"
        raise InputError(f"{run}: process {owner} is training there; {fix}.") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return file  # the file system has no locks
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def claim_run_folder(cfg: RunConfig | ClassifyConfig) -> TextIO:
    """Create and lock the run folder, remove leftovers, and write config.json.

    Returns the lock (see `lock_run_folder`). Raises `InputError` if the folder holds another run
    and `train.resume` is no, if another process trains there, or if it cannot be written.
    """
    run = Path(cfg.train.out)
    if cfg.train.resume == "no" and list_checkpoints(run):
        fix = "continue it with --train.resume auto, choose another --train.out, or delete it"
        raise InputError(f"{run} holds the checkpoints of an earlier run; {fix}.")
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = lock_run_folder(run)
        for partial in (*run.glob(".saving-*"), *run.glob(".shards-*")):  # of a killed process
            shutil.rmtree(partial)
        if cfg.train.resume == "no":
            for stale in (run / "log.jsonl", run / "skipped.jsonl", *run.glob("bad-step-*.pt")):
                stale.unlink(missing_ok=True)
        write_config(cfg)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise InputError(f"train.out = {str(run)!r}: {reason}.") from None
    return lock


def write_config(cfg: RunConfig | ClassifyConfig) -> None:
    """Write the run's config.json, which `python train.py runs/x/config.json` reads."""
    path = Path(cfg.train.out, "config.json")
    path.write_text(json.dumps(to_dict(cfg), indent=2) + "\n", encoding="utf-8")

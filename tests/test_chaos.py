"""Kill a run with SIGKILL at any moment: the resumed run ends bit for bit the same."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from config_tools import read_json

STEPS = 6
STREAM = {"stream": True, "stream_block": 7}
SHARDS = {"parallel": "fsdp", "optimizer": "adamw"}
KINDS = {  # name -> data, processes
    "map": ({"packing": True}, 1),
    "map-2-workers": ({"packing": True, "workers": 2}, 1),
    "stream": (STREAM, 1),
    "stream-2-workers": (STREAM | {"workers": 2, "packing": True}, 1),
    "map-2-processes": ({}, 2),
    "map-2-shards": ({}, 2),
    "stream-2-processes": (STREAM | {"stream_block": 5, "workers": 1}, 2),
}
# When to kill a process: name -> (function, number of the call).
MOMENTS = {
    "step": ("engine.training.loop.clip_gradients", 3),
    "packing": ("data.batches.loader.collate", 4),
    "evaluation": ("train.evaluate", 1),
    "weights": ("models.pretrained.safetensors_io.save_file", 2),
    "state": ("engine.training.checkpoint._flush", 2),
    "rename": ("engine.training.checkpoint._point", 2),
}


@pytest.fixture
def config(run_file, rows_file):
    """`config(name, kind)` -> config file of a run with evaluation, checkpoints and dropout."""
    __import__("datasets")  # once, not in each forked process

    def write(name: str, kind: str) -> Path:
        data = {"val_fraction": 0.2} | KINDS[kind][0]
        if data.get("stream"):  # streams need absolute image paths
            rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
            rows = [row | {"image": str(rows_file.parent / row["image"])} for row in rows]
            data["source"] = str(rows_file.with_name("whole.jsonl"))
            Path(data["source"]).write_text("\n".join(map(json.dumps, rows)))
        train = dict(steps=STEPS, save_every=2, eval_every=3, eval_samples=2, answer_sheet_every=0)
        train |= SHARDS if kind.endswith("shards") else {}
        return run_file(name, {"lm_dropout": 0.1}, data, **train, max_bad_steps=1)

    return write


def folder(config: Path) -> Path:
    return Path(read_json(config)["train"]["out"])


def result(run: Path) -> tuple[dict, dict]:
    """Return (weights, every logged value of each step), without times."""
    logged: dict = {}
    for event in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        names = ("loss", "grad_norm", "grad_norm_vision", "val_loss", "val_accuracy")
        for name in names:
            if name in event:
                logged.setdefault((event["step"], name), set()).add(event[name])
    return load_file(run / f"step-{STEPS:06d}" / "model.safetensors"), logged


def assert_same(whole: Path, other: Path) -> None:
    (x, logged), (y, logged_again) = result(whole), result(other)
    assert logged_again == logged, "a repeated step logs the same values"
    assert [name for name in x if not torch.equal(x[name], y[name])] == []
    states = [torch.load(r / f"step-{STEPS:06d}" / "state.pt", weights_only=True)
              for r in (whole, other)]  # fmt: skip
    assert states[0]["loader"] == states[1]["loader"] and states[0]["best"] == states[1]["best"]
    assert not list(other.glob(".saving-*")), "leftovers of killed processes are removed"


def kill_at(where: str, call: int):
    """Return a function that makes process 0 kill itself at the n-th call of a function."""

    def arm(rank: int) -> None:
        if rank:
            return
        module, _, name = where.rpartition(".")
        module = __import__(module, fromlist=[name])
        original, left = getattr(module, name), [call]

        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, counted)

    return arm


def finish(launch, argv: list[str], world: int, before=lambda rank: None) -> list[int]:
    """Return exit codes; if one process is killed, kill the others, as torchrun does."""
    processes = launch(argv, world, before)
    while any(p.is_alive() for p in processes):
        if any(p.exitcode not in (None, 0) for p in processes):
            for p in processes:
                p.kill()
        processes[0].join(0.02)
    for p in processes:
        p.join()
    return [p.exitcode for p in processes]


def whole_run(launch, config, kind: str) -> Path:
    path, world = config("whole", kind), KINDS[kind][1]
    output = path.parent / "output.txt"
    assert finish(launch, [str(path)], world) == [0] * world, output.read_text()[-3000:]
    return folder(path)


@pytest.mark.parametrize(("kind", "moments"), [
    ("map", ["rename", "state"]),
    pytest.param("stream-2-workers", ["packing"], marks=pytest.mark.slow)])  # fmt: skip
def test_a_killed_and_resumed_run_is_the_same(launch, config, kind, moments):
    whole, world = whole_run(launch, config, kind), KINDS[kind][1]
    path = config("parts", kind)
    argv = [str(path), "--train.resume", "auto"]
    for moment in moments:
        assert finish(launch, argv, world, kill_at(*MOMENTS[moment]))[0] == -signal.SIGKILL
    assert finish(launch, argv, world) == [0] * world
    assert_same(whole, folder(path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_moment(launch, config, kind):
    """At all MOMENTS in turn: 42 kills in total."""
    whole, world = whole_run(launch, config, kind), KINDS[kind][1]
    path = config("parts", kind)
    argv = [str(path), "--train.resume", "auto"]
    for where, _ in MOMENTS.values():
        assert -signal.SIGKILL in finish(launch, argv, world, kill_at(where, 1))
    assert finish(launch, argv, world) == [0] * world
    assert_same(whole, folder(path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(launch, config, kind):
    """After random times: 28 kills in total."""
    rng = random.Random(kind)
    begin = time.monotonic()
    whole, world = whole_run(launch, config, kind), KINDS[kind][1]
    seconds = time.monotonic() - begin
    path = config("parts", kind)
    argv = [str(path), "--train.resume", "auto"]
    for _ in range(4):
        processes = launch(argv, world)
        time.sleep(rng.uniform(0.1, 0.9) * seconds)
        for p in processes:
            p.kill()
        for p in processes:
            p.join()
    assert finish(launch, argv, world) == [0] * world
    assert_same(whole, folder(path))

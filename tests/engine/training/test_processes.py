"""Two processes train like one with twice the batches, with DDP and with FSDP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from config_tools import InputError, read_json
from configs import TrainConfig
from engine.training import checkpoint
from train import main

ROOT = Path(__file__).parents[3]
# Gradients of key biases are rounding noise, which Adam would amplify.
MODEL = {"vit_qkv_bias": False}


def folder(config: Path) -> Path:
    return Path(read_json(config)["train"]["out"])


def events(run: Path) -> list[list[float]]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    names = ("loss", "grad_norm", "grad_norm_vision", "grad_norm_language")
    return [[e["step"], *(e[name] for name in names)] for e in lines if "loss" in e]


def run_two(launch, argv: list[str], output: Path, before=lambda rank: None) -> None:
    processes = launch(argv, 2, before)
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0, 0], output.read_text()[-3000:]


@pytest.fixture
def mixed_rows(tmp_path, rows_file) -> str:
    """Images only on even rows, so that a process may have none; answers differ in length."""
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["image"] = str(rows_file.parent / row["image"])
        if i % 2:
            del row["image"]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "mixed.jsonl")


def few_logits(rank: int) -> None:
    """Compute the loss in chunks, as with a large vocabulary."""
    import models.ops.token_loss

    models.ops.token_loss.MAX_LOGITS["cpu"] = 640 * 4


def same_curve(one: Path, two: Path, n: int) -> None:
    assert [e[0] for e in events(one)] == [e[0] for e in events(two)] == list(range(1, n + 1))
    for x, y in zip(events(one), events(two), strict=True):
        torch.testing.assert_close(torch.tensor(x), torch.tensor(y), rtol=1e-5, atol=1e-5)


BOTH = ("vision", "language")


@pytest.mark.parametrize(("parallel", "checkpointing"), [
    ("ddp", ()), pytest.param("fsdp", (), marks=pytest.mark.slow),
    pytest.param("ddp", BOTH, marks=pytest.mark.slow),
    pytest.param("fsdp", BOTH, marks=pytest.mark.slow)])  # fmt: skip
def test_two_processes_match_one_with_twice_the_batches(
    launch, run_file, mixed_rows, parallel, checkpointing
):
    """20 steps of 2 micro-batches, with and without images, with unequal numbers of targets.

    Only the two processes use activation checkpointing.
    """
    data, train = {"source": mixed_rows}, dict(steps=20, optimizer="adamw", lr_vision=3e-4,
                                               lr_projector=3e-4, lr_language=3e-4)  # fmt: skip
    one = run_file("one", MODEL, data, **train, accumulate=4)
    main([str(one)])
    train |= dict(accumulate=2, parallel=parallel, activation_checkpointing=checkpointing)
    two = run_file("two", MODEL, data, **train)
    run_two(launch, [str(two)], two.parent / "output.txt", few_logits)
    same_curve(folder(one), folder(two), 20)
    x, y = (load_file(folder(c) / "step-000020" / "model.safetensors") for c in (one, two))
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=1e-3, atol=1e-4)


def compile_without_a_compiler(rank: int) -> None:
    """Compile with backend `aot_eager`, which traces forward and backward without a compiler."""
    import engine.training.distributed
    import train

    engine.training.distributed.missing_compiler = lambda _: ""
    train.compile_blocks = partial(train.compile_blocks, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_with_compiled_blocks(launch, run_file, mixed_rows, parallel):
    train = dict(steps=6, optimizer="adamw", parallel=parallel, accumulate=2,
                 activation_checkpointing=("language",))  # fmt: skip
    data = {"source": mixed_rows, "packing": True}
    plain, made = (run_file(c, MODEL, data, **train, compile=c) for c in ("off", "on"))
    output = plain.parent / "output.txt"
    run_two(launch, [str(plain)], output)
    run_two(launch, [str(made)], output, compile_without_a_compiler)
    assert ", torch.compile on, " in output.read_text()
    same_curve(folder(plain), folder(made), 6)


@pytest.mark.slow
def test_an_fsdp_run_resumes_and_evaluates(launch, run_file):
    """A stopped FSDP run resumes bit for bit, and its checkpoints hold whole models."""
    train = dict(steps=4, optimizer="adamw", parallel="fsdp", eval_every=2, eval_samples=2)
    data = {"val_fraction": 0.3}
    whole, parts = (run_file(n, {"lm_dropout": 0.1}, data, **train) for n in ("whole", "parts"))
    output = whole.parent / "output.txt"
    run_two(launch, [str(whole)], output)

    def stop_in_step_2(rank: int) -> None:
        import os

        import engine.training.loop

        original, left = engine.training.loop.clip_gradients, [2]

        def counted(*args):
            left[0] -= 1
            if left[0] == 0 and rank == 1:  # a signal to one process stops all
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        engine.training.loop.clip_gradients = counted

    run_two(launch, [str(parts)], output, stop_in_step_2)
    assert [p.name for p in checkpoint.list_checkpoints(folder(parts))] == ["step-000002"]
    assert (folder(parts) / "step-000002" / "shards" / ".metadata").is_file()
    run_two(launch, [str(parts), "--train.resume", "auto"], output)
    x, y = (load_file(folder(c) / "step-000004" / "model.safetensors") for c in (whole, parts))
    assert [name for name in x if not torch.equal(x[name], y[name])] == []
    assert events(folder(whole)) == events(folder(parts))
    lines = (folder(whole) / "log.jsonl").read_text()
    assert '"val_loss"' in lines


def test_each_process_has_its_own_dropout_generator(launch, run_file):
    """A checkpoint holds the generators of all processes, and they differ."""
    config = run_file("run", {"lm_dropout": 0.1}, steps=2)
    run_two(launch, [str(config)], config.parent / "output.txt")
    state = torch.load(folder(config) / "step-000002" / "state.pt", weights_only=True)
    first, second = state["rng"]
    assert state["world"] == 2 and not torch.equal(first["torch"], second["torch"])
    with pytest.raises(InputError, match=r"processes: was 2, now 1.*--train\.init-from"):
        main([str(config), "--train.resume", "auto", "--train.steps", "2"])


def test_options_that_fsdp_does_not_support_are_refused():
    for changes in ({}, {"optimizer": "adamw", "ema": 0.9}, {"optimizer": "adamw",
                                                             "lora": ("language",)}):  # fmt: skip
        with pytest.raises(InputError, match="parallel = 'fsdp'"):
            TrainConfig(parallel="fsdp", **changes)


# --- With torchrun --------------------------------------------------------------------------------


def torchrun(output: Path, *argv: str) -> subprocess.Popen:
    """Start `torchrun argv` with one thread per process."""
    with open(output, "w") as out:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *argv], cwd=ROOT,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out,
                                stderr=out)  # fmt: skip


def same_weights(one: Path, two: Path, step: str) -> None:
    x, y = (load_file(folder(c) / step / "model.safetensors") for c in (one, two))
    assert [name for name in x if not torch.equal(x[name], y[name])] == []


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker(run_file, tmp_path):
    """With --max-restarts and --train.resume auto, the run ends with the same weights."""
    train, output = dict(steps=120, save_every=20, log_every=10), tmp_path / "torchrun.txt"
    whole, again = (run_file(n, {"lm_dropout": 0.1}, **train) for n in ("whole", "again"))
    launch = ["--standalone", "--nproc-per-node=2", "--max-restarts=2", "train.py"]
    for config in (whole, again):
        process = torchrun(output, *launch, str(config), "--train.resume", "auto")
        if config == again:
            deadline = time.monotonic() + 300
            while not list(folder(again).glob("step-*")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            os.kill(int(children.split()[-1]), signal.SIGKILL)
        assert process.wait(600) == 0, output.read_text()[-3000:]
    same_weights(whole, again, "step-000120")


@pytest.mark.slow
def test_two_nodes_match_one_with_two_processes(run_file, tmp_path):
    """Two torchrun commands with a rendezvous endpoint, as in docs/scaling.md."""
    one, two = (run_file(n, {"lm_dropout": 0.1}, steps=4) for n in ("one", "two"))
    alone = torchrun(tmp_path / "0.txt", "--standalone", "--nproc-per-node=2", "train.py", str(one))
    assert alone.wait(300) == 0, (tmp_path / "0.txt").read_text()[-3000:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        end = f"127.0.0.1:{free.getsockname()[1]}"
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={end}",
            "--rdzv-id=test", "--local-addr=127.0.0.1", "train.py", str(two)]  # fmt: skip
    nodes = [torchrun(tmp_path / f"{i}.txt", *meet) for i in (1, 2)]
    for i, node in enumerate(nodes, 1):
        assert node.wait(300) == 0, (tmp_path / f"{i}.txt").read_text()[-3000:]
    same_weights(one, two, "step-000004")
    assert events(folder(one)) == events(folder(two))

"""Training is deterministic: resumed, accumulated and compiled runs match uninterrupted ones."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data.batches.loader
from config_tools import InputError, read_json
from configs import TrainConfig
from engine.training import distributed
from engine.training.distributed import Dist
from engine.training.logger import read_log
from engine.training.loop import find_bad_batches, save_bad_batches
from models.inference.compile import compile_blocks
from models.vision_language_model import VisionLanguageModel
from train import main

ROOT = Path(__file__).parents[3]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def train_run(config: Path, *flags: str) -> Path:
    """Train in this process; return the run folder."""
    main([str(config), *flags])
    return Path(read_json(config)["train"]["out"])


def weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(run / f"step-{step:06d}" / "model.safetensors")


def events(run: Path) -> list[tuple]:
    """(step, loss, grad_norm, lr_factor) of every training line of the log."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(e["step"], e["loss"], e["grad_norm"], e["lr_factor"]) for e in lines if "loss" in e]


def same_state(a, b) -> bool:
    """Compare nested states; tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def state_of(run: Path, step: int = 6) -> dict:
    state = torch.load(run / f"step-{step:06d}" / "state.pt", weights_only=True)
    names = ("step", "optimizer", "loader", "precision")
    return {k: state[k] for k in names} | {"rng": state["rng"][0]}


def assert_same_run(a: Path, b: Path) -> None:
    x, y = weights(a), weights(b)
    assert [k for k in x if not torch.equal(x[k], y[k])] == []
    assert events(a) == events(b)
    assert same_state(state_of(a), state_of(b))


@pytest.mark.parametrize(
    ("model", "data", "train"),
    [
        ({}, {}, {}),
        ({"lm_dropout": 0.2, "vit_dropout": 0.1}, {"packing": True}, {"accumulate": 2}),
        ({"lm_tie_weights": False}, {"batch_size": 2, "workers": 1}, {"optimizer": "adamw"}),
    ],
    ids=["plain", "dropout-packed-accumulated", "adamw-untied-worker"],
)
def test_resumed_runs_match_uninterrupted_ones(run_file, stop_after, capsys, model, data, train):
    whole = train_run(run_file("whole", model, data, **train))
    config = run_file("parts", model, data, **train)
    stop_after(3)
    parts = train_run(config)
    assert not (parts / "step-000006").exists()
    printed = capsys.readouterr().out
    assert f"python train.py {parts}/config.json --train.resume auto" in printed
    torch.manual_seed(99)  # a new process would have another generator state
    train_run(parts / "config.json", "--train.resume", "auto")
    assert_same_run(whole, parts)


def test_prefetched_batches_change_nothing(run_file, stop_after, monkeypatch):
    """On a GPU, the next step's batches are prepared while it still computes."""
    train, packed = {"accumulate": 2}, {"packing": True}
    whole = train_run(run_file("whole", {}, packed, **train))
    monkeypatch.setattr(Dist, "is_async", True)
    config = run_file("parts", {}, packed, **train)
    stop_after(3)
    parts = train_run(config)
    torch.manual_seed(99)
    train_run(parts / "config.json", "--train.resume", "auto")
    assert_same_run(whole, parts)


def test_compiled_blocks_train_like_eager_ones(run_file, stop_after, monkeypatch, capsys):
    """With backend `eager`, which needs no compiler."""
    monkeypatch.setattr(distributed, "missing_compiler", lambda _: "")
    monkeypatch.setattr("train.compile_blocks", partial(compile_blocks, backend="eager"))
    plain, compiled = {"packing": True}, dict(optimizer="adamw", compile="on")
    whole = train_run(run_file("whole", {}, plain, **compiled))
    assert ", torch.compile on, " in capsys.readouterr().out
    config = run_file("parts", {}, plain, **compiled)
    stop_after(3)
    parts = train_run(config)
    train_run(parts / "config.json", "--train.resume", "auto")
    assert_same_run(whole, parts)
    other = train_run(run_file("other", {}, plain, optimizer="adamw"))
    assert weights(whole).keys() == weights(other).keys()
    for (_, *x), (_, *y) in zip(events(whole), events(other), strict=True):
        torch.testing.assert_close(torch.tensor(x), torch.tensor(y), rtol=1e-5, atol=1e-5)


def test_the_seed_determines_the_run(run_file):
    a, b = (train_run(run_file(name, {"lm_dropout": 0.1})) for name in "ab")
    assert_same_run(a, b)
    c = train_run(run_file("c", {"lm_dropout": 0.1}, seed=1))
    assert events(a) != events(c)


def test_config_json_of_a_resumed_run_is_unchanged(run_file, stop_after):
    config = run_file("run")
    stop_after(2)
    run = train_run(config)
    train_run(run / "config.json", "--train.resume", "auto")
    again = read_json(run / "config.json")["train"]
    assert again["init_from"] == ""  # else a copy of the file would not start from scratch
    assert again | {"resume": "no"} == read_json(config)["train"]


def test_gradient_accumulation_matches_a_larger_batch(run_file):
    # Gradients of key biases are rounding noise, which Adam would amplify.
    model = {"vit_qkv_bias": False}
    whole = train_run(run_file("whole", model, {"batch_size": 4}, steps=3, optimizer="adamw"))
    split = train_run(
        run_file("split", model, {"batch_size": 2}, steps=3, accumulate=2, optimizer="adamw")
    )
    for (_, *x), (_, *y) in zip(events(whole), events(split), strict=True):
        torch.testing.assert_close(torch.tensor(x), torch.tensor(y), rtol=1e-5, atol=1e-5)
    x, y = weights(whole, 3), weights(split, 3)
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_frozen_parts_do_not_change(run_file, part):
    run = train_run(run_file("run", steps=2, freeze=(part,), weight_decay=0.5))
    prefix = {"vision": "vision_encoder.", "projector": "MP.", "language": "decoder."}
    torch.manual_seed(0)
    model = VisionLanguageModel.from_pretrained(run / "step-000002")
    torch.manual_seed(0)
    before = VisionLanguageModel(model.cfg).state_dict()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(name.startswith(prefix[part]) for name in moved)
    for other in prefix.keys() - {part}:
        assert any(name.startswith(prefix[other]) for name in moved)


def test_training_on_rows_without_images(run_file, tmp_path):
    rows = [{"question": f"What is {i}?", "answer": "yes"} for i in range(8)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"source": str(tmp_path / "text.jsonl"), "val_fraction": 0.3}
    run = train_run(run_file("run", data=data, steps=12, lr_language=0.01, warmup=0))
    losses = [loss for _, loss, *_ in events(run)]
    assert losses[-1] < 0.7 * losses[0]
    assert (run / "step-000012" / "model.safetensors").is_file()


def inject_nan(monkeypatch, bad: set[int]) -> None:
    """Set the images of the chosen batches, counted from 0, to NaN."""
    collate, count = data.batches.loader.collate, iter(range(1000))

    def collate_with_nan(*args):
        batch = collate(*args)
        if next(count) in bad:
            batch.images.fill_(torch.nan)
        return batch

    monkeypatch.setattr(data.batches.loader, "collate", collate_with_nan)


def test_a_non_finite_step_is_skipped_and_logged(run_file, monkeypatch, capsys):
    inject_nan(monkeypatch, {1})
    run = train_run(run_file("run", steps=3, save_every=1, keep=3, warmup=0))
    x, y = weights(run, 1), weights(run, 2)
    assert all(torch.equal(x[k], y[k]) for k in x)
    assert same_state(state_of(run, 1)["optimizer"][0]["state"],
                      state_of(run, 2)["optimizer"][0]["state"])  # fmt: skip
    (kept,) = torch.load(run / "bad-step-000001.pt", weights_only=True)
    assert kept["images"].isnan().all() and kept["input_ids"].shape[0] == 1
    assert "step skipped, batch saved in" in (out := capsys.readouterr()).out + out.err
    lines = (run / "log.jsonl").read_text().splitlines()
    steps = [e for e in (json.loads(x, parse_constant=refuse) for x in lines) if "loss" in e]
    assert [e["bad_steps"] for e in steps] == [0, 1, 1]
    assert [e["loss"] is None for e in steps] == [False, True, False]
    assert [e["step"] for e in read_log(run) if "loss" in e] == [1, 3]
    shutil.rmtree(run / "step-000003")
    train_run(run / "config.json", "--train.resume", "auto")
    assert events(run)[-1][0] == 3 and read_log(run)[-2]["bad_steps"] == 1, "lost on resume"


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def test_every_process_saves_its_own_bad_batch(tmp_path):
    for rank in (0, 1):
        batch = types.SimpleNamespace(tensors=lambda rank=rank: {"x": torch.full((2,), rank)})
        path = save_bad_batches(tmp_path, 7, [batch], rank)
        (kept,) = torch.load(path, weights_only=True)
        assert kept["x"].tolist() == [rank, rank]
    assert len(list(tmp_path.iterdir())) == 2 and len(find_bad_batches(tmp_path)) == 1


def test_consecutive_bad_steps_stop_the_run(run_file, monkeypatch):
    inject_nan(monkeypatch, {1, 3, 4})
    config = run_file("run", steps=6, save_every=1, max_bad_steps=2)
    with pytest.raises(InputError, match="2 steps in a row"):
        train_run(config)
    run = Path(read_json(config)["train"]["out"])
    assert (run / "step-000004").is_dir() and not (run / "step-000005").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are restored


def test_resuming_with_other_settings_is_refused(run_file, stop_after):
    stop_after(2)
    run = train_run(run_file("run"))
    resume = ["--train.resume", "auto"]
    for flag, value, name in [
        ("--train.lr-muon", "0.5", f"train.lr_muon: was {TrainConfig().lr_muon}, now 0.5"),
        ("--data.batch-size", "3", "data.batch_size: was 1, now 3"),
        ("--model.lm-dropout", "0.5", "model.lm_dropout: was 0.0, now 0.5"),
    ]:
        with pytest.raises(InputError, match=name):
            train_run(run / "config.json", *resume, flag, value)
    with pytest.raises(InputError, match="holds the checkpoints of an earlier run"):
        train_run(run / "config.json")
    train_run(run / "config.json", *resume, "--train.log-every", "2", "--data.workers", "1")
    assert (run / "step-000006").is_dir()


@pytest.mark.parametrize(("workers", "sent"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_saves_and_the_printed_command_continues(run_file, stop_after, workers, sent):
    """The signal goes to the whole process group, as from a terminal, including workers."""
    config = run_file("run", steps=3000)
    run = Path(read_json(config)["train"]["out"])
    command = [sys.executable, "train.py", str(config), "--data.workers", str(workers)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not ((run / "log.jsonl").is_file() and (run / "log.jsonl").stat().st_size):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()  # otherwise communicate() waits for 3,000 steps
            raise AssertionError(process.communicate())
        time.sleep(0.05)
    os.killpg(process.pid, sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    (folder,) = run.glob("step-*")
    step = int(folder.name[5:])
    assert events(run)[-1][0] == step < 3000
    assert f"saved {run} at step {step}; continue with: " in out
    python, script, *flags = shlex.split(out.partition("continue with: ")[2])
    assert (python, script) == ("python", "train.py")
    stop_after(2)
    main(flags)
    assert [e[0] for e in events(run)[-3:]] == [step, step + 1, step + 2]

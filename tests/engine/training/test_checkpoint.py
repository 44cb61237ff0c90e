"""A checkpoint is complete or absent; an interrupted save keeps the previous one."""

from __future__ import annotations

import errno
import random
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config_tools import InputError, newest_checkpoint, read_json
from configs import RunConfig, TrainConfig
from engine.training import checkpoint, run_folder
from engine.training.distributed import Dist
from engine.training.optim import build_optimizer
from models.vision_language_model import VisionLanguageModel


@pytest.fixture
def made(tmp_path, minute_config, tiny_processor):
    """Return (cfg, save(step)) of a run in a new folder."""
    cfg = RunConfig(model=minute_config(), train=TrainConfig(out=str(tmp_path / "run"), keep=2))
    model, processor = VisionLanguageModel(cfg.model), replace(tiny_processor, cfg=cfg.model)

    alone = Dist(0, 1, torch.device("cpu"))
    optimizer = build_optimizer(model.parts, cfg.train)

    def write(model, folder):
        model.save_pretrained(folder, processor)

    def save(step: int, **state) -> Path:
        checkpoint.save(cfg, step, model, write, optimizer, alone, state)
        return Path(cfg.train.out) / f"step-{step:06d}"

    return cfg, save


def names(cfg: RunConfig) -> list[str]:
    """Files of a run folder, without config.json."""
    return sorted(p.name for p in Path(cfg.train.out).iterdir() if p.name != "config.json")


def test_the_newest_are_kept_and_found(made):
    cfg, save = made
    for step in (5, 10, 100000, 1000000):
        save(step)
    assert names(cfg) == ["step-100000", "step-1000000"]
    assert checkpoint.resolve(cfg.train.out).name == "step-1000000"


def test_steps_are_ordered_by_number_not_by_name(made):
    cfg, save = made
    for step in (999000, 999500, 1000000, 1000500):
        save(step)
    assert names(cfg) == ["step-1000000", "step-1000500"]
    assert checkpoint.resolve(cfg.train.out).name == newest_checkpoint(Path(cfg.train.out)).name
    assert checkpoint.resolve(cfg.train.out).name == "step-1000500"


def test_a_resumed_run_keeps_its_precision(made):
    """With auto, a new measurement could choose another precision."""
    _, save = made
    assert checkpoint.resumed_precision([], "auto") == "auto", "a new run"
    for step, precision in ((5, "fp32"), (6, "bf16")):
        found = [save(step, precision=precision)]
        assert checkpoint.resumed_precision(found, "auto") == precision
        assert checkpoint.resumed_precision(found, "fp32") == "fp32", "an explicit precision"
    assert checkpoint.resumed_precision([save(7)], "auto") == "auto", "an earlier version"
    (found[0] / checkpoint.STATE).write_bytes(b"half")
    with pytest.raises(InputError, match=r"state\.pt: damaged"):
        checkpoint.resumed_precision(found, "auto")


def test_a_state_saved_on_a_gpu_opens_without_one(made, monkeypatch):
    cfg, save = made
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        folder = save(5, extra=torch.ones(3))
    with pytest.raises(RuntimeError, match="on a CUDA device"):
        torch.load(folder / checkpoint.STATE, weights_only=True)
    assert checkpoint.load_state(folder, cfg)["extra"].device.type == "cpu"
    assert checkpoint.resumed_precision([folder], "auto") == "auto"


def test_processes_with_the_largest_seed_draw_different_numbers():
    """torch's seeds are limited to 64 bits."""
    found = []
    for rank in range(1, 4):
        checkpoint.seed_generators(2**63 - 1, rank)
        found.append((random.random(), float(np.random.rand()), torch.rand(()).item()))
    assert all(len(set(drawn)) == 3 for drawn in zip(*found))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks(made, monkeypatch, code):
    cfg, _ = made

    def refuse(*_):
        raise OSError(code, "refused")

    monkeypatch.setattr("fcntl.lockf", refuse)
    if code == errno.EIO:
        with pytest.raises(InputError, match="cannot be written"):
            run_folder.claim_run_folder(cfg)
    else:
        run_folder.claim_run_folder(cfg).close()


def test_incomplete_checkpoints_are_ignored(made):
    cfg, save = made
    save(5)
    run = Path(cfg.train.out)
    for name in (".saving-000009-123", "step-000009"):
        (run / name).mkdir()
        (run / name / "model.safetensors").write_bytes(b"half")
    assert [p.name for p in checkpoint.list_checkpoints(run)] == ["step-000005"]
    assert checkpoint.resolve(run).name == "step-000005"
    save(9)  # replaces the incomplete folder of the same step
    assert checkpoint.load_state(checkpoint.resolve(run), cfg)["step"] == 9


def break_save(monkeypatch, how: str) -> None:
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    if how == "weights":
        monkeypatch.setattr("models.pretrained.safetensors_io.save_file", full)
    elif how == "state":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(Path, "rename", full)


@pytest.mark.parametrize("how", ["weights", "state", "rename"])
def test_a_full_disk_keeps_the_previous_checkpoint(made, monkeypatch, how):
    cfg, save = made
    save(5)
    with monkeypatch.context() as patched:
        break_save(patched, how)
        with pytest.raises(InputError, match=r"step-000010.*No space left on device"):
            save(10)
    assert names(cfg) == ["step-000005"]
    assert checkpoint.load_state(checkpoint.resolve(cfg.train.out), cfg)["step"] == 5


@pytest.mark.parametrize("limit", [30_000, 300_000], ids=["weights", "state"])
def test_a_file_size_limit_is_an_input_error(made, limit):
    """Libraries raise different errors when a write fails; RLIMIT_FSIZE makes it fail."""
    cfg, save = made
    save(5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError, match="could not be written"):
            save(10, extra=torch.zeros(500_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(cfg) == ["step-000005"]


def test_rng_state_round_trip():
    def draws():
        return torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()

    random.gauss(0, 1), np.random.randn()  # both cache a second value
    state = checkpoint.rng_state()
    first = draws(), random.gauss(0, 1), float(np.random.randn())
    draws()
    checkpoint.set_rng_state(state)
    assert (draws(), random.gauss(0, 1), float(np.random.randn())) == first


def test_load_state_names_changed_settings(made):
    cfg, save = made
    folder = save(5)
    other = replace(cfg, train=replace(cfg.train, beta2=0.5, log_every=3, keep=9))
    with pytest.raises(InputError, match=r"train.beta2: was 0.98, now 0.5\)"):
        checkpoint.load_state(folder, other)
    assert checkpoint.load_state(folder, cfg)["provenance"]["torch"] == torch.__version__


def test_a_run_folder_is_not_overwritten(made):
    cfg, save = made
    save(5)
    with pytest.raises(InputError, match=r"--train\.resume auto"):
        run_folder.claim_run_folder(cfg)
    resumed = replace(cfg, train=replace(cfg.train, resume="auto"))
    run_folder.claim_run_folder(resumed)
    assert read_json(Path(cfg.train.out) / "config.json")["train"]["resume"] == "auto"


@pytest.mark.parametrize("kind", ["absent", "empty", "file"])
def test_a_missing_checkpoint_is_named(tmp_path, kind):
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("x")
    with pytest.raises(InputError, match=str(path)):
        checkpoint.resolve(path)

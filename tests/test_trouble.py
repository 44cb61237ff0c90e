"""What goes wrong on the machine under a run costs one sentence, and nothing that was there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

import engine.training.checkpoint
import engine.training.logger
import train
from cli import command
from config_tools import InputError, read_json
from data import prepare
from engine.training import checkpoint
from engine.training.run_folder import lock_run_folder


def folder(config: Path) -> Path:
    return Path(read_json(config)["train"]["out"])


def test_two_runs_in_one_folder(launch, run_file, tmp_path, capsys):
    """The second one leaves at once and touches nothing; the first goes on to its end."""
    config = run_file("run", steps=4, save_every=1)
    run = folder(config)
    run.mkdir()
    hold = lock_run_folder(run)  # by this process: what is forked from it does not have the lock
    (run / "log.jsonl").write_text('{"step": 1}\n')
    (second,) = launch([str(config)])
    second.join(60)
    said = (tmp_path / "said.txt").read_text()
    assert second.exitcode == 2
    assert f"process {os.getpid()} on " in said and "is training there" in said
    assert (run / "log.jsonl").read_text() == '{"step": 1}\n' and not (run / "config.json").exists()
    hold.close()
    train.main([str(config)])
    assert (run / "step-000004").is_dir()
    with open(run / ".lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_really(run_file, tmp_path):
    config = run_file("closed/run")
    (tmp_path / "closed").chmod(0o500)
    with pytest.raises(InputError, match=r"train\.out = .*cannot be written \(Permission denied\)"):
        train.main([str(config)])


def test_a_read_only_folder_is_refused_before_training(run_file, monkeypatch, capsys):
    config = run_file("run")

    def refuse(*_args, **_options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SystemExit) as stop:
        command(train.main, [str(config)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert "train.out = " in line and "cannot be written (Read-only file system)" in line


def test_a_full_disk_stops_the_log_not_the_run(run_file, monkeypatch, capsys):
    """A line that cannot be written is told once; checkpoints are the run."""
    config = run_file("run", steps=4, save_every=2)
    dumps = json.dumps

    def full(value, *args, **options):
        if isinstance(value, dict) and "loss" in value and value["step"] > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return dumps(value, *args, **options)

    monkeypatch.setattr(engine.training.logger.json, "dumps", full)
    train.main([str(config)])
    said = "".join(capsys.readouterr())
    assert said.count("log.jsonl: cannot be written (No space left on device)") == 1
    assert [p.name for p in checkpoint.list_checkpoints(folder(config))] == [
        "step-000002",
        "step-000004",
    ]


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(run_file, monkeypatch, capsys):
    config = run_file("run", steps=4, save_every=2)
    flush, left = engine.training.checkpoint._flush, [2]

    def full(path):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(engine.training.checkpoint, "_flush", full)
    with pytest.raises(SystemExit):
        command(train.main, [str(config)])
    err = capsys.readouterr().err
    assert "step-000004: the checkpoint could not be written (" in err and "Traceback" not in err
    assert [p.name for p in checkpoint.list_checkpoints(folder(config))] == ["step-000002"]
    train.main([str(config), "--train.resume", "auto"])
    assert (folder(config) / "step-000004").is_dir()


@pytest.mark.parametrize("what", ["checkpoint", "run"])
def test_what_is_deleted_under_a_run_is_written_again(run_file, monkeypatch, what):
    """A checkpoint, or the whole folder; the command that continues works afterwards."""
    config = run_file("run", steps=6, save_every=2, keep=1)
    run, point, left = folder(config), engine.training.checkpoint._point, [1]

    def delete(link, target):
        point(link, target)
        left[0] -= 1
        if left[0] == 0:
            shutil.rmtree(run if what == "run" else run / "step-000002")

    monkeypatch.setattr(engine.training.checkpoint, "_point", delete)
    train.main([str(config)])
    assert [p.name for p in checkpoint.list_checkpoints(run)] == ["step-000006"]
    lines = (run / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6
    train.main([str(run / "config.json"), "--train.resume", "auto"])


def test_the_best_is_kept_beside_the_newest(run_file, monkeypatch):
    """Accuracy decides, loss among equals; a resumed run still knows which it was."""
    scores = {1: (0.1, 3.0), 2: (0.5, 2.0), 3: (0.5, 1.9), 4: (0.4, 1.0), 5: (0.5, 1.95), 6: (0, 0)}

    def fixed(cfg, model, processor, dist, autocast_context, step):
        accuracy, loss = scores[step]
        return {"val_accuracy": accuracy, "val_loss": loss}

    monkeypatch.setattr(train, "evaluate_at", fixed)
    config = run_file("run", steps=6, eval_every=1, save_every=1, keep=1)
    train.main([str(config)])
    run = folder(config)
    assert [p.name for p in checkpoint.list_checkpoints(run)] == ["step-000003", "step-000006"]
    assert os.readlink(run / "best") == "step-000003"
    shutil.rmtree(run / "step-000006")
    train.main([str(config), "--train.resume", "auto"])
    assert [p.name for p in checkpoint.list_checkpoints(run)] == ["step-000003", "step-000006"]
    assert checkpoint.resolve(run).name == "step-000006"
    assert checkpoint.resolve(run / "best").name in ("best", "step-000003")


def test_rows_that_changed_are_noticed(run_file, rows_file, tmp_path):
    copy = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    for row in rows:
        row["image"] = str(rows_file.parent / row["image"])
    copy.write_text("\n".join(map(json.dumps, rows)))
    config = run_file("run", data={"source": str(copy)}, steps=2)
    train.main([str(config)])
    copy.write_text("\n".join(map(json.dumps, rows[:-1])))
    with pytest.raises(InputError, match=r"rows of the source: 24 rows .* then, 23 rows .* now"):
        train.main([str(config), "--train.resume", "auto"])


def test_prepared_rows_are_the_rows(run_file, rows_file, tmp_path, monkeypatch, capsys):
    """Read once, pictures and all; interrupted, it goes on; the originals are needed no more."""
    out = tmp_path / "prepared"
    really, left = prepare.write, [2]

    def cut(rows, path):
        left[0] -= 1
        if left[0] == 0:
            raise InputError("cut off")
        really(rows, path)

    monkeypatch.setattr(prepare, "write", cut)
    with pytest.raises(InputError, match="cut off"):
        prepare.main([str(rows_file), str(out), "--rows", "10"])
    monkeypatch.setattr(prepare, "write", really)
    prepare.main([str(rows_file), str(out), "--rows", "10"])
    assert "24 rows read, 24 kept in 3 files" in capsys.readouterr().out
    from configs import DataConfig
    from data.sources.open import open_dataset

    wanted = open_dataset(DataConfig(source=str(rows_file), val_fraction=0.0), "train")
    for stream in (False, True):
        cfg = DataConfig(source=str(out), val_fraction=0.0, stream=stream)
        got = open_dataset(cfg, "train")
        assert len(got) == 24
        for i in (0, 23):
            assert got[i].turns == wanted[i].turns
            assert got[i].images == (Path(wanted[i].images[0]).read_bytes(),)
    with pytest.raises(InputError, match="holds something else"):
        prepare.main([str(rows_file), str(tmp_path)])
    prepare.main([str(rows_file), str(out), "--limit", "5"])  # fewer than there are: nothing to do
    for flag in ("--rows", "--limit"):
        with pytest.raises(InputError, match=f"{flag[2:]} = -1: must be at least"):
            prepare.main([str(rows_file), str(tmp_path / "new"), f"{flag}=-1"])

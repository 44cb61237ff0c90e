"""Full disks, read-only folders, locks and deleted files: one error line, and nothing is lost."""

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
    """The second run stops with an error and changes nothing; the first run finishes."""
    config = run_file("run", steps=4, save_every=1)
    run = folder(config)
    run.mkdir()
    lock = lock_run_folder(run)  # this process holds it; forked processes do not inherit it
    (run / "log.jsonl").write_text('{"step": 1}\n')
    (second,) = launch([str(config)])
    second.join(60)
    output = (tmp_path / "output.txt").read_text()
    assert second.exitcode == 2
    assert f"process {os.getpid()} on " in output and "is training there" in output
    assert (run / "log.jsonl").read_text() == '{"step": 1}\n' and not (run / "config.json").exists()
    lock.close()
    train.main([str(config)])
    assert (run / "step-000004").is_dir()
    with open(run / ".lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_without_write_permission(run_file, tmp_path):
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


def test_a_full_disk_stops_the_log_but_not_the_run(run_file, monkeypatch, capsys):
    """The warning is printed once, and checkpoints are still saved."""
    config = run_file("run", steps=4, save_every=2)
    dumps = json.dumps

    def full(value, *args, **options):
        if isinstance(value, dict) and "loss" in value and value["step"] > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return dumps(value, *args, **options)

    monkeypatch.setattr(engine.training.logger.json, "dumps", full)
    train.main([str(config)])
    printed = "".join(capsys.readouterr())
    assert printed.count("log.jsonl: cannot be written (No space left on device)") == 1
    assert [p.name for p in checkpoint.list_checkpoints(folder(config))] == [
        "step-000002",
        "step-000004",
    ]


def test_a_full_disk_at_a_checkpoint_keeps_the_previous_one(run_file, monkeypatch, capsys):
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
def test_files_deleted_during_a_run_are_written_again(run_file, monkeypatch, what):
    """A checkpoint, or the whole run folder; the run can still be resumed."""
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


def test_the_best_checkpoint_is_kept(run_file, monkeypatch):
    """Highest accuracy, then lowest loss; also after a resume."""
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


def test_resuming_with_changed_rows_is_refused(run_file, rows_file, tmp_path):
    copy = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    for row in rows:
        row["image"] = str(rows_file.parent / row["image"])
    copy.write_text("\n".join(map(json.dumps, rows)))
    config = run_file("run", data={"source": str(copy)}, steps=2)
    train.main([str(config)])
    copy.write_text("\n".join(map(json.dumps, rows[:-1])))
    with pytest.raises(InputError, match=r"rows of the source: was 24 rows .*, now 23 rows "):
        train.main([str(config), "--train.resume", "auto"])


def test_prepare_copies_rows_and_images(run_file, rows_file, tmp_path, monkeypatch, capsys):
    """Images are copied, an interrupted run resumes, and the originals are not needed any more."""
    out = tmp_path / "prepared"
    original, left = prepare.write, [2]

    def interrupt(rows, path):
        left[0] -= 1
        if left[0] == 0:
            raise InputError("interrupted")
        original(rows, path)

    monkeypatch.setattr(prepare, "write", interrupt)
    with pytest.raises(InputError, match="interrupted"):
        prepare.main([str(rows_file), str(out), "--rows", "10"])
    monkeypatch.setattr(prepare, "write", original)
    prepare.main([str(rows_file), str(out), "--rows", "10"])
    assert "24 rows read, 24 kept in 3 files" in capsys.readouterr().out
    from configs import DataConfig
    from data.sources.open import open_dataset

    expected = open_dataset(DataConfig(source=str(rows_file), val_fraction=0.0), "train")
    for stream in (False, True):
        cfg = DataConfig(source=str(out), val_fraction=0.0, stream=stream)
        got = open_dataset(cfg, "train")
        assert len(got) == 24
        for i in (0, 23):
            assert got[i].turns == expected[i].turns
            assert got[i].images == (Path(expected[i].images[0]).read_bytes(),)
    with pytest.raises(InputError, match="holds something else"):
        prepare.main([str(rows_file), str(tmp_path)])
    prepare.main([str(rows_file), str(out), "--limit", "5"])  # no effect: more rows exist
    for flag in ("--rows", "--limit"):
        with pytest.raises(InputError, match=f"{flag[2:]} = -1: must be at least"):
            prepare.main([str(rows_file), str(tmp_path / "new"), f"{flag}=-1"])

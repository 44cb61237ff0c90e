"""Each output of the log gets every line, and after a resume each step counts once."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

import train
from config_tools import InputError, read_json
from configs import RunConfig, TrainConfig
from engine.training.logger import Logger, answer_sheet_path, plot_curves, read_log

RATES = {"tokens_per_s": 10.0, "images_per_s": 2.0, "data_wait": 0.1}


def config(tmp_path, **train) -> RunConfig:
    return RunConfig(train=TrainConfig(out=str(tmp_path), steps=4, **train))


def test_log_lines_plot_and_messages(tmp_path, capsys):
    logger = Logger(config(tmp_path), True)
    for step in range(1, 5):
        logger.advance()
        logger.log({"loss": 4.0 - step / 2, "grad_norm_vision": 0.1 * step, **RATES}, step)
    logger.log({"val_loss": 2.5, "val_accuracy": 0.5, "val_answers": ["red"]}, 4)
    logger.write("a message")
    logger.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in lines] == [1, 2, 3, 4, 4]
    assert lines[0]["loss"] == 3.5 and lines[4]["val_accuracy"] == 0.5 and "seconds" in lines[0]
    assert Image.open(tmp_path / "loss.png").size == (1800, 760)
    out, err = capsys.readouterr()
    assert "a message" in out and "4/4" in err and "loss 2.000, 10 tokens/s" in err


def test_other_processes_are_silent(tmp_path, capsys):
    logger = Logger(config(tmp_path, wandb=True), False)
    logger.advance()
    logger.log({"loss": 1.0} | RATES, 1)
    logger.write("nothing")
    logger.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_after_a_resume_the_later_line_counts(tmp_path):
    for first, loss in ((1, 3.0), (2, 9.0)):
        logger = Logger(config(tmp_path), True, first - 1)
        for step in range(first, 4):
            logger.log({"loss": loss, **RATES}, step)
        logger.log({"val_loss": loss, "val_accuracy": 0.0}, 3)
        logger.close()
    assert [(e["step"], e.get("loss")) for e in read_log(tmp_path)] == [
        (1, 3.0), (2, 9.0), (3, 9.0), (3, None)
    ]  # fmt: skip
    assert read_log(tmp_path)[-1]["val_loss"] == 9.0


def test_no_step_no_plot(tmp_path):
    Logger(config(tmp_path), True).close()
    assert (tmp_path / "log.jsonl").read_text() == "" and not (tmp_path / "loss.png").exists()


def test_without_matplotlib_there_is_no_plot(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot_curves(tmp_path)
    assert not (tmp_path / "loss.png").exists()


def test_wandb_is_offline_and_gets_every_value(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    init = lambda **kwargs: calls.append(kwargs) or run  # noqa: E731
    fake = types.SimpleNamespace(init=init, Image=lambda path: ("image", path))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    cfg = config(tmp_path, wandb=True)
    logger = Logger(cfg, True)
    logger.log({"loss": 1.0} | RATES, 3)
    sheet = answer_sheet_path(tmp_path, 3)
    sheet.touch()
    logger.log_evaluation({"val_loss": 0.5, "val_answers": ["red"]}, 3)
    logger.log_evaluation({"val_loss": 0.4}, 4)  # without an answer sheet
    logger.close()
    init, line, evaluated, later, end = calls
    assert init["mode"] == "offline" and init["dir"] == str(tmp_path)
    assert init["config"]["train"]["steps"] == 4
    assert line == (3, {"loss": 1.0} | RATES) and end == "end"
    assert evaluated == (3, {"val_loss": 0.5, "answers": ("image", str(sheet))})
    assert later == (4, {"val_loss": 0.4})
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Logger(cfg, True).close()
    assert calls[5]["mode"] == "disabled"


@pytest.mark.slow
def test_wandb_keeps_the_answer_sheets_of_an_offline_run(run_file, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = run_file("run", data={"val_fraction": 0.3}, steps=4, eval_every=2, eval_samples=3,
                    wandb=True)  # fmt: skip
    train.main([str(path)])
    run = Path(read_json(path)["train"]["out"])
    kept = sorted(run.glob("wandb/offline-run-*/files/media/images/answers_*.png"))
    drawn = [answer_sheet_path(run, step).read_bytes() for step in (2, 4)]
    assert sorted(p.read_bytes() for p in kept) == sorted(drawn)


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        Logger(config(tmp_path, wandb=True), True)

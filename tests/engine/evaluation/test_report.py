"""The report shows what a run wrote, needs no network, and names what is missing."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import train
from cli import command
from config_tools import InputError, from_dict, read_json
from configs import RunConfig
from engine.evaluation import report
from engine.evaluation.evaluate import load_answerable_items
from engine.inference.chat import Chat
from engine.training.logger import read_log


@pytest.fixture(scope="module")
def run(tmp_path_factory, rows_file, minute_config):
    """A run of six steps with two evaluations, and a score."""
    from config_tools import to_dict
    from configs import DataConfig, RunConfig, TrainConfig

    folder = tmp_path_factory.mktemp("report") / "run"
    data = DataConfig(source=str(rows_file), batch_size=1, max_length=256, packing=False,
                      val_fraction=0.3)  # fmt: skip
    made = TrainConfig(out=str(folder), steps=6, log_every=1, eval_every=3, warmup=2,
                       eval_samples=12, precision="fp32")  # fmt: skip
    cfg = RunConfig(model=minute_config(), data=data, train=made)
    (folder.parent / "config.json").write_text(json.dumps(to_dict(cfg)))
    command(train.main, [str(folder.parent / "config.json")])
    one = {"accuracy": 0.25, "interval": [0.1, 0.4], "blind": 0.125, "shuffled": 0.1, "n": 8,
           "seen": 0.2, "unseen": None}  # fmt: skip
    (folder / "score.json").write_text(json.dumps(one | {"skills": {"<b>all</b>": one}}))
    return folder


def test_the_page_shows_what_the_run_wrote(run, capsys):
    command(report.main, [str(run)])
    page = (run / "report.html").read_text()
    assert "report.html" in capsys.readouterr().out
    last = [e for e in read_log(run) if "loss" in e][-1]
    assert f"{last['loss']:.3f}" in page and '<td class="n">6</td>' in page
    assert "25.0 %" in page and "10.0 – 40.0" in page and "12.5 %" in page
    assert "&lt;b&gt;all&lt;/b&gt;" in page and "<b>all</b>" not in page, "texts are escaped"
    answers = [e["val_answers"] for e in read_log(run) if "val_answers" in e]
    assert len(answers) == 2 and page.count("<th>step ") == 2
    rows = re.findall(r'<td class="(?:right|wrong)">', page)
    assert len(rows) == 2 * len(answers[0]) > 4
    assert page.count("<figure>") == 4 and page.count("data:image/jpeg;") == 4, "overlays"
    assert "What is " in page
    assert "model.vit_img_size" in page and "train.steps" in page and "supervised:" in page
    assert page.count("data:image/svg+xml;base64,") == 5, "curves"


def test_invalid_events_and_scores_are_ignored(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with open(copy / "log.jsonl", "a") as file:
        file.write('5\n{"loss": 1}\n')
    half = {"accuracy": 0.5, "interval": [0, 1], "n": 3, "seen": None, "unseen": None}
    (copy / "half.json").write_text(json.dumps(half | {"skills": {"color": {"accuracy": 1}}}))
    assert "half.json" not in report.write_page([report.collect(copy)])


def test_the_page_needs_no_network_and_fits_a_phone(run):
    page = report.write_page([report.collect(run)])
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "http" not in re.sub(
        r"data:[^\"]*", "", page
    )
    assert 'name="viewport"' in page and len(page) < 4 * 2**20


def test_two_runs_are_side_by_side(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    values = read_json(other / "config.json")
    values["train"]["lr_muon"] = 0.123
    (other / "config.json").write_text(json.dumps(values))
    command(report.main, [str(run), str(other), "--out", str(tmp_path / "both.html")])
    page = (tmp_path / "both.html").read_text()
    assert page.count("<section>") == 2
    differs = re.findall(r'class="differs"><th>(.*?)</th><td>(.*?)</td>', page)
    assert ("train.lr_muon", "0.123") in differs and len(differs) == 2


def test_answers_match_their_questions_if_one_was_left_out(run, tmp_path):
    """The run left out the first question, so its answers start at the second."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    cfg = from_dict(RunConfig, read_json(copy / "config.json"), "config.json")
    chat = Chat.load(copy)
    asked, _ = load_answerable_items(chat.processor, cfg.data, cfg.train.eval_samples)
    lines = Path(cfg.data.source).read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for i in range(24):
        shutil.copy(Path(cfg.data.source).parent / f"{i}.png", tmp_path)
    (tmp_path / Path(asked[0].sample.images[0]).name).write_bytes(b"broken")
    cfg = replace(cfg, data=replace(cfg.data, source=str(tmp_path / "rows.jsonl")))
    found = report.answers_section(copy, cfg, [{"step": 1, "val_answers": [""] * (len(asked) - 1)}])
    wanted = [item.question.replace("<image>", "") for item in asked[1:]]
    assert [answer["question"] for answer in found["answers"]] == wanted


def test_the_page_names_what_is_missing(run, tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        report.collect(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "log.jsonl"):
        shutil.copy(run / name, bare)
    page = report.write_page([report.collect(bare)])
    assert "No scores yet" in page and "Not available: " in page, "no checkpoint any more"

"""score.py: output files, resuming, comparison, several processes, and error messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import score
from cli import command
from config_tools import read_json
from engine.inference.chat import Chat
from tasks.world import CHOICES


def test_error_messages(small_checkpoint, rows_file, refused, tmp_path):
    argv = [small_checkpoint, "--data.source", rows_file, "--data.val-fraction", 0]
    assert "no rows in split val" in refused(score.main, *argv, "--split", "val")
    missing = tmp_path / "missing" / "score.json"
    assert "its folder does not exist" in refused(score.main, *argv, "--json", missing)
    assert str(tmp_path) in refused(score.main, *argv, "--json", tmp_path)
    assert "n = 0" in refused(score.main, *argv, "--n", 0)


def test_output_files(small_checkpoint, rows_file, capsys, tmp_path):
    flags = ["--n", 3, "--max-new-tokens", 4, "--json", tmp_path / "s.json"]
    flags += ["--predictions", tmp_path / "p.jsonl", "--answer-sheet", tmp_path / "s.png"]
    argv = [small_checkpoint, "--data.source", rows_file, *flags]
    command(score.main, [str(a) for a in argv])
    result = read_json(tmp_path / "s.json")
    assert result["n"] == 3 and f"{result['accuracy']:.1%}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert sum(r["score"] for r in rows) / 3 == pytest.approx(result["accuracy"])
    assert Image.open(tmp_path / "s.png").width > 900


def test_an_interrupted_score_resumes(
    small_checkpoint, rows_file, capsys, tmp_path, monkeypatch, refused
):
    path = tmp_path / "p.jsonl"
    argv = [small_checkpoint, "--data.source", rows_file, "--n", 6, "--max-new-tokens", 3]
    argv = [str(a) for a in (*argv, "--predictions", path, "--json", tmp_path / "s.json")]
    command(score.main, argv)
    whole, figures = path.read_text(), read_json(tmp_path / "s.json")
    path.rename(f"{path}.part0")
    lines = whole.splitlines(keepends=True)
    (tmp_path / "p.jsonl.part0").write_text("".join(lines[:2] + lines[4:]))
    prompts_read = []
    replies = Chat.generate_replies

    def counted(self, prompts, *rest):
        return replies(self, (prompts_read.append(1) or p for p in prompts), *rest)

    monkeypatch.setattr(Chat, "generate_replies", counted)
    command(score.main, argv)
    assert path.read_text() == whole
    assert len(prompts_read) == 2 * 3, "two questions in three views"
    assert read_json(tmp_path / "s.json") == figures
    capsys.readouterr()
    assert "other settings" in refused(score.main, *argv, "--max-new-tokens", 4)


def test_predictions_for_other_images_are_refused(
    small_checkpoint, rows_file, refused, tmp_path, capsys
):
    """The text of the rows is the same; only the images differ."""
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()[:2]]
    questions, path = tmp_path / "questions.jsonl", tmp_path / "p.jsonl"
    argv = [small_checkpoint, "--data.source", questions, "--max-new-tokens", 3]
    argv = [str(a) for a in (*argv, "--predictions", path)]
    for first, second in ((0, 1), (1, 0)):
        paths = [rows_file.parent / f"{i}.png" for i in (first, second)]
        lines = [json.dumps(row | {"image": str(p)}) for row, p in zip(rows, paths)]
        questions.write_text("\n".join(lines))
        if first == 0:
            command(score.main, argv)
    capsys.readouterr()
    assert "of another checkpoint or other settings" in refused(score.main, *argv)


def test_paired_comparison(small_checkpoint, rows_file, capsys, tmp_path, refused):
    data = ["--data.source", rows_file, "--max-new-tokens", 3]
    argv = [str(a) for a in (small_checkpoint, *data, "--n", 5, "--predictions", tmp_path / "a")]
    command(score.main, argv)
    argv[-2:] = ["--against", str(tmp_path / "a"), "--json", str(tmp_path / "s.json")]
    command(score.main, argv)
    against = read_json(tmp_path / "s.json")["against"]
    assert against == {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0}
    assert "difference to the other checkpoint: +0.0%" in capsys.readouterr().out
    message = refused(score.main, small_checkpoint, *data, "--n", 4, *argv[-4:-2])
    assert "its 5 questions differ" in message


def test_multiple_choice_by_likelihood(small_checkpoint, capsys, tmp_path, refused):
    argv = [small_checkpoint, "--by", "likelihood", "--n", 20, "--predictions", tmp_path / "p"]
    command(score.main, [str(a) for a in argv])
    rows = [json.loads(line) for line in (tmp_path / "p").read_text().splitlines()]
    assert len(rows) == 16, "two questions per skill, except what and caption"
    assert all(r["views"]["answer"] in CHOICES[r["skill"]] for r in rows)
    assert "what" not in capsys.readouterr().out
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What?", "answer": "yes"}\n')
    message = refused(score.main, small_checkpoint, "--by", "likelihood",
                   "--data.source", rows, "--data.val-fraction", 0)  # fmt: skip
    assert "no rows with choices in split test" in message


def test_two_processes_give_the_same_score_as_one(small_checkpoint, rows_file, tmp_path):
    root = Path(__file__).parent.parent
    argv = [small_checkpoint, "--data.source", rows_file, "--max-new-tokens", 3, "--n", 20]
    flags = {
        name: [*argv, "--predictions", tmp_path / name, "--json", tmp_path / f"{name}.json"]
        for name in ("one", "two")
    }
    score.main([str(a) for a in flags["one"]])
    # Without "--", torchrun would parse --n as an abbreviation of one of its flags.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
              "--"]  # fmt: skip
    done = subprocess.run(
        [str(a) for a in (*launch, root / "score.py", *flags["two"])],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()
    assert read_json(tmp_path / "one.json") == read_json(tmp_path / "two.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "one.json", "two", "two.json"]

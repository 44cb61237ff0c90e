"""generate.py --jsonl: resuming checks questions, images and settings."""

from __future__ import annotations

import json
import os

import generate
from cli import command


def run(*argv: object) -> None:
    command(generate.main, [str(a) for a in argv])


def test_answers_about_other_images_are_refused(
    small_checkpoint, rows_file, tmp_path, refused, capsys
):
    """All rows have the same question, as is common."""
    questions, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    paths = [str(rows_file.parent / f"{i}.png") for i in range(2)]
    rows = [{"image": path, "question": "What?", "id": i} for i, path in enumerate(paths)]
    flags = [small_checkpoint, "--jsonl", questions, "--max-new-tokens", 3, "--out"]
    questions.write_text("\n".join(map(json.dumps, rows)))
    run(*flags, out)
    capsys.readouterr()
    assert "other settings" in refused(generate.main, *flags, out, "--logprobs")
    questions.write_text("\n".join(map(json.dumps, rows[::-1])))
    assert "answers to other questions" in refused(generate.main, *flags, out)
    os.mkfifo(tmp_path / "pipe")
    assert "must be a file" in refused(generate.main, *flags, tmp_path / "pipe")


def test_a_resumed_run_samples_the_same_answers(small_checkpoint, tmp_path, capsys):
    """All rows have the same question; answers are sampled."""
    questions = tmp_path / "in.jsonl"
    questions.write_text("\n".join([json.dumps({"question": "What?"})] * 6))
    flags = [small_checkpoint, "--jsonl", questions, "--max-new-tokens", 12, "--temperature", 2,
             "--seed", 5, "--batch-size", 2, "--out"]  # fmt: skip
    run(*flags, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    assert len({json.loads(line)["answer"] for line in lines}) > 3
    (tmp_path / "resumed.jsonl").write_text("".join(lines[:3]))
    run(*flags, tmp_path / "resumed.jsonl")
    assert (tmp_path / "resumed.jsonl").read_text() == "".join(lines)


def test_null_and_empty_fields(small_checkpoint, rows_file, tmp_path):
    """Rows of a table have all columns; a lone surrogate is valid JSON."""
    questions, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    image = str(rows_file.parent / "0.png")
    same = [{"image": image, "question": "What?", "id": "\ud83d"},
            {"images": None, "image": image, "question": None, "prompt": "What?"},
            {"images": [], "image": image, "question": "What?", "prompt": ""}]  # fmt: skip
    questions.write_text("\n".join(map(json.dumps, [*same, {"question": "What?"}])))
    for _ in range(2):  # the second run finds the answers of the first
        run(small_checkpoint, "--jsonl", questions, "--max-new-tokens", 8, "--out", out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["answer"] for row in found[:3]}) == 1 and found[0]["id"] == "\ud83d"
    assert found[3]["answer"] != found[0]["answer"]

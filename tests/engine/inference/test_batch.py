"""A file of answers belongs to its questions, down to their pictures."""

from __future__ import annotations

import json
import os

import generate
from cli import command


def ask(*argv: object) -> None:
    command(generate.main, [str(a) for a in argv])


def test_answers_to_other_pictures_are_not_kept(
    small_checkpoint, rows_file, tmp_path, refused, capsys
):
    """The same question in every row is the usual file."""
    asked, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    shown = [str(rows_file.parent / f"{i}.png") for i in range(2)]
    rows = [{"image": path, "question": "What?", "id": i} for i, path in enumerate(shown)]
    flags = [small_checkpoint, "--jsonl", asked, "--max-new-tokens", 3, "--out"]
    asked.write_text("\n".join(map(json.dumps, rows)))
    ask(*flags, out)
    capsys.readouterr()
    assert "other settings" in refused(generate.main, *flags, out, "--logprobs")
    asked.write_text("\n".join(map(json.dumps, rows[::-1])))
    assert "holds other answers" in refused(generate.main, *flags, out)
    os.mkfifo(tmp_path / "pipe")
    assert "must be a file" in refused(generate.main, *flags, tmp_path / "pipe")


def test_a_run_that_goes_on_samples_what_the_whole_one_would(small_checkpoint, tmp_path, capsys):
    """Row by row: the same question in each, answered by chance."""
    asked = tmp_path / "in.jsonl"
    asked.write_text("\n".join([json.dumps({"question": "What?"})] * 6))
    flags = [small_checkpoint, "--jsonl", asked, "--max-new-tokens", 12, "--temperature", 2,
             "--seed", 5, "--batch-size", 2, "--out"]  # fmt: skip
    ask(*flags, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    assert len({json.loads(line)["answer"] for line in lines}) > 3
    (tmp_path / "torn.jsonl").write_text("".join(lines[:3]))
    ask(*flags, tmp_path / "torn.jsonl")
    assert (tmp_path / "torn.jsonl").read_text() == "".join(lines)


def test_columns_that_a_row_has_no_use_for(small_checkpoint, rows_file, tmp_path):
    """A table has both names in every row; half a surrogate is valid JSON."""
    asked, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    image = str(rows_file.parent / "0.png")
    same = [{"image": image, "question": "What?", "id": "\ud83d"},
            {"images": None, "image": image, "question": None, "prompt": "What?"},
            {"images": [], "image": image, "question": "What?", "prompt": ""}]  # fmt: skip
    asked.write_text("\n".join(map(json.dumps, [*same, {"question": "What?"}])))
    for _ in range(2):  # what is there is found again
        ask(small_checkpoint, "--jsonl", asked, "--max-new-tokens", 8, "--out", out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["answer"] for row in found[:3]}) == 1 and found[0]["id"] == "\ud83d"
    assert found[3]["answer"] != found[0]["answer"]

"""The cost of corrupt images is measured on runs that list them all and finish."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.quality import corrupt
from config_tools import InputError


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "corrupt").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "corrupt" / name).write_bytes(b"no image")
    return tmp_path / "corrupt"


@pytest.mark.slow
def test_a_turn_trains_with_and_without_corrupt_images(
    run_file, folder, rows_file, monkeypatch, capsys
):
    monkeypatch.setattr(corrupt, "EVERY", 12)
    monkeypatch.setattr(corrupt, "TURNS", 1)
    (folder / "good.png").write_bytes((rows_file.parent / "0.png").read_bytes())
    corrupt.main([str(folder), str(run_file(data={"batch_size": 4}))])
    out = capsys.readouterr().out
    files = r"a good row takes .* ms, a corrupt file .* ms \(maximum .* ms, 2 files\)"
    assert re.search(files, out)
    assert re.search(r"^\d+ steps over 24 rows, 2 of them corrupt: .* without, .* with; in 1 turns",
                     out, re.M)  # fmt: skip


def test_a_run_that_does_not_list_corrupt_images_is_an_error(folder, rows_file, tmp_path, run_file):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    rows = [row | {"image": str(rows_file.parent / row["image"])} for row in rows]
    files = corrupt.find_corrupt(folder)
    assert corrupt.write_with_corrupt(rows, files, 0, tmp_path / "b.jsonl") == 0
    cfg = corrupt.parse_run([str(run_file(steps=1))])
    with pytest.raises(InputError, match="lists 0 rows; expected the 1 corrupt"):
        corrupt.run(cfg, tmp_path / "b.jsonl", "bad", 1)
    with pytest.raises(InputError, match="found no corrupt image"):
        corrupt.find_corrupt(tmp_path / "nowhere")

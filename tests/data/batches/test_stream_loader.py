"""Unusable rows of a stream are skipped and listed once; too many end the run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import islice

import pytest

from config_tools import InputError
from configs import DataConfig
from data.batches.stream_loader import open_loader
from data.sources.open import open_dataset

STREAM = DataConfig(stream=True, stream_block=10, batch_size=4, max_length=128, packing=False,
                    val_fraction=0.0)  # fmt: skip


def test_bad_rows_of_a_stream_are_skipped_listed_and_limited(tiny_processor, tmp_path, numbers):
    rows = [{"question": "q", "answer": f"number {i}", "image": None} for i in range(60)]
    rows[7]["image"] = "absent.png"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = replace(STREAM, source=str(tmp_path / "rows.jsonl"))
    listed = tmp_path / "skipped.jsonl"
    loader = open_loader(open_dataset(cfg, "train"), tiny_processor, cfg, skipped_file=listed)
    seen = numbers(islice(iter(loader), 40))
    assert set(seen) == set(range(60)) - {7}
    (line,) = map(json.loads, listed.read_text().splitlines())  # listed once, not once per epoch
    assert "row 8 of part 1 of 1" in line["reason"] and "absent.png" in line["reason"]
    for i in range(20, 27):
        rows[i]["image"] = "absent.png"
    (tmp_path / "worse.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = replace(cfg, source=str(tmp_path / "worse.jsonl"))
    with pytest.raises(InputError, match="6 rows are unusable"):
        list(islice(iter(open_loader(open_dataset(cfg, "train"), tiny_processor, cfg)), 40))


def test_an_invalid_line_is_skipped_and_listed(tiny_processor, tmp_path, numbers):
    lines = [json.dumps({"question": "q", "answer": f"number {i}"}) for i in range(60)]
    lines[7] = '{"question": "q", "answer": '
    lines[9] = "caf\xe9"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="latin-1")
    cfg = replace(STREAM, source=str(tmp_path / "rows.jsonl"))
    listed = tmp_path / "skipped.jsonl"
    loader = open_loader(open_dataset(cfg, "train"), tiny_processor, cfg, skipped_file=listed)
    assert set(numbers(islice(iter(loader), 40))) == set(range(60)) - {7, 9}
    reasons = [json.loads(line)["reason"] for line in listed.read_text().splitlines()]
    assert len(reasons) == 2 and all("not JSON" in reason for reason in reasons)
    assert {re.search(r"row (\d+) of", reason)[1] for reason in reasons} == {"8", "10"}

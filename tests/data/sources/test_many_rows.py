"""200,000 rows: training starts in seconds, and memory stays constant over an epoch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import DataConfig
from data.batches.loader import Loader
from data.sources.open import open_dataset

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """200,000 LLaVA rows, every fourth with an image."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for i in range(20):
        pixels = rng.integers(0, 256, (16 + i, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    with open(folder / "many.jsonl", "w") as file:
        for i in range(200_000):
            mark, image = ("<image>\n", {"image": f"{i % 20}.png"}) if i % 4 == 0 else ("", {})
            turns = [
                {"from": "human", "value": f"{mark}What is number {i} of this list of things?"},
                {"from": "gpt", "value": f"It is {i}, one more than {i - 1}."},
            ]
            file.write(json.dumps({"id": str(i), "conversations": turns} | image) + "\n")
    return folder / "many.jsonl"


@pytest.mark.slow
def test_200_000_rows_start_training_in_seconds(many, tmp_path):
    """From the command to the last line before the first step.

    Measured in CPU time, so that other processes do not count.
    """
    argv = ["tiny", "--data.source", str(many), "--train.out", str(tmp_path), "--train.steps", "9"]
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "train.py"), *argv], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    start = time.monotonic()
    try:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("checked 16 rows"):
                break
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    finally:
        process.kill()
        process.wait()
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    print(f"ready after {time.monotonic() - start:.1f} s, {seconds:.1f} s of them computing")
    assert "200,000 rows of conversations[from, value] (LLaVA)" in "".join(printed)
    assert seconds < 15


def anonymous_mib() -> float:
    """Anonymous memory of this process in MiB, without mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


@pytest.mark.slow
def test_memory_stays_constant_over_an_epoch_of_200_000_rows(many, tiny_processor, minute_config):
    """Measured after a tenth of the epoch, when all buffers are full, and at its end."""
    cfg = DataConfig(source=str(many), val_fraction=0.0, batch_size=16, max_length=256)
    processor = replace(tiny_processor, cfg=minute_config())
    early = None
    for batch in Loader(open_dataset(cfg, "train"), processor, cfg):
        if early is None and batch.state["position"] > 20_000:
            early = anonymous_mib()
        if batch.state["epoch"] > 0:
            break
    late = anonymous_mib()
    print(f"{early:.0f} MiB after a tenth of the epoch, {late:.0f} MiB at its end")
    assert late - early < 16


@pytest.mark.parametrize("fraction, note", [
    (0.0, ""), (0.001, "nothing is evaluated"), (0.3, "`best` is chosen by few answers"),
])  # fmt: skip
def test_few_validation_rows_are_reported(tmp_path, fraction, note):
    rows = [{"question": f"what is {i}?", "answer": str(i)} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(source=str(tmp_path / "a.jsonl"), val_fraction=fraction)
    source = open_dataset(cfg, "train")
    report = f"{40 - len(source)} validation rows: {note}; raise data.val_fraction for more"
    assert [n for n in source.notes if "raise data" in n] == ([report] if note else [])

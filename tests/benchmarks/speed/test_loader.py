"""The loader benchmark reports what the loader did."""

from __future__ import annotations

import re
from dataclasses import replace

from benchmarks.speed import loader
from configs import DataConfig, RunConfig
from data.batches import loader as loaders


def test_packed_rows_are_fuller_and_times_match_the_loader(
    tiny_processor, minute_config, rows_file, monkeypatch
):
    monkeypatch.setattr(loader, "BATCHES", 3)
    data = DataConfig(source=str(rows_file), max_length=256, batch_size=2, val_fraction=0.0)
    cfg = RunConfig(model=minute_config(), data=data)
    processor, original = replace(tiny_processor, cfg=cfg.model), loaders.fill_rows
    table, seconds, packing_seconds = loader.packing(cfg, processor)
    assert loaders.fill_rows is original, "the timed function is restored"
    plain, packed = (float(x) for x in re.findall(r"\| ([\d.]+)% \|", table))
    assert plain < 40 and packed > 90
    report = loader.compare_with_model(cfg, processor, seconds, packing_seconds)
    step = float(re.search(r"takes ([\d.]+) s", report)[1])
    times = int(re.search(r"(\d+) times as fast", report)[1])
    assert abs(times - step / seconds) < 1 + 0.01 / seconds

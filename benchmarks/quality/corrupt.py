"""What corrupt images cost a training run: 1 % of the rows against none, alternating.

python -m benchmarks.quality.corrupt CORRUPT_FOLDER tiny --data.source my.jsonl
Arguments after the folder are those of train.py. Each turn trains one epoch on the rows, then one
with corrupt files in place of every hundredth image, and checks that the run finished and listed
them all. Turns differ by more than the cost, so the time of single files is printed as well.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import mean

import train
from benchmarks.speed import timing
from benchmarks.speed.timing import clock, format_seconds
from cli import command, parse_run
from config_tools import InputError, to_dict
from configs import RunConfig
from data import processor as processors
from data.batches.stream_loader import open_loader
from data.images import open_image
from data.sources.open import open_dataset, open_rows

EVERY, TURNS = 100, 5


def find_corrupt(folder: Path) -> list[Path]:
    """Files of a folder that cannot be opened as images; raises `InputError` if there are none."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            open_image(path)
        except InputError:
            found.append(path)
    if not found:
        raise InputError(f"{folder}: found no corrupt image; expected at least one.")
    return found


def write_with_corrupt(rows: list[dict], corrupt: list[Path], turn: int, path: Path) -> int:
    """Write the rows with corrupt images in every hundredth; returns how many."""
    places = range(EVERY // 2, len(rows), EVERY)
    changed = [dict(row) for row in rows]
    for k, i in enumerate(places):
        changed[i]["image"] = str(corrupt[(turn * len(places) + k) % len(corrupt)])
    path.write_text("\n".join(map(json.dumps, changed)), encoding="utf-8")
    return len(places)


def time_files(cfg: RunConfig, corrupt: list[Path]) -> str:
    """How long it takes to encode a good row, and to reject a corrupt file."""
    processor, source = processors.build(cfg.model), open_dataset(cfg.data, "train")
    good, bad = [], []
    for i in range(min(100, len(source))):
        start = clock()
        processor.encode(source[i], cfg.data.max_length, cfg.data.max_tiles)
        good.append(clock() - start)
    for file in corrupt:
        start = clock()
        with contextlib.suppress(InputError):
            open_image(file)
        bad.append(clock() - start)
    worst = f"maximum {format_seconds(max(bad))}, {len(bad)} files"
    times = [format_seconds(mean(seconds)) for seconds in (good, bad)]
    return f"a good row takes {times[0]}, a corrupt file {times[1]} ({worst})"


def run(cfg: RunConfig, path: Path, name: str, n_bad: int) -> float:
    """Seconds of a run on a file of rows; raises `InputError` unless it lists all corrupt ones."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(cfg, data=replace(cfg.data, source=str(path)),
                      train=replace(cfg.train, out=f"{folder}/{name}"))  # fmt: skip
        config = Path(folder, "config.json")
        config.write_text(json.dumps(to_dict(cfg)), encoding="utf-8")
        quiet, start = io.StringIO(), clock()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            train.main([str(config)])
        seconds, listed = clock() - start, Path(cfg.train.out, "skipped.jsonl")
        n_listed = len(listed.read_text().splitlines()) if listed.exists() else 0
    if n_listed != n_bad:
        found = f"skipped.jsonl lists {n_listed} rows"
        raise InputError(f"{path}: {found}; expected the {n_bad} corrupt.")
    return seconds


def main(argv: list[str]) -> None:
    folder, cfg = Path(argv[0]), parse_run(argv[1:])
    read, corrupt = open_rows(cfg.data.source), find_corrupt(folder)
    rows = [dict(row, image=str(read.folder / row["image"])) for row in islice(read, len(read))]
    cfg = replace(cfg, data=replace(cfg.data, val_fraction=0.0, workers=0))
    source = open_dataset(cfg.data, "train")
    loader = open_loader(source, processors.build(cfg.model), cfg.data)
    steps = next(n for n, batch in enumerate(loader, 1) if batch.state["epoch"] > 0)
    cfg = replace(cfg, train=replace(cfg.train, steps=steps, log_every=steps, save_every=0))
    with tempfile.TemporaryDirectory() as temporary:
        turns = iter(range(TURNS + 1))
        clean, bad = Path(temporary, "a.jsonl"), Path(temporary, "b.jsonl")
        clean.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

        def train_with_corrupt() -> float:
            n_bad = write_with_corrupt(rows, corrupt, next(turns), bad)
            return run(cfg, bad, "bad", n_bad)

        calls = {"clean": lambda: run(cfg, clean, "clean", 0), "corrupt": train_with_corrupt}
        times = timing.alternate(calls, 0, min_turns=TURNS, max_turns=TURNS)
    median, minimum, maximum = timing.ratios(times["clean"], times["corrupt"])
    without, with_corrupt = (format_seconds(times[name].median) for name in calls)
    print(timing.describe_run("benchmarks.quality.corrupt", argv))
    print(time_files(cfg, corrupt))
    n_bad = len(range(EVERY // 2, len(rows), EVERY))
    change = f"{median - 1:+.1%} ({minimum - 1:+.1%} to {maximum - 1:+.1%})"
    print(f"{steps} steps over {len(rows)} rows, {n_bad} of them corrupt: {without} without, "
          f"{with_corrupt} with; in {TURNS} turns {change}")  # fmt: skip


if __name__ == "__main__":
    command(main)

"""What corrupt files among good ones cost a run: 1 % of the rows, beside none, in turns.

python -m benchmarks.speed.corrupt CORRUPT_FOLDER tiny --data.source my.jsonl
The words behind the folder are those of train.py. Each turn trains for an epoch on the rows, and on
the same with other corrupt files in place of every hundredth picture, and checks that the run came
to its end and listed them all. As one turn differs from the next by more than the cost, the table
also says how long a corrupt file takes beside a good row.
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
from benchmarks.speed.timing import alternate, clock, command_line, ratios, readable, where
from cli import command, parse_run
from config_tools import InputError, to_dict
from configs import RunConfig
from data import processor as processors
from data.batches.stream_loader import open_loader
from data.images import open_image
from data.sources.open import open_source
from data.sources.rows import open_rows

EVERY, TURNS = 100, 5


def refused(folder: Path) -> list[Path]:
    """The files of a folder that are no pictures."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            open_image(path)
        except InputError:
            found.append(path)
    if not found:
        raise InputError(f"{folder}: holds no corrupt pictures.")
    return found


def with_corrupt(rows: list[dict], corrupt: list[Path], turn: int, path: Path) -> int:
    """Write the rows with other pictures in every hundredth; returns how many."""
    places = range(EVERY // 2, len(rows), EVERY)
    changed = [dict(row) for row in rows]
    for k, i in enumerate(places):
        changed[i]["image"] = str(corrupt[(turn * len(places) + k) % len(corrupt)])
    path.write_text("\n".join(map(json.dumps, changed)), encoding="utf-8")
    return len(places)


def each(cfg: RunConfig, corrupt: list[Path]) -> str:
    """How long a good row and a corrupt file take until they are tokens, or skipped."""
    processor, source = processors.build(cfg.model), open_source(cfg.data, "train")
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
    return (
        f"a good row takes {readable(mean(good))}, a corrupt file {readable(mean(bad))} "
        f"(most {readable(max(bad))}, {len(bad)} files)"
    )


def epoch(cfg: RunConfig) -> int:
    """Batches until every row has been read."""
    source = open_source(cfg.data, "train")
    loader = open_loader(source, processors.build(cfg.model), cfg.data)
    return next(n for n, batch in enumerate(loader, 1) if batch.state["epoch"] > 0)


def run(cfg: RunConfig, path: Path, name: str, n_bad: int) -> float:
    """Seconds of a whole run on the rows of a file; raises `InputError` if it did not list all."""
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
        raise InputError(f"{path}: {n_bad} rows are corrupt, {n_listed} were listed.")
    return seconds


def main(argv: list[str]) -> None:
    folder, cfg = Path(argv[0]), parse_run(argv[1:])
    read, corrupt = open_rows(cfg.data.source), refused(folder)
    rows = [dict(row, image=str(read.folder / row["image"])) for row in islice(read, len(read))]
    data = replace(cfg.data, val_fraction=0.0, workers=0)
    cfg = replace(cfg, data=data)
    steps = epoch(cfg)
    cfg = replace(cfg, train=replace(cfg.train, steps=steps, log_every=steps, save_every=0))
    with tempfile.TemporaryDirectory() as beside:
        turns, clean, bad = iter(range(TURNS + 1)), Path(beside, "a.jsonl"), Path(beside, "b.jsonl")
        clean.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

        def with_some() -> float:
            n_bad = with_corrupt(rows, corrupt, next(turns), bad)
            return run(cfg, bad, "bad", n_bad)

        calls = {"clean": lambda: run(cfg, clean, "clean", 0), "corrupt": with_some}
        times = alternate(calls, 0, least=TURNS, most=TURNS)
    middle, least, most = ratios(times["clean"], times["corrupt"])
    print(where(command_line("benchmarks.corrupt", argv)))
    print(each(cfg, corrupt))
    n_bad = len(range(EVERY // 2, len(rows), EVERY))
    print(
        f"{steps} steps over {len(rows)} rows, {n_bad} of them corrupt: "
        f"{readable(times['clean'].median)} without, {readable(times['corrupt'].median)} with; "
        f"in {TURNS} turns {middle - 1:+.1%} ({least - 1:+.1%} to {most - 1:+.1%})"
    )


if __name__ == "__main__":
    command(main)

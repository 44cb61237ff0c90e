"""Compares this working tree with another revision: time and memory of training and decoding.

python -m benchmarks.speed.revisions HEAD                        before a commit: what it costs
python -m benchmarks.speed.revisions v0.1 --presets tiny --rows train decode1
python -m benchmarks.speed.revisions ../old --against HEAD~3     a folder works like a revision

Each tree runs in a process of its own. Both take turns (A B B A ...), so noise affects both alike.
Prints a table; a ratio above 1 means that the working tree is slower or needs more memory.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed.timing import ROOT, describe_run, markdown
from cli import command
from config_tools import InputError
from configs import PRESETS
from engine.training.distributed import is_bf16_emulated

ROWS = {
    "first": "first token, image and 64 words",
    "decode1": "decoding step, 1 row",
    "decode8": "decoding step, 8 rows",
    "train": "training step, padded rows",
    "packed": "training step, packed rows",
    "memory": "peak memory of training, padded rows",
}
MIN_TURNS, MAX_TURNS, MEMORY_TURNS = 5, 400, 2
ORDERS = ((0, 1), (1, 0))  # of before (0) and after (1) in a turn, alternating
Ask = Callable[..., dict]
SLOWER = 1.03  # ratios above are named below the table


def checkout(source: str, folder: Path) -> Path:
    """`source` if it is a folder with a tree, else a git revision unpacked into `folder`."""
    if Path(source, "configs.py").is_file():
        return Path(source).resolve()
    archive = ["git", "-C", str(ROOT), "archive", "--format=tar", source]
    done = subprocess.run(archive, capture_output=True, check=False)
    if done.returncode:
        raise InputError(
            f"{source!r}: neither a folder with configs.py nor a git revision; "
            f"give one of both. git: {done.stderr.decode().strip()}"
        )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


@contextmanager
def start(tree: Path, n_threads: int) -> Iterator[Ask]:
    """A process that measures one tree, see revision_worker.py; yields `ask`."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": str(n_threads), "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1"}  # fmt: skip
    # As train.py sets them: see set_malloc_thresholds in engine/training/distributed.py.
    env.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 30))
    env.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 24))
    argv = [sys.executable, str(ROOT / "benchmarks/speed/revision_worker.py"), str(tree)]
    process = subprocess.Popen(argv, cwd=tree, env=env, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip

    def ask(**request) -> dict:
        """One repetition: with a request of that row, without one of the same row again."""
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        if not (reply := process.stdout.readline()):
            raise InputError(
                f"{tree}: its worker ended with status {process.wait()}, see above; "
                f"the last request was {request or 'another repetition'}."
            )
        return json.loads(reply)

    try:
        yield ask
    finally:
        process.kill()
        with suppress(BrokenPipeError):  # a request that a dead worker has not read
            process.stdin.close()
        process.stdout.close()
        process.wait()


@dataclass
class Result:
    """One row of the table: `numbers` and `values` hold lists of (before, after), one per turn."""

    preset: str
    precision: str
    row: str
    numbers: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    values: tuple[list, list] = field(default_factory=lambda: ([], []))  # losses or tokens

    @property
    def name(self) -> str:
        return f"{self.preset} {self.precision}: {ROWS[self.row]}"

    @property
    def ratio(self) -> float:
        before, after = np.median(self.numbers, axis=1)
        return float(after / before)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the ratio of medians over turns drawn again (bootstrap)."""
        numbers = np.array(self.numbers)  # [2, turns]; seconds, or bytes of the row `memory`
        n = numbers.shape[1]
        turns = np.random.default_rng(0).integers(n, size=(2000, n))
        before, after = np.median(numbers[:, turns], axis=2)
        low, high = np.quantile(after / before, (0.025, 0.975))
        return float(low), float(high)

    @property
    def cells(self) -> tuple[str, ...]:
        unit, scale = ("MiB", 2**-20) if self.row == "memory" else ("ms", 1e3)
        quartiles = scale * np.quantile(self.numbers, (0.5, 0.25, 0.75), axis=1).T
        spreads = [f"{mid:.4g} {unit} ({low:.4g} - {high:.4g})" for mid, low, high in quartiles]
        interval = "{:.3f} - {:.3f}".format(*self.interval)
        return self.name, *spreads, f"{self.ratio:.3f}", interval, str(len(self.numbers[0]))


def time_row(
    result: Result, workers: Sequence[Ask], request: dict, seconds: float, turns: int | None
) -> None:
    """Fill a row by turns: as many as given, or until `seconds` are over."""
    for ask, values in zip(workers, result.values):
        values.append(ask(**request)["values"])  # not timed: warm-up
    end = time.perf_counter() + seconds
    for turn in range(turns or MAX_TURNS):
        if not turns and turn >= MIN_TURNS and time.perf_counter() > end:
            break
        for side in ORDERS[turn % 2]:
            time.sleep(0.02)  # libgomp's idle threads keep the cores busy for a few ms
            reply = workers[side]()
            result.numbers[side].append(reply["seconds"])
            result.values[side].append(reply["values"])


def memory_row(result: Result, trees: Sequence[Path], request: dict, n_threads: int) -> None:
    """Peak memory of two training steps beyond that of the imports, in fresh processes."""
    for turn in range(MEMORY_TURNS):
        for side in ORDERS[turn % 2]:
            with start(trees[side], n_threads) as ask:
                ask(**request | {"row": "train"})
                reply = ask()
            result.numbers[side].append(reply["peak"])
            result.values[side].append(reply["values"])


def measure(
    trees: Sequence[Path], presets: Sequence[str], precisions: Sequence[str], rows: Sequence[str],
    n_threads: int, seconds: float | None = None, turns: int | None = None,
    changes: dict | None = None,
) -> list[Result]:  # fmt: skip
    """All rows of two trees (before, after); `changes` replace fields of the presets' models."""
    results = []
    with ExitStack() as stack:
        workers = [stack.enter_context(start(tree, n_threads)) for tree in trees]
        for preset, precision, row in product(presets, precisions, rows):
            n_samples, default = (16, 8.0) if preset == "tiny" else (4, 30.0)
            request = {"preset": preset, "precision": precision, "row": row,
                       "samples": n_samples, "changes": json.dumps(changes or {})}  # fmt: skip
            result = Result(preset, precision, row)
            if row == "memory":
                memory_row(result, trees, request, n_threads)
            else:
                time_row(result, workers, request, default if seconds is None else seconds, turns)
            print(*result.cells, sep=" | ", file=sys.stderr, flush=True)
            results.append(result)
    return results


def table(results: Sequence[Result]) -> str:
    head = ("", "before: median (quartiles)", "after: median (quartiles)", "after / before",
            "95 % interval", "turns")  # fmt: skip
    return markdown(head, (result.cells for result in results))


def slower(results: Sequence[Result]) -> str:
    """A sentence that names every row with 3 % more time or memory."""
    found = [r for r in results if r.ratio > SLOWER]
    if not found:
        return f"No row is more than {SLOWER - 1:.0%} slower."
    noise = ", but the interval includes 1"
    named = (f"{r.name} ({r.ratio - 1:+.1%}{noise if r.interval[0] <= 1 else ''})" for r in found)
    return f"More than {SLOWER - 1:.0%} slower: {'; '.join(named)}."


def difference(results: Sequence[Result]) -> str:
    """Sentences on the largest difference of losses and on whether greedy tokens are equal."""
    first, later, differ = [0.0], [0.0], []
    for r in results:
        before, after = r.values
        if r.row.startswith(("decode", "first")):
            differ += [r.name] if before != after else []
            continue
        distance = np.abs(np.subtract(before, after))[:, 0]  # [turns]
        first += distance[:1].tolist() if r.row != "memory" else []
        later += distance.tolist()
    tokens = f"differ in {'; '.join(differ)}" if differ else "are equal"
    return (
        f"Largest difference of the loss: {max(first):.1e} in first steps, {max(later):.1e} in all "
        f"steps. Greedy tokens {tokens}."
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.revisions")
    parser.add_argument("base", help="git revision or folder to compare with: before")
    parser.add_argument("--against", default=str(ROOT), help="after; default: this working tree")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["tiny", "222m"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--turns", type=int, help="exact number of turns of a timed row")
    time_help = f"time of a row, at least {MIN_TURNS} turns; default: 8 for tiny, 30 for others"
    length.add_argument("--seconds", type=float, help=time_help)
    args = parser.parse_args(argv)
    for flag, value in (("turns", args.turns), ("threads", args.threads)):
        if value is not None and value < 1:
            raise InputError(f"--{flag} {value}: must be at least 1.")
    torch.set_num_threads(args.threads)
    is_slow = is_bf16_emulated(torch.device("cpu"))  # this CPU emulates bf16: minutes a step
    precisions = args.precisions or (["fp32"] if is_slow else ["fp32", "bf16"])
    with tempfile.TemporaryDirectory() as folder:
        trees = [checkout(source, Path(folder, name))
                 for source, name in ((args.base, "before"), (args.against, "after"))]  # fmt: skip
        line = describe_run("benchmarks.speed.revisions", argv)
        results = measure(trees, args.presets, precisions, args.rows, args.threads, args.seconds,
                          args.turns)  # fmt: skip
    print(f"{line}\n\n{table(results)}\n\n{slower(results)}\n{difference(results)}")


if __name__ == "__main__":
    command(main)

"""Source -> processor -> packing -> Batch, in a fixed order whatever the number of workers.

The order is a function of (seed, epoch) alone, and each Batch carries the loader's state after
itself, so that a run resumes with the very next batch. Not here: the rules of packing (packing.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from config_tools import InputError
from configs import DataConfig
from data.batches.packing import collate, fill_rows
from data.processor import Processor
from data.sources.open import n_rows_read, number_in_file
from data.sources.split import max_bad_rows
from data.types import Batch, Tokens

CHUNK = 8  # samples a worker prepares at a time: enough to hide the cost of handing over


@dataclass(frozen=True)
class Skipped:
    """A row that could not be encoded."""

    reason: str


@dataclass
class Encoded(Dataset):
    """Indices -> Tokens or Skipped; runs in the workers."""

    source: object
    processor: Processor
    cfg: DataConfig

    def __getitem__(self, indices: list[int]) -> list[tuple[int, Tokens | Skipped]]:
        return [(i, self._one(i)) for i in indices]

    def _one(self, i: int) -> Tokens | Skipped:
        try:
            return self.processor.encode(self.source[i], self.cfg.max_length, self.cfg.max_tiles)
        except InputError as error:
            return Skipped(str(error))
        except Exception as error:
            row = number_in_file(self.source, i) + 1
            raise told(error, f"row {row} of {self.cfg.source}") from error


def told(error: Exception, where: str) -> RuntimeError:
    """A mistake of this code, with the row it was made on."""
    return RuntimeError(f"{where}: {type(error).__name__}: {error}")


def _start_worker(_worker: int) -> None:
    """One thread, as spinning OpenMP threads of a worker would starve the training process.

    A signal to the whole group, as of Ctrl-C or a cluster's scheduler, is for the training process
    alone: it finishes its step, for which it needs its workers, saves and ends them. One that is
    still there after five minutes was forgotten, and ends itself. A worker whose training process
    was killed ends without handing over its last batch: workers keep each other's pipes open, so
    it would wait for a reader for ever.
    """
    torch.set_num_threads(1)
    Finalize(None, os._exit, (0,), exitpriority=0)  # before the queues' own, which wait
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(300))


@dataclass
class Loader:
    """Endless batches; `epoch` and `position` say where in the shuffle the next sample is read."""

    source: object
    processor: Processor
    cfg: DataConfig
    rank: int = 0
    world: int = 1
    skipped_file: Path | None = None
    epoch: int = 0
    position: int = 0
    waiting: list[tuple[int, Tokens]] = field(default_factory=list)  # read, not yet in a batch
    skipped: list[int] = field(default_factory=list)  # rows of the source that could not be encoded

    def restore(self, state: dict) -> None:
        """Continue after the batch that carried `state`."""
        self.go_to(state)
        self.skipped = list(state["skipped"])
        self.waiting = self.again(state["waiting"])

    def go_to(self, state: dict) -> None:
        """Read on from where `place` was."""
        self.epoch, self.position = state["epoch"], state["position"]

    def again(self, waiting: list) -> list[tuple[int, Tokens]]:
        """Samples that were read, but in no batch yet."""
        encoded = self._encoded()[waiting]
        return [(i, tokens) for i, tokens in encoded if isinstance(tokens, Tokens)]

    def place(self) -> dict:
        """Where the next sample is read."""
        return {"epoch": self.epoch, "position": self.position}

    def state(self) -> dict:
        waiting = [i for i, _ in self.waiting]
        return self.place() | {"waiting": waiting, "skipped": list(self.skipped)}

    @property
    def deal(self) -> tuple[int, int]:
        """(which, of how many) batches are this rank's: all form the same order and take turns."""
        return self.rank, self.world

    def __iter__(self) -> Iterator[Batch]:
        """Batches of this rank."""
        if self.deal[0] == 0:
            self._list(*({"reason": reason} for reason in self.source.bad))  # which names the row
        samples = self._samples()
        n_rows, capacity = self.cfg.batch_size, self.cfg.max_length
        turn, (rank, world) = 0, self.deal
        while True:
            if self.cfg.packing:
                # Twice a batch's tokens wait, so that a row finds what fits it.
                lengths = [len(t) for _, t in self.waiting]
                missing = 2 * n_rows * capacity - sum(lengths)
                while missing > 0:
                    self.waiting.append(next(samples))
                    lengths.append(len(self.waiting[-1][1]))
                    missing -= lengths[-1]
                tiles = [len(t.tiles) for _, t in self.waiting] if self.cfg.tiles_per_batch else []
                most = self.cfg.tiles_per_batch // n_rows
                rows = fill_rows(lengths, n_rows, capacity, tiles, most)
            else:
                while len(self.waiting) < n_rows:
                    self.waiting.append(next(samples))
                rows = [[i] for i in range(n_rows)]
            groups = [[self.waiting[i][1] for i in row] for row in rows]
            taken = {i for row in rows for i in row}
            self.waiting = [sample for i, sample in enumerate(self.waiting) if i not in taken]
            if turn % world == rank:
                batch = self._collate(groups)
            if turn % world == world - 1:  # the state after all ranks' batches, on each
                batch.state = self.state()
                yield batch
            turn += 1

    def _chunks(self) -> Iterator[list[int]]:
        """Indices in reading order from (epoch, position) on, for ever."""
        epoch, position = self.epoch, self.position
        while True:
            generator = torch.Generator()
            generator.manual_seed((self.cfg.seed * 1_000_003 + epoch) % 2**64)
            order = torch.randperm(len(self.source), generator=generator)
            if epoch == 0:  # what comes first, then the rest, each shuffled
                order = torch.cat(
                    (order[order < self.source.first], order[order >= self.source.first])
                )
            for start in range(position, len(order), CHUNK):
                yield order[start : start + CHUNK].tolist()
            epoch, position = epoch + 1, 0

    def _samples(self) -> Iterator[tuple[int, Tokens]]:
        encoded = self._encoded()
        workers = self.cfg.workers
        loader = DataLoader(
            encoded,
            sampler=self._chunks(),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_start_worker,
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # else it draws from the global one, and a resume differs
        )
        for chunk in loader:
            for i, tokens in chunk:
                self.position += 1
                if self.position == len(self.source):
                    self.epoch, self.position = self.epoch + 1, 0
                if isinstance(tokens, Skipped):
                    self._skip(i, tokens.reason)
                else:
                    yield i, tokens

    def _encoded(self) -> Encoded:
        return Encoded(self.source, self.processor, self.cfg)

    def _collate(self, groups: list[list[Tokens]]) -> Batch:
        return collate(groups, self.processor.cfg)

    def _skip(self, i: int, reason: str) -> None:
        if i not in self.skipped:
            self.skipped.append(i)
            if self.deal[0] == 0:  # every rank sees the same rows, or each its own
                self._list({"row": number_in_file(self.source, i) + 1, "reason": reason})
        n_bad = len(self.source.bad) + len(self.skipped)
        if n_bad > max_bad_rows(n_rows_read(self.source)) or len(self.skipped) == len(self.source):
            raise InputError(f"{n_bad} rows could not be used, the last: {reason}")

    def _list(self, *bad: dict) -> None:
        """A line each in skipped.jsonl; what cannot be written is no reason to stop training.

        A run that goes on from before the row was met finds it there.
        """
        if self.skipped_file is not None and bad:
            lines = [json.dumps(row) + "\n" for row in bad]
            with contextlib.suppress(OSError):
                with open(self.skipped_file, "a+", encoding="utf-8") as file:
                    file.seek(0)
                    known = set(file)
                    file.writelines(line for line in lines if line not in known)

"""Dataset -> processor -> packing -> Batch, in the same order for any number of workers.

The order depends only on (seed, epoch). Each Batch carries the state of the loader after it, so a
resumed run continues with the next batch. Not here: which samples share a row (packing.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from config_tools import InputError
from configs import DataConfig
from data.batches.packing import collate, fill_rows
from data.processor import Processor
from data.sources.split import max_bad_rows
from data.types import Batch, Dataset, Tokens

CHUNK = 8  # samples that a worker encodes at a time; reduces the cost of passing them on


class Skipped(str):
    """Stands in for a row that could not be encoded: the reason."""


@dataclass
class EncodedDataset(torch.utils.data.Dataset):
    """Indices -> Tokens or Skipped, in the worker processes."""

    dataset: Any  # Dataset, or another source of samples for `processor`
    processor: Any
    cfg: DataConfig

    def __getitem__(self, indices: list[int]) -> list[tuple[int, Tokens | Skipped]]:
        return [(i, self._encode(i)) for i in indices]

    def _encode(self, i: int) -> Tokens | Skipped:
        try:
            return self.processor.encode(self.dataset[i], self.cfg.max_length, self.cfg.max_tiles)
        except InputError as error:
            return Skipped(error)
        except Exception as error:
            raise error_at(
                f"row {self.dataset.row_number(i)} of {self.cfg.source}", error
            ) from error


def error_at(where: str, error: Exception) -> RuntimeError:
    """Wrap an unexpected exception (a bug) with the name of the row."""
    return RuntimeError(f"{where}: {type(error).__name__}: {error}")


def start_worker(_worker: int) -> None:
    """Initialise a worker process: one thread, Ctrl-C ignored.

    More threads would compete with the training process for cores. Ctrl-C and SIGTERM also reach
    workers, but the training process needs them to finish its step; it then saves and ends them. A
    worker that still runs five minutes after SIGTERM exits. If the training process is killed, a
    worker exits without flushing its queue: workers keep each other's pipes open, so a flush would
    block forever.
    """
    torch.set_num_threads(1)
    Finalize(None, os._exit, (0,), exitpriority=0)  # before the queues' finalizers, which wait
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(300))


@dataclass
class Loader:
    """Infinite batches; `epoch` and `position` give the next sample in the shuffled order."""

    dataset: Dataset
    processor: Processor
    cfg: DataConfig
    rank: int = 0
    world_size: int = 1
    skipped_file: Path | None = None
    epoch: int = 0
    position: int = 0
    waiting: list[tuple[Any, Tokens]] = field(default_factory=list)  # read, not yet in a batch
    skipped: list[Any] = field(default_factory=list)  # indices that could not be encoded

    def load_state_dict(self, state: dict) -> None:
        """Continue after the batch that carried `state`."""
        self.load_position(state)
        self.skipped = list(state["skipped"])
        self.waiting = self.encode_again(state["waiting"])

    def position_dict(self) -> dict:
        """The position of the next sample."""
        return {"epoch": self.epoch, "position": self.position}

    def load_position(self, state: dict) -> None:
        self.epoch, self.position = state["epoch"], state["position"]

    def encode_again(self, indices: list) -> list[tuple[Any, Tokens]]:
        """Encode the samples again that waited for a batch when the state was saved."""
        encoded = self._encoded()[indices]
        return [(i, tokens) for i, tokens in encoded if isinstance(tokens, Tokens)]

    def state_dict(self) -> dict:
        waiting = [i for i, _ in self.waiting]
        return self.position_dict() | {"waiting": waiting, "skipped": list(self.skipped)}

    @property
    def batch_shard(self) -> tuple[int, int]:
        """(index, n): all ranks form the same batches; this rank yields every n-th."""
        return self.rank, self.world_size

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this rank."""
        samples, (rank, world_size) = self._samples(), self.batch_shard
        if rank == 0:
            self._list_skipped(*({"reason": reason} for reason in self.dataset.skipped))
        batch: Any = None  # of this rank
        for turn in count():
            rows = self._next_rows(samples)
            groups = [[self.waiting[i][1] for i in row] for row in rows]
            taken = {i for row in rows for i in row}
            self.waiting = [sample for i, sample in enumerate(self.waiting) if i not in taken]
            if turn % world_size == rank:
                batch = self._collate(groups)
            if turn % world_size == world_size - 1:  # the state after the batches of all ranks
                batch.state = self.state_dict()
                yield batch

    def _next_rows(self, samples: Iterator[tuple[int, Tokens]]) -> list[list[int]]:
        """Read until a batch can be formed; return its rows as indices into `waiting`."""
        n_rows, capacity = self.cfg.batch_size, self.cfg.max_length
        if not self.cfg.packing:
            while len(self.waiting) < n_rows:
                self.waiting.append(next(samples))
            return [[i] for i in range(n_rows)]
        n_waiting = sum(len(t) for _, t in self.waiting)
        while n_waiting < 2 * n_rows * capacity:  # twice the tokens of a batch, to fill rows well
            self.waiting.append(next(samples))
            n_waiting += len(self.waiting[-1][1])
        lengths = [len(t) for _, t in self.waiting]
        tiles = [len(t.tiles) for _, t in self.waiting] if self.cfg.tiles_per_batch else []
        max_tiles = self.cfg.tiles_per_batch // n_rows
        return fill_rows(lengths, n_rows, capacity, tiles, max_tiles)

    def _chunks(self) -> Iterator[list[int]]:
        """Endless indices in training order, from (epoch, position) on."""
        epoch, position = self.epoch, self.position
        while True:
            generator = torch.Generator()
            generator.manual_seed((self.cfg.seed * 1_000_003 + epoch) % 2**64)
            order = torch.randperm(len(self.dataset), generator=generator)
            if epoch == 0:  # first `n_first` samples, then the rest, both shuffled
                n_first = self.dataset.n_first
                order = torch.cat((order[order < n_first], order[order >= n_first]))
            for start in range(position, len(order), CHUNK):
                yield order[start : start + CHUNK].tolist()
            epoch, position = epoch + 1, 0

    def _samples(self) -> Iterator[tuple[Any, Tokens]]:
        encoded = self._encoded()
        for i, tokens in chain.from_iterable(self._read(encoded, self._chunks())):
            self.position += 1
            if self.position == len(self.dataset):
                self.epoch, self.position = self.epoch + 1, 0
            if isinstance(tokens, Skipped):
                self._skip(i, str(tokens))
            else:
                yield i, tokens

    def _read(self, encoded: torch.utils.data.Dataset, sampler: Any = None) -> DataLoader:
        """Chunks of samples, encoded in the workers."""
        workers = self.cfg.workers
        generator = torch.Generator()  # the global generator differs after a resume
        return DataLoader(
            encoded, sampler=sampler, batch_size=None, num_workers=workers, generator=generator,
            worker_init_fn=start_worker, prefetch_factor=4 if workers else None,
        )  # fmt: skip

    def _encoded(self) -> Any:
        return EncodedDataset(self.dataset, self.processor, self.cfg)

    def _collate(self, groups: list[list[Tokens]]) -> Batch:
        return collate(groups, self.processor.cfg)

    def _skip(self, i: int, reason: str) -> None:
        if i not in self.skipped:
            self.skipped.append(i)
            if self.batch_shard[0] == 0:  # list it once; stream ranks read different rows
                self._list_skipped({"row": self.dataset.row_number(i), "reason": reason})
        n_bad = len(self.dataset.skipped) + len(self.skipped)
        is_empty = len(self.skipped) == len(self.dataset)
        if n_bad > max_bad_rows(self.dataset.n_rows) or is_empty:
            raise InputError(f"{n_bad} rows are unusable; the last: {reason}")

    def _list_skipped(self, *rows: dict) -> None:
        """Append new rows to skipped.jsonl; a failed write does not stop training."""
        if self.skipped_file is None or not rows:
            return
        lines = [json.dumps(row) + "\n" for row in rows]
        with contextlib.suppress(OSError), open(self.skipped_file, "a+", encoding="utf-8") as file:
            file.seek(0)
            known = set(file)
            file.writelines(line for line in lines if line not in known)

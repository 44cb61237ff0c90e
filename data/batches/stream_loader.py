"""Loaders of what has no numbered rows: streams read in parts, and mixtures of several sources.

Both are a `Loader` that gets its samples elsewhere; packing, skipping and resuming are the same.
Not here: how a part is read (streams.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from config_tools import InputError
from configs import DataConfig
from data.batches.loader import CHUNK, Loader, Skipped, _start_worker, told
from data.processor import Processor
from data.sources.open import MixtureSource
from data.sources.split import max_bad_rows_in_stream
from data.sources.streaming import Part, StreamSource
from data.types import Tokens


@dataclass
class Place:
    """Where a part of a stream goes on."""

    epoch: int = 0
    block: int = 0
    at: int = 0  # samples of the block, in its shuffled order, that are done with
    start: dict | None = None  # the library's place at the start of the block


@dataclass
class Passing(IterableDataset):
    """Chunks of a rank's parts, each worker reading one: (part, place, [Tokens, Skipped, None])."""

    source: StreamSource
    processor: Processor
    cfg: DataConfig
    parts: list[int]
    of: int
    places: list[Place]
    turn: int  # which of the parts comes next; the first worker takes it, the next the next

    def __iter__(self) -> Iterator[tuple[int, Place, list]]:
        info = get_worker_info()
        mine = ((info.id if info else 0) + self.turn) % len(self.parts)
        part, place = self.source.part(self.parts[mine], self.of), self.places[mine]
        n_used = 0
        while True:
            rows, after = part.block(place.start)
            order = part.shuffled(rows, place.epoch, place.block)
            for at in range(place.at, len(order)):
                if at % CHUNK and at > place.at:
                    continue
                chunk = order[at : at - at % CHUNK + CHUNK]
                encoded = [self.one(part, number, row) for number, row in chunk]
                n_used += sum(tokens is not None for tokens in encoded)
                yield mine, replace(place, at=at), encoded
            if len(rows) == self.cfg.stream_block:
                place = Place(place.epoch, place.block + 1, 0, after)
                continue
            if n_used == 0 and place.block + len(rows) + place.at == 0:
                return  # a part without rows
            if n_used == 0 and place.epoch > self.places[mine].epoch:
                return  # a whole epoch without a row to train on
            place = Place(place.epoch + 1)

    def one(self, part: Part, number: int, row: dict) -> Tokens | Skipped | None:
        where = part.where(number)
        try:
            sample = self.source.sample(row, where)
            if sample is None:
                return None
            return self.processor.encode(sample, self.cfg.max_length, self.cfg.max_tiles)
        except InputError as error:
            reason = str(error)
            return Skipped(reason if where in reason else f"{where}: {reason}")
        except Exception as error:
            raise told(error, where) from error


@dataclass
class StreamLoader(Loader):
    """Endless batches of a stream. Each rank reads and packs parts of its own.

    A sample is [part, epoch, block, at]; those that wait for a batch are read again on resume,
    from the start of their blocks.
    """

    places: list[Place] = field(default_factory=list)
    turn: int = 0
    starts: dict[tuple[int, int, int], dict | None] = field(default_factory=dict)

    def __post_init__(self):
        n = max(1, self.cfg.workers)
        self.parts = [self.rank * n + w for w in range(n)]
        self.places = self.places or [Place() for _ in self.parts]

    @property
    def deal(self) -> tuple[int, int]:
        return 0, 1

    def place(self) -> dict:
        held = {(p, e, b) for (p, e, b, _), _ in self.waiting}
        held |= {(p, place.epoch, place.block) for p, place in enumerate(self.places)}
        self.starts = {key: start for key, start in self.starts.items() if key in held}
        return {
            "epoch": min(place.epoch for place in self.places),
            "position": self.position,
            "turn": self.turn,
            "places": [[p.epoch, p.block, p.at] for p in self.places],
            "starts": [[*key, start] for key, start in sorted(self.starts.items())],
        }

    def go_to(self, state: dict) -> None:
        self.position, self.turn = state["position"], state["turn"]
        self.starts = {(p, e, b): start for p, e, b, start in state["starts"]}
        self.places = [
            Place(e, b, at, self.starts.get((p, e, b)))
            for p, (e, b, at) in enumerate(state["places"])
        ]

    def again(self, waiting: list) -> list[tuple[list[int], Tokens]]:
        reading, found = self._passing(), {}
        for p, e, b in sorted({tuple(i[:3]) for i in waiting}):
            part = self.source.part(self.parts[p], reading.of)
            rows, _ = part.block(self.starts[p, e, b])
            order = part.shuffled(rows, e, b)
            for at in sorted(i[3] for i in waiting if tuple(i[:3]) == (p, e, b)):
                found[p, e, b, at] = reading.one(part, *order[at])
        lost = [i for i in waiting if not isinstance(found[tuple(i)], Tokens)]
        if lost:
            raise InputError(f"{self.source.name}: rows have changed since the checkpoint.")
        return [(list(i), found[tuple(i)]) for i in waiting]

    def _passing(self) -> Passing:
        of = len(self.parts) * self.world
        return Passing(
            self.source, self.processor, self.cfg, self.parts, of, list(self.places), self.turn
        )

    def _samples(self) -> Iterator[tuple[list[int], Tokens]]:
        workers = self.cfg.workers
        loader = DataLoader(
            self._passing(),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_start_worker,
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),
        )
        for p, place, chunk in loader:
            self.starts[p, place.epoch, place.block] = place.start
            for i, tokens in enumerate(chunk):
                at, is_last = place.at + i, i + 1 == len(chunk)
                self.places[p] = replace(place, at=at + 1)
                self.turn = (p + 1) % len(self.parts) if is_last else p
                self.position += 1
                if isinstance(tokens, Skipped):
                    self._skip([p, place.epoch, place.block, at], tokens.reason)
                elif tokens is not None:
                    yield [p, place.epoch, place.block, at], tokens
        raise InputError(f"{self.source.name}: no rows to train on for process {self.rank}.")

    def _skip(self, i: list[int], reason: str) -> None:
        if reason not in self.skipped:  # it names the row, whatever its place this time
            self.skipped.append(reason)
            self._list({"row": i, "reason": reason})
        n_read = max(self.position, len(self.source))
        if len(self.skipped) > max_bad_rows_in_stream(n_read):
            raise InputError(f"{len(self.skipped)} rows could not be used, the last: {reason}")


@dataclass
class MixtureLoader(Loader):
    """Samples of several loaders, each as often as its share says; all of each once per epoch.

    The next is the one that is furthest behind its share, so that any stretch of samples has the
    shares to within one, and where the mixture stands is how many of each have been taken.
    """

    members: list[Loader] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def deal(self) -> tuple[int, int]:
        return self.members[0].deal

    def place(self) -> dict:
        return {
            "epoch": min(member.place()["epoch"] for member in self.members),
            "position": sum(self.counts),
            "counts": list(self.counts),
            "members": [member.place() for member in self.members],
        }

    def go_to(self, state: dict) -> None:
        self.counts = list(state["counts"])
        for member, its in zip(self.members, state["members"], strict=True):
            member.go_to(its)

    def state(self) -> dict:
        for m, member in enumerate(self.members):  # a stream keeps the blocks of what waits
            member.waiting = [(i, tokens) for (k, i), tokens in self.waiting if k == m]
        skipped = [[m, i] for m, member in enumerate(self.members) for i in member.skipped]
        return self.place() | {"waiting": [i for i, _ in self.waiting], "skipped": skipped}

    def restore(self, state: dict) -> None:
        for m, member in enumerate(self.members):
            member.skipped = [i for k, i in state["skipped"] if k == m]
        super().restore(state)

    def again(self, waiting: list) -> list[tuple[list, Tokens]]:
        of = [[i for k, i in waiting if k == m] for m in range(len(self.members))]
        found = [iter(member.again(its)) for member, its in zip(self.members, of)]
        return [([m, i], next(found[m])[1]) for m, i in waiting]

    def _samples(self) -> Iterator[tuple[list, Tokens]]:
        streams = [member._samples() for member in self.members]
        while True:
            m = behind(self.counts, self.source.shares)
            i, tokens = next(streams[m])
            self.counts[m] += 1
            self.skipped = [j for member in self.members for j in member.skipped]
            yield [m, i], tokens


def behind(counts: list[int], shares: tuple[Fraction, ...]) -> int:
    """Whose next sample is due first, the first of equals."""
    return min(range(len(counts)), key=lambda m: ((counts[m] + 1) / shares[m], m))


def open_loader(
    source,
    processor: Processor,
    cfg: DataConfig,
    rank: int = 0,
    world: int = 1,
    skipped_file: Path | None = None,
) -> Loader:
    """The loader of a source, whatever it is."""
    common = dict(rank=rank, world=world, skipped_file=skipped_file)
    if isinstance(source, MixtureSource):
        members = [
            open_loader(member, processor, replace(cfg, source=name), **common)
            for member, name in zip(source.members, source.names)
        ]
        counts = [0] * len(members)
        return MixtureLoader(source, processor, cfg, **common, members=members, counts=counts)
    kind = StreamLoader if isinstance(source, StreamSource) else Loader
    return kind(source, processor, cfg, **common)

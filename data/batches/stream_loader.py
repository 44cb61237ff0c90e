"""Loaders of streams, which are read in parts, and of mixtures of datasets.

Both are `Loader`s with another source of samples; packing, skipping and resuming are inherited.
Not here: how a part is read (sources/streaming.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from config_tools import InputError
from configs import DataConfig
from data.batches.loader import CHUNK, Loader, Skipped, error_at
from data.processor import Processor
from data.sources.open import MixtureDataset
from data.sources.split import max_bad_rows
from data.sources.streaming import StreamDataset, StreamPart
from data.types import Dataset, Tokens


@dataclass
class Cursor:
    """The position in a part of a stream."""

    epoch: int = 0
    block: int = 0
    offset: int = 0  # samples of the block, in shuffled order, already read
    start: dict | None = None  # state of the `datasets` library at the start of the block


@dataclass
class EncodedStream(IterableDataset):
    """Chunks of a rank's parts, one part per worker: (part, cursor, [Tokens, Skipped or None])."""

    dataset: StreamDataset
    processor: Processor
    cfg: DataConfig
    parts: list[int]
    of: int
    cursors: list[Cursor]
    turn: int  # index of the part that is read next, by the first worker

    def __iter__(self) -> Iterator[tuple[int, Cursor, list]]:
        info = get_worker_info()
        own = ((info.id if info else 0) + self.turn) % len(self.parts)
        part, cursor = self.dataset.part(self.parts[own], self.of), self.cursors[own]
        n_used = 0
        while True:
            rows, after = part.read_block(cursor.start)
            order = part.shuffle(rows, cursor.epoch, cursor.block)
            for offset in range(cursor.offset, len(order)):
                if offset % CHUNK and offset > cursor.offset:
                    continue
                chunk = order[offset : offset - offset % CHUNK + CHUNK]
                encoded = [self.encode(part, number, row) for number, row in chunk]
                n_used += sum(tokens is not None for tokens in encoded)
                yield own, replace(cursor, offset=offset), encoded
            if len(rows) == self.cfg.stream_block:
                cursor = Cursor(cursor.epoch, cursor.block + 1, 0, after)
                continue
            has_no_rows = cursor.block + len(rows) + cursor.offset == 0
            if n_used == 0 and (has_no_rows or cursor.epoch > self.cursors[own].epoch):
                return  # no training rows in the part or in a whole epoch
            cursor = Cursor(cursor.epoch + 1)

    def encode(self, part: StreamPart, number: int, row: Any) -> Tokens | Skipped | None:
        """A row as Tokens; Skipped if it is unusable, None if it is not for training."""
        where = part.where(number)
        try:
            if (sample := self.dataset.make_sample(row, where)) is None:
                return None
            return self.processor.encode(sample, self.cfg.max_length, self.cfg.max_tiles)
        except InputError as error:
            return Skipped(error if where in str(error) else f"{where}: {error}")
        except Exception as error:
            raise error_at(where, error) from error


@dataclass
class StreamLoader(Loader):
    """Infinite batches of a stream. Each rank reads and packs its own parts.

    The index of a sample is [part, epoch, block, offset]. On resume, samples that waited for a
    batch are read again from the start of their blocks.
    """

    dataset: StreamDataset
    cursors: list[Cursor] = field(default_factory=list)
    turn: int = 0
    starts: dict[tuple[int, int, int], dict | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = max(1, self.cfg.workers)
        self.parts = [self.rank * n + w for w in range(n)]
        self.cursors = self.cursors or [Cursor() for _ in self.parts]

    @property
    def batch_shard(self) -> tuple[int, int]:
        return 0, 1

    def position_dict(self) -> dict:
        held = {(p, e, b) for (p, e, b, _), _ in self.waiting}
        held |= {(p, cursor.epoch, cursor.block) for p, cursor in enumerate(self.cursors)}
        self.starts = {key: start for key, start in self.starts.items() if key in held}
        return {
            "epoch": min(cursor.epoch for cursor in self.cursors),
            "position": self.position,
            "turn": self.turn,
            # existing checkpoints call the cursors "places"
            "places": [[c.epoch, c.block, c.offset] for c in self.cursors],
            "starts": [[*key, start] for key, start in sorted(self.starts.items())],
        }

    def load_position(self, state: dict) -> None:
        self.position, self.turn = state["position"], state["turn"]
        self.starts = {(p, e, b): start for p, e, b, start in state["starts"]}
        places = enumerate(state["places"])
        self.cursors = [Cursor(e, b, o, self.starts.get((p, e, b))) for p, (e, b, o) in places]

    def encode_again(self, indices: list) -> list[tuple[Any, Tokens]]:
        stream, found = self._encoded(), {}
        for p, e, b in sorted({tuple(i[:3]) for i in indices}):
            part = self.dataset.part(self.parts[p], stream.of)
            rows, _ = part.read_block(self.starts[p, e, b])
            order = part.shuffle(rows, e, b)
            for offset in sorted(i[3] for i in indices if tuple(i[:3]) == (p, e, b)):
                found[p, e, b, offset] = stream.encode(part, *order[offset])
        if not all(isinstance(found[tuple(i)], Tokens) for i in indices):
            fix = "restore them or start a new run"
            raise InputError(f"{self.cfg.source}: rows have changed since the checkpoint; {fix}.")
        return [(list(i), found[tuple(i)]) for i in indices]

    def _encoded(self) -> EncodedStream:
        of, common = len(self.parts) * self.world_size, (self.dataset, self.processor, self.cfg)
        return EncodedStream(*common, self.parts, of, list(self.cursors), self.turn)

    def _samples(self) -> Iterator[tuple[Any, Tokens]]:
        for p, cursor, chunk in self._read(self._encoded()):
            self.starts[p, cursor.epoch, cursor.block] = cursor.start
            for offset, tokens in enumerate(chunk, cursor.offset):
                is_last = offset + 1 == cursor.offset + len(chunk)
                self.cursors[p] = replace(cursor, offset=offset + 1)
                self.turn = (p + 1) % len(self.parts) if is_last else p
                self.position += 1
                i = [p, cursor.epoch, cursor.block, offset]
                if isinstance(tokens, Skipped):
                    self._skip(i, str(tokens))
                elif tokens is not None:
                    yield i, tokens
        problem = f"no training rows for process {self.rank}; use fewer processes or workers"
        raise InputError(f"{self.cfg.source}: {problem}.")

    def _skip(self, i: list[int], reason: str) -> None:
        if reason not in self.skipped:  # the reason names the row; indices differ per epoch
            self.skipped.append(reason)
            self._list_skipped({"row": i, "reason": reason})
        n_read = max(self.position, len(self.dataset))
        if len(self.skipped) > max_bad_rows(n_read, is_stream=True):
            raise InputError(f"{len(self.skipped)} rows are unusable; the last: {reason}")


@dataclass
class MixtureLoader(Loader):
    """Samples of several loaders, in proportion to their shares.

    The next sample always comes from the loader furthest behind its share. The number of samples
    taken from each loader is therefore within one of its share, and is the whole position.
    """

    dataset: MixtureDataset
    members: list[Loader] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def batch_shard(self) -> tuple[int, int]:
        return self.members[0].batch_shard

    def position_dict(self) -> dict:
        positions = [member.position_dict() for member in self.members]
        return {
            "epoch": min(position["epoch"] for position in positions),
            "position": sum(self.counts),
            "counts": list(self.counts),
            "members": positions,
        }

    def load_position(self, state: dict) -> None:
        self.counts = list(state["counts"])
        for member, position in zip(self.members, state["members"], strict=True):
            member.load_position(position)

    def state_dict(self) -> dict:
        for m, member in enumerate(self.members):  # streams keep the blocks of waiting samples
            member.waiting = [(i, tokens) for (k, i), tokens in self.waiting if k == m]
        skipped = [[m, i] for m, member in enumerate(self.members) for i in member.skipped]
        waiting = [i for i, _ in self.waiting]
        return self.position_dict() | {"waiting": waiting, "skipped": skipped}

    def load_state_dict(self, state: dict) -> None:
        for m, member in enumerate(self.members):
            member.skipped = [i for k, i in state["skipped"] if k == m]
        super().load_state_dict(state)

    def encode_again(self, indices: list) -> list[tuple[Any, Tokens]]:
        of = [[i for k, i in indices if k == m] for m in range(len(self.members))]
        found = [iter(member.encode_again(own)) for member, own in zip(self.members, of)]
        return [([m, i], next(found[m])[1]) for m, i in indices]

    def _samples(self) -> Iterator[tuple[Any, Tokens]]:
        streams, shares = [member._samples() for member in self.members], self.dataset.shares
        while True:  # in a tie, the first loader
            m = min(range(len(shares)), key=lambda m: (self.counts[m] + 1) / shares[m])
            i, tokens = next(streams[m])
            self.counts[m] += 1
            self.skipped = [j for member in self.members for j in member.skipped]
            yield [m, i], tokens


def open_loader(
    dataset: Dataset, processor: Processor, cfg: DataConfig, rank: int = 0, world_size: int = 1,
    skipped_file: Path | None = None,
) -> Loader:  # fmt: skip
    """Create the loader for the type of `dataset`."""
    options = dict(rank=rank, world_size=world_size, skipped_file=skipped_file)
    if isinstance(dataset, MixtureDataset):
        members = [
            open_loader(member, processor, replace(cfg, source=name), **options)
            for member, name in zip(dataset.members, dataset.names)
        ]
        counts = [0] * len(members)
        return MixtureLoader(dataset, processor, cfg, **options, members=members, counts=counts)
    kind: Any = StreamLoader if isinstance(dataset, StreamDataset) else Loader
    return kind(dataset, processor, cfg, **options)

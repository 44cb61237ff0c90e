"""Streams of rows: read in parts, shuffled in blocks, resumable at any row.

A stream is an `IterableDataset` of the `datasets` library; nothing is indexed or cached.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config_tools import InputError
from configs import DataConfig
from data.sources.arrow import call_datasets, decode_row, encoded_columns
from data.sources.split import RowDataset, hash_digests, make_sample, max_bad_rows, parse_row
from data.sources.text_files import find_delimiter, parse_json
from data.types import Sample

# --- One function per format --------------------------------------------------------------------


class RowStream(NamedTuple):
    """An open stream; `read` converts an item of `data` to a row, its error, or None (no row)."""

    data: Any  # datasets.IterableDataset; images are bytes, not decoded
    read: Callable[[dict], dict | InputError | None]


def load_stream(name: str, *args: str | None, **options: Any) -> Any:
    """`datasets.load_dataset(*args, **options)` as a stream; raises `InputError` naming `name`."""
    options = {"split": "train", "streaming": True} | options
    opened = call_datasets(name, lambda datasets: datasets.load_dataset(*args, **options))
    return opened if opened.features is None else opened.decode(False)


def stream_jsonl(path: str, _split: str) -> RowStream:
    # Read lines as bytes and parse them here: `datasets` converts values of mixed types.
    return RowStream(load_stream(path, "text", data_files=[path], encoding="latin-1"), _read_line)


def _read_line(item: dict) -> dict | InputError | None:
    try:
        return parse_json(item["text"].encode("latin-1")) if item["text"].strip() else None
    except InputError as error:
        return error


def stream_csv(path: str, _split: str) -> RowStream:
    """Read all columns as text; `datasets` would guess types from the first rows."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            delimiter = find_delimiter(file.readline().encode())
            file.seek(0)
            names = next(csv.reader(file, delimiter=delimiter), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not CSV in UTF-8 ({error}).") from None

    types = {name: {"dtype": "string", "_type": "Value"} for name in names}
    features = call_datasets(path, lambda datasets: datasets.Features.from_dict(types))
    data = load_stream(path, "csv", data_files=[path], features=features, sep=delimiter,
                       keep_default_na=False, encoding="utf-8-sig")  # fmt: skip
    return RowStream(data, lambda item: {column: cell for column, cell in item.items() if cell})


def stream_parquet(path: str, _split: str) -> RowStream:
    """A Parquet file, or the Parquet files directly in a folder."""
    is_folder = Path(path).is_dir()
    files = [str(file) for file in sorted(Path(path).glob("*.parquet"))] if is_folder else [path]
    if not files:
        fix = "leave out --data.stream"
        raise InputError(f"data.source = {path!r}: no Parquet files to stream; {fix}.")
    return _stream_arrow(load_stream(path, "parquet", data_files=files))


def stream_hub(name: str, split: str) -> RowStream:
    """A Hub dataset `owner/name` or `owner/name:configuration`, downloaded while it is read."""
    repository, _, configuration = name.partition(":")
    args = repository, configuration or None
    return _stream_arrow(load_stream(f"hf:{name}", *args, split=split or "train"))


def _stream_arrow(data: Any) -> RowStream:
    return RowStream(data, partial(decode_row, encoded=encoded_columns(data.features)))


# --- Reading ------------------------------------------------------------------------------------

MAX_ATTEMPTS = 6  # per block; the wait doubles each time, from one second
READ_ERRORS = (OSError, ValueError, RuntimeError, InputError)  # include Arrow's errors
N_HEAD = 64  # rows checked before training
MAX_SCANNED = 20_000  # rows read to find validation rows
MAX_VAL_ROWS = 256


class StreamReader(NamedTuple):
    """How to open a stream; called in every worker and epoch."""

    source: str  # data.source, for messages
    open: Callable[[str, str], RowStream]
    name: str  # path, or name on the Hub
    split: str

    @property
    def folder(self) -> Path:
        """The folder that image paths are relative to: the source, or the folder of the file."""
        path = Path(self.source)
        return path if path.is_dir() else path.parent if path.is_file() else Path()


class StreamPart:
    """Part `number` of `of` parts of a stream; every row is in exactly one part."""

    def __init__(self, cfg: DataConfig, reader: StreamReader, number: int, of: int):
        self.cfg, self.reader, self.number, self.of = cfg, reader, number, of
        self.rows: Iterator[dict | InputError] | None = None
        self.data: Any = None  # datasets.IterableDataset
        self.after: dict | None = None  # state after the last block

    def read_block(self, state: dict | None) -> tuple[list[dict | InputError], dict]:
        """(up to `stream_block` rows from `state` on, the state after them).

        `state` comes from the `datasets` library; None is the start. An unreadable row is returned
        as its `InputError`. Raises `InputError` if the source cannot be read.
        """
        attempt = 0
        while True:
            attempt += 1
            try:
                rows = self._open(state) if self.rows is None or state != self.after else self.rows
                found = list(islice(rows, self.cfg.stream_block))
                self.after = self.data.state_dict()
                return found, self.after
            except Exception as error:
                if not (is_connection_error(error) or isinstance(error, READ_ERRORS)):
                    raise  # a bug in picoVLM
                self.rows = None
                if is_transient(error) and attempt < MAX_ATTEMPTS:
                    time.sleep(2 ** (attempt - 1))
                    continue
                if isinstance(error, InputError):
                    raise
                words = (str(error) or type(error).__name__).splitlines()[0][:200]
                fix = "; resume later with --train.resume auto" * is_transient(error)
                problem = f"cannot be read ({words}), attempts: {attempt}"
                raise InputError(f"{self.reader.source}: {problem}{fix}.") from None

    def blocks(self) -> Iterator[list[dict | InputError]]:
        """All blocks from the start."""
        rows, state = self.read_block(None)
        while rows:
            yield rows
            rows, state = self.read_block(state)

    def _open(self, state: dict | None) -> Iterator[dict | InputError]:
        from datasets.distributed import split_dataset_by_node

        stream = self.reader.open(self.reader.name, self.reader.split)
        data = self.data = split_dataset_by_node(stream.data, self.number, self.of)
        if state is not None:
            data.load_state_dict(state)
        # `iter(1)`: a plain loop would split the rows among DataLoader workers again.
        items = ({name: v[0] for name, v in one.items()} for one in data.iter(1))
        self.rows = (row for row in map(stream.read, items) if row is not None)
        return self.rows

    def shuffle(self, rows: list, epoch: int, block: int) -> list[tuple[int, dict | InputError]]:
        """(number in the part, row) of a block, in training order."""
        seed = (self.cfg.seed, epoch, self.number, block)
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        first = block * self.cfg.stream_block
        return [(first + i, rows[i]) for i in order]

    def where(self, number: int) -> str:
        return f"{self.reader.source} row {number + 1} of part {self.number + 1} of {self.of}"


@dataclass(frozen=True)
class ListRows:
    """Rows in memory; images may be PIL images."""

    rows: list[dict]
    folder: Path = Path()

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, k: int) -> str:
        return f"row {k + 1}"

    def __getitem__(self, k: int) -> dict:
        return self.rows[k]

    def scan(self) -> Iterator[dict]:
        return iter(self.rows)


@dataclass(frozen=True, kw_only=True)
class StreamDataset(RowDataset):
    """A stream to train on. `rows` are only the first training rows, for checks."""

    reader: StreamReader

    def part(self, number: int, of: int) -> StreamPart:
        return StreamPart(self.cfg, self.reader, number, of)

    def make_sample(self, row: dict | InputError, where: str) -> Sample | None:
        """The row as a training sample; None if not for training. `InputError`s name the row."""
        try:
            parsed = parse_row(require_row(row), self.cfg)
            if parsed is None or parsed.is_val:
                return None
            return make_sample(parsed.conversation, self.reader.folder, where)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def require_row(row: dict | InputError) -> dict:
    """Return the row, or raise the error in its place."""
    if isinstance(row, InputError):
        raise row
    return row


def is_connection_error(error: BaseException) -> bool:
    """Whether it is httpx's TransportError (timeout, lost connection), which is not an OSError.

    Compared by name, because huggingface_hub may use another version of httpx.
    """
    kinds = type(error).__mro__
    return any(k.__name__ == "TransportError" and k.__module__.startswith("httpx") for k in kinds)


def is_transient(error: BaseException) -> bool:
    """Whether a retry may help, for example after a timeout or a lost connection."""
    if isinstance(error, InputError):
        return error.__cause__ is not None and is_transient(error.__cause__)
    is_offline = type(error).__name__ == "OfflineModeIsEnabled"
    is_final = is_offline or isinstance(error, (FileNotFoundError, PermissionError))
    return (isinstance(error, OSError) or is_connection_error(error)) and not is_final


@lru_cache(maxsize=4)
def _read_head(cfg: DataConfig, reader: StreamReader, is_val: bool) -> tuple[RowDataset, str]:
    """The first usable rows of a split, and the schema of the first one."""
    part, n_wanted = StreamPart(cfg, reader, 0, 1), MAX_VAL_ROWS if is_val else N_HEAD
    kept, digests, n_read, n_bad, reason, schema = [], [], 0, 0, "", ""
    for rows in part.blocks():
        for row in rows:
            n_read += 1
            try:
                parsed = parse_row(require_row(row), cfg)
            except InputError as error:
                n_bad, reason = n_bad + 1, reason or f"{part.where(n_read - 1)}: {error}"
                continue
            schema = schema or (parsed.conversation.schema if parsed else "")
            if parsed is not None and parsed.is_val == is_val and len(kept) < n_wanted:
                kept.append(row)
                digests.append(parsed.digest)
        if len(kept) == n_wanted or n_read >= MAX_SCANNED:
            break
    if n_bad > max_bad_rows(n_read, is_stream=True):
        raise InputError(f"{n_bad} of the first {n_read} rows are unusable; the first: {reason}")
    if not kept and not is_val:
        why = f"; {reason}" if reason else "."
        raise InputError(f"{reader.source}: no training rows{why}")
    fingerprint = f"{reader.source}, the beginning {hash_digests(digests)}"
    rows = ListRows(kept, reader.folder)
    return RowDataset(rows, np.arange(len(kept)), (), (), cfg, fingerprint), schema


def open_stream(cfg: DataConfig, reader: StreamReader, split: str) -> RowDataset:
    """A stream to train on; for `val`, the validation rows among its first rows."""
    head, schema = _read_head(cfg, reader, split == "val")
    if split == "val":
        return head
    note = f"{reader.source}: stream of {schema}; {cfg.val_fraction:.1%} of rows for validation"
    return StreamDataset(**vars(head) | {"notes": (note,)}, reader=reader)

"""Streams and mixtures: each row once per epoch for any workers, resumable, no split leakage."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
from datasets import ClassLabel, Dataset, Features, Value

import data.sources.streaming
from cli import parse_run
from config_tools import InputError
from configs import DataConfig
from data.batches.stream_loader import open_loader
from data.processor import Processor
from data.sources.open import open_dataset
from data.sources.streaming import StreamDataset, is_transient

N = 43  # rows; not a multiple of the block, of a chunk or of the number of parts
STREAM = DataConfig(stream=True, stream_block=10, batch_size=2, max_length=128, packing=False,
                    val_fraction=0.2)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    rows = [{"question": "what " * (1 + i % 7), "answer": f"number {i}"} for i in range(N)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def shards(file, tmp_path_factory):
    """The same rows in three Parquet files of unequal length."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("shards")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for i, part in enumerate((rows[:5], rows[5:30], rows[30:])):
        Dataset.from_list(part).to_parquet(str(folder / f"{i}.parquet"))
    return folder


def split_numbers(file) -> tuple[set[int], set[int]]:
    """Rows for training and for validation in a dataset that is not streamed."""
    found = []
    for split in ("train", "val"):
        source = open_dataset(DataConfig(source=str(file), val_fraction=0.2), split)
        found.append({int(source[i].turns[-1].text.split()[-1]) for i in range(len(source))})
    return found[0], found[1]


def an_epoch(loader, numbers) -> list[int]:
    """The samples of the first epoch in order, found without the position of the loader."""
    found = []
    for batch in loader:
        found += numbers([batch])
        if batch.state["epoch"] > 0:
            return found
    raise AssertionError


def test_the_fingerprint_of_a_stream_depends_on_its_first_rows(file, tmp_path):
    """A run must not resume with other rows under the same name."""
    lines = file.read_text().splitlines()
    prints = []
    for name, rows in (("a", lines), ("b", lines), ("c", [*lines[1:], lines[0]]), ("d", lines[1:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        cfg = replace(STREAM, source=str(tmp_path / f"{name}.jsonl"))
        name, beginning = open_dataset(cfg, "train").fingerprint.split(", ")
        assert name == cfg.source
        prints.append(beginning)
    assert prints[0] == prints[1] and len(set(prints)) == 3


# --- Every row once -----------------------------------------------------------------------------


def rows_of_parts(source: StreamDataset, of: int) -> list[int]:
    """The training rows that all parts read in an epoch."""
    seen = []
    for number in range(of):
        part, state, block = source.part(number, of), None, 0
        while True:
            rows, state = part.read_block(state)
            for k, row in part.shuffle(rows, 0, block):
                if (sample := source.make_sample(row, part.where(k))) is not None:
                    seen.append(int(sample.turns[-1].text.split()[-1]))
            if len(rows) < source.cfg.stream_block:
                break
            block += 1
    return seen


@pytest.mark.parametrize("of", [1, 3, 4, 12])
def test_every_row_is_in_one_part(file, shards, of):
    """1 to 4 ranks x 0 to 3 workers read 1 to 12 parts, also with more parts than files."""
    train, val = split_numbers(file)
    assert train | val == set(range(N)) and not train & val and len(val) > 3
    for path in (file, shards):
        source = open_dataset(replace(STREAM, source=str(path)), "train")
        assert sorted(rows_of_parts(source, of)) == sorted(train), path


# Only two cases of each kind are fast tests: starting workers takes time.
GRID = [
    pytest.param(stream, world, workers, marks=() if short else pytest.mark.slow)
    for stream in (True, False) for world in (1, 2, 3, 4) for workers in (0, 1, 2, 3)
    for short in [(world, workers) in ((3, 0), (4, 0))]
]  # fmt: skip


@pytest.mark.parametrize(("stream", "world", "workers"), GRID)
def test_every_row_once_by_ranks_and_workers(tiny_processor, file, stream, world, workers, numbers):
    """Counts only the first epoch: parts of a stream start the second at different times."""
    train, val = split_numbers(file)
    cfg = replace(STREAM, source=str(file), stream=stream, workers=workers, batch_size=1)
    source, seen = open_dataset(cfg, "train"), []
    for rank in range(world):
        loader = open_loader(source, tiny_processor, cfg, rank, world)
        if stream:
            samples = loader._samples()
            while loader.position_dict()["epoch"] == 0:
                (_, epoch, _, _), tokens = next(samples)
                text = tiny_processor.decode(tokens.ids[tokens.supervised].tolist())
                seen += [int(re.search(r"number (\d+)", text)[1])] if epoch == 0 else []
        else:
            seen += numbers(islice(iter(loader), -(-len(train) // world)))[
                : (len(train) - rank + world - 1) // world
            ]
    assert sorted(seen) == sorted(train) and not set(seen) & val


def test_ranks_with_workers_share_a_stream(tiny_processor, file, numbers):
    train, _ = split_numbers(file)
    cfg = replace(STREAM, source=str(file), workers=2, batch_size=1)
    source, seen = open_dataset(cfg, "train"), []
    for rank in (0, 1):
        mine = an_epoch(open_loader(source, tiny_processor, cfg, rank, 2), numbers)
        assert set(Counter(mine).values()) <= {1, 2}
        seen += list(dict.fromkeys(mine))
    assert sorted(seen) == sorted(train)


def test_epochs_and_seeds_have_different_orders(tiny_processor, file, numbers):
    def first(n: int, **changes) -> list[int]:
        cfg = replace(STREAM, source=str(file), batch_size=1, **changes)
        loader = open_loader(open_dataset(cfg, "train"), tiny_processor, cfg)
        return numbers(islice(iter(loader), n))

    n = len(split_numbers(file)[0])
    two = first(2 * n)
    assert sorted(two[:n]) == sorted(two[n:]) and two[:n] != two[n:]
    assert first(n) == two[:n] != first(n, seed=1)


def test_validation_rows_of_a_stream_are_selected_by_the_hash(file):
    _, val = split_numbers(file)
    source = open_dataset(replace(STREAM, source=str(file)), "val")
    assert {int(source[i].turns[-1].text.split()[-1]) for i in range(len(source))} == val


# --- Resume -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("mixture", [False, True], ids=["stream", "mixture"])
def test_a_stream_resumes_with_the_next_batch(tiny_processor, file, shards, packing, mixture):
    name = f"{file}=0.7 {shards}=0.3" if mixture else str(file)
    cfg = replace(STREAM, source=name, packing=packing, max_length=128, workers=0)
    whole = list(islice(iter(open_loader(open_dataset(cfg, "train"), tiny_processor, cfg)), 30))
    assert whole[-1].state["epoch"] >= 1 or mixture
    for stop in (0, 5, 9, 16, 25):
        again = open_loader(open_dataset(cfg, "train"), tiny_processor, cfg)
        again.load_state_dict(json.loads(json.dumps(whole[stop].state)))
        for got, want in zip(islice(iter(again), 4), whole[stop + 1 :]):
            assert got.input_ids.tolist() == want.input_ids.tolist(), stop
            assert got.state["waiting"] == want.state["waiting"], stop


def test_a_stream_with_workers_resumes_too(tiny_processor, file):
    cfg = replace(STREAM, source=str(file), workers=2, packing=True)
    whole = list(islice(iter(open_loader(open_dataset(cfg, "train"), tiny_processor, cfg)), 9))
    for stop in (2, 5):
        again = open_loader(open_dataset(cfg, "train"), tiny_processor, cfg)
        again.load_state_dict(whole[stop].state)
        for got, want in zip(islice(iter(again), 3), whole[stop + 1 :]):
            assert got.input_ids.tolist() == want.input_ids.tolist()
            assert got.state["waiting"] == want.state["waiting"]


# --- Mixtures -----------------------------------------------------------------------------------


def test_a_mixture_has_its_shares_and_every_row(tiny_processor, tmp_path, numbers):
    for name, n in (("a", 14), ("b", 9)):
        rows = [{"question": "q", "answer": f"{name} {100 * (name == 'b') + i}"} for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = f"{tmp_path}/a.jsonl=0.7 {tmp_path}/b.jsonl=0.3"
    run = parse_run(["tiny", "--data.source", *words.split(), "--data.val-fraction", "0"])
    assert run.data.source == words
    cfg = replace(run.data, packing=False, batch_size=1, max_length=64)
    source = open_dataset(cfg, "train")
    assert len(source) == 23 and "mixture" in source.notes[0]
    loader = open_loader(source, tiny_processor, cfg)
    seen = numbers(islice(iter(loader), 60))
    for n in (10, 20, 30, 60):
        assert sum(i < 100 for i in seen[:n]) == round(0.7 * n)
    of_a, of_b = [i for i in seen if i < 100], [i for i in seen if i >= 100]
    for its, n in ((of_a, 14), (of_b, 9)):
        for start in range(0, len(its) - n + 1, n):
            assert len(set(its[start : start + n])) == n, "every row once before any is repeated"
    assert loader.state_dict()["counts"] == [42, 18]


@pytest.mark.parametrize("words", ["a.jsonl=0.5 a.jsonl=0.5", "a.jsonl=0 b.jsonl=1", "a=1.2.3"])
def test_invalid_shares_are_errors(words):
    with pytest.raises(InputError, match=r"data\.source"):
        open_dataset(DataConfig(source=words), "train")


# --- Errors -------------------------------------------------------------------------------------


def test_timeouts_are_retried_and_lose_no_row(file, monkeypatch):
    waits, opened, really = [], [], data.sources.streaming.load_stream
    monkeypatch.setattr(data.sources.streaming.time, "sleep", waits.append)

    def flaky(*args, **options):
        opened.append(args)
        if len(opened) in (1, 3):
            raise TimeoutError("the Hub does not answer")

        def cut(row):
            if '"number 17"' in row["text"] and len(opened) == 2:
                raise ConnectionResetError("cut off")
            return row

        return really(*args, **options).map(cut)

    cfg = replace(STREAM, source=str(file), seed=5)
    source = open_dataset(cfg, "train")  # reads the first rows, before the errors
    monkeypatch.setattr(data.sources.streaming, "load_stream", flaky)
    assert sorted(rows_of_parts(source, 1)) == sorted(split_numbers(file)[0])
    assert waits == [1, 1, 2] and len(opened) == 4


def test_timeouts_of_httpx_are_transient():
    httpx = pytest.importorskip("httpx2")
    assert is_transient(httpx.ReadTimeout("late")) and is_transient(httpx.ConnectError("lost"))
    assert is_transient(TimeoutError()) and is_transient(ConnectionResetError())
    assert not is_transient(FileNotFoundError("gone")) and not is_transient(
        ValueError("no Parquet")
    )
    wrapped = InputError("cannot be opened")
    wrapped.__cause__ = httpx.ReadTimeout("late")
    assert is_transient(wrapped) and not is_transient(InputError("bad"))


def test_repeated_timeouts_end_in_one_message(file, monkeypatch):
    source = open_dataset(replace(STREAM, source=str(file)), "train")
    waits = []
    monkeypatch.setattr(data.sources.streaming.time, "sleep", waits.append)

    def gone(*_args, **_options):
        raise TimeoutError("read timed out")

    monkeypatch.setattr(data.sources.streaming, "load_stream", gone)
    with pytest.raises(InputError, match=r"read timed out.*attempts: 6.*--train\.resume auto"):
        source.part(0, 1).read_block(None)
    assert waits == [1, 2, 4, 8, 16]


def test_image_paths_are_relative_to_the_file_and_csv_cells_are_text(tmp_path, monkeypatch):
    """Not to the working directory; and numbers in a column are answers like any text."""
    (tmp_path / "rows").mkdir()
    lines = [f"w.png,how many of {i}?,{i}" for i in range(1, 40)]
    text = "\ufeffimage,question,answer\n" + "\n".join([*lines, "w.png,what?,None"])
    (tmp_path / "rows" / "n.csv").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    cfg = replace(STREAM, source="rows/n.csv", val_fraction=0.0, stream_block=100)
    source, whole = (open_dataset(replace(cfg, stream=s), "train") for s in (True, False))
    rows, _ = source.part(0, 1).read_block(None)
    for i in (0, 38, 39):
        streamed = source.make_sample(rows[i], "here")
        for sample in (source[i], streamed):
            assert (sample.turns, sample.images) == (whole[i].turns, whole[i].images)
    assert streamed.turns[-1].text == "None" and streamed.images == ("rows/w.png",)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unexpected_exception_names_the_row(tiny_processor, file, monkeypatch, stream, workers):
    """It ends the run, even if raised in a worker."""
    really = Processor.encode

    def encode(self, sample, *budget):
        if sample.turns[-1].text == "number 9":
            raise KeyError("lost")
        return really(self, sample, *budget)

    monkeypatch.setattr(Processor, "encode", encode)
    cfg = replace(STREAM, source=str(file), stream=stream, workers=workers, val_fraction=0.0)
    where = "row 10 of part 1 of 1" if stream else f"row 10 of {file}"
    with pytest.raises(RuntimeError, match=f"{where}.*KeyError.*lost"):
        list(islice(iter(open_loader(open_dataset(cfg, "train"), tiny_processor, cfg)), 40))


def test_a_stream_has_the_same_rows_as_the_file(tmp_path):
    """Including mixed types, empty cells, semicolons and class names."""
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                          {"role": "assistant", "content": "a cat"}]},
            {"messages": [{"role": "user", "content": "q"},
                          {"role": "assistant", "content": "4"}]}]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    for name in ("b.csv", "b.tsv"):
        (tmp_path / name).write_text("image;question;answer\n;a, b?;4\nw.png;c?;d\n")
    features = Features({"image": Value("string"), "label": ClassLabel(names=["cat", "dog"])})
    table = {"image": ["1.png", "2.png"], "label": [1, 0]}
    Dataset.from_dict(table, features).to_parquet(tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.csv", "b.tsv", "c.parquet"):
        cfg = replace(STREAM, source=str(tmp_path / name), val_fraction=0.0)
        streamed, whole = (open_dataset(replace(cfg, stream=s), "train") for s in (True, False))
        found, _ = streamed.part(0, 1).read_block(None)
        assert len(found) == len(whole) == 2, name
        for i, row in enumerate(found):
            assert streamed.make_sample(row, "here") == replace(whole[i], row="here"), name


def test_a_broken_csv_file_is_not_retried(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nq,a\nq,a,b\nq,a\n")
    with pytest.raises(InputError, match=r"a\.csv: cannot be read \(.*\), attempts: 1\."):
        open_dataset(replace(STREAM, source=str(tmp_path / "a.csv")), "train")


def test_sources_that_cannot_be_streamed(tmp_path):
    (tmp_path / "list.json").write_text("[{}]")
    with pytest.raises(InputError, match=r"list\.json.*save it as \.jsonl"):
        open_dataset(replace(STREAM, source=str(tmp_path / "list.json")), "train")
    with pytest.raises(InputError, match=r"leave out --data\.stream"):
        open_dataset(replace(STREAM, source="world"), "train")
    with pytest.raises(InputError, match=r"leave out --data\.stream"):
        open_dataset(replace(STREAM, source=str(tmp_path)), "train")


# --- Ratings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_finevision_ratings_filter_turns_and_rows(tmp_path, stream):
    names = ("relevance", "image_correspondence", "visual_dependency", "formatting")
    rows = []
    for i, name in enumerate(names):
        ratings = {f"{n}_ratings": [5, 2 if n == name else 5] for n in names}
        texts = [{"user": "a?", "assistant": f"first {i}"}, {"user": "b?", "assistant": f"two {i}"}]
        rows.append({"texts": texts} | ratings)
    poor = {f"{n}_ratings": [1] for n in names}
    rows.append({"texts": [{"user": "q?", "assistant": "poor"}]} | poor)
    good = {f"{n}_ratings": [5] for n in names}
    rows.append({"texts": [{"user": "q?", "assistant": "x"}]} | good)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def answers(**minimum) -> list[list[str]]:
        cfg = replace(STREAM, source=str(tmp_path / "rows.jsonl"), stream=stream, **minimum)
        source = open_dataset(replace(cfg, val_fraction=0.0), "train")
        return [[t.text for t in source[i].turns if t.role == "assistant"]
                for i in range(len(source))]  # fmt: skip

    assert len(answers()) == 6 and answers()[4] == ["poor"]
    for i, name in enumerate(names):
        found = answers(**{f"min_{name}": 3})
        assert len(found) == 5 and found[i] == [f"first {i}"]
        assert [len(a) for a in found] == [1 if k == i else 2 for k in range(4)] + [1]
    with pytest.raises(InputError, match="min_formatting = 6"):
        replace(STREAM, min_formatting=6)

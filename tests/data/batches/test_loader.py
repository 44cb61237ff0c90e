"""The order of batches is the same for any workers and after a resume; bad rows are counted."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from config_tools import InputError
from configs import DataConfig
from data.batches.loader import CHUNK, Loader
from data.batches.stream_loader import open_loader
from data.images import open_image
from data.sources.open import open_dataset
from data.types import Batch

ROOT = Path(__file__).parents[3]
PACKED = DataConfig(batch_size=2, max_length=256, packing=True, workers=0, world_questions=2)
PLAIN = replace(PACKED, packing=False)
N = 37  # rows of the file; not a multiple of the chunk, so that a resume starts inside a chunk


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Rows of different lengths and answers; every third has an image."""
    folder, rng = tmp_path_factory.mktemp("rows"), random.Random(0)
    rows = []
    for i in range(N):
        row = {"question": "what " * rng.randint(1, 40), "answer": f"number {i}"}
        if i % 3 == 0:
            Image.new("RGB", (48, 48), (5 * i, 5 * i, 5 * i)).save(folder / f"{i}.png")
            row["image"] = f"{i}.png"
        rows.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder / "rows.jsonl"


def on(file, cfg: DataConfig) -> DataConfig:
    return replace(cfg, source=str(file), val_fraction=0.0)


def loader(cfg: DataConfig, processor, **changes) -> Loader:
    return Loader(open_dataset(cfg, "train"), processor, cfg, **changes)


def take(loader: Loader, n: int) -> list[Batch]:
    return list(islice(iter(loader), n))


def same(a: Batch, b: Batch, state: bool = True) -> bool:
    x, y = a.tensors(), b.tensors()
    return (
        all((x[k] is None and y[k] is None) or torch.equal(x[k], y[k]) for k in x)
        and (a.n_targets, a.n_samples, a.n_tokens) == (b.n_targets, b.n_samples, b.n_tokens)
        and (not state or a.state == b.state)
    )


def until_epoch_ends(loader: Loader) -> list[Batch]:
    """Batches up to the first with a row of the second epoch."""
    batches = []
    for batch in loader:
        batches.append(batch)
        if batch.state["epoch"] > 0:
            return batches
    raise AssertionError("a loader never ends")


# --- Order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [PACKED, PLAIN], ids=["packed", "plain"])
def test_batches_do_not_depend_on_the_number_of_workers(tiny_processor, cfg):
    single = take(loader(cfg, tiny_processor), 6)
    parallel = take(loader(replace(cfg, workers=2), tiny_processor), 6)
    assert all(map(same, single, parallel))
    assert not torch.equal(single[0].input_ids, single[1].input_ids)


@pytest.mark.parametrize("cfg", [PACKED, PLAIN], ids=["packed", "plain"])
def test_every_row_comes_once_per_epoch(tiny_processor, file, cfg, numbers):
    """The first N samples are all rows, the next N all rows in another order."""
    batches = take(loader(on(file, cfg), tiny_processor), 60 if cfg.packing else 45)
    seen = numbers(batches)
    waiting = batches[-1].state["waiting"]
    if cfg.packing:  # packing mixes samples of two epochs: count them
        n_read = batches[-1].state["epoch"] * N + batches[-1].state["position"]
        assert len(seen) + len(waiting) == n_read > 2 * N
        counts = [seen.count(i) + waiting.count(i) for i in range(N)]
        assert set(counts) <= {n_read // N, n_read // N + 1}
    else:
        first, second = seen[:N], seen[N : 2 * N]
        assert sorted(first) == sorted(second) == list(range(N))
        assert first != second and first != sorted(first)


def test_the_order_depends_on_the_seed(tiny_processor, file, numbers):
    cfg = on(file, PLAIN)
    orders = [
        numbers(take(loader(replace(cfg, seed=seed), tiny_processor), 9))
        for seed in (0, 0, 1, 2**63 - 1)  # the last exceeds 64 bits when combined with the epoch
    ]
    assert orders[0] == orders[1] != orders[2] != orders[3]


def test_batches_count_targets_samples_and_tokens(tiny_processor, file):
    for cfg in (on(file, PACKED), on(file, PLAIN)):
        for batch in take(loader(cfg, tiny_processor), 12):
            assert batch.input_ids.shape[0] == cfg.batch_size
            assert batch.input_ids.shape[1] <= cfg.max_length
            assert batch.n_targets == int((batch.targets >= 0).sum()) > 0
            ends = batch.targets == tiny_processor.cfg.vlm_eos_token_id
            assert batch.n_samples == int(ends.sum())
            placeholders = (batch.input_ids == tiny_processor.cfg.vlm_image_token_id).sum()
            assert placeholders == 9 * len(batch.images)
            if not cfg.packing:
                assert batch.segments is None and batch.n_samples == cfg.batch_size


def test_the_global_random_state_is_unchanged(tiny_processor):
    """A resumed run creates its loader after restoring the state, which dropout depends on."""
    for workers in (0, 1):
        before = torch.get_rng_state()
        take(loader(replace(PLAIN, workers=workers), tiny_processor), 2)
        assert torch.equal(torch.get_rng_state(), before)


# --- Resume -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [PACKED, PLAIN], ids=["packed", "plain"])
def test_resume_continues_with_the_next_batch(tiny_processor, file, cfg):
    """After any batch, across epochs, through JSON, with and without workers."""
    cfg = on(file, cfg)
    whole = take(loader(cfg, tiny_processor), 24)
    assert whole[-1].state["epoch"] >= 1
    for stop in range(23):
        state = json.loads(json.dumps(whole[stop].state))
        again = loader(cfg, tiny_processor)
        again.load_state_dict(state)
        assert again.state_dict() == whole[stop].state
        assert all(map(same, take(again, 3), whole[stop + 1 : stop + 4])), stop
    again = loader(replace(cfg, workers=2), tiny_processor)
    again.load_state_dict(whole[4].state)
    assert all(map(same, take(again, 6), whole[5:11]))


def test_a_state_does_not_change_with_the_loader(tiny_processor, file, tmp_path):
    """A checkpoint keeps it while training continues and skips rows."""
    broken = with_bad_images(file, dict.fromkeys((3, 4, 9, 10)), tmp_path)
    batches = iter(loader(on(broken, PLAIN), tiny_processor))
    state = next(batches).state
    kept, later = json.dumps(state), [next(batches).state for _ in range(18)]
    assert len(later[-1]["skipped"]) == 4 > len(state["skipped"])
    assert json.dumps(state) == kept


def test_the_world_resumes(tiny_processor):
    whole = take(loader(PACKED, tiny_processor), 5)
    again = loader(PACKED, tiny_processor)
    again.load_state_dict(whole[1].state)
    assert all(map(same, take(again, 3), whole[2:]))


# --- Ranks --------------------------------------------------------------------------------------


def test_the_world_starts_with_captions(tiny_processor):
    """Without packing, batches keep the order: 12 captions, then questions only."""
    cfg = replace(PLAIN, world_captions_first=12, world_caption_fraction=0.0)
    batches = take(loader(cfg, tiny_processor), 12)
    texts = [tiny_processor.decode(ids.tolist()) for b in batches for ids in b.input_ids]
    tasks = [re.search("Describe the picture|List the things", text) for text in texts]
    assert [task is not None for task in tasks] == [True] * 12 + [False] * 12
    assert {task.group() for task in tasks[:12]} == {"Describe the picture", "List the things"}


@pytest.mark.parametrize("cfg", [PACKED, PLAIN], ids=["packed", "plain"])
def test_two_ranks_interleave_to_the_order_of_one(tiny_processor, file, cfg):
    cfg = on(file, cfg)
    one = take(loader(cfg, tiny_processor), 12)
    ranks = [take(loader(cfg, tiny_processor, rank=r, world_size=2), 6) for r in (0, 1)]
    for i, batch in enumerate(one):
        assert same(ranks[i % 2][i // 2], batch, state=False), i
        # Only rank 0 saves its state, so it must include the batches of other ranks.
        assert ranks[i % 2][i // 2].state == one[i // 2 * 2 + 1].state, i


def test_a_two_rank_run_resumes(tiny_processor, file):
    """All ranks restore the state of rank 0; no batch is repeated or lost."""
    cfg = on(file, PLAIN)
    one = take(loader(cfg, tiny_processor), 16)
    saved = take(loader(cfg, tiny_processor, rank=0, world_size=2), 4)[-1].state
    for rank in (0, 1):
        again = loader(cfg, tiny_processor, rank=rank, world_size=2)
        again.load_state_dict(saved)
        for got, want in zip(take(again, 4), one[8 + rank :: 2]):
            assert same(got, want, state=False)


# --- Bad rows -----------------------------------------------------------------------------------


def with_bad_images(file, bad: dict[int, bytes | None], folder):
    """A copy of the file; rows in `bad` have a broken image, or a missing one if None."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for i, row in enumerate(rows):
        if "image" in row:
            row["image"] = str(file.parent / row["image"])
        if i in bad:
            row["image"] = f"bad-{i}.png"
            if bad[i] is not None:
                (folder / row["image"]).write_bytes(bad[i])
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cfg", [PACKED, PLAIN], ids=["packed", "plain"])
def test_broken_images_are_skipped_counted_and_listed(
    tiny_processor, file, tmp_path, cfg, workers, numbers
):
    truncated = (file.parent / "0.png").read_bytes()[:60]
    broken = with_bad_images(file, {3: b"no", 4: None, 9: truncated, 10: b""}, tmp_path)
    cfg = replace(on(broken, cfg), workers=workers)
    reading = loader(cfg, tiny_processor, skipped_file=tmp_path / "skipped.jsonl")
    batches = until_epoch_ends(reading)
    batches += take(reading, 25)  # the next epoch reads them again and does not list them again
    assert batches[-1].state["epoch"] >= 1
    assert sorted(batches[-1].state["skipped"]) == sorted(reading.skipped) == [3, 4, 9, 10]
    lines = [json.loads(s) for s in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == [4, 5, 10, 11]  # counted from 1, as in messages
    for line in lines:
        assert f"bad-{line['row'] - 1}.png" in line["reason"]
    seen = numbers(batches)
    assert not {3, 4, 9, 10} & set(seen)
    assert set(range(N)) - {3, 4, 9, 10} - set(batches[-1].state["waiting"]) <= set(seen)


@pytest.mark.parametrize("n_broken", [5, 6])
def test_invalid_rows_and_broken_images_count_together(tiny_processor, file, tmp_path, n_broken):
    """10 of 1,000 rows may be bad, for any reason; all are listed."""
    lines = file.read_text().splitlines()
    lines = (lines * (1000 // len(lines) + 1))[:1000]
    for i in range(5):
        lines[7 * i] = "{"
    for i in range(n_broken):
        lines[7 * i + 1] = json.dumps({"image": f"absent-{i}.png", "caption": "c"})
    (file.parent / "many.jsonl").write_text("\n".join(lines))
    cfg, listed = on(file.parent / "many.jsonl", PLAIN), tmp_path / "skipped.jsonl"
    reading = loader(cfg, tiny_processor, skipped_file=listed)
    if n_broken == 6:
        with pytest.raises(InputError, match="11 rows are unusable"):
            until_epoch_ends(reading)
    else:
        until_epoch_ends(reading)
    reasons = [json.loads(line)["reason"] for line in listed.read_text().splitlines()]
    assert sum("not JSON" in r for r in reasons) == 5
    assert sum("absent-" in r for r in reasons) == n_broken


def test_resume_keeps_the_skipped_rows(tiny_processor, file, tmp_path):
    broken = with_bad_images(file, dict.fromkeys((3, 4, 9, 10)), tmp_path)
    cfg = on(broken, PLAIN)
    whole = take(loader(cfg, tiny_processor), 40)
    assert len(whole[-1].state["skipped"]) == 4
    for stop in (2, 9, 20):
        again = loader(cfg, tiny_processor, skipped_file=tmp_path / f"again-{stop}.jsonl")
        again.load_state_dict(whole[stop].state)
        assert all(map(same, take(again, 6), whole[stop + 1 : stop + 7]))


def test_rows_skipped_again_after_a_crash_are_listed_once(tiny_processor, file, tmp_path):
    """The run continued after its checkpoint; the resumed run reads the same rows again."""
    broken, path = with_bad_images(file, dict.fromkeys((3, 4, 9, 10)), tmp_path), tmp_path / "s"
    for stream in (False, True):
        cfg = replace(on(broken, PLAIN), stream=stream, stream_block=5)
        first, again = (
            open_loader(open_dataset(cfg, "train"), tiny_processor, cfg, skipped_file=path)
            for _ in range(2)
        )
        batches = take(first, 40)
        listed = path.read_text().splitlines()
        assert len(listed) == 4 > len(batches[2].state["skipped"])
        again.load_state_dict(batches[2].state)
        take(again, 40)
        assert len(again.skipped) == 4 and path.read_text().splitlines() == listed
        path.unlink()


def test_only_one_rank_lists_skipped_rows(tiny_processor, file, tmp_path):
    broken = with_bad_images(file, {3: None}, tmp_path)
    for rank in (0, 1):
        path = tmp_path / "skipped.jsonl"
        take(
            loader(on(broken, PLAIN), tiny_processor, rank=rank, world_size=2, skipped_file=path),
            12,
        )
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_stop_the_run(tiny_processor, file, tmp_path, workers):
    broken = with_bad_images(file, dict.fromkeys(range(0, 12, 2)), tmp_path)
    cfg = replace(on(broken, PLAIN), workers=workers)
    with pytest.raises(InputError, match=r"6 rows are unusable; the last: .*bad-\d+\.png"):
        until_epoch_ends(loader(cfg, tiny_processor))


def test_a_file_with_only_broken_images_stops_the_run(tiny_processor, tmp_path):
    """With fewer rows than the limit; otherwise the loader would loop forever."""
    rows = [{"image": f"{i}.png", "caption": "c"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="3 rows are unusable"):
        take(loader(on(tmp_path / "rows.jsonl", PLAIN), tiny_processor), 1)


def test_a_file_shorter_than_a_batch_is_repeated(tiny_processor, tmp_path, numbers):
    rows = [{"question": f"q{i}", "answer": f"number {i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(rows) < CHUNK
    for cfg in (PLAIN, PACKED):
        batches = take(loader(on(tmp_path / "rows.jsonl", cfg), tiny_processor), 6)
        assert set(numbers(batches)) == {0, 1, 2}
    plain = take(loader(on(tmp_path / "rows.jsonl", PLAIN), tiny_processor), 6)
    assert sorted(numbers(plain)) == sorted([0, 1, 2] * 4)


# --- Corrupt images -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_every_corrupt_image_is_skipped_or_read(shared, tiny_processor, tmp_path, workers, numbers):
    """Every corrupt file once, with enough good rows to stay below the limit."""
    corrupt = sorted(f for f in (shared / "corrupt").rglob("*") if f.is_file())
    refused = set()
    for i, file in enumerate(corrupt):
        try:
            open_image(file)
        except InputError:
            refused.add(i)
    rows = [{"image": str(file), "caption": f"number {i}"} for i, file in enumerate(corrupt)]
    n_good = 101 * len(refused)
    rows += [{"question": "?", "answer": f"number {len(rows) + i}"} for i in range(n_good)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = replace(on(tmp_path / "rows.jsonl", PLAIN), workers=workers, batch_size=64)
    reading = loader(cfg, tiny_processor, skipped_file=tmp_path / "skipped.jsonl")
    seen = numbers(until_epoch_ends(reading))
    assert set(seen) == set(range(len(rows))) - refused
    lines = [json.loads(s) for s in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {line["row"] - 1 for line in lines} == refused and len(refused) > 80
    for line in lines:
        assert str(corrupt[line["row"] - 1]) in line["reason"] and "\n" not in line["reason"]


KILLED = """
import os, signal
from configs import DataConfig, VLMConfig
from data import processor
from data.batches.loader import Loader
from data.sources.open import open_dataset

cfg = DataConfig(workers=2)
batches = iter(Loader(open_dataset(cfg, "train"), processor.build(VLMConfig()), cfg))
next(batches)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_of_a_killed_run_end():
    """`run` waits until the workers close stdout; full queues must not block them."""
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr

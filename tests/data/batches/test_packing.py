"""Packing of samples into rows, and the positions, segments and targets of a batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import VLMConfig
from data.batches.packing import collate, collate_prompts, fill_rows
from data.types import IGNORE_INDEX, Tokens
from data.world import questions

CFG = VLMConfig()
IMAGE, PER_TILE = CFG.vlm_image_token_id, CFG.tokens_per_tile
SIZE = CFG.vit_img_size


def tokens(*ids: int, targets=(), n_tiles: int = 0, shade: int = 0, row: str = "row 1") -> Tokens:
    """A sample with these ids after its tiles; `targets` are its supervised positions."""
    ids = [IMAGE] * (n_tiles * PER_TILE) + list(ids)
    supervised = np.zeros(len(ids), dtype=bool)
    supervised[[n_tiles * PER_TILE + i for i in targets]] = True
    tiles = np.full((n_tiles, SIZE, SIZE, 3), shade, dtype=np.uint8)
    return Tokens(np.array(ids, dtype=np.int32), supervised, tiles, row)


# --- fill_rows ----------------------------------------------------------------------------------

waiting = st.integers(5, 60).flatmap(
    lambda capacity: st.tuples(
        st.lists(st.integers(1, capacity), max_size=40), st.integers(1, 6), st.just(capacity)
    )
)


@given(waiting)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_rows_hold_each_sample_once_and_no_more_than_fits(case):
    lengths, n_rows, capacity = case
    rows = fill_rows(lengths, n_rows, capacity)
    used = [i for row in rows for i in row]
    assert len(used) == len(set(used)) and set(used) <= set(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)
    assert len(rows) == n_rows or len(used) == len(lengths)  # fewer rows only if all samples fit
    for number, row in enumerate(rows):
        earlier = {i for r in rows[:number] for i in r}
        assert row[0] == min(set(range(len(lengths))) - earlier)  # the oldest comes first
        left = set(range(len(lengths))) - earlier - set(row)
        free = capacity - sum(lengths[i] for i in row)
        assert all(lengths[i] > free for i in left)  # no remaining sample fits


@given(waiting.filter(lambda case: case[0]))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_no_sample_waits_forever(case):
    """The k-th oldest sample is used after at most k + 1 calls, whatever arrives later."""
    lengths, n_rows, capacity = case
    line = list(enumerate(lengths))
    for _ in range(len(lengths)):
        rows = fill_rows([n for _, n in line], n_rows, capacity)
        taken = {i for row in rows for i in row}
        line = [x for i, x in enumerate(line) if i not in taken]
        line += [(-1, capacity), (-1, 1)]  # newcomers that fit anywhere
    assert all(name == -1 for name, _ in line)


def test_a_small_case_by_hand():
    # Capacity 10: the oldest, 4, is filled with 6; the next row starts with 3 and takes 7.
    assert fill_rows([4, 3, 6, 7, 2], 2, 10) == [[0, 2], [1, 3]]
    assert fill_rows([], 3, 10) == []
    assert fill_rows([10, 10], 1, 10) == [[0]]
    assert fill_rows([2, 2, 2], 9, 10) == [[0, 1, 2]]


def test_no_row_exceeds_its_tile_limit():
    """Within the limit rows are well filled; each sample is used once, and none waits forever."""
    rng = random.Random(0)
    line = [(rng.randint(5, 60), rng.choice([0, 0, 1, 1, 2, 9])) for _ in range(400)]
    seen, fill, n = [], 0, 0
    while len(line) > 60:
        waiting = line[:60]
        lengths, tiles = zip(*waiting)
        rows = fill_rows(lengths, 4, 128, tiles, 10)
        assert max(sum(tiles[i] for i in row) for row in rows) <= 10
        assert rows[0][0] == 0, "the oldest sample is in the first row"
        taken = [i for row in rows for i in row]
        assert len(set(taken)) == len(taken)
        seen += [waiting[i] for i in taken]
        line = [s for i, s in enumerate(waiting) if i not in taken] + line[60:]
        fill, n = fill + sum(sum(lengths[i] for i in row) for row in rows), n + 4 * 128
    assert len(seen) > 300 and fill / n > 0.95
    free = fill_rows(lengths, 4, 128)
    assert free == fill_rows(lengths, 4, 128, tiles, 0), "0 tiles means no limit"


def test_rows_of_the_world_are_97_percent_full(tiny_processor):
    """As in the loader, twice the tokens of a batch wait.

    Lengths of 137 to 170 are hard to pack: only six or seven fit into a row of 1024.
    """
    n_rows, capacity = 4, 1024
    stream = (
        len(tiny_processor.encode(questions.train_sample(0, "train", i, 8, 0.25), capacity, 64))
        for i in range(10_000)
    )
    line, filled = [], []
    for _ in range(12):
        while sum(line) < 2 * n_rows * capacity:
            line.append(next(stream))
        rows = fill_rows(line, n_rows, capacity)
        filled += [sum(line[i] for i in row) for row in rows]
        taken = {i for row in rows for i in row}
        line = [n for i, n in enumerate(line) if i not in taken]
    assert len(filled) == 12 * n_rows
    assert sum(filled) / (len(filled) * capacity) >= 0.97


# --- collate ------------------------------------------------------------------------------------


def test_a_packed_batch_by_hand():
    a = tokens(11, 12, 13, targets=(1, 2))
    b = tokens(21, 22, targets=(0, 1))  # its first token must not become a target of a
    c = tokens(31, 32, 33, 34, targets=(3,))
    batch = collate([[a, b], [c]], CFG)
    pad = CFG.vlm_pad_token_id
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22], [31, 32, 33, 34, pad]]
    no = IGNORE_INDEX
    assert batch.targets.tolist() == [[12, 13, no, 22, no], [no, no, 34, no, no]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]]
    assert (batch.n_targets, batch.n_samples, batch.n_tokens) == (4, 3, 9)
    assert batch.images.shape == (0, 3, SIZE, SIZE)
    for tensor in (batch.input_ids, batch.targets, batch.positions, batch.segments):
        assert tensor.dtype == torch.int64


def test_one_sample_a_row_needs_no_segments():
    batch = collate([[tokens(11, 12, 13, targets=(1,))], [tokens(14)]], CFG)
    assert batch.segments is None
    assert batch.input_ids.tolist() == [[11, 12, 13], [14, 0, 0]]
    assert batch.positions[0].tolist() == [0, 1, 2] and batch.n_tokens == 4


rows_of_samples = st.lists(
    st.lists(
        st.tuples(st.lists(st.tuples(st.integers(10, 99), st.booleans()), min_size=1, max_size=6),
                  st.integers(0, 2)),
        min_size=1, max_size=4,
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@given(rows_of_samples)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_a_batch_contains_every_sample(layout):
    """Each segment equals its sample: ids, positions, shifted targets and tiles in order."""
    shade, rows = 0, []
    for row in layout:
        rows.append([])
        for words, n_tiles in row:
            ids, wanted = zip(*words)
            targets = [i for i, w in enumerate(wanted) if w]
            shade += 1
            rows[-1].append(tokens(*ids, targets=targets, n_tiles=n_tiles, shade=shade))
    batch = collate(rows, CFG)
    images = iter(batch.images)
    width = max(sum(map(len, row)) for row in rows)
    assert (
        batch.input_ids.shape == batch.targets.shape == batch.positions.shape == (len(rows), width)
    )
    for r, row in enumerate(rows):
        start = 0
        for s, sample in enumerate(row):
            n = len(sample)
            cut = slice(start, start + n)
            assert batch.input_ids[r, cut].tolist() == sample.ids.tolist()
            assert batch.positions[r, cut].tolist() == list(range(n))
            if batch.segments is not None:
                assert batch.segments[r, cut].tolist() == [s + 1] * n
            want = [
                int(sample.ids[i + 1]) if i + 1 < n and sample.supervised[i + 1] else IGNORE_INDEX
                for i in range(n)
            ]
            assert batch.targets[r, cut].tolist() == want
            for tile in sample.tiles:
                want = torch.full((3, SIZE, SIZE), (tile[0, 0, 0] / 255 - 0.5) / 0.5)
                assert torch.allclose(next(images), want, atol=1e-6)
            start += n
        assert (batch.input_ids[r, start:] == CFG.vlm_pad_token_id).all()
        assert (batch.targets[r, start:] == IGNORE_INDEX).all()
        if batch.segments is not None:
            assert (batch.segments[r, start:] == 0).all()
    assert next(images, None) is None
    assert (batch.segments is None) == all(len(row) == 1 for row in rows)
    assert batch.n_targets == int((batch.targets != IGNORE_INDEX).sum())


@pytest.mark.parametrize("n_placeholders", [0, PER_TILE - 1, PER_TILE + 1, 2 * PER_TILE])
def test_placeholders_that_do_not_match_name_the_sample(n_placeholders):
    """Checked per sample: equal totals of the batch are not enough."""
    good = tokens(1, n_tiles=1, row="train.jsonl row 4")
    tiles = np.zeros((1, SIZE, SIZE, 3), dtype=np.uint8)
    ids = np.array([IMAGE] * n_placeholders + [1], dtype=np.int32)
    bad = Tokens(ids, np.zeros(len(ids), dtype=bool), tiles, "train.jsonl row 5")
    with pytest.raises(ValueError, match=f"train.jsonl row 5: {n_placeholders} image placeholders"):
        collate([[good, bad]], CFG)


def test_batch_to_keeps_all_fields():
    batch = collate([[tokens(11, 12, targets=(1,)), tokens(13)]], CFG)
    batch.state = {"epoch": 3}
    moved = batch.to("cpu")
    assert moved.state == {"epoch": 3}
    assert (moved.n_targets, moved.n_samples, moved.n_tokens) == (1, 2, 3)
    for name, tensor in batch.tensors().items():
        assert torch.equal(moved.tensors()[name], tensor)
    alone = collate([[tokens(11, 12)]], CFG).to("cpu")
    assert alone.segments is None


def test_prompts_are_padded_at_the_end():
    ids, mask, images = collate_prompts([tokens(7, n_tiles=1, shade=255), tokens(8, 9)], CFG)
    assert ids.tolist() == [[IMAGE] * PER_TILE + [7], [8, 9] + [0] * (PER_TILE - 1)]
    assert mask.tolist() == [[1] * (PER_TILE + 1), [1, 1] + [0] * (PER_TILE - 1)]
    assert images.shape == (1, 3, SIZE, SIZE) and (images == 1).all()

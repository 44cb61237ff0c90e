"""A dry run measures the largest batch, estimates time and memory, and writes nothing."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch

from configs import PRESETS, DataConfig
from data.batches.stream_loader import open_loader
from data.sources.open import open_dataset
from engine.training.distributed import memory_budget
from engine.training.dry_run import choose_checkpointing, first_sample, largest_batch
from train import main


def test_no_batch_is_larger_than_largest_batch(tiny_processor):
    packed = DataConfig(batch_size=2, max_length=128, world_questions=2)
    plain = replace(packed, packing=False, max_tiles=3)
    for cfg in (packed, plain, replace(packed, tiles_per_batch=128)):
        worst = largest_batch(tiny_processor, cfg)
        loader = iter(open_loader(open_dataset(cfg, "train"), tiny_processor, cfg))
        for _ in range(8):
            batch = next(loader)
            assert batch.input_ids.numel() <= worst.input_ids.numel() == 2 * 128
            assert len(batch.images) <= len(worst.images)
        assert worst.n_targets > 0
        placeholders = (worst.input_ids == tiny_processor.cfg.vlm_image_token_id).sum()
        assert placeholders == 9 * len(worst.images)


def test_the_first_sample_is_one_conversation(tiny_processor):
    for packing in (True, False):
        cfg = DataConfig(batch_size=2, max_length=256, packing=packing)
        batch = next(iter(open_loader(open_dataset(cfg, "train"), tiny_processor, cfg)))
        tokens = first_sample(batch)
        assert int((tokens.ids == tiny_processor.cfg.vlm_bos_token_id).sum()) == 1
        text = tiny_processor.tokenizer.decode(tokens.ids.tolist(), skip_special_tokens=False)
        assert text.endswith(("<end_of_utterance>", "<end_of_utterance>\n"))
        supervised = tokens.ids[tokens.supervised]
        assert 0 < len(supervised) < len(tokens.ids)
        assert tiny_processor.cfg.vlm_image_token_id not in supervised


def test_a_dry_run_prints_a_summary_and_writes_nothing(run_file, tmp_path, capsys):
    config = run_file("run", data={"packing": True}, steps=600, freeze=("vision",), accumulate=2)
    torch.manual_seed(99)
    before, state = set(tmp_path.iterdir()), torch.get_rng_state()
    main([str(config), "--train.dry-run"])
    out = capsys.readouterr().out
    assert set(tmp_path.iterdir()) == before and not torch.equal(torch.get_rng_state(), state)
    found = re.search(r"vision +([\d,]+) +0\nprojector +([\d,]+) +\2\nlanguage +([\d,]+) +\3", out)
    assert found, out
    assert re.search(r"largest batch: 1 rows of 256 tokens, \d+ tiles: [\d.]+ s/step, "
                     r"peak memory [\d.]+ GiB", out)  # fmt: skip
    assert re.search(r"first batch: \d+ samples, \d+ tokens, \d+ tiles, [\d.]+% full: [\d.]+ s/"
                     r"step, [\d,]+ tokens/s", out)  # fmt: skip
    assert re.search(r"600 steps of 2 batches, about [\d,]+ samples, [\d.]+ epochs; estimated "
                     r"time \d+ (min|h) .*, at most \d+ (min|h) ", out)  # fmt: skip
    assert re.search(r"User:.*What is \d+\?.*\[\[ red.*<end_of_utterance>\]\]", out, re.S)


def test_parts_that_do_not_fit_are_checkpointed():
    """Tiles of `460m` exceed 20 GiB, and `tiny` needs less than 1 GiB."""
    bf16, named = torch.bfloat16, PRESETS["460m"]
    plain = replace(named, train=replace(named.train, activation_checkpointing=()))
    assert choose_checkpointing(plain, bf16, 20 * 2**30) == ("vision",)
    assert choose_checkpointing(plain, bf16, math.inf) == ()
    assert choose_checkpointing(named, bf16, math.inf) == ("vision", "language")
    assert choose_checkpointing(PRESETS["tiny"], torch.float32, 2**30) == ()
    assert choose_checkpointing(PRESETS["222m"], torch.float32, 2**31) == ("vision", "language")


def test_the_memory_budget_is_shared_among_processes(monkeypatch):
    whole = memory_budget(torch.device("cpu"))
    assert 2**28 < whole < 2**45
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_budget(torch.device("cpu")) == whole / 4

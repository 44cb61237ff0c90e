"""What is reported adds up, and a blind model sees nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from configs import DataConfig, InputError
from data import world
from data.loader import Loader
from data.sample import Sample, Turn
from data.sources import open_source
from engine import evaluation
from engine.chat import Chat
from engine.evaluation import Answered, Item, answer_items, evaluate, items, report, validation_loss

OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)


@pytest.fixture(scope="module")
def chat(small_checkpoint) -> Chat:
    return Chat.load(small_checkpoint)


def item(expected: str, skill: str = "color", unseen: bool = False) -> Item:
    return Item(Sample((Turn("user", "What?"), Turn("assistant", expected))), skill, unseen)


def test_items_cover_every_skill_and_repeat():
    found = items(DataConfig(), "test", 2 * len(world.SKILLS))
    assert sorted(i.skill for i in found) == sorted(2 * world.SKILLS)
    again = items(DataConfig(), "test", 2 * len(world.SKILLS))
    assert [i.sample.turns for i in found] == [i.sample.turns for i in again]
    assert [i.sample.turns for i in items(DataConfig(seed=1), "test", 20)] != [
        i.sample.turns for i in found
    ]


def test_items_of_a_file_are_its_rows_in_one_order(rows_file):
    cfg = DataConfig(source=str(rows_file), val_fraction=0.0)
    some, every = items(cfg, "test", 7), items(cfg, "test", 999)
    assert [i.sample.row for i in some] == [i.sample.row for i in every[:7]]
    rows = sorted(int(i.sample.row.split()[-1]) for i in every)
    assert rows == list(range(1, 25)) and rows[:7] != [int(i.sample.row.split()[-1]) for i in some]
    assert {i.skill for i in every} == {"all"} and items(cfg, "val", 5) == []


def test_report_adds_up():
    right, wrong = "red", "blue"
    answered = [
        Answered(item("red"), right), Answered(item("red"), wrong),
        Answered(item("red", unseen=True), right), Answered(item("red", "count"), wrong),
    ]  # fmt: skip
    blind = [replace(a, answer=b) for a, b in zip(answered, (right, wrong, wrong, wrong))]
    result = report(answered, blind)
    assert set(result) == {"accuracy", "interval", "seen", "unseen", "blind", "n", "skills"}
    assert list(result["skills"]) == ["color", "count"]
    color = result["skills"]["color"]
    assert set(color) == {"accuracy", "interval", "seen", "unseen", "blind", "n"}
    assert (color["accuracy"], color["n"]) == (pytest.approx(2 / 3), 3)
    assert (color["seen"], color["unseen"]) == (0.5, 1.0)
    assert color["blind"] == pytest.approx(1 / 3) and result["blind"] == 0.25
    assert (result["accuracy"], result["n"]) == (0.5, 4)
    assert result["skills"]["count"]["unseen"] is None
    assert result["interval"][0] <= 0.5 <= result["interval"][1]
    assert json.loads(json.dumps(result))["interval"] == list(result["interval"])


def test_blind_blanks_every_picture(chat, rows_file, monkeypatch):
    cfg = DataConfig(source=str(rows_file), val_fraction=0.0)
    questions = items(cfg, "test", 4)
    seen = []
    monkeypatch.setattr(Chat, "answers", lambda _, prompts, __: seen.append(prompts) or [""] * 4)
    for blind in (False, True):
        answer_items(chat, questions, blind)
    for sighted, blank in zip(*seen, strict=True):
        assert np.array_equal(sighted.ids, blank.ids) and sighted.tiles.shape == blank.tiles.shape
        assert sighted.tiles.std() > 10 and (blank.tiles == 128).all()


def test_a_blind_model_cannot_tell_pictures_apart(chat, tmp_path):
    def about(color: str) -> Item:
        picture = Image.new("RGB", (30, 30), color)
        turns = (Turn("user", "<image>What color?"), Turn("assistant", color))
        return Item(Sample(turns, (picture,)), "color", False)

    questions = [about("red"), about("blue")]
    red, blue = answer_items(chat, questions, max_new_tokens=8)
    assert red.answer != blue.answer and red.item is questions[0]
    red, blue = answer_items(chat, questions, blind=True, max_new_tokens=8)
    assert red.answer == blue.answer


def test_a_lost_picture_or_one_over_budget_is_not_scored_around(chat, rows_file, tmp_path):
    turns = (Turn("user", "<image>What?"), Turn("assistant", "red"))
    lost = Item(Sample(turns, (str(tmp_path / "lost.png"),)), "all", False)
    with pytest.raises(InputError, match=r"lost\.png"):
        answer_items(chat, [lost])
    cfg = DataConfig(source=str(rows_file))
    with pytest.raises(InputError, match="1 tiles are more than"):
        answer_items(chat, items(cfg, "test", 1), max_tiles=0)


@pytest.fixture
def cfg(rows_file) -> DataConfig:
    return DataConfig(
        source=str(rows_file), val_fraction=0.4, batch_size=2, max_length=128, workers=0
    )


def test_evaluate_leaves_the_model_as_it_was(chat, cfg):
    chat.model.train()
    state = torch.get_rng_state()
    values = evaluate(chat.model, chat.processor, cfg, 3, OFF)
    assert chat.model.training and torch.equal(torch.get_rng_state(), state)
    chat.model.eval()
    assert values == evaluate(chat.model, chat.processor, cfg, 3, OFF)
    assert not chat.model.training
    assert set(values) == {"val_loss", "val_accuracy", "val_all"}


def test_validation_loss_is_a_mean_over_targets(chat, cfg):
    def loader(packing: bool) -> Loader:
        changed = replace(cfg, packing=packing, batch_size=1)
        return Loader(open_source(changed, "val"), chat.processor, changed)

    n = 3
    found = validation_loss(chat.model, loader(False), n, OFF)
    total = n_targets = 0
    for _, batch in zip(range(n), loader(False)):
        logits, _ = chat.model(batch.input_ids, batch.images)
        flat = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), reduction="none"
        )
        total, n_targets = total + flat.sum().item(), n_targets + (batch.targets != -100).sum()
    assert found == pytest.approx(total / n_targets.item(), rel=1e-4)


def test_without_validation_rows_there_is_nothing_to_log(chat, cfg):
    assert evaluate(chat.model, chat.processor, replace(cfg, val_fraction=0.0), 3, OFF) == {}


def test_mean_of_nothing_is_none():
    assert evaluation.mean([]) is None

"""Questions, views (answer, blind, shuffled), scores and validation values."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from config_tools import InputError
from configs import DataConfig
from data.batches.loader import Loader
from data.sources.open import open_dataset
from data.types import Sample, Turn
from data.world import questions
from engine.evaluation import evaluate as evaluation
from engine.evaluation.evaluate import (
    VIEWS,
    Item,
    answer_questions,
    choose_views,
    encode_question,
    evaluate,
    generate_views,
    load_items,
    score_answers,
    summarize_skills,
    validation_loss,
)
from engine.evaluation.metrics import any_exact, per_answer
from engine.inference.chat import Chat
from engine.training.checkpoint import Best

OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)


@pytest.fixture(scope="module")
def chat(small_checkpoint) -> Chat:
    return Chat.load(small_checkpoint)


def item(expected: str, skill: str = "color", unseen: bool = False) -> Item:
    return Item(Sample((Turn("user", "What?"), Turn("assistant", expected))), skill, unseen)


def test_items_cover_every_skill_and_are_reproducible():
    found = load_items(DataConfig(), "test", 2 * len(questions.SKILLS))
    assert sorted(i.skill for i in found) == sorted(2 * questions.SKILLS)
    again = load_items(DataConfig(), "test", 2 * len(questions.SKILLS))
    assert [i.sample.turns for i in found] == [i.sample.turns for i in again]
    assert [i.sample.turns for i in load_items(DataConfig(seed=1), "test", 20)] != [
        i.sample.turns for i in found
    ]


def test_items_of_a_file_are_its_rows_in_a_fixed_order(rows_file):
    cfg = DataConfig(source=str(rows_file), val_fraction=0.0)
    some, every = load_items(cfg, "test", 7), load_items(cfg, "test", 999)
    assert [i.sample.row for i in some] == [i.sample.row for i in every[:7]]
    rows = sorted(int(i.sample.row.split()[-1]) for i in every)
    assert rows == list(range(1, 25)) and rows[:7] != [int(i.sample.row.split()[-1]) for i in some]
    assert {i.skill for i in every} == {"all"} and load_items(cfg, "val", 5) == []


def test_summary_adds_up():
    right, wrong = "red", "blue"
    questions = [item("red"), item("red"), item("red", unseen=True), item("red", "count")]
    answers = {
        "answer": (right, wrong, right, wrong),
        "blind": (right, wrong, wrong, wrong),
        "shuffled": (wrong, wrong, wrong, wrong),
    }
    metric = per_answer(any_exact)
    result = summarize_skills(
        {view: score_answers(questions, given, metric) for view, given in answers.items()}
    )
    keys = {"accuracy", "interval", "seen", "unseen", "blind", "shuffled", "n"}
    assert set(result) == keys | {"skills"} and result["shuffled"] == 0
    assert list(result["skills"]) == ["color", "count"]
    color = result["skills"]["color"]
    assert set(color) == keys
    assert (color["accuracy"], color["n"]) == (pytest.approx(2 / 3), 3)
    assert (color["seen"], color["unseen"]) == (0.5, 1.0)
    assert color["blind"] == pytest.approx(1 / 3) and result["blind"] == 0.25
    assert (result["accuracy"], result["n"]) == (0.5, 4)
    assert result["skills"]["count"]["unseen"] is None
    assert result["interval"][0] <= 0.5 <= result["interval"][1]
    assert json.loads(json.dumps(result))["interval"] == list(result["interval"])


def test_blind_and_shuffled_views(chat, rows_file):
    cfg = DataConfig(source=str(rows_file), val_fraction=0.0)
    questions = load_items(cfg, "test", 6)
    plain = [encode_question(chat, questions, i, "answer", 9) for i in range(6)]
    for i in range(6):
        blank = encode_question(chat, questions, i, "blind", 9)
        other = encode_question(chat, questions, i, "shuffled", 9)
        assert np.array_equal(plain[i].ids, blank.ids) and np.array_equal(plain[i].ids, other.ids)
        assert plain[i].tiles.std() > 10 and (blank.tiles == 128).all()
        assert np.array_equal(other.tiles, plain[(i + 3) % 6].tiles)
    text = Item(Sample((Turn("user", "Yes?"), Turn("assistant", "yes"))), "all")
    mixed = [text, *questions[:2], text]
    other = encode_question(chat, mixed, 1, "shuffled", 9)
    assert np.array_equal(other.tiles, plain[1].tiles), "needs as many images"
    assert len(encode_question(chat, mixed, 0, "shuffled", 9).tiles) == 0


def test_views_in_one_batch_match_separate_ones(chat, rows_file):
    cfg = DataConfig(source=str(rows_file), val_fraction=0.0)
    questions = load_items(cfg, "test", 5)
    together = dict(generate_views(chat, questions, [4, 1, 2], VIEWS, max_new_tokens=5))
    assert set(together) == {1, 2, 4}
    for view in VIEWS:
        separate = answer_questions(chat, questions, view, max_new_tokens=5)
        assert [together[i][view] for i in (1, 2, 4)] == [separate[i].answer for i in (1, 2, 4)]
    assert len({found[view] for found in together.values() for view in VIEWS}) > 3


def test_choose_views_picks_the_most_likely_choice(chat, rows_file):
    cfg = DataConfig(source=str(rows_file), val_fraction=0.0)
    choices = ("red", "red red", "no")
    questions = [replace(i, choices=choices) for i in load_items(cfg, "test", 3)]
    for i, found in choose_views(chat, questions, [0, 2], ("answer", "blind")):
        probabilities = chat.choice_probabilities(
            encode_question(chat, questions, i, "answer", 9), choices
        )
        assert (
            found["answer"] == choices[int(np.argmax(probabilities))] and found["blind"] in choices
        )


def test_score_answers_keeps_few_images_and_all_references(rows_file):
    cfg = DataConfig(source=str(rows_file), val_fraction=0.0)
    questions = load_items(cfg, "test", 24)
    right = [item.expected for item in questions]
    found = score_answers(questions, right, per_answer(any_exact))
    assert [a.score for a in found] == [1.0] * 24 and [a.item.expected for a in found] == right
    assert [bool(a.item.sample.images) for a in found] == [True] * 10 + [False] * 14
    assert score_answers([], [], per_answer(any_exact)) == []


def test_a_blind_model_gives_the_same_answer_for_all_images(chat, tmp_path):
    def about(color: str) -> Item:
        image = Image.new("RGB", (30, 30), color)
        turns = (Turn("user", "<image>What color?"), Turn("assistant", color))
        return Item(Sample(turns, (image,)), "color", False)

    questions = [about("red"), about("blue")]
    red, blue = answer_questions(chat, questions, max_new_tokens=8)
    assert red.answer != blue.answer and red.item is questions[0]
    red, blue = answer_questions(chat, questions, "blind", max_new_tokens=8)
    assert red.answer == blue.answer


def test_scoring_raises_for_a_missing_image_or_too_many_tiles(chat, rows_file, tmp_path):
    turns = (Turn("user", "<image>What?"), Turn("assistant", "red"))
    lost = Item(Sample(turns, (str(tmp_path / "lost.png"),)), "all", False)
    with pytest.raises(InputError, match=r"lost\.png"):
        answer_questions(chat, [lost])
    cfg = DataConfig(source=str(rows_file))
    with pytest.raises(InputError, match="1 tiles are more than"):
        answer_questions(chat, load_items(cfg, "test", 1), max_tiles=0)


@pytest.fixture
def cfg(rows_file) -> DataConfig:
    return DataConfig(
        source=str(rows_file), val_fraction=0.4, batch_size=2, max_length=128, workers=0
    )


def test_evaluate_restores_mode_and_generators(chat, cfg):
    chat.model.train()
    state = torch.get_rng_state()
    values = evaluate(chat.model, chat.processor, cfg, 3, OFF)
    assert chat.model.training and torch.equal(torch.get_rng_state(), state)
    chat.model.eval()
    assert values == evaluate(chat.model, chat.processor, cfg, 3, OFF)
    assert not chat.model.training
    assert set(values) == {"val_loss", "val_accuracy", "val_answers"}
    assert len(values["val_answers"]) == 3 and all(map(str, values["val_answers"]))


def test_validation_loss_is_a_mean_over_supervised_tokens(chat, cfg):
    def loader(packing: bool) -> Loader:
        changed = replace(cfg, packing=packing, batch_size=1)
        return Loader(open_dataset(changed, "val"), chat.processor, changed)

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


def test_broken_images_are_skipped_and_counted(chat, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    rows = [
        {"image": f"{kind}.png", "question": f"q{i}", "answer": "a"}
        for kind, n in (("good", 60), ("bad", 4))
        for i in range(n)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    cfg = DataConfig(source=str(path), val_fraction=0.99, batch_size=2, max_length=128)
    n_val = len(open_dataset(cfg, "val"))
    values = evaluate(chat.model, chat.processor, cfg, 100, OFF)
    assert values["val_left_out"] == 4 and values["val_loss"] > 0
    assert len(values["val_answers"]) == 10 and n_val > 60
    path.write_text("\n".join(map(json.dumps, rows[60:])))
    problem = evaluate(chat.model.train(), chat.processor, cfg, 100, OFF)
    assert list(problem) == ["val_problem"] and "bad.png" in problem["val_problem"]
    assert chat.model.training and not Best().update(problem, 1)


def test_invalid_base64_is_skipped_too(chat, tmp_path):
    """The error occurs before an image is opened, and in no batch of the validation loss."""
    image = "data:image/png;base64,abc"
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(60)]
    rows.append({"image": image, "question": "last", "answer": "a"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    cfg = DataConfig(source=str(path), val_fraction=0.99, batch_size=2, max_length=128)
    values = evaluate(chat.model, chat.processor, cfg, 100, OFF)
    assert values["val_left_out"] == 1 and values["val_loss"] > 0
    with pytest.raises(InputError, match="not base64"):
        load_items(cfg, "val", 100)  # score.py needs all questions


def test_no_values_without_validation_rows(chat, cfg):
    assert evaluate(chat.model, chat.processor, replace(cfg, val_fraction=0.0), 3, OFF) == {}


def test_mean_of_nothing_is_none():
    assert evaluation.mean_score([]) is None

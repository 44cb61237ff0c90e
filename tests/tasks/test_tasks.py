"""Every public task on Parquet rows with the columns and types of its dataset."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage

from config_tools import InputError
from configs import DataConfig
from data.world import questions
from engine.evaluation.evaluate import score_answers
from tasks.world import CHOICES

TEXT, NUMBER = Value("string"), Value("int64")


def jpeg(color: str) -> dict:
    data = io.BytesIO()
    PILImage.new("RGB", (60, 40), color).save(data, "JPEG")
    return {"bytes": data.getvalue(), "path": None}


# name: (features, rows, [(text in the prompt, reference, choices, skill)], right answers, wrong
# answers)
SETS = {
    "mmstar": (
        {"index": NUMBER, "question": TEXT, "image": Image(), "answer": TEXT, "category": TEXT,
         "l2_category": TEXT,
         "meta_info": {"image_path": TEXT, "source": TEXT, "split": TEXT}},
        [{"index": 0, "image": jpeg("red"), "answer": "B", "category": "coarse perception",
          "question": "Which is it?\nOptions: A: a cat, B: a lawn, C: a car, D: a cup\n",
          "l2_category": "image scene and topic",
          "meta_info": {"image_path": "images/0.jpg", "source": "MMBench", "split": "val"}}],
        [("D: a cup\nAnswer with the option's letter", "B", tuple("ABCD"), "coarse perception")],
        ["B: a lawn"], ["A"],
    ),
    "pope": (
        {"id": TEXT, "question_id": TEXT, "question": TEXT, "answer": TEXT, "image_source": TEXT,
         "image": Image(), "category": TEXT},
        [{"id": "0", "question_id": "1", "question": "Is there a snowboard in the image?",
          "answer": "yes", "image_source": "COCO_val2014_000000310196", "image": jpeg("blue"),
          "category": "adversarial"},
         {"id": "1", "question_id": "2", "question": "Is there a car in the image?",
          "answer": "no", "image_source": "COCO_val2014_000000210789", "image": jpeg("red"),
          "category": "random"}],
        [("snowboard in the image?\nAnswer the question using", "yes", ("yes", "no"),
          "adversarial"), ("car", "no", ("yes", "no"), "random")],
        ["Yes", "No, there is not."], ["no", "yes"],
    ),
    "scienceqa": (
        {"image": Image(), "question": TEXT, "choices": Sequence(TEXT), "answer": Value("int8"),
         "hint": TEXT, "task": TEXT, "grade": TEXT, "subject": TEXT, "topic": TEXT,
         "category": TEXT, "skill": TEXT, "lecture": TEXT, "solution": TEXT},
        [{"image": jpeg("red"), "question": "Which is farthest north?", "answer": 2,
          "choices": ["West Virginia", "Louisiana", "Arizona"], "hint": "Look at the map.",
          "task": "closed choice", "grade": "grade2", "subject": "social science",
          "topic": "geography", "category": "Geography", "skill": "Read a map", "lecture": "",
          "solution": ""},
         {"image": jpeg("red"), "question": "Will these magnets attract?", "answer": 0,
          "choices": ["attract", "repel"], "hint": "", "task": "closed choice",
          "grade": "grade5", "subject": "natural science", "topic": "physics",
          "category": "Magnets", "skill": "Magnets", "lecture": "", "solution": ""}],
        [("Context: Look at the map.\nWhich is farthest north?\nA. West Virginia\nB. Louisiana\n"
          "C. Arizona\nAnswer", "C", ("A", "B", "C"), "social science"),
         ("Will these magnets attract?\nA. attract\nB. repel\n", "A", ("A", "B"),
          "natural science")],
        ["C.", "attract"], ["B", "repel"],
    ),
    "chartqa": (
        {"type": TEXT, "question": TEXT, "answer": TEXT, "image": Image()},
        [{"type": "human_test", "question": "How many bars?", "answer": "14",
          "image": jpeg("white")},
         {"type": "augmented_test", "question": "Share of women?", "answer": "57.5%",
          "image": jpeg("white")}],
        [("How many bars?", "14", (), "human"), ("women", "57.5%", (), "augmented")],
        ["14.0", "0.58"], ["15", "64%"],
    ),
    "textvqa": (
        {"image_id": TEXT, "question_id": Value("int32"), "question": TEXT,
         "question_tokens": Sequence(TEXT), "image": Image(), "image_width": Value("int32"),
         "image_height": Value("int32"), "flickr_original_url": TEXT, "flickr_300k_url": TEXT,
         "answers": Sequence(TEXT), "image_classes": Sequence(TEXT), "set_name": TEXT,
         "ocr_tokens": Sequence(TEXT)},
        [{"image_id": "003a8ae2ef43b901", "question_id": 34602, "question": "what brand is this?",
          "question_tokens": ["what", "brand"], "image": jpeg("gray"), "image_width": 1024,
          "image_height": 664, "flickr_original_url": "", "flickr_300k_url": "",
          "answers": ["nokia"] * 8 + ["Nokia 6", "toshiba"], "image_classes": ["Phone"],
          "set_name": "val", "ocr_tokens": ["NOKIA"]}],
        [("What brand is this?\n", "nokia", (), "all")],
        ["Nokia."], ["samsung"],
    ),
    "docvqa": (
        {"questionId": TEXT, "question": TEXT, "question_types": Sequence(TEXT),
         "image": Image(), "docId": NUMBER, "ucsf_document_id": TEXT,
         "ucsf_document_page_no": TEXT, "answers": Sequence(TEXT), "data_split": TEXT},
        [{"questionId": "49153", "question": "What is the actual value per 1000?",
          "question_types": ["figure/diagram", "layout"], "image": jpeg("white"),
          "docId": 14465, "ucsf_document_id": "pybv0228", "ucsf_document_page_no": "81",
          "answers": ["0.28", "0.28 per 1000"], "data_split": "val"}],
        [("What is the actual value per 1000?\n", "0.28", (), "figure/diagram")],
        ["0.28 per 1000"], ["12,345"],
    ),
    "coco_captions": (
        {"question_id": TEXT, "image": Image(), "question": TEXT, "answer": Sequence(TEXT),
         "id": NUMBER, "license": Value("int8"), "file_name": TEXT, "coco_url": TEXT,
         "height": Value("int32"), "width": Value("int32"), "date_captured": TEXT},
        [{"question_id": f"COCO_val2014_{i}.jpg", "image": jpeg("red"), "id": i, "license": 3,
          "question": "Please carefully observe the image and come up with a caption for it",
          "answer": answers, "file_name": "", "coco_url": "", "height": 40, "width": 60,
          "date_captured": "2013-11-14"}
         for i, answers in enumerate((["A dog on a lawn.", "a brown dog runs"],
                                      ["Two boats at sea", "boats on the water"]))],
        [("one-sentence caption", "A dog on a lawn.", (), "all"),
         ("one-sentence caption", "Two boats at sea", (), "all")],
        ["a dog on a lawn", "two boats at sea"], ["two boats at sea", "a dog on a lawn"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_public_task(name, tmp_path):
    features, rows, wanted, right, wrong = SETS[name]
    if name == "coco_captions":
        pytest.importorskip("pycocoevalcap", reason="no pycocoevalcap: captions are not scored")
    Dataset.from_list(rows, Features(features)).to_parquet(tmp_path / "rows.parquet")
    task = importlib.import_module(f"tasks.{name}").TASK
    found = task.items(DataConfig(source=str(tmp_path / "rows.parquet")), "test", 99)
    assert len(found) == len(rows) and task.source.startswith("hf:")
    items = sorted(found, key=lambda item: int(item.sample.row.split()[-1]))
    for item, row, (text, expected, choices, skill) in zip(items, rows, wanted, strict=True):
        prompt = item.sample.turns[0].text
        assert prompt.startswith("<image>") and text in prompt, prompt
        assert (item.expected, item.choices, item.skill) == (expected, choices, skill)
        assert item.sample.images == (row["image"]["bytes"],)
    assert min(a.score for a in score_answers(items, right, task.metric)) > 0.9
    assert max(a.score for a in score_answers(items, wrong, task.metric)) < 0.1
    assert task.extra_metrics(right, [i.correct for i in items]).get("f1", 1.0) == 1.0


@pytest.mark.parametrize("name", SETS)
def test_rows_with_other_columns_are_refused(name, rows_file):
    found = importlib.import_module(f"tasks.{name}").TASK.items(
        DataConfig(source=str(rows_file)), "test", 3
    )
    if name == "coco_captions":
        return  # any row with an image and an answer has its columns
    with pytest.raises(InputError, match=r"row .*: not a row of this task .* are image, quest"):
        _ = found[0].sample


def test_choices_of_the_world_are_its_answers():
    task = importlib.import_module("tasks.world").TASK
    found = task.items(DataConfig(), "test", 30 * len(questions.SKILLS))
    for item in found:
        if item.choices:
            assert item.expected in item.choices, item
    answers = {item.skill: set() for item in found}
    for item in found:
        answers[item.skill].add(item.expected)
    assert {s for s in answers if not CHOICES.get(s)} == {"what", "caption"}
    assert all(answers[s] == set(CHOICES[s]) for s in ("exist", "compare", "count", "shape"))


def test_caption_metric_on_photos(shared, tmp_path):
    """51 photos with five captions each: the first scores higher than that of another photo."""
    pytest.importorskip("pycocoevalcap", reason="no pycocoevalcap: captions are not scored")
    from config_tools import read_json

    folder = shared / "datasets" / "coco_captions_cc_by"
    rows = [
        {"image": str(folder / image["file_name"]), "answer": image["captions"][1:]}
        for image in read_json(folder / "annotations.json")["images"]
    ]
    people = [i["captions"][0] for i in read_json(folder / "annotations.json")["images"]]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    task = importlib.import_module("tasks.coco_captions").TASK
    found = task.items(DataConfig(source=str(tmp_path / "rows.parquet")), "test", 99)
    items = sorted(found, key=lambda item: int(item.sample.row.split()[-1]))
    assert all(Path(item.sample.images[0]).is_file() for item in items)
    mean = lambda answers: sum(task.metric(answers, [i.correct for i in items])) / 51  # noqa: E731
    assert 0.6 < mean(people) < 1.6, "human captions on COCO have about 0.9"
    assert mean([*people[1:], people[0]]) < 0.2

"""The figures are those counted by hand, and pictures that fail are said, not counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from config_tools import InputError
from configs import ViTConfig
from configs_classify import ClassifyDataConfig
from data.classification.dataset import from_rows
from data.sources.idx import ArrayRows
from engine.training.distributed import autocast
from engine.vit.classification import (
    Result,
    class_metrics,
    draw_confusion,
    evaluate,
    format_table,
    predict,
)
from engine.vit.figures import heatmap
from models.classifier import Classifier
from models.vision_transformer import ViT

LABELS = ("a", "b", "c")
RESULT = Result(
    LABELS, 0.5, np.array([0, 0, 0, 1, 1, 0]), np.array([0, 1, 1, 1, 0, 0]), np.ones(6, bool), ()
)


def test_figures_are_counted_by_hand():
    assert RESULT.accuracy == 3 / 6
    assert RESULT.confusion.tolist() == [[2, 2, 0], [1, 1, 0], [0, 0, 0]]
    a, b, c = class_metrics(RESULT)
    assert a == {"class": "a", "images": 4, "recall": 0.5, "precision": 2 / 3, "confused_with": "b"}
    assert (b["recall"], b["precision"], b["confused_with"]) == (0.5, 1 / 3, "a")
    assert (c["images"], c["recall"], c["precision"], c["confused_with"]) == (0, None, None, "")
    low, high = RESULT.interval
    assert low <= 0.5 <= high
    assert RESULT.values() == {"val_loss": 0.5, "val_accuracy": 0.5}  # of three, five is no news


def test_the_table_has_the_worst_first_and_names_what_is_missing():
    lines = format_table(RESULT).splitlines()
    assert lines[0].startswith("accuracy 50.00% (95 % interval ")
    assert [line.split()[0] for line in lines[2:]] == ["a", "b", "c"]
    failed = replace(RESULT, failed=("x.png: torn.",))
    assert format_table(failed).splitlines()[-1] == "skipped: x.png: torn."


def test_the_confusion_is_drawn(tmp_path):
    draw_confusion(RESULT, tmp_path / "c.png")
    picture = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    assert picture.shape[0] > 300 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


@pytest.fixture
def model(lively) -> Classifier:
    torch.manual_seed(0)
    names = tuple(map(str, range(7)))
    cfg = ViTConfig(vit_img_size=16, vit_patch_size=4, vit_hidden_dim=32, vit_inter_dim=48,
                    vit_n_heads=2, vit_n_blocks=1, vit_n_classes=7, vit_labels=names)  # fmt: skip
    return Classifier(lively(ViT(cfg)))


def test_evaluate_is_one_forward_over_everything(model):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (150, 16, 16, 3), dtype=np.uint8)  # two batches
    labels = [str(k) for k in rng.integers(0, 7, 150)]
    rows = ArrayRows(pixels, labels, "rows")
    source = from_rows(rows, ClassifyDataConfig(val_fraction=0.0), "test", model.labels)
    result = evaluate(model.train(), source, autocast(torch.device("cpu"), torch.float32))
    assert model.training
    x = torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        logits, loss = model.eval()(x, torch.tensor([int(k) for k in labels]))
    wanted = torch.tensor([int(k) for k in labels])
    assert result.loss == pytest.approx(loss.item(), abs=1e-5)
    assert result.accuracy == pytest.approx((logits.argmax(1) == wanted).float().mean().item())
    in_top = [w in row for w, row in zip(wanted.tolist(), logits.topk(5).indices.tolist())]
    assert result.in_top.tolist() == in_top
    assert result.values()["val_top5"] == round(float(np.mean(in_top)), 4)


def test_answers_are_in_order_of_probability_and_of_pictures(model, tmp_path):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    pictures = [Image.fromarray(x) for x in pixels]
    (tmp_path / "torn.png").write_bytes(b"torn")
    mixed = [*pictures[:2], str(tmp_path / "torn.png"), *pictures[2:]]
    found = list(predict(model.eval(), mixed, k=9, batch_size=2))
    assert [picture for picture, *_ in found] == mixed
    assert [bool(problem) for *_, problem in found] == [False, False, True, False, False, False]
    for picture, classes, problem in found:
        if problem:
            assert classes == [] and "torn.png" in problem
            continue
        x = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            shares = model(x)[0].softmax(-1)[0]
        order = shares.argsort(descending=True).tolist()
        assert [name for name, _ in classes] == list(map(str, order))
        assert sum(p for _, p in classes) == pytest.approx(1)


def test_nothing_that_opens_is_said(model, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "torn.png").write_bytes(b"torn")
    from data.classification.dataset import open_classification

    cfg = ClassifyDataConfig(source=str(tmp_path))
    source = open_classification(cfg, "test", ("a", *model.labels))
    with pytest.raises(InputError, match="no image can be opened"):
        evaluate(model, source, autocast(torch.device("cpu"), torch.float32))


def test_a_map_is_dark_where_least_and_bright_where_most():
    values = np.zeros((4, 4))
    values[0, 3] = 1
    pixels = np.asarray(heatmap(values)).astype(int)
    assert pixels[20, -20].sum() > pixels[-20, 20].sum() + 200

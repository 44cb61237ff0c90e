"""Figures of a classifier against values by hand; unreadable images are listed, not counted."""

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


def test_figures_match_values_by_hand():
    assert RESULT.accuracy == 3 / 6
    assert RESULT.confusion.tolist() == [[2, 2, 0], [1, 1, 0], [0, 0, 0]]
    a, b, c = class_metrics(RESULT)
    assert a == {"class": "a", "images": 4, "recall": 0.5, "precision": 2 / 3, "confused_with": "b"}
    assert (b["recall"], b["precision"], b["confused_with"]) == (0.5, 1 / 3, "a")
    assert (c["images"], c["recall"], c["precision"], c["confused_with"]) == (0, None, None, "")
    low, high = RESULT.interval
    assert low <= 0.5 <= high
    assert RESULT.values() == {"val_loss": 0.5, "val_accuracy": 0.5}  # no top 5 of 3 classes


def test_the_table_starts_with_the_lowest_recall_and_lists_skipped_images():
    lines = format_table(RESULT).splitlines()
    assert lines[0].startswith("accuracy 50.00% (95 % interval ")
    assert [line.split()[0] for line in lines[2:]] == ["a", "b", "c"]
    failed = replace(RESULT, failed=("x.png: damaged.",))
    assert format_table(failed).splitlines()[-1] == "skipped: x.png: damaged."


def test_the_confusion_matrix_is_drawn(tmp_path):
    draw_confusion(RESULT, tmp_path / "c.png")
    image = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    assert image.shape[0] > 300 and len(np.unique(image.reshape(-1, 3), axis=0)) > 10


@pytest.fixture
def model(lively) -> Classifier:
    torch.manual_seed(0)
    names = tuple(map(str, range(7)))
    cfg = ViTConfig(vit_img_size=16, vit_patch_size=4, vit_hidden_dim=32, vit_inter_dim=48,
                    vit_n_heads=2, vit_n_blocks=1, vit_n_classes=7, vit_labels=names)  # fmt: skip
    return Classifier(lively(ViT(cfg)))


def test_evaluate_matches_one_forward_pass(model):
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
    expected = torch.tensor([int(k) for k in labels])
    assert result.loss == pytest.approx(loss.item(), abs=1e-5)
    assert result.accuracy == pytest.approx((logits.argmax(1) == expected).float().mean().item())
    in_top = [w in row for w, row in zip(expected.tolist(), logits.topk(5).indices.tolist())]
    assert result.in_top.tolist() == in_top
    assert result.values()["val_top5"] == round(float(np.mean(in_top)), 4)


def test_predictions_are_sorted_and_in_the_order_of_the_images(model, tmp_path):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    images = [Image.fromarray(x) for x in pixels]
    (tmp_path / "broken.png").write_bytes(b"broken")
    mixed = [*images[:2], str(tmp_path / "broken.png"), *images[2:]]
    found = list(predict(model.eval(), mixed, k=9, batch_size=2))
    assert [image for image, *_ in found] == mixed
    assert [bool(problem) for *_, problem in found] == [False, False, True, False, False, False]
    for image, classes, problem in found:
        if problem:
            assert classes == [] and "broken.png" in problem
            continue
        x = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            probabilities = model(x)[0].softmax(-1)[0]
        order = probabilities.argsort(descending=True).tolist()
        assert [name for name, _ in classes] == list(map(str, order))
        assert sum(p for _, p in classes) == pytest.approx(1)


def test_an_error_if_no_image_opens(model, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"broken")
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

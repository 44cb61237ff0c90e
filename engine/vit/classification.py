"""Evaluate a classifier: accuracy, figures per class, confusion matrix, predictions.

Not here: training (training.py), images and classes (data/classification/).

Letters: K classes, N images.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config_tools import InputError, write_atomic
from data.classification.dataset import ClassificationDataset
from data.classification.loader import evaluation_batches, normalise, open_and_resize
from engine.evaluation.metrics import bootstrap_interval
from engine.figures.style import plotting
from models.classifier import Classifier
from models.pretrained.load import open_vit

TOP = 5
CONFUSION, RESULT = "confusion.png", "result.json"  # files of a run folder


def open_classifier(source: str) -> Classifier:
    """Load a picoVLM or transformers checkpoint, a run folder, or a Hub id; needs a head."""
    vit = open_vit(source)
    if not vit.cfg.vit_n_classes:
        raise InputError(f"{source}: has no classifier head; train one with `classify.py train`.")
    return Classifier(vit)


@dataclass(frozen=True)
class Result:
    """Predictions for every image that could be opened."""

    labels: tuple[str, ...]
    loss: float  # cross-entropy per image
    expected: np.ndarray  # [N] int64
    predicted: np.ndarray  # [N] int64
    in_top: np.ndarray  # [N] bool, whether the class is among the TOP predictions
    failed: tuple[str, ...]  # error messages of the other images

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions."""
        return float((self.expected == self.predicted).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return bootstrap_interval((self.expected == self.predicted).tolist())

    @property
    def confusion(self) -> np.ndarray:
        """[K, K] number of images by class (rows) and prediction (columns)."""
        K = len(self.labels)
        return np.bincount(self.expected * K + self.predicted, minlength=K * K).reshape(K, K)

    def values(self) -> dict[str, float]:
        """Values for log.jsonl."""
        values = {"val_loss": round(self.loss, 4), "val_accuracy": round(self.accuracy, 4)}
        if len(self.labels) > TOP:
            values[f"val_top{TOP}"] = round(float(self.in_top.mean()), 4)
        return values


@torch.inference_mode()
def evaluate(
    model: Classifier, source: ClassificationDataset, autocast_context: torch.autocast
) -> Result:
    """Evaluate on all images, without augmentation; raises `InputError` if none can be opened."""
    was_training = model.training
    model.eval()
    loss, outputs, targets, failed = 0.0, [], [], []
    for batch, problems in evaluation_batches(source, model.cfg, model.labels):
        failed += problems
        if not batch.n_targets:
            continue
        batch = batch.to(model.device)
        with autocast_context:
            logits, batch_loss = model(**batch.tensors(), reduction="sum")
        loss += batch_loss.item()
        outputs.append(logits.float().cpu())
        targets.append(batch.targets.cpu())
    model.train(was_training)
    if not outputs:
        raise InputError(f"no image can be opened; the first error: {failed[0]}")
    logits, expected = torch.cat(outputs), torch.cat(targets)
    top = logits.topk(min(TOP, logits.shape[1])).indices  # [N, TOP]
    in_top = (top == expected[:, None]).any(1).numpy()
    loss /= len(expected)
    return Result(model.labels, loss, expected.numpy(), top[:, 0].numpy(), in_top, tuple(failed))


# --- Reports ------------------------------------------------------------------------------------


def class_metrics(result: Result) -> list[dict]:
    """For each class: images, recall, precision, and the class it is most often confused with."""
    confusion, rows = result.confusion, []
    for k, label in enumerate(result.labels):
        n, n_predicted, n_correct = confusion[k].sum(), confusion[:, k].sum(), confusion[k, k]
        wrong = np.where(np.arange(len(result.labels)) == k, 0, confusion[k])
        rows.append({
            "class": label,
            "images": int(n),
            "recall": float(n_correct / n) if n else None,
            "precision": float(n_correct / n_predicted) if n_predicted else None,
            "confused_with": result.labels[wrong.argmax()] if wrong.max() else "",
        })  # fmt: skip
    return rows


def format_table(result: Result, max_rows: int = 40) -> str:
    """Accuracy, then a row per class, the lowest recall first."""
    low, high = result.interval
    line = f"accuracy {result.accuracy:.2%} (95 % interval {low:.2%} to {high:.2%})"
    line += f" of {len(result.expected):,} images, loss {result.loss:.4f}"
    if len(result.labels) > TOP:
        line += f", top {TOP} {result.in_top.mean():.2%}"
    rows = class_metrics(result)
    rows.sort(key=lambda row: 2 if row["recall"] is None else row["recall"])
    width = max(5, *(len(row["class"]) for row in rows))
    lines = [line, f"{'class':<{width}}    images  recall  precision  confused with"]
    for row in rows[:max_rows]:
        shares = (row["recall"], row["precision"])
        recall, precision = ("     -" if x is None else f"{x:6.1%}" for x in shares)
        cells = f"{row['class']:<{width}}  {row['images']:>8,}  {recall}  {precision:>9}"
        lines.append(f"{cells}  {row['confused_with']}".rstrip())
    n_hidden = len(rows) - max_rows
    lines += [f"and {n_hidden} more classes with the same or higher recall"] * (n_hidden > 0)
    return "\n".join(lines + [f"skipped: {error}" for error in result.failed])


def report_result(result: Result, folder: Path | None) -> None:
    """Print the table; with a folder, also write the confusion matrix and the figures there."""
    print(format_table(result))
    if folder is not None:
        draw_confusion(result, folder / CONFUSION)
        low, high = result.interval
        figures = result.values() | {"interval": [low, high], "images": len(result.expected)}
        figures |= {"classes": class_metrics(result)}
        write_atomic(folder / RESULT, json.dumps(figures, indent=2) + "\n")
        print(f"confusion matrix in {folder / CONFUSION}, figures in {folder / RESULT}")


def draw_confusion(result: Result, path: Path) -> None:
    """Draw the confusion matrix, normalized per class; raises `InputError` without matplotlib."""
    confusion, K = result.confusion, len(result.labels)
    share = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    side = min(14.0, 2.5 + 0.35 * K)
    with plotting("the confusion matrix") as figure_class:
        figure = figure_class(figsize=(side, side), layout="constrained")
        axis = figure.subplots()
        axis.grid(False)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.set(xlabel="prediction", ylabel="class", title=f"accuracy {result.accuracy:.1%}")
        if K <= 60:
            axis.set_xticks(range(K), result.labels, rotation=90)
            axis.set_yticks(range(K), result.labels)
        for i, k in np.argwhere(confusion) if K <= 20 else ():
            color = "white" if share[i, k] > 0.5 else "black"
            axis.text(k, i, confusion[i, k], ha="center", va="center", color=color, fontsize=8)
        figure.savefig(path, dpi=120)


# --- Predictions --------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    model: Classifier, images: Sequence, k: int, batch_size: int = 64
) -> Iterator[tuple[object, list[tuple[str, float]], str]]:
    """Yield (image, its `k` most probable (class, probability), error), in order.

    An image that cannot be opened has an error and no classes; otherwise the error is empty.
    """
    k = min(k, len(model.labels))
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        opened, errors = open_and_resize(part, model.cfg)
        top: Iterator = iter(())
        if opened:
            pixels = normalise(opened, model.cfg).to(model.device)
            probabilities, classes = model(pixels)[0].float().softmax(-1).topk(k)  # [N, k]
            top = zip(classes.tolist(), probabilities.tolist())
        for image, error in zip(part, errors):
            row = [] if error else zip(*next(top))
            yield image, [(model.labels[c], p) for c, p in row], error


def write_predictions(rows: list[tuple[str, list[tuple[str, float]]]], path: Path) -> None:
    """Write a .csv or .jsonl file: each image with its classes and probabilities, best first."""
    file = io.StringIO()
    if path.suffix == ".jsonl":
        for image, classes in rows:
            predictions = [{"class": name, "probability": round(p, 6)} for name, p in classes]
            file.write(json.dumps({"image": image, "classes": predictions}) + "\n")
    else:
        writer = csv.writer(file, lineterminator="\n")
        ranks = range(1, 1 + len(rows[0][1]))
        writer.writerow(["image", *(f"{what}_{i}" for i in ranks for what in ("class", "p"))])
        for image, classes in rows:
            writer.writerow([image, *(v for name, p in classes for v in (name, f"{p:.6f}"))])
    write_atomic(path, file.getvalue())

"""How good a classifier is: accuracy, a table by class, a picture of what it confuses.

Not here: training (loop.py), pictures and classes (data/classification/dataset.py, data/classification/loader.py).

Letters: K classes, N pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from config_tools import InputError
from data.classification.dataset import Classes
from data.classification.loader import evaluation_batches, normalise, whole_views
from engine.evaluation.metrics import bootstrap_interval
from models.classifier import Classifier
from models.pretrained.load import open_vit

TOP = 5


def open_classifier(source: str) -> Classifier:
    """Of a directory, ours or one of transformers, a run folder, or a Hub id; or `InputError`."""
    vit = open_vit(source)
    if not vit.cfg.vit_n_classes:
        raise InputError(f"{source}: an encoder without a classifier; train one on it first.")
    return Classifier(vit)


@dataclass(frozen=True)
class Result:
    """What came out for every picture that could be opened."""

    labels: tuple[str, ...]
    loss: float  # cross-entropy per picture
    expected: np.ndarray  # [N] int64
    predicted: np.ndarray  # [N] int64
    in_top: np.ndarray  # [N] bool, whether the class is among the TOP most probable
    failed: tuple[str, ...]  # what is wrong with the other pictures

    @property
    def accuracy(self) -> float:
        return float((self.expected == self.predicted).mean())

    @property
    def interval(self) -> tuple[float, float]:
        return bootstrap_interval((self.expected == self.predicted).tolist())

    @property
    def confusion(self) -> np.ndarray:
        """[K, K] pictures by their class (rows) and by the answer (columns)."""
        K = len(self.labels)
        return np.bincount(self.expected * K + self.predicted, minlength=K * K).reshape(K, K)

    def values(self) -> dict[str, float]:
        """For the log."""
        values = {"val_loss": round(self.loss, 4), "val_accuracy": round(self.accuracy, 4)}
        if len(self.labels) > TOP:
            values[f"val_top{TOP}"] = round(float(self.in_top.mean()), 4)
        return values


@torch.inference_mode()
def evaluate(model: Classifier, source: Classes, region: torch.autocast) -> Result:
    """Whole pictures, once; the model is left as it was. Raises `InputError` without any."""
    was_training = model.training
    model.eval()
    loss, outputs, targets, failed = 0.0, [], [], []
    for batch, problems in evaluation_batches(source, model.cfg, model.labels):
        failed += problems
        if not batch.n_targets:
            continue
        batch = batch.to(model.device)
        with region:
            logits, batch_loss = model(**batch.tensors(), reduction="sum")
        loss += batch_loss.item()
        outputs.append(logits.float().cpu())
        targets.append(batch.targets.cpu())
    model.train(was_training)
    if not outputs:
        raise InputError(f"no picture can be opened, the first: {failed[0]}")
    logits, expected = torch.cat(outputs), torch.cat(targets)
    top = logits.topk(min(TOP, logits.shape[1])).indices  # [N, TOP]
    return Result(
        model.labels,
        loss / len(expected),
        expected.numpy(),
        top[:, 0].numpy(),
        (top == expected[:, None]).any(1).numpy(),
        tuple(failed),
    )


# --- For people ---------------------------------------------------------------------------------


def by_class(result: Result) -> list[dict]:
    """For each class its pictures, recall, precision, and what it is taken for most often."""
    confusion, rows = result.confusion, []
    for k, label in enumerate(result.labels):
        n, answered, right = confusion[k].sum(), confusion[:, k].sum(), confusion[k, k]
        wrong = np.where(np.arange(len(result.labels)) == k, 0, confusion[k])
        rows.append(
            {
                "class": label,
                "pictures": int(n),
                "recall": float(right / n) if n else None,
                "precision": float(right / answered) if answered else None,
                "taken for": result.labels[wrong.argmax()] if wrong.max() else "",
            }
        )
    return rows


def table(result: Result, most: int = 40) -> str:
    """Accuracy and, class by class, the worst first."""
    low, high = result.interval
    lines = [
        f"accuracy {result.accuracy:.2%} (95 % interval {low:.2%} to {high:.2%}) of "
        f"{len(result.expected):,} pictures, loss {result.loss:.4f}"
    ]
    if len(result.labels) > TOP:
        lines[0] += f", top {TOP} {result.in_top.mean():.2%}"
    rows = sorted(by_class(result), key=lambda row: 2 if row["recall"] is None else row["recall"])
    width = max(5, *(len(row["class"]) for row in rows))
    lines.append(f"{'class':<{width}}  pictures  recall  precision  taken for")
    for row in rows[:most]:
        recall, precision = (
            "     -" if row[key] is None else f"{row[key]:6.1%}" for key in ("recall", "precision")
        )
        line = f"{row['class']:<{width}}  {row['pictures']:>8,}  {recall}  {precision:>9}"
        lines.append(f"{line}  {row['taken for']}".rstrip())
    lines += [f"and {len(rows) - most} classes more, all at least as good"] * (len(rows) > most)
    return "\n".join(lines + [f"left out: {problem}" for problem in result.failed])


def draw_confusion(result: Result, path: Path) -> None:
    """Write the confusion matrix, shares of each class's pictures; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "a picture of the confusion needs matplotlib, so run `pip install matplotlib`."
        ) from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    confusion, K = result.confusion, len(result.labels)
    share = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    side = min(14.0, 2.5 + 0.35 * K)
    figure, axis = plt.subplots(figsize=(side, side), constrained_layout=True)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="answer", ylabel="class", title=f"accuracy {result.accuracy:.1%}")
    if K <= 60:
        axis.set_xticks(range(K), result.labels, rotation=90)
        axis.set_yticks(range(K), result.labels)
    for i, k in np.argwhere(confusion) if K <= 20 else ():
        color = "white" if share[i, k] > 0.5 else "black"
        axis.text(k, i, confusion[i, k], ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- Answers ------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    model: Classifier, pictures: Sequence, k: int, batch_size: int = 64
) -> Iterator[tuple[object, list[tuple[str, float]], str]]:
    """(picture, its `k` most probable classes with probabilities, what is wrong with it), in order.

    A picture that cannot be opened has no classes; nothing is wrong with the others.
    """
    k = min(k, len(model.labels))
    for start in range(0, len(pictures), batch_size):
        part = pictures[start : start + batch_size]
        views, problems = whole_views(part, model.cfg)
        images = normalise(views, model.cfg).to(model.device) if views else None
        found = iter(() if images is None else _top(model, images, k))
        for picture, problem in zip(part, problems):
            yield picture, [] if problem else next(found), problem


def _top(model: nn.Module, images: torch.Tensor, k: int) -> list[list[tuple[str, float]]]:
    probabilities, classes = model(images)[0].float().softmax(-1).topk(k)  # [N, k]
    return [
        [(model.labels[c], p) for c, p in zip(row, shares)]
        for row, shares in zip(classes.tolist(), probabilities.tolist())
    ]

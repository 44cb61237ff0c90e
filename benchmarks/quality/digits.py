"""5-fold cross-validation on scikit-learn's 1,797 digits: picoVLM's and transformers' ViT.

python -m benchmarks.quality.digits                                    both, every fold
python -m benchmarks.quality.digits --folds 0                          only the time of a step
python -m benchmarks.quality.digits --models picoVLM "transformers, same weights"

Both have the same shape, data order, augmentation, optimizer, rates and steps. transformers starts
from its own initial weights or from picoVLM's. Test digits are evaluated once, at the end, and
nothing is chosen on them. Times are CPU time. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import nn

from configs import ViTConfig
from configs_classify import ClassifyDataConfig, ClassifyTrainConfig
from data.classification import loader as loaders
from data.classification.dataset import ClassificationDataset, from_rows
from data.sources.idx import ArrayRows
from engine.evaluation.metrics import bootstrap_interval
from engine.training.optim import build_optimizer, lr_factor
from models.classifier import Classifier
from models.vision_transformer import ViT

DATA = ClassifyDataConfig(source="digits", batch_size=64, crop_min_scale=0.6, crop_max_ratio=1.2,
                          randaugment=0, mixup=0.2, val_fraction=0.0)  # fmt: skip
MODEL = ViTConfig(
    vit_img_size=16, vit_patch_size=4, vit_n_channels=1, vit_hidden_dim=96, vit_inter_dim=192,
    vit_n_heads=4, vit_n_blocks=4, vit_hidden_act="gelu", vit_cls_flag=True, vit_n_classes=10,
    vit_labels=tuple("0123456789"),
)  # fmt: skip
TRAIN = ClassifyTrainConfig(steps=600, warmup=100, optimizer="adamw", lr_trunk=0.002, lr_head=0.002,
                            weight_decay=0.05, beta2=0.99, schedule="cosine")  # fmt: skip


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8] uint8 and their digits [1797]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images * 255 / 16).round().astype(np.uint8), found.target


def folds(target: np.ndarray):
    """(training rows, test rows) of five folds, stratified by digit."""
    from sklearn.model_selection import StratifiedKFold

    return StratifiedKFold(5, shuffle=True, random_state=0).split(target, target)


def source_of(
    pixels: np.ndarray, target: np.ndarray, data: ClassifyDataConfig
) -> ClassificationDataset:
    rows = ArrayRows(pixels, [str(t) for t in target], data.source)
    return from_rows(rows, data, "train", MODEL.vit_labels)


def loader_of(
    source: ClassificationDataset, model: ViTConfig, data: ClassifyDataConfig
) -> loaders.ClassificationLoader:
    numbers = {name: i for i, name in enumerate(source.names)}
    processor = loaders.ClassificationProcessor(model, data, numbers)
    return loaders.ClassificationLoader(source, processor, loaders.loader_config(data))


class HFClassifier(nn.Module):
    """A transformers image classifier with the interface of picoVLM's `Classifier`."""

    def __init__(self, model: nn.Module, cfg: ViTConfig):
        super().__init__()
        self.model, self.cfg, self.labels = model, cfg, cfg.vit_labels

    @property
    def parts(self) -> dict[str, nn.Module]:
        children = dict(self.model.named_children())
        head = children.pop("classifier")
        return {"trunk": nn.ModuleDict(children), "head": head}

    def forward(self, images, targets=None):
        logits = self.model(pixel_values=images).logits
        return logits, None if targets is None else nn.functional.cross_entropy(logits, targets)


def hf_vit(cfg: ViTConfig) -> HFClassifier:
    """transformers' ViTForImageClassification of the same shape, with its own initial weights."""
    import transformers

    config = transformers.ViTConfig(
        image_size=cfg.vit_img_size, patch_size=cfg.vit_patch_size,
        num_channels=cfg.vit_n_channels, hidden_size=cfg.vit_hidden_dim,
        intermediate_size=cfg.vit_inter_dim, num_hidden_layers=cfg.vit_n_blocks,
        num_attention_heads=cfg.vit_n_heads, hidden_act="gelu", num_labels=cfg.vit_n_classes,
        layer_norm_eps=cfg.vit_ln_eps,
    )  # fmt: skip
    return HFClassifier(transformers.ViTForImageClassification(config), cfg)


def hf_vit_with_same_weights(cfg: ViTConfig) -> HFClassifier:
    """The same class with the initial weights of picoVLM."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        ViT(cfg).save_pretrained(folder)
        model = transformers.ViTForImageClassification.from_pretrained(folder)
    return HFClassifier(model, cfg)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "picoVLM": lambda: Classifier(ViT(MODEL)),
    "transformers": lambda: hf_vit(MODEL),
    "transformers, same weights": lambda: hf_vit_with_same_weights(MODEL),
}


def fit(model: nn.Module, loader: loaders.ClassificationLoader, cfg: ClassifyTrainConfig) -> None:
    """Train with the optimizer and schedule of classify.py."""
    optimizer, batches = build_optimizer(model.parts, cfg), iter(loader)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    for step in range(cfg.steps):
        batch = next(batches)
        optimizer.set_lr(lr_factor(cfg, step))
        _, loss = model(**batch.tensors())
        loss.backward()
        nn.utils.clip_grad_norm_(params, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()


def seconds_per_step(models: dict[str, nn.Module]) -> dict[str, np.ndarray]:
    """Seconds [60] of training steps without data loading; the models alternate."""
    optimizers = {name: build_optimizer(model.parts, TRAIN) for name, model in models.items()}
    shape = (DATA.batch_size, MODEL.vit_n_channels, MODEL.vit_img_size, MODEL.vit_img_size)
    images, targets = torch.randn(shape), torch.randint(10, (DATA.batch_size,))
    seconds = {name: [] for name in models}
    for _ in range(5 + 60):
        for name, model in models.items():
            start = time.process_time()
            model.train()(images, targets)[1].backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name].append(time.process_time() - start)
    return {name: np.array(found[5:]) for name, found in seconds.items()}


@torch.inference_mode()
def is_correct(model: nn.Module, source: ClassificationDataset) -> np.ndarray:
    """Whether each row is classified correctly, [n] bool."""
    model.eval()
    batches = loaders.evaluation_batches(source, model.cfg, model.labels)
    found = [model(batch.images)[0].argmax(-1) == batch.targets for batch, _ in batches]
    return torch.cat(found).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["picoVLM", "transformers"])
    parser.add_argument("--steps", type=int, default=TRAIN.steps)
    args = parser.parse_args()
    cfg = replace(TRAIN, steps=args.steps)
    makers = {name: MODELS[name] for name in args.models}
    pixels, target = digits()
    correct = {name: [] for name in makers}
    seconds = seconds_per_step({name: make() for name, make in makers.items()})
    for name, found in seconds.items():
        low, mid, high = 1000 * np.percentile(found, (25, 50, 75))
        print(f"{name}: {mid:.1f} ms per step (quartiles {low:.1f} and {high:.1f})", flush=True)
    for fold, (train_rows, test_rows) in enumerate(islice(folds(target), args.folds)):
        source = source_of(pixels[train_rows], target[train_rows], DATA)
        test = source_of(pixels[test_rows], target[test_rows], DATA)
        for name, make in makers.items():
            torch.manual_seed(fold)
            model, start = make(), time.process_time()
            fit(model, loader_of(source, MODEL, DATA), cfg)
            spent = time.process_time() - start
            correct[name].append(is_correct(model, test))
            n = sum(p.numel() for p in model.parameters())
            accuracy = f"{correct[name][-1].mean():.2%} correct"
            print(f"fold {fold} {name}: {accuracy}, {spent:.0f} s, {n:,} parameters", flush=True)
    for name in makers if args.folds else ():
        every = np.concatenate(correct[name])
        low, high = bootstrap_interval(every.tolist())
        interval = f"(95 % interval {low:.2%} to {high:.2%})"
        print(f"{name}: {every.mean():.2%} of {len(every):,} {interval}")


if __name__ == "__main__":
    main()

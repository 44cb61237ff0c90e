"""Image classification: `logits, loss = classifier(images, targets)`.

Not here: the ViT, its pooling and heads (vision_transformer.py), files (models/pretrained).

Letters: N images, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pretrained.mixin import PretrainedMixin
from models.vision_transformer import ViT


class Classifier(PretrainedMixin, nn.Module):
    """A ViT of `vit_n_classes` > 0 and its loss."""

    def __init__(self, vit: ViT):
        super().__init__()
        if not vit.cfg.vit_n_classes:
            raise ValueError("vit_n_classes = 0: must be at least 1 in a classifier")
        self.cfg, self.vit = vit.cfg, vit

    @property
    def device(self) -> torch.device:
        return self.vit.patch_embedding.conv.weight.device

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules that can be frozen and have their own learning rates."""
        children = dict(self.vit.named_children())
        head = children.pop("head")
        return {"trunk": nn.ModuleDict({k: m for k, m in children.items() if m}), "head": head}

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names; without names, the class numbers."""
        return self.cfg.vit_labels or tuple(map(str, range(self.cfg.vit_n_classes)))

    def forward(
        self, images: Tensor, targets: Tensor | None = None, reduction: str = "mean"
    ) -> tuple[Tensor, Tensor | None]:
        """Images [N, channels, size, size] -> (logits [N, K], loss or None).

        `targets` are class numbers [N], or probabilities [N, K] for mixup, CutMix and label
        smoothing.
        """
        logits = self.vit(images)
        loss = None if targets is None else F.cross_entropy(logits, targets, reduction=reduction)
        return logits, loss

    def __str__(self) -> str:
        """A table of the modules, their parameter counts and sizes."""
        cfg = self.cfg
        notes = {
            "patch_embedding": f"{cfg.vit_grid} x {cfg.vit_grid} patches of {cfg.vit_patch_size} "
            f"pixels, {cfg.vit_n_channels} channels, {cfg.vit_n_prefix} prefix tokens",
            "blocks": f"{cfg.vit_n_blocks} x (width {cfg.vit_hidden_dim}, MLP "
            f"{cfg.vit_inter_dim}, {cfg.vit_n_heads} heads)",
            "map_pool": "attention pooling",
            "head": f"{cfg.vit_head}, {cfg.vit_n_classes} classes",
        }
        counts = {
            name: sum(p.numel() for p in part.parameters())
            for name, part in self.vit.named_children()
        }
        rows = [(name, n, notes.get(name, "")) for name, n in counts.items() if n]
        rows.append(("total", sum(counts.values()), ""))
        width = max(len(name) for name, *_ in rows)
        return "\n".join(f"{name:<{width}}  {n:>13,}  {note}".rstrip() for name, n, note in rows)

"""`logits, loss = classifier(images, targets)`: a ViT with a head, and what training asks of it.

Not here: the ViT, its pools and heads (vision_transformer.py), files (backbones.py).

Letters: N images, K classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vision_transformer import ViT


class Classifier(nn.Module):
    """A ViT of `vit_n_classes` > 0 and its loss."""

    def __init__(self, vit: ViT):
        super().__init__()
        if not vit.cfg.vit_n_classes:
            raise ValueError("vit_n_classes = 0: a ViT without a head classifies nothing")
        self.cfg, self.vit = vit.cfg, vit

    @property
    def device(self) -> torch.device:
        return self.vit.patch_embedding.conv.weight.device

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that freeze and learn at their own rates."""
        children = dict(self.vit.named_children())
        head = children.pop("head")
        return {"trunk": nn.ModuleDict({k: m for k, m in children.items() if m}), "head": head}

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes; their numbers where none were given."""
        return self.cfg.vit_labels or tuple(map(str, range(self.cfg.vit_n_classes)))

    def forward(
        self, images: Tensor, targets: Tensor | None = None, reduction: str = "mean"
    ) -> tuple[Tensor, Tensor | None]:
        """Images [N, channels, size, size] -> (logits [N, K], loss or None).

        targets are class numbers [N], or probabilities [N, K] where images are mixed or labels
        smoothed.
        """
        logits = self.vit(images)
        loss = None if targets is None else F.cross_entropy(logits, targets, reduction=reduction)
        return logits, loss

    def __str__(self) -> str:
        return str(self.vit)

    def save_pretrained(self, directory: str | Path, processor=None) -> None:
        """Write a directory that transformers opens where it has such a model; no processor."""
        self.vit.save_pretrained(directory)

    def push_to_hub(self, repo_id: str, private: bool = True) -> str:
        """Upload what `save_pretrained` writes to user/name; returns its address.

        `classify.py export --push` also writes a model card. Raises `InputError`.
        """
        from models.pretrained import hub

        return hub.push_saved(self.save_pretrained, repo_id, private)

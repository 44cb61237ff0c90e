"""The vision encoder: a pre-norm Vision Transformer (Dosovitskiy et al. 2020; defaults: SigLIP's).

One class serves as VLM encoder, classifier and image embedder (`forward_features`, `pool`, `head`).
Not here: resizing (data/images.py), loading (models/pretrained).

Letters: N tiles, P patches, T tokens (CLS and registers, then patches), M pooling queries,
D width, H heads, C head dimension.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from configs import ViTConfig
from models.ops.activations import ACTIVATIONS
from models.ops.attention import attention
from models.ops.cast_once import cast_once
from models.ops.init import init_weights
from models.ops.memory import run_blocks
from models.pretrained.mixin import PretrainedMixin


class ViTPatchEmbeddings(nn.Module):
    """Tiles [N, channels, size, size] -> tokens [N, T, D], with learned position embeddings."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        size, D = cfg.vit_patch_size, cfg.vit_hidden_dim
        bias = not cfg.vit_pre_norm  # CLIP: no bias, since ViT.pre_norm follows
        self.conv = nn.Conv2d(cfg.vit_n_channels, D, kernel_size=size, stride=size, bias=bias)
        n_positions = int(cfg.vit_cls_flag) + cfg.vit_n_patches  # registers have no position
        self.position_embedding = nn.Parameter(torch.empty(n_positions, D))
        self.cls_token = nn.Parameter(torch.empty(D)) if cfg.vit_cls_flag else None
        n = cfg.vit_n_registers
        self.registers = nn.Parameter(torch.empty(n, D)) if n else None

    def forward(self, images: Tensor) -> Tensor:
        N, *shape = images.shape
        expected = [self.cfg.vit_n_channels, self.cfg.vit_img_size, self.cfg.vit_img_size]
        if shape != expected:
            raise ValueError(f"images have shape {[N, *shape]}; expected {[N, *expected]}")
        x = self.conv(images).flatten(2).transpose(1, 2)  # [N, P, D]
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(N, 1, -1), x), dim=1)  # [N, 1 + P, D]
        x = x + self.position_embedding
        if self.registers is not None:
            cls, patches = x.tensor_split([int(self.cfg.vit_cls_flag)], dim=1)
            x = torch.cat((cls, self.registers.expand(N, -1, -1), patches), dim=1)  # [N, T, D]
        return x


class ViTMultiHeadAttention(nn.Module):
    """Every token attends to every token of its tile."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        D = cfg.vit_hidden_dim
        self.n_heads, self.dropout = cfg.vit_n_heads, cfg.vit_dropout
        self.q_proj = nn.Linear(D, D, bias=cfg.vit_qkv_bias)
        self.k_proj = nn.Linear(D, D, bias=cfg.vit_qkv_bias)
        self.v_proj = nn.Linear(D, D, bias=cfg.vit_qkv_bias)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """Self-attention of x [N, T, D]; with `queries` [N, M, D], cross-attention to x."""
        for_q, for_k, for_v = cast_once(x, 3)
        for_q = for_q if queries is None else queries
        q, k, v = (
            y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # q [N, H, T or M, C]; k, v with T
            for y in (self.q_proj(for_q), self.k_proj(for_k), self.v_proj(for_v))
        )
        out = attention(q, k, v, dropout=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # [N, T or M, D]


class ViTMLP(nn.Module):
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.activation = ACTIVATIONS[cfg.vit_hidden_act]
        n_hidden = cfg.vit_inter_dim * (2 if cfg.vit_hidden_act == "swiglu" else 1)  # gate, value
        self.fc1 = nn.Linear(cfg.vit_hidden_dim, n_hidden)
        self.fc2 = nn.Linear(cfg.vit_inter_dim, cfg.vit_hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class ViTLayerScale(nn.Module):
    """Layer scale: a learned factor per channel (Touvron et al. 2021)."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(cfg.vit_hidden_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ViTDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): samples skip the branch with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate)  # [N, 1, 1]
        return x * keep / (1 - self.rate)


class ViTBlock(nn.Module):
    def __init__(self, cfg: ViTConfig, drop_path: float = 0.0):
        super().__init__()
        self.ln1 = nn.LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.attn = ViTMultiHeadAttention(cfg)
        self.ln2 = nn.LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.mlp = ViTMLP(cfg)
        self.scale1 = ViTLayerScale(cfg) if cfg.vit_layer_scale else nn.Identity()
        self.scale2 = ViTLayerScale(cfg) if cfg.vit_layer_scale else nn.Identity()
        self.dropout = nn.Dropout(cfg.vit_dropout)
        self.drop_path = ViTDropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.dropout(self.scale1(self.attn(self.ln1(x)))))
        return x + self.drop_path(self.dropout(self.scale2(self.mlp(self.ln2(x)))))


class ViTMapPool(nn.Module):
    """Multihead attention pooling: a learned query, the probe, attends to all tokens (SigLIP)."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, cfg.vit_hidden_dim))
        self.attn = ViTMultiHeadAttention(cfg)
        self.ln = nn.LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.mlp = ViTMLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x, self.probe.expand(len(x), -1, -1))  # [N, 1, D]
        return (x + self.mlp(self.ln(x)))[:, 0]  # [N, D]


def build_head(cfg: ViTConfig) -> nn.Module:
    """[N, D] -> logits [N, vit_n_classes]; `mlp` is the head of the paper's pre-training."""
    D, n_classes = cfg.vit_hidden_dim, cfg.vit_n_classes
    if not n_classes:
        return nn.Identity()
    if cfg.vit_head == "linear":
        return nn.Linear(D, n_classes)
    mlp: OrderedDict[str, nn.Module] = OrderedDict(hidden=nn.Linear(D, D), tanh=nn.Tanh())
    return nn.Sequential(mlp | {"out": nn.Linear(D, n_classes)})


class ViT(PretrainedMixin, nn.Module):
    """`forward_features(images)`: all tokens. `vit(images)`: pooled features or class logits."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg: Any = cfg  # a VLMConfig inside a VisionLanguageModel
        self.activation_checkpointing = False
        D, eps, n_blocks = cfg.vit_hidden_dim, cfg.vit_ln_eps, cfg.vit_n_blocks
        drop_paths = torch.linspace(0, cfg.vit_drop_path, n_blocks, device="cpu").tolist()
        self.patch_embedding = ViTPatchEmbeddings(cfg)
        self.pre_norm = nn.LayerNorm(D, eps) if cfg.vit_pre_norm else nn.Identity()
        self.dropout = nn.Dropout(cfg.vit_dropout)
        self.blocks = nn.ModuleList(ViTBlock(cfg, rate) for rate in drop_paths)
        self.layer_norm = nn.LayerNorm(D, eps)
        self.map_pool = ViTMapPool(cfg) if cfg.vit_pooling == "map" else None
        self.head = build_head(cfg)
        init_weights(self, n_residual=2 * n_blocks)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images [N, channels, size, size] -> [N, T, D] after the final norm."""
        x = self.dropout(self.pre_norm(self.patch_embedding(images)))  # [N, T, D]
        checkpointing = self.activation_checkpointing and self.training
        return self.layer_norm(run_blocks(self.blocks, x, checkpointing=checkpointing))

    def patches(self, images: Tensor) -> Tensor:
        """The patch tokens without CLS and registers, [N, P, D]: the input of a VLM's projector."""
        return self.forward_features(images)[:, self.cfg.vit_n_prefix :]

    def pool(self, x: Tensor) -> Tensor:
        """Features [N, T, D] -> [N, D] for cls, mean (of patches) and map; [N, P, D] for none."""
        if self.map_pool is not None:
            return self.map_pool(x)
        patches = x[:, self.cfg.vit_n_prefix :]  # [N, P, D]
        return {"cls": x[:, 0], "mean": patches.mean(1), "none": patches}[self.cfg.vit_pooling]

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features, or logits [N, vit_n_classes] if the config has classes."""
        return self.head(self.pool(self.forward_features(images)))

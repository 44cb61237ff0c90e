"""The vision encoder: a pre-norm Vision Transformer (Dosovitskiy et al. 2020; default: SigLIP's).

One ViT, three jobs through `forward_features -> pool -> head`: eyes of a VLM, classifier, image
embeddings.
Not here: image resizing (data/images.py), weights of other layouts (models/pretrained).

Letters: N tiles, P patches, T tokens (CLS and registers, then patches), D width, H heads,
C head width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import ViTConfig
from models.ops.attention import attention
from models.ops.init import init_weights, parameter_table
from models.ops.memory import cast_once, run_blocks


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def swiglu(x: Tensor) -> Tensor:
    """The first half gates the second, [..., 2 * inter] -> [..., inter] (Shazeer 2020)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


ACTIVATIONS = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "swiglu": swiglu,
}


class ViTPatchEmbeddings(nn.Module):
    """Images [N, 3, H, W] -> tokens [N, T, D]: cut into patches, project, add learned positions.

    The strided convolution *is* cut, flatten, multiply: its kernel sees each patch once.
    """

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg = cfg
        size, D = cfg.vit_patch_size, cfg.vit_hidden_dim
        bias = not cfg.vit_pre_norm  # CLIP's norm would take it away again
        self.conv = nn.Conv2d(cfg.vit_n_channels, D, kernel_size=size, stride=size, bias=bias)
        self.position_embedding = nn.Parameter(
            torch.empty(int(cfg.vit_cls_flag) + cfg.vit_n_patches, D)
        )
        self.cls_token = nn.Parameter(torch.empty(D)) if cfg.vit_cls_flag else None
        self.registers = (
            nn.Parameter(torch.empty(cfg.vit_n_registers, D)) if cfg.vit_n_registers else None
        )

    def forward(self, images: Tensor) -> Tensor:
        cfg = self.cfg
        N, *shape = images.shape
        wanted = [cfg.vit_n_channels, cfg.vit_img_size, cfg.vit_img_size]
        if shape != wanted:
            raise ValueError(
                f"images are [N, {', '.join(map(str, shape))}], the encoder takes "
                f"[N, {', '.join(map(str, wanted))}]"
            )
        x = self.conv(images).flatten(2).transpose(1, 2)  # [N, P, D]
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(N, 1, -1), x), dim=1)  # [N, 1 + P, D]
        x = x + self.position_embedding
        if self.registers is not None:
            n_cls = int(cfg.vit_cls_flag)
            x = torch.cat(
                (x[:, :n_cls], self.registers.expand(N, -1, -1), x[:, n_cls:]), dim=1
            )  # [N, T, D]
        return x


class ViTMultiHeadAttention(nn.Module):
    """Every token sees every token of its tile."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        D = cfg.vit_hidden_dim
        self.n_heads = cfg.vit_n_heads
        self.dropout = cfg.vit_dropout
        self.q_proj = nn.Linear(D, D, bias=cfg.vit_qkv_bias)
        self.k_proj = nn.Linear(D, D, bias=cfg.vit_qkv_bias)
        self.v_proj = nn.Linear(D, D, bias=cfg.vit_qkv_bias)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """`queries` [N, Q, D] look at x [N, T, D]; by default x looks at itself."""
        inputs = cast_once(x, 3) if queries is None else (queries, *cast_once(x, 2))
        q, k, v = (
            proj(y).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [N, H, T, C]
            for proj, y in zip((self.q_proj, self.k_proj, self.v_proj), inputs)
        )
        out = attention(q, k, v, causal=False, dropout=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # [N, T, D]


class ViTMLP(nn.Module):
    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.activation = ACTIVATIONS[cfg.vit_hidden_act]
        n_in = 2 * cfg.vit_inter_dim if cfg.vit_hidden_act == "swiglu" else cfg.vit_inter_dim
        self.fc1 = nn.Linear(cfg.vit_hidden_dim, n_in)
        self.fc2 = nn.Linear(cfg.vit_inter_dim, cfg.vit_hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class ViTLayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021)."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(cfg.vit_hidden_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ViTDropPath(nn.Module):
    """In training, a branch is skipped by a share `rate` of the samples (Huang et al. 2016)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate)  # [N, 1, 1]
        return x * kept / (1 - self.rate)


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
    """One learned query attends to all tokens.

    It is transformers' SiglipMultiheadAttentionPoolingHead.
    """

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, cfg.vit_hidden_dim))
        self.attn = ViTMultiHeadAttention(cfg)
        self.ln = nn.LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.mlp = ViTMLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x, self.probe.expand(len(x), -1, -1))  # [N, 1, D]
        return (x + self.mlp(self.ln(x)))[:, 0]  # [N, D]


class ViTMLPHead(nn.Module):
    """A hidden layer with tanh before the classes: the ViT paper's head while pretraining."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.hidden = nn.Linear(cfg.vit_hidden_dim, cfg.vit_hidden_dim)
        self.out = nn.Linear(cfg.vit_hidden_dim, cfg.vit_n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x)))


def build_head(cfg: ViTConfig) -> nn.Module:
    """Pooled features [N, D] -> logits [N, vit_n_classes]; without classes, nothing is done."""
    if not cfg.vit_n_classes:
        return nn.Identity()
    is_mlp = cfg.vit_head == "mlp"
    return ViTMLPHead(cfg) if is_mlp else nn.Linear(cfg.vit_hidden_dim, cfg.vit_n_classes)


class ViT(nn.Module):
    """`forward_features(images)` -> all tokens, normalised; `ViT(images)` -> as `vit_pool` says."""

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        self.cfg, self.activation_checkpointing = cfg, False
        eps, n = cfg.vit_ln_eps, cfg.vit_n_blocks
        rates = torch.linspace(0, cfg.vit_drop_path, n, device="cpu").tolist()
        self.patch_embedding = ViTPatchEmbeddings(cfg)
        self.pre_norm = nn.LayerNorm(cfg.vit_hidden_dim, eps) if cfg.vit_pre_norm else nn.Identity()
        self.dropout = nn.Dropout(cfg.vit_dropout)
        self.blocks = nn.ModuleList(ViTBlock(cfg, rate) for rate in rates)
        self.layer_norm = nn.LayerNorm(cfg.vit_hidden_dim, eps)
        self.map_pool = ViTMapPool(cfg) if cfg.vit_pooling == "map" else None
        self.head = build_head(cfg)
        init_weights(self, n_residual=2 * n)

    def forward_features(self, images: Tensor) -> Tensor:
        """[N, channels, size, size] -> [N, T, D] after the last norm, CLS and registers first."""
        x = self.dropout(self.pre_norm(self.patch_embedding(images)))
        wide, again = self.cfg.vit_inter_dim, self.activation_checkpointing
        return self.layer_norm(run_blocks(self.blocks, x, wide, self.training, again))

    def patches(self, images: Tensor) -> Tensor:
        """The patch tokens alone, [N, P, D]: what a language model sees."""
        return self.forward_features(images)[:, self.cfg.vit_n_prefix :]

    def pool(self, x: Tensor) -> Tensor:
        """Features [N, T, D] -> [N, D] for cls, mean (over patches) and map; [N, P, D] for none."""
        if self.map_pool is not None:
            return self.map_pool(x)
        patches = x[:, self.cfg.vit_n_prefix :]
        return {"cls": x[:, 0], "mean": patches.mean(1), "none": patches}[self.cfg.vit_pooling]

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features; with `vit_n_classes`, their logits [N, vit_n_classes]."""
        return self.head(self.pool(self.forward_features(images)))

    def __str__(self) -> str:
        cfg = self.cfg
        wide = f"width {cfg.vit_hidden_dim}, MLP {cfg.vit_inter_dim}, {cfg.vit_n_heads} heads"
        what = {
            "patch_embedding": f"{cfg.vit_grid} x {cfg.vit_grid} patches of {cfg.vit_patch_size} "
            f"pixels, {cfg.vit_n_channels} channels, {cfg.vit_n_prefix} tokens in front",
            "blocks": f"{cfg.vit_n_blocks} x ({wide})",
            "map_pool": "one query attends to all tokens",
            "head": f"{cfg.vit_head}, {cfg.vit_n_classes} classes",
        }
        return parameter_table(dict(self.named_children()), what)

    @classmethod
    def from_pretrained(cls, cfg: ViTConfig) -> ViT:
        """The weights `cfg.vit_model_type` names, a directory or Hub id, at `cfg.vit_img_size`.

        The other sizes are the source's; `vit.cfg` says what they are. Raises `InputError`.
        """
        from models.pretrained import load

        return load.load_vit(cfg)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a directory that transformers opens as the same kind of encoder."""
        from models.pretrained import save

        save.save_vit(self, directory)

    def push_to_hub(self, repo_id: str, private: bool = True) -> str:
        """Upload what `save_pretrained` writes to user/name; returns its address.

        Raises `InputError`.
        """
        from models.pretrained import hub

        return hub.push_saved(self.save_pretrained, repo_id, private)

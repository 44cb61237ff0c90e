"""Fixtures for tests of checkpoint files: random parameters, edited and damaged directories."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file


@pytest.fixture
def randomise_all():
    """Randomize every parameter: ones, zeros and uniform attention would hide a mapping error."""

    def randomise_all(model: torch.nn.Module) -> torch.nn.Module:
        g = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim < 2 or "position" in name:
                    p.add_(0.3 * torch.randn(p.shape, generator=g))
                else:
                    p.copy_(torch.randn(p.shape, generator=g) * 1.5 * p.shape[-1] ** -0.5)
        return model.eval()

    return randomise_all


@pytest.fixture
def edit_config():
    """`edit_config(folder, **changes)`: set keys of its config.json."""

    def edit_config(folder, **changes) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit_config


@pytest.fixture
def edit_weights():
    """`edit_weights(folder, edit)`: `edit` changes the tensors of model.safetensors in place."""

    def edit_weights(folder, edit) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit_weights


@pytest.fixture
def damage(edit_weights):
    """`damage(folder)`: add, delete and cut a tensor; return the names of the last two."""

    def damage(folder) -> list[str]:
        names = []

        def edit(tensors):
            names.extend(sorted(n for n in tensors if tensors[n].ndim == 1 and ".1." in n)[:2])
            tensors["extra.weight"] = torch.zeros(3)
            del tensors[names[0]]
            tensors[names[1]] = tensors[names[1]][:-1].clone()

        edit_weights(folder, edit)
        return names

    return damage


def masked_attention(q, k, v, from_q, from_k, max_q, max_k, *, window_size, enable_gqa):
    """Replaces torch's `varlen_attn`: the same arguments, [B*T, H, C], but masked attention."""
    assert from_q is from_k and window_size == (-1, 0) and from_q.dtype == torch.int32
    assert enable_gqa or q.shape[1] == k.shape[1]
    at = torch.arange(len(q), device=q.device)
    segment, gap = torch.bucketize(at, from_q, right=True), at[:, None] - at
    mask = (segment[:, None] == segment) & (gap >= 0) & (gap < max_q) & (gap < max_k)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, B*T, C]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)
    return out[0].transpose(0, 1).contiguous()


@pytest.fixture
def masked_varlen(monkeypatch):
    """Use variable-length attention, with masked attention in place of the GPU masked_attention."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", masked_attention)
    from models.ops import packed

    monkeypatch.setattr(packed, "supports_varlen", lambda *_: True)

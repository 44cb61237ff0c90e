"""What tests of foreign and of damaged files share: random parameters, edits of a directory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def shake():
    """Every parameter random: ones, zeros and uniform attention would hide a mapping error."""

    def shake(model: torch.nn.Module) -> torch.nn.Module:
        g = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim < 2 or "position" in name:
                    p.add_(0.3 * torch.randn(p.shape, generator=g))
                else:
                    p.copy_(torch.randn(p.shape, generator=g) * 1.5 * p.shape[-1] ** -0.5)
        return model.eval()

    return shake


@pytest.fixture
def edit_config():
    """`edit_config(folder, **changes)` of its config.json."""

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
    """A leftover, a missing and a misshapen tensor at once; the names of the last two."""

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

"""Low-rank adapters (Hu et al. 2021) on any part: attach, save, merge. peft does the adapting.

A checkpoint of such a run is the merged model, which every loader opens, and beside it `adapter/`:
all that was trained, in peft's own format, under the names of transformers' Idefics3. What it
belongs to is the run's `base/`. Not here: which parameters an optimizer gets (optim.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from config_tools import InputError
from configs import TrainConfig
from models.pretrained.safetensors_io import read_weights, save_tensors
from models.pretrained.save import layout_of
from models.vision_language_model import VisionLanguageModel

FOLDER, BASE, FILE = "adapter", "base", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's, of every name
PLACES = {"vision": "vision_encoder", "projector": "MP", "language": "decoder"}


def attach(model: VisionLanguageModel, cfg: TrainConfig) -> None:
    """Put an adapter on the linear layers that `cfg` names; it changes nothing until trained.

    Raises `InputError` where no layer is named so, or a part would train beside them in full.
    """
    if not cfg.lora:
        return
    loose = [part for part in ("vision", "language") if part not in (*cfg.lora, *cfg.freeze)]
    if loose:
        raise InputError(
            f"train.lora = {cfg.lora}: {loose[0]} would train in full beside the adapters, which "
            f"could then not stand alone; add it there, or to --train.freeze."
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("train.lora: needs the package peft: pip install peft.") from None
    names = targets(model, cfg)
    rank = dict(r=cfg.lora_r, lora_alpha=cfg.lora_alpha)
    inject_adapter_in_model(LoraConfig(**rank, target_modules=names), model)


def targets(model: VisionLanguageModel, cfg: TrainConfig) -> list[str]:
    """Names of the linear layers that get adapters; the head never does."""
    found = []
    for part in cfg.lora:
        of_part = [
            f"{PLACES[part]}.{name}"
            for name, module in model.parts[part].named_modules()
            if isinstance(module, nn.Linear) and name != "head"
        ]
        chosen = [n for n in of_part if not cfg.lora_targets or n.endswith(cfg.lora_targets)]
        if not chosen:
            ends = sorted({name.rpartition(".")[2] for name in of_part})
            raise InputError(
                f"train.lora_targets = {cfg.lora_targets}: none in {part}, which has "
                f"{', '.join(ends)}."
            )
        found += chosen
    return found


def adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer with an adapter."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


@torch.no_grad()
def merged(model: VisionLanguageModel) -> VisionLanguageModel:
    """A plain model that computes the same; untouched tensors are shared, not copied."""
    layers = dict(adapted(model))
    tensors = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if owner in layers and leaf == "weight":
            tensor = tensor + layers[owner].get_delta_weight("default")
        tensors[f"{owner}.{leaf}" if owner else name] = tensor
    return model.assembled(tensors)


def trained(model: VisionLanguageModel) -> dict[str, Tensor]:
    """All tensors that train, under our names: `layer.lora_A.weight`, and what trains in full."""
    return {
        name.replace(".default.", "."): p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def save(model: VisionLanguageModel, cfg: TrainConfig, folder: Path) -> None:
    """`folder/adapter` in peft's format."""
    from peft import LoraConfig

    theirs = {pair.ours[0]: pair.theirs for pair in layout_of(model.cfg)}

    def rename(name: str) -> str:
        layer, lora, rest = name.partition(".lora_")
        return (theirs[f"{layer}.weight"].removesuffix(".weight") + lora + rest) if lora \
            else theirs[name]  # fmt: skip

    out, tensors = folder / FOLDER, trained(model)
    out.mkdir()
    names = [theirs[f"{name}.weight"].removesuffix(".weight") for name, _ in adapted(model)]
    full = [rename(n).removesuffix(".weight") for n in tensors if ".lora_" not in n]
    LoraConfig(
        r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=sorted(names), inference_mode=True,
        modules_to_save=full or None, base_model_name_or_path=str(Path(cfg.out, BASE).absolute()),
    ).save_pretrained(out)  # fmt: skip
    named = {PREFIX + rename(name): t.cpu().contiguous() for name, t in tensors.items()}
    save_tensors(named, out / FILE)


def load(model: VisionLanguageModel, folder: Path) -> None:
    """Fill what trains from `folder/adapter`, every tensor of it; raises `InputError`.

    A run that had no adapters has none to fill: its other settings are compared later.
    """
    if not (folder / FOLDER).is_dir():
        return
    ours = {pair.theirs.removesuffix(".weight"): pair.ours[0].removesuffix(".weight")
            for pair in layout_of(model.cfg)}  # fmt: skip
    found = {}
    for name, tensor in read_weights(folder / FOLDER, FILE).items():
        layer, lora, rest = name.removeprefix(PREFIX).removesuffix(".weight").partition(".lora_")
        found[f"{ours.get(layer)}{lora}{rest}.weight"] = tensor
    wanted = trained(model)
    odd = found.keys() ^ wanted.keys()
    odd |= {name for name in found.keys() & wanted.keys()
            if found[name].shape != wanted[name].shape}  # fmt: skip
    if odd:
        raise InputError(f"{folder / FOLDER}: does not fit this run's adapters, as of {min(odd)}.")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def start_of(folder: Path) -> Path:
    """What a run goes on from at a checkpoint: its weights, or what its adapters belong to."""
    return folder.parent / BASE if (folder / FOLDER).is_dir() else folder


def write(model: VisionLanguageModel, folder: Path, processor, cfg: TrainConfig) -> None:
    """A checkpoint's model: as it is, or merged and with its adapter."""
    if cfg.lora:
        merged(model).save_pretrained(folder, processor)
        save(model, cfg, folder)
    else:
        model.save_pretrained(folder, processor)


def keep_base(model: VisionLanguageModel, processor, cfg: TrainConfig) -> None:
    """Write the model that adapters belong to into the run's folder, whole, before training.

    Fresh adapters add zero, so merging them changes no bit.
    """
    folder, beside = Path(cfg.out, BASE), Path(cfg.out, ".saving-base")
    if cfg.lora:
        shutil.rmtree(folder, ignore_errors=True)
        merged(model).save_pretrained(beside, processor)
        beside.rename(folder)

"""LoRA adapters (Hu et al. 2021) on any part, by peft: attach, save, load, merge.

A checkpoint holds the merged model, which every loader opens, and `adapter/`: all trained tensors
in peft's format, under the names of transformers' Idefics3. The model they apply to is in the run's
`base/`. Not here: which parameters an optimizer gets (optim.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config_tools import InputError, import_optional
from configs import TrainConfig
from models.pretrained.load import load_tensors
from models.pretrained.safetensors_io import read_weights, save_tensors
from models.pretrained.save import checkpoint_pairs
from models.vision_language_model import VisionLanguageModel

FOLDER, BASE, FILE = "adapter", "base", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft puts it before every tensor name
MODULES = {"vision": "vision_encoder", "projector": "MP", "language": "decoder"}


def attach_adapters(model: VisionLanguageModel, cfg: TrainConfig) -> None:
    """Add an adapter to the linear layers that `cfg` selects; its output is 0 until trained.

    Raises `InputError` if no layer matches, if another part would train in full, or without peft.
    """
    if not cfg.lora:
        return
    unfrozen = [part for part in ("vision", "language") if part not in (*cfg.lora, *cfg.freeze)]
    if unfrozen:
        raise InputError(
            f"train.lora = {cfg.lora}: {unfrozen[0]} would train in full, and its weights are not "
            f"part of the adapter; add it to --train.lora or to --train.freeze."
        )
    peft = import_optional("peft", "train.lora:")
    names = target_modules(model, cfg)
    config = peft.LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=names)
    peft.inject_adapter_in_model(config, model)


def target_modules(model: VisionLanguageModel, cfg: TrainConfig) -> list[str]:
    """Names of the linear layers that get adapters; never the head."""
    found = []
    for part in cfg.lora:
        layers = model.parts[part].named_modules()
        linear = [name for name, m in layers if isinstance(m, nn.Linear) and name != "head"]
        of_part = [f"{MODULES[part]}.{name}" for name in linear]
        chosen = [n for n in of_part if not cfg.lora_targets or n.endswith(cfg.lora_targets)]
        if not chosen:
            ends = sorted({name.rpartition(".")[2] for name in of_part})
            reason = f"no linear layer in {part} matches; it has {', '.join(ends)}"
            raise InputError(f"train.lora_targets = {cfg.lora_targets}: {reason}.")
        found += chosen
    return found


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Every layer with an adapter, by name."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


@torch.no_grad()
def merge(model: VisionLanguageModel) -> VisionLanguageModel:
    """Merge the adapters into a new model; tensors without adapters are shared, not copied."""
    layers, tensors = adapter_layers(model), {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if owner in layers and leaf == "weight":
            tensor = tensor + layers[owner].get_delta_weight("default")
        tensors[f"{owner}.{leaf}" if owner else name] = tensor
    return load_tensors(type(model), model.cfg, tensors).train(model.training)


def trainable_tensors(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Trainable tensors by their names in picoVLM, for example `layer.lora_A.weight`."""
    trainable = ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)
    return {name.replace(".default.", "."): p for name, p in trainable}


def save_adapter(model: VisionLanguageModel, cfg: TrainConfig, folder: Path) -> None:
    """Write `folder/adapter` in peft's format."""
    peft = import_optional("peft", "train.lora:")
    hf_names = {pair.params[0]: pair.key for pair in checkpoint_pairs(model.cfg)}

    def rename_layer(name: str) -> str:
        return hf_names[f"{name}.weight"].removesuffix(".weight")

    def rename(name: str) -> str:
        layer, lora, rest = name.partition(".lora_")
        return rename_layer(layer) + lora + rest if lora else hf_names[name]

    out, tensors = folder / FOLDER, trainable_tensors(model)
    out.mkdir()
    names = [rename_layer(name) for name in adapter_layers(model)]
    full = [rename(n).removesuffix(".weight") for n in tensors if ".lora_" not in n]
    peft.LoraConfig(
        r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=sorted(names), inference_mode=True,
        modules_to_save=full or None, base_model_name_or_path=str(Path(cfg.out, BASE).absolute()),
    ).save_pretrained(out)  # fmt: skip
    named = {PREFIX + rename(name): t.cpu().contiguous() for name, t in tensors.items()}
    save_tensors(named, out / FILE)


def load_adapter(model: VisionLanguageModel, folder: Path) -> None:
    """Load `folder/adapter`, if it exists, into the tensors that train; raises `InputError`."""
    if not (folder / FOLDER).is_dir():
        return
    own_names = {pair.key.removesuffix(".weight"): pair.params[0].removesuffix(".weight")
                 for pair in checkpoint_pairs(model.cfg)}  # fmt: skip
    saved = {}
    for name, tensor in read_weights(folder / FOLDER, FILE).items():
        layer, lora, rest = name.removeprefix(PREFIX).removesuffix(".weight").partition(".lora_")
        saved[f"{own_names.get(layer)}{lora}{rest}.weight"] = tensor
    trainable = trainable_tensors(model)
    shapes, now = ({name: t.shape for name, t in x.items()} for x in (saved, trainable))
    mismatched = {name for name in shapes | now if shapes.get(name) != now.get(name)}
    if mismatched:
        reason = f"tensor {min(mismatched)} does not match the adapters of this run"
        raise InputError(f"{folder / FOLDER}: {reason}; keep the --train.lora settings.")
    with torch.no_grad():
        for name, tensor in trainable.items():
            tensor.copy_(saved[name])


def initial_weights(folder: Path) -> Path:
    """The model to load before resuming: the checkpoint, or with adapters the base model."""
    return folder.parent / BASE if (folder / FOLDER).is_dir() else folder


def save_model(model: VisionLanguageModel, folder: Path, processor, cfg: TrainConfig) -> None:
    """Write the model into a checkpoint folder; with adapters, the merged model and the adapter."""
    if cfg.lora:
        merge(model).save_pretrained(folder, processor)
        save_adapter(model, cfg, folder)
    else:
        model.save_pretrained(folder, processor)


def save_base(model: VisionLanguageModel, processor, cfg: TrainConfig) -> None:
    """Before training with adapters, write the base model into the run folder.

    Merging new adapters adds zero, so the base weights are unchanged.
    """
    folder, temporary = Path(cfg.out, BASE), Path(cfg.out, ".saving-base")
    if cfg.lora:
        shutil.rmtree(folder, ignore_errors=True)
        merge(model).save_pretrained(temporary, processor)
        temporary.rename(folder)

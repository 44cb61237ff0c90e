"""Models -> checkpoint directories in the Idefics3 format, nanoVLM's, or a backbone's own."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from config_tools import InputError, to_dict
from configs import LMConfig, ViTConfig, VLMConfig
from models.language_model import LanguageModel
from models.ops.init import on_meta_device
from models.ops.rope import rope_frequencies
from models.pretrained.layouts import idefics3, nanovlm
from models.pretrained.load import (
    FAMILIES,
    HEAD,
    _pairs,
    _part,
    own_pairs,
)
from models.pretrained.mapping import (
    Family,
    Pair,
    to_theirs,
)
from models.pretrained.safetensors_io import (
    IMAGES,
    OWN_KEY,
    tensors_and_dtype,
    write,
    write_json,
)
from models.vision_language_model import VisionLanguageModel
from models.vision_transformer import ViT


def unsupported_reason(cfg: VLMConfig) -> str:
    """Why a checkpoint of this model is not an Idefics3 directory, in words; "" when it is."""
    return idefics3.unsupported_reason(cfg)


def layout_of(cfg: VLMConfig) -> list[Pair]:
    """Our names and those on disk: Idefics3's where it has a place for everything."""
    model = None
    if idefics3.unsupported_reason(cfg):
        with on_meta_device():
            model = VisionLanguageModel(cfg)
    return idefics3.pairs(cfg) if model is None else own_pairs(model)


def save_vlm(model: VisionLanguageModel, directory: str | Path) -> None:
    """Write weights, config.json and generation_config.json: an Idefics3 directory.

    Our config stands under its own key. An architecture Idefics3 has no place for is written under
    model_type picovlm with our tensor names.
    """
    directory, cfg = Path(directory), model.cfg
    tensors, dtype = tensors_and_dtype(model)
    if idefics3.unsupported_reason(cfg):
        config = {"model_type": OWN_KEY, "torch_dtype": dtype}
    else:
        tensors = to_theirs(tensors, idefics3.pairs(cfg))
        config = idefics3.config_json(cfg, dtype)
    write(directory, tensors, config | {OWN_KEY: to_dict(cfg)})
    ids = {
        "pad_token_id": cfg.vlm_pad_token_id,
        "bos_token_id": cfg.vlm_bos_token_id,
        "eos_token_id": [cfg.vlm_eos_token_id],
    }
    write_json(directory / "generation_config.json", ids)


def save_nanovlm(model: VisionLanguageModel, directory: str | Path, tokenizer: str = "") -> None:
    """Write what nanoVLM's own from_pretrained opens; raises `InputError` where it has no place.

    `tokenizer`: where it will find one, by default what our config names.
    """
    cfg = model.cfg
    reason = idefics3.unsupported_reason(cfg) or nanovlm.unsupported_reason(cfg)
    if reason:
        raise InputError(f"this model cannot be written for nanoVLM: it has no place for {reason}.")
    tensors, _ = tensors_and_dtype(model)
    tensors = to_theirs(nanovlm.unfold(tensors), nanovlm.pairs(cfg))
    if cfg.lm_tie_weights:
        del tensors[nanovlm.EMBEDDING]  # as its save_model does, and its load_model wants
    tensors[nanovlm.INV_FREQ] = rope_frequencies(cfg)
    config = nanovlm.write(cfg) | {"lm_tokenizer": tokenizer or cfg.lm_tokenizer}
    write(Path(directory), tensors, config)


def save_vit(model: ViT, directory: str | Path) -> None:
    """Write weights, config.json and the image settings, as transformers' own classes do."""
    cfg = ViTConfig(**_part(ViTConfig, model.cfg))
    n = 1 if cfg.vit_n_channels == 1 else 3
    mean, std = list(cfg.vit_image_mean[:n]), list(cfg.vit_image_std[:n])
    size = {"height": cfg.vit_img_size, "width": cfg.vit_img_size}
    _write_backbone(model, cfg, Path(directory))
    write_json(
        Path(directory) / IMAGES,
        {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": size,
         "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
         "image_mean": mean, "image_std": std},
    )  # fmt: skip


def save_lm(model: LanguageModel, directory: str | Path) -> None:
    """Write weights and config.json of a ...ForCausalLM; a tied head is left out, as it does."""
    _write_backbone(model, LMConfig(**_part(LMConfig, model.cfg)), Path(directory))


def _family_of(model: nn.Module) -> Family | None:
    """The layout a model is written in; None where no family has a place for all of it."""
    cfg = model.cfg
    return next((f for f in FAMILIES[type(model)] if not f.misfit(cfg)), None)


def reader_of(model: nn.Module) -> str:
    """The class of transformers that opens what is written of a model; "" where there is none."""
    family = _family_of(model)
    return family.write(model.cfg)["architectures"][0] if family else ""


def _write_backbone(model: nn.Module, cfg, directory: Path) -> None:
    tensors, dtype = tensors_and_dtype(model)
    family = _family_of(model)
    if getattr(cfg, "lm_tie_weights", False):
        del tensors[HEAD]
    if family is None:
        config = {"model_type": f"{OWN_KEY}_{type(model).__name__}", OWN_KEY: to_dict(cfg)}
    else:
        config = family.write(cfg)
        tensors = to_theirs(tensors, _pairs(family, model, family.prefixes[0]))
    write(directory, tensors, config | {"torch_dtype": dtype})

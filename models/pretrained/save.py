"""Save models in Idefics3 format, in nanoVLM's, or in transformers' format of a backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from config_tools import InputError, to_dict
from configs import LMConfig, ViTConfig, VLMConfig
from models.classifier import Classifier
from models.language_model import LanguageModel
from models.ops.init import on_meta_device
from models.ops.rope import rope_frequencies
from models.pretrained.layouts import idefics3, nanovlm
from models.pretrained.load import HEAD, LAYOUTS, backbone_pairs, own_pairs, sub_config
from models.pretrained.mapping import Layout, Pair, export_tensors
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
    """The first field that Idefics3 format does not support, "field = value"; "" if none."""
    return idefics3.unsupported_reason(cfg)


def checkpoint_pairs(cfg: VLMConfig) -> list[Pair]:
    """Parameter names and keys of a checkpoint: Idefics3's if it supports `cfg`, else our own."""
    if not idefics3.unsupported_reason(cfg):
        return idefics3.pairs(cfg)
    with on_meta_device():
        return own_pairs(VisionLanguageModel(cfg))


def save_vlm(model: VisionLanguageModel, directory: str | Path) -> None:
    """Write weights, config.json and generation_config.json in Idefics3 format.

    picoVLM's config is stored under the key "picovlm". A config that Idefics3 does not support gets
    model_type "picovlm" and picoVLM's parameter names.
    """
    directory, cfg = Path(directory), model.cfg
    tensors, dtype = tensors_and_dtype(model)
    if idefics3.unsupported_reason(cfg):
        config = {"model_type": OWN_KEY, "torch_dtype": dtype}
    else:
        config = idefics3.write(cfg, dtype)
    tensors = export_tensors(tensors, checkpoint_pairs(cfg))
    write(directory, tensors, config | {OWN_KEY: to_dict(cfg)})
    ids = {
        "pad_token_id": cfg.vlm_pad_token_id,
        "bos_token_id": cfg.vlm_bos_token_id,
        "eos_token_id": [cfg.vlm_eos_token_id],
    }
    write_json(directory / "generation_config.json", ids)


def save_nanovlm(model: VisionLanguageModel, directory: str | Path, tokenizer: str = "") -> None:
    """Write files for nanoVLM's from_pretrained. Raises `InputError` for unsupported fields.

    `tokenizer` is the path or Hub id of nanoVLM's tokenizer, by default that of the config.
    """
    cfg = model.cfg
    reason = idefics3.unsupported_reason(cfg) or nanovlm.unsupported_reason(cfg)
    if reason:
        raise InputError(
            f"nanoVLM does not support {reason}; use save_pretrained, or --to transformers."
        )
    tensors, _ = tensors_and_dtype(model)
    tensors = export_tensors(nanovlm.unfold(tensors), nanovlm.pairs(cfg))
    if cfg.lm_tie_weights:
        del tensors[nanovlm.EMBEDDING]  # nanoVLM stores a tied pair once, as the head
    tensors[nanovlm.INV_FREQ] = rope_frequencies(cfg)
    config = nanovlm.write(cfg) | {"lm_tokenizer": tokenizer or cfg.lm_tokenizer}
    write(Path(directory), tensors, config)


def save_vit(model: ViT, directory: str | Path) -> None:
    """Write weights, config.json and image settings as transformers does."""
    cfg = sub_config(ViTConfig, model.cfg)
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
    """Write weights and config.json as transformers' ...ForCausalLM, without a tied head."""
    _write_backbone(model, sub_config(LMConfig, model.cfg), Path(directory))


def save_classifier(model: Classifier, directory: str | Path) -> None:
    """Save the ViT, which includes the classifier head."""
    save_vit(model.vit, directory)


SAVERS: dict[type, Callable[[Any, str | Path], None]] = {
    VisionLanguageModel: save_vlm,
    ViT: save_vit,
    LanguageModel: save_lm,
    Classifier: save_classifier,
}


def save_pretrained(model: Any, directory: str | Path) -> None:
    """Implements `model.save_pretrained` (mixin.py), without a processor's files."""
    save = next(save for base, save in SAVERS.items() if isinstance(model, base))
    save(model, directory)


def _layout_of(model: ViT | LanguageModel) -> Layout | None:
    """The layout in which a backbone is written; None if no layout supports its config."""
    layouts = LAYOUTS[type(model)]
    return next((each for each in layouts if not each.unsupported_reason(model.cfg)), None)


def transformers_class(model: ViT | LanguageModel) -> str:
    """The transformers class that loads a saved backbone; "" if there is none."""
    layout = _layout_of(model)
    return layout.write(model.cfg)["architectures"][0] if layout else ""


def _write_backbone(model: ViT | LanguageModel, cfg: ViTConfig | LMConfig, directory: Path) -> None:
    tensors, dtype = tensors_and_dtype(model)
    layout = _layout_of(model)
    if getattr(cfg, "lm_tie_weights", False):
        del tensors[HEAD]
    if layout is None:
        config = {"model_type": f"{OWN_KEY}_{type(model).__name__}", OWN_KEY: to_dict(cfg)}
    else:
        config = layout.write(cfg)
    pairs = backbone_pairs(layout, model, layout.prefixes[0] if layout else "")
    write(directory, export_tensors(tensors, pairs), config | {"torch_dtype": dtype})

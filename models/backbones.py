"""Encoders and decoders on their own: other people's weights in, ours out in their layout.

Not here: names (models/pretrained), files (checkpoint_files.py), whole models.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import replace
from pathlib import Path

from torch import nn

from configs import (
    LMConfig,
    ViTConfig,
    VLMConfig,
    by_step,
    from_dict,
    read_json,
    require,
    to_dict,
)
from models.checkpoint_files import (
    CONFIG,
    EMBEDDING,
    HEAD,
    IMAGES,
    OWN_KEY,
    fill,
    is_whole,
    load_vlm,
    outline,
    own_names,
    read_config,
    read_weights,
    state_of,
    tie,
    understand,
    write,
    write_json,
)
from models.hub import find
from models.language_model import LanguageModel
from models.pretrained import clip, dinov2, llama, siglip, vit
from models.pretrained.engine import (
    Family,
    Pair,
    extend_rows,
    pairs_of,
    prefix_of,
    resample_positions,
    to_ours,
    to_theirs,
)
from models.vision_transformer import ViT, init_weights, new_head

FAMILIES: dict[type, tuple[Family, ...]] = {
    ViT: (siglip.FAMILY, siglip.FAMILY_CLASSIFIER, clip.FAMILY, vit.FAMILY, dinov2.FAMILY,
          dinov2.FAMILY_SWIGLU),
    LanguageModel: (llama.FAMILY,),
}  # fmt: skip
POSITION = "patch_embedding.position_embedding"


def say(sentence: str) -> None:
    """What the user should know, beside the program's output."""
    print(sentence, file=sys.stderr)


def _part(cls: type, cfg) -> dict:
    """The fields of one part of a whole config."""
    return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cls)}


def _read_backbone(cls: type, config_cls: type, directory: Path, **fields) -> tuple:
    """(our config of exactly what a directory describes, its tensors in fp32 under our names).

    `fields` are what its config.json does not say. Raises `InputError`.
    """
    config, where = read_config(directory), str(directory / CONFIG)
    kind, families = config.get("model_type"), FAMILIES[cls]
    same = [family for family in families if kind in family.model_types]
    if kind == f"{OWN_KEY}_{cls.__name__}":
        source, family = from_dict(config_cls, config.get(OWN_KEY), where), None
    else:
        known = dict.fromkeys(name for family in families for name in family.model_types)
        require(same, f"{where}: model_type", kind, f"must be one of {', '.join(known)}")
        read = same[0].read
        source = understand(config_cls, lambda: read(config, where) | fields, where)
        misfits = [family.misfit(source) for family in same]
        require("" in misfits, f"{where}: model_type", kind, f"has no place for {misfits[0]}")
        family = same[misfits.index("")]
    found = read_weights(directory)
    model = outline(cls, source, len(found), where)
    pairs = _pairs(family, model, prefix_of(found, family) if family else "")
    if getattr(source, "lm_tie_weights", False):
        tie(found, pairs, str(directory))
    ignore = family.ignore if family else ()
    tensors = to_ours(found, pairs, model.state_dict(), ignore, str(directory))
    return source, {name: tensor.float() for name, tensor in tensors.items()}


def _pairs(family: Family | None, model: nn.Module, prefix: str) -> list[Pair]:
    if family is None:
        return own_names(model)
    return pairs_of(family, len(model.blocks), prefix)


def _image_statistics(directory: Path) -> dict:
    """Mean and deviation of preprocessor_config.json; nothing where it says nothing."""
    images = read_json(directory / IMAGES) if (directory / IMAGES).is_file() else {}
    images = images.get("image_processor", images)
    pair = {"vit_image_mean": images.get("image_mean"), "vit_image_std": images.get("image_std")}
    # One channel has one number; our fields are three.
    return {k: v * 3 if len(v) == 1 else v for k, v in pair.items() if isinstance(v, list)}


def newest(directory: Path) -> Path:
    """Of a run folder its newest checkpoint; any other directory as it is."""
    return max(directory.glob("step-*"), key=by_step, default=directory)


def _read_vit(name: str, pool: str) -> tuple[ViTConfig, dict]:
    """(its config, its tensors) of an encoder, of a classifier, or of a whole model's eyes."""
    directory = newest(find(name))
    if is_whole(read_config(directory)):
        eyes = load_vlm(directory).vision_encoder.float()
        source, tensors = ViTConfig(**_part(ViTConfig, eyes.cfg)), eyes.state_dict()
    else:
        fields = _image_statistics(directory) | ({"vit_pool": "map"} if pool == "map" else {})
        source, tensors = _read_backbone(ViT, ViTConfig, directory, **fields)
    has_map = pool != "map" or "map_pool.probe" in tensors
    require(has_map, "vit_pool", pool, f"{name} has no such pool, only cls or mean fit")
    return source, tensors


def _pooled(tensors: dict, cfg: ViTConfig) -> dict:
    """The tensors without a map pool that `cfg` does not ask for."""
    is_map = cfg.vit_pooling == "map"
    return {name: t for name, t in tensors.items() if is_map or not name.startswith("map_pool.")}


def _head(cfg: ViTConfig, source: ViTConfig) -> dict:
    """The fields of the classifier that `cfg` asks for; the source's where it does not."""
    names = ("vit_n_classes", "vit_labels", "vit_head")
    if isinstance(cfg, VLMConfig):
        return dict(zip(names, (0, (), cfg.vit_head)))
    is_same = cfg.vit_n_classes == source.vit_n_classes and not cfg.vit_labels
    asked = cfg if cfg.vit_n_classes and not is_same else source
    return {name: getattr(asked, name) for name in names}


def open_vit(name: str, pool: str = "auto") -> ViT:
    """An encoder as it is, with its own size and classifier, pooled as `pool` says.

    `name` is a directory, ours or one of transformers, a run folder, a Hub id, or a whole
    vision-language model of which these are the eyes. Raises `InputError`.
    """
    source, tensors = _read_vit(name, pool)
    new = source if pool == "auto" else replace(source, vit_pool=pool)
    return fill(ViT, new, _pooled(tensors, new))


def load_vit(cfg: ViTConfig) -> ViT:
    """The encoder `cfg.vit_model_type` names, at `cfg.vit_img_size`; raises `InputError`.

    Positions of another grid are resampled, and that is said. A classifier is kept outside a VLM,
    unless `cfg` wants other classes or another head.
    """
    source, tensors = _read_vit(cfg.vit_model_type, cfg.vit_pool)
    head, is_vlm = _head(cfg, source), isinstance(cfg, VLMConfig)
    pool = source.vit_pool if cfg.vit_pool == "auto" and not is_vlm else cfg.vit_pool
    kept = ("vit_img_size", "vit_dropout", "vit_drop_path", "vit_model_type")
    sizes = {name: v for name, v in _part(ViTConfig, source).items() if name not in kept}
    new = replace(cfg, **sizes | head | {"vit_pool": pool})
    tensors = _pooled(tensors, new)
    if head != {name: getattr(source, name) for name in head}:
        fresh = new_head(new)
        init_weights(fresh, n_residual=1)
        tensors = {name: t for name, t in tensors.items() if not name.startswith("head.")}
        tensors |= {f"head.{name}": t.detach() for name, t in fresh.named_parameters()}
        if new.vit_n_classes:
            say(f"{cfg.vit_model_type}: a fresh classifier of {new.vit_n_classes} classes.")
    if new.vit_grid != source.vit_grid:
        say(
            f"{cfg.vit_model_type}: positions of {source.vit_grid} x {source.vit_grid} patches "
            f"resampled (bicubic) to {new.vit_grid} x {new.vit_grid}, as vit_img_size = "
            f"{new.vit_img_size}."
        )
        n_prefix, antialias = int(new.vit_cls_flag), new.vit_n_registers > 0
        table = resample_positions(tensors[POSITION], n_prefix, new.vit_grid, antialias)
        tensors[POSITION] = table
    return fill(ViT, new, tensors)


def load_lm(cfg: LMConfig) -> LanguageModel:
    """The decoder `cfg.lm_model_type` names; raises `InputError`.

    Its vocabulary is at least `cfg.lm_vocab_size`: new rows start at the mean of the old ones.
    """
    source, tensors = _read_backbone(LanguageModel, LMConfig, find(cfg.lm_model_type))
    kept = ("lm_dropout", "lm_model_type", "lm_tokenizer")
    sizes = {name: v for name, v in _part(LMConfig, source).items() if name not in kept}
    n = max(cfg.lm_vocab_size, source.lm_vocab_size)
    new = replace(cfg, **sizes | {"lm_vocab_size": n})
    for name in (EMBEDDING, HEAD):
        tensors[name] = extend_rows(tensors[name], n)
    return fill(LanguageModel, new, tensors)


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
    tensors, dtype = state_of(model)
    family = _family_of(model)
    if getattr(cfg, "lm_tie_weights", False):
        del tensors[HEAD]
    if family is None:
        config = {"model_type": f"{OWN_KEY}_{type(model).__name__}", OWN_KEY: to_dict(cfg)}
    else:
        config = family.write(cfg)
        tensors = to_theirs(tensors, _pairs(family, model, family.prefixes[0]))
    write(directory, tensors, config | {"torch_dtype": dtype})

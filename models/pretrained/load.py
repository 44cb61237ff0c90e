"""Checkpoints and backbones -> models: every key and tensor is checked.

Not here: names (layouts/), files (safetensors_io.py), the state of a training run (engine/training/checkpoint.py).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from config_tools import InputError, by_step, from_dict, read_json, require
from configs import LMConfig, ViTConfig, VLMConfig
from models.language_model import LanguageModel
from models.ops.init import init_weights, on_meta_device
from models.pretrained.hub import find
from models.pretrained.layouts import clip, dinov2, idefics3, llama, nanovlm, siglip, vit
from models.pretrained.mapping import (
    SAME,
    Family,
    Pair,
    extend_rows,
    pairs_of,
    prefix_of,
    resample_positions,
    to_ours,
)
from models.pretrained.safetensors_io import (
    CONFIG,
    IMAGES,
    OWN_KEY,
    TOKENS,
    read_config,
    read_weights,
)
from models.vision_language_model import VisionLanguageModel
from models.vision_transformer import ViT, build_head

EMBEDDING, HEAD = "token_embedding.weight", "head.weight"


def build_on_meta(cls: type, cfg, n_tensors: int, where: str) -> nn.Module:
    """A model without storage, whose names and shapes a file is held against."""
    blocks = max(getattr(cfg, name, 0) for name in ("vit_n_blocks", "lm_n_blocks"))
    require(blocks <= n_tensors, f"{where}: blocks", blocks, f"the file has {n_tensors} tensors")
    try:
        with on_meta_device():
            return cls(cfg)
    except (RuntimeError, TypeError) as error:  # sizes that no machine can count
        reason = str(error).splitlines()[0]
        raise InputError(f"{where}: no model has such sizes ({reason}).") from None


def load_tensors(cls: type, cfg, tensors: dict[str, Tensor]) -> nn.Module:
    """A model of these tensors; a tied head shares its storage with the embedding."""
    with on_meta_device():
        model = cls(cfg)
    model.load_state_dict(tensors, assign=True)
    for part in model.modules():
        if isinstance(part, LanguageModel) and cfg.lm_tie_weights:
            part.head.weight = part.token_embedding.weight
    return model.requires_grad_(True).eval()


def own_pairs(model: nn.Module) -> list[Pair]:
    """The layout that is our own: every tensor under its name."""
    return [Pair((name,), name, SAME) for name in model.state_dict()]


def parse_config(cls: type, read: Callable[[], dict], where: str):
    """What `read` makes of somebody's config.json; raises `InputError` on one without sense."""
    try:
        return from_dict(cls, read(), where)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise InputError(f"{where}: not the config of such a model ({error!r}).") from None


def resolve_tied(
    found: dict[str, Tensor], pairs: list[Pair], where: str, strict: bool = False
) -> None:
    """Complete a tied pair of which a file holds one; raises `InputError` where two differ.

    `strict`: both must be there, as in our own files, so that no reader has to guess.
    """
    names = {name.removeprefix("decoder."): p.theirs for p in pairs for name in p.ours}
    one, other = names[EMBEDDING], names[HEAD]
    if one in found and other in found:
        equal = found[one].shape == found[other].shape and torch.equal(found[one], found[other])
        fix = "but the file's embedding and head differ"
        require(equal, f"{where}: lm_tie_weights", True, fix)
    if not strict:
        both = found.get(one, found.get(other))
        found |= {} if both is None else {one: both, other: both}


def is_whole(config: dict) -> bool:
    """Whether a config.json is that of a whole vision-language model."""
    return config.get("model_type") in (*idefics3.MODEL_TYPES, OWN_KEY) or nanovlm.is_one(config)


def load_vlm(source: str | Path, revision: str | None = None) -> VisionLanguageModel:
    """Our own checkpoints, published Idefics3 and SmolVLM, nanoVLM's: every tensor is checked.

    `source` is a directory or Hub id. Raises `InputError`.
    """
    directory = find(source, revision)
    config, where = read_config(directory), str(directory / CONFIG)
    kind, is_nano = config.get("model_type"), nanovlm.is_one(config)
    # Of one that we wrote, with our tokenizer: the tokens are where they were.
    ours = idefics3.special_ids(_added_tokens(directory)) if is_nano else {}
    if OWN_KEY in config:
        fix = "must be idefics3 or picovlm"
        require(kind in ("idefics3", OWN_KEY), f"{where}: model_type", kind, fix)
        cfg = from_dict(VLMConfig, config[OWN_KEY], where)
    elif kind in idefics3.MODEL_TYPES:
        cfg = parse_config(VLMConfig, lambda: _read_idefics3(directory, config), where)
    elif is_nano:
        same = {"lm_vocab_size": config["lm_vocab_size"], **ours} if ours else {}
        cfg = parse_config(VLMConfig, lambda: nanovlm.read(config, where) | same, where)
    else:
        raise InputError(
            f"{where}: model_type = {kind!r} and no {OWN_KEY!r} key: neither a picoVLM checkpoint "
            "nor an Idefics3, SmolVLM or nanoVLM one."
        )
    found = read_weights(directory)
    model = build_on_meta(VisionLanguageModel, cfg, len(found), where)
    layout = nanovlm if is_nano else idefics3
    pairs = own_pairs(model) if kind == OWN_KEY else layout.pairs(cfg)
    if is_nano and not ours:
        heads = [name for name in (nanovlm.EMBEDDING, nanovlm.HEAD) if name in found]
        found |= {name: nanovlm.swap_tokens(found[name], config) for name in heads}
    if cfg.lm_tie_weights:
        resolve_tied(found, pairs, str(directory), strict=OWN_KEY in config)
    tensors = to_ours(found, pairs, model.state_dict(), layout.IGNORE, str(directory))
    return load_tensors(VisionLanguageModel, cfg, nanovlm.fold(tensors) if is_nano else tensors)


def _read_idefics3(directory: Path, config: dict) -> dict:
    """Sizes from config.json, how pictures are cut and which tokens mean what from beside it."""
    newer = directory / "processor_config.json"  # transformers 5 writes this one alone
    is_newer = newer.is_file() and not (directory / IMAGES).is_file()
    images = read_json(newer if is_newer else directory / IMAGES)
    images = images.get("image_processor", images)
    return idefics3.read(config, images, _added_tokens(directory), str(directory))


def _added_tokens(directory: Path) -> dict[str, int]:
    """The tokens beside a tokenizer's own words; none where there is no tokenizer."""
    if not (directory / TOKENS).is_file():
        return {}
    added = read_json(directory / TOKENS).get("added_tokens", [])
    return {token["content"]: token["id"] for token in added}


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
        source = parse_config(config_cls, lambda: read(config, where) | fields, where)
        misfits = [family.misfit(source) for family in same]
        require("" in misfits, f"{where}: model_type", kind, f"has no place for {misfits[0]}")
        family = same[misfits.index("")]
    found = read_weights(directory)
    model = build_on_meta(cls, source, len(found), where)
    pairs = _pairs(family, model, prefix_of(found, family) if family else "")
    if getattr(source, "lm_tie_weights", False):
        resolve_tied(found, pairs, str(directory))
    ignore = family.ignore if family else ()
    tensors = to_ours(found, pairs, model.state_dict(), ignore, str(directory))
    return source, {name: tensor.float() for name, tensor in tensors.items()}


def _pairs(family: Family | None, model: nn.Module, prefix: str) -> list[Pair]:
    if family is None:
        return own_pairs(model)
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
    return load_tensors(ViT, new, _pooled(tensors, new))


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
        fresh = build_head(new)
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
    return load_tensors(ViT, new, tensors)


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
    return load_tensors(LanguageModel, new, tensors)

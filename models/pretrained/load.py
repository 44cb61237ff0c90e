"""Load checkpoints and backbones; every config field and every tensor is checked.

Not here: names and shapes (layouts/), files (safetensors_io.py), the state of a training run
(engine/training/checkpoint.py).
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from config_tools import HUB_ID, InputError, from_dict, newest_checkpoint, read_json, require
from configs import LMConfig, ViTConfig, VLMConfig
from models.classifier import Classifier
from models.language_model import LanguageModel
from models.ops.init import init_weights, on_meta_device
from models.pretrained.hub import find
from models.pretrained.layouts import clip, dinov2, idefics3, llama, nanovlm, siglip, vit
from models.pretrained.mapping import (
    SAME,
    Layout,
    Pair,
    extend_rows,
    import_tensors,
    layout_pairs,
    prefix_of,
    resample_positions,
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

LAYOUTS: dict[type, tuple[Layout, ...]] = {
    ViT: (siglip.LAYOUT, siglip.LAYOUT_CLASSIFIER, clip.LAYOUT, vit.LAYOUT, dinov2.LAYOUT,
          dinov2.LAYOUT_SWIGLU),
    LanguageModel: (llama.LAYOUT,),
}  # fmt: skip
EMBEDDING, HEAD = "token_embedding.weight", "head.weight"
POSITION = "patch_embedding.position_embedding"
Model = TypeVar("Model", bound=nn.Module)


# --- Tensors -> a model -------------------------------------------------------------------------


def build_on_meta(cls: type[Model], cfg: Any, n_tensors: int, where: str) -> Model:
    """A model without storage, whose names and shapes a file's tensors must match.

    Raises `InputError` if the sizes cannot be built.
    """
    blocks = max(getattr(cfg, name, 0) for name in ("vit_n_blocks", "lm_n_blocks"))
    require(
        blocks <= n_tensors, f"{where}: blocks", blocks, f"exceed the file's {n_tensors} tensors"
    )
    try:
        with on_meta_device():
            return cls(cfg)
    except (RuntimeError, TypeError) as error:  # a size overflowed in torch
        reason = str(error).splitlines()[0]
        raise InputError(f"{where}: a model of these sizes cannot be built ({reason}).") from None


def load_tensors(cls: type[Model], cfg: Any, tensors: dict[str, Tensor]) -> Model:
    """A model of `cfg` in evaluation mode that holds `tensors` without copying them.

    A tied head shares its storage with the embedding.
    """
    with on_meta_device():
        model = cls(cfg)
    model.load_state_dict(tensors, assign=True)
    for part in model.modules():
        if isinstance(part, LanguageModel) and cfg.lm_tie_weights:
            part.head.weight = part.token_embedding.weight
    return model.requires_grad_(True).eval()


def own_pairs(model: nn.Module) -> list[Pair]:
    """picoVLM's own layout: every tensor under its parameter name."""
    return [Pair((name,), name, SAME) for name in model.state_dict()]


def parse_config(cls: type, read: Callable[[], dict], where: str) -> Any:
    """A config from the fields that `read` returns for a config.json; raises `InputError`."""
    try:
        return from_dict(cls, read(), where)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise InputError(f"{where}: not a valid config of this model type ({error!r}).") from None


def sub_config(cls: type, cfg: Any) -> Any:
    """The fields of a whole model's config that belong to `cls`."""
    return cls(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(cls)})


def resolve_tied(
    found: dict[str, Tensor], pairs: list[Pair], where: str, strict: bool = False
) -> None:
    """Add the embedding or head that a file of tied weights leaves out.

    With `strict`, nothing is added: picoVLM's own files must hold both. Raises `InputError` if the
    two differ.
    """
    keys = {name.removeprefix("decoder."): pair.key for pair in pairs for name in pair.params}
    one, other = keys[EMBEDDING], keys[HEAD]
    if one in found and other in found:
        equal = found[one].shape == found[other].shape and torch.equal(found[one], found[other])
        fix = "must be False, because the file's embedding and head differ"
        require(equal, f"{where}: lm_tie_weights", True, fix)
    if not strict:
        both = found.get(one, found.get(other))
        found |= {} if both is None else {one: both, other: both}


def _match(
    found: dict[str, Tensor],
    model: nn.Module,
    pairs: list[Pair],
    ignore: tuple[str, ...],
    directory: Path,
    strict: bool = False,
) -> dict[str, Tensor]:
    """A file's tensors by parameter name, exactly those of `model`; raises `InputError`."""
    if getattr(model.cfg, "lm_tie_weights", False):
        resolve_tied(found, pairs, str(directory), strict)
    return import_tensors(found, pairs, model.state_dict(), ignore, str(directory))


# --- A whole model ------------------------------------------------------------------------------


def is_whole(config: dict) -> bool:
    """Whether a config.json describes a whole vision-language model."""
    own = (*idefics3.MODEL_TYPES, OWN_KEY)
    return config.get("model_type") in own or nanovlm.is_config(config)


def load_vlm(source: str | Path, revision: str | None = None) -> VisionLanguageModel:
    """A picoVLM, Idefics3, SmolVLM or nanoVLM checkpoint, from a directory or Hub id.

    Raises `InputError`.
    """
    directory = find(source, revision)
    config, where = read_config(directory), str(directory / CONFIG)
    kind, is_nano = config.get("model_type"), nanovlm.is_config(config)
    # picoVLM's exports to nanoVLM use picoVLM's tokenizer: token rows are kept.
    special_ids = idefics3.special_ids(_added_tokens(directory)) if is_nano else {}
    if OWN_KEY in config:
        fix = "must be idefics3 or picovlm"
        require(kind in ("idefics3", OWN_KEY), f"{where}: model_type", kind, fix)
        cfg = from_dict(VLMConfig, config[OWN_KEY], where)
    elif kind in idefics3.MODEL_TYPES:
        cfg = parse_config(VLMConfig, lambda: _read_idefics3(directory, config), where)
    elif is_nano:
        cfg = parse_config(VLMConfig, lambda: nanovlm.read(config, special_ids, where), where)
    else:
        raise InputError(
            f"{where}: model_type = {kind!r} without a {OWN_KEY!r} key is not supported; expected "
            "a picoVLM, Idefics3, SmolVLM or nanoVLM checkpoint."
        )
    name = origin(directory, config)
    if name and name not in cfg.vlm_base_models:
        cfg = replace(cfg, vlm_base_models=(*cfg.vlm_base_models, name))
    found = read_weights(directory)
    model = build_on_meta(VisionLanguageModel, cfg, len(found), where)
    layout = nanovlm if is_nano else idefics3
    pairs = own_pairs(model) if kind == OWN_KEY else layout.pairs(cfg)
    if is_nano and not special_ids:
        tables = [name for name in (nanovlm.EMBEDDING, nanovlm.HEAD) if name in found]
        found |= {name: nanovlm.replace_tokens(found[name], config) for name in tables}
    tensors = _match(found, model, pairs, layout.IGNORE, directory, strict=OWN_KEY in config)
    return load_tensors(VisionLanguageModel, cfg, nanovlm.fold(tensors) if is_nano else tensors)


def origin(directory: Path, config: dict) -> str:
    """The name of a model for model cards: its Hub id, or "NAME (local)" of a foreign directory.

    Empty for a local checkpoint of picoVLM, which holds the names of its own origins.
    """
    for part in directory.parts:  # the Hub's cache: models--user--name/snapshots/revision
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    if OWN_KEY in config:
        return ""
    named = str(config.get("_name_or_path") or "")
    is_hub_id = re.fullmatch(HUB_ID, named) and not Path(named).exists()
    return named if is_hub_id else f"{directory.resolve().name} (local)"


def _read_idefics3(directory: Path, config: dict) -> dict:
    """Fields from config.json, the image settings and the tokenizer in the same directory."""
    newer = directory / "processor_config.json"  # transformers 5 writes only this one
    is_newer = newer.is_file() and not (directory / IMAGES).is_file()
    images = read_json(newer if is_newer else directory / IMAGES)
    images = images.get("image_processor", images)
    return idefics3.read(config, images, _added_tokens(directory), str(directory))


def _added_tokens(directory: Path) -> dict[str, int]:
    """The added tokens of a tokenizer and their ids; empty without a tokenizer."""
    if not (directory / TOKENS).is_file():
        return {}
    added = read_json(directory / TOKENS).get("added_tokens", [])
    return {token["content"]: token["id"] for token in added}


# --- A backbone ---------------------------------------------------------------------------------


def _notify(sentence: str) -> None:
    """Print a notice on stderr; stdout is for a command's output."""
    print(sentence, file=sys.stderr)


def _read_backbone(
    cls: type, config_cls: type, directory: Path, **fields: object
) -> tuple[Any, dict[str, Tensor]]:
    """(config of a directory, its tensors in fp32 by parameter name).

    `fields` are added to those of its config.json. Raises `InputError`.
    """
    config, where = read_config(directory), str(directory / CONFIG)
    kind, layout = config.get("model_type"), None
    if kind == f"{OWN_KEY}_{cls.__name__}":
        source = from_dict(config_cls, config[OWN_KEY], where)
    else:
        layouts = [each for each in LAYOUTS[cls] if kind in each.model_types]
        known = dict.fromkeys(name for each in LAYOUTS[cls] for name in each.model_types)
        require(bool(layouts), f"{where}: model_type", kind, f"must be one of {', '.join(known)}")
        read = layouts[0].read
        source = parse_config(config_cls, lambda: read(config, where) | fields, where)
        reasons = [each.unsupported_reason(source) for each in layouts]
        require("" in reasons, f"{where}: model_type", kind, f"does not support {reasons[0]}")
        layout = layouts[reasons.index("")]
    found = read_weights(directory)
    model = build_on_meta(cls, source, len(found), where)
    pairs = backbone_pairs(layout, model, prefix_of(found, layout) if layout else "")
    tensors = _match(found, model, pairs, layout.ignore if layout else (), directory)
    return source, {name: tensor.float() for name, tensor in tensors.items()}


def backbone_pairs(layout: Layout | None, model: ViT | LanguageModel, prefix: str) -> list[Pair]:
    """The pairs of a backbone in `layout`; without one, in picoVLM's own layout."""
    return layout_pairs(layout, len(model.blocks), prefix) if layout else own_pairs(model)


def _image_statistics(directory: Path) -> dict:
    """Mean and standard deviation from preprocessor_config.json, if it has them."""
    images = read_json(directory / IMAGES) if (directory / IMAGES).is_file() else {}
    images = images.get("image_processor", images)
    pair = {"vit_image_mean": images.get("image_mean"), "vit_image_std": images.get("image_std")}
    # Config fields always have three values; a greyscale model's file has one.
    return {k: v * 3 if len(v) == 1 else v for k, v in pair.items() if isinstance(v, list)}


def _read_vit(
    name: str, pool: str, revision: str | None = None
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """(config, tensors) of an encoder, of a classifier, or of a whole model's vision encoder."""
    directory = newest_checkpoint(find(name, revision))
    if is_whole(read_config(directory)):
        encoder = load_vlm(directory).vision_encoder.float()
        source, tensors = sub_config(ViTConfig, encoder.cfg), encoder.state_dict()
    else:
        fields = _image_statistics(directory) | ({"vit_pool": "map"} if pool == "map" else {})
        source, tensors = _read_backbone(ViT, ViTConfig, directory, **fields)
    has_map = pool != "map" or "map_pool.probe" in tensors
    require(has_map, "vit_pool", pool, f"{name} has no weights for it; use cls or mean")
    return source, tensors


def _without_unused_pool(tensors: dict[str, Tensor], cfg: ViTConfig) -> dict[str, Tensor]:
    """The tensors, without those of a map pool that `cfg` does not use."""
    is_map = cfg.vit_pooling == "map"
    return {name: t for name, t in tensors.items() if is_map or not name.startswith("map_pool.")}


def _classifier_fields(cfg: ViTConfig, source: ViTConfig) -> dict:
    """Classifier fields of `cfg`, or of the source if `cfg` has none; none inside a VLM."""
    names = ("vit_n_classes", "vit_labels", "vit_head")
    if isinstance(cfg, VLMConfig):
        return dict(zip(names, (0, (), cfg.vit_head)))
    is_same = cfg.vit_n_classes == source.vit_n_classes and not cfg.vit_labels
    chosen = cfg if cfg.vit_n_classes and not is_same else source
    return {name: getattr(chosen, name) for name in names}


def open_vit(name: str, pool: str = "auto") -> ViT:
    """Load an encoder at its own image size, with its own classifier, pooled by `pool`.

    `name` is a directory saved by picoVLM or transformers, a run folder or a Hub id. Of a whole
    vision-language model, the vision encoder is loaded. Raises `InputError`.
    """
    source, tensors = _read_vit(name, pool)
    asked: Any = pool  # ViTConfig validates it
    new = source if pool == "auto" else replace(source, vit_pool=asked)
    return load_tensors(ViT, new, _without_unused_pool(tensors, new))


def load_vit(cfg: ViTConfig, revision: str | None = None) -> ViT:
    """The encoder that `cfg.vit_model_type` names, at `cfg.vit_img_size`; raises `InputError`.

    Position embeddings of another grid are resampled. Outside a VLM the classifier is kept, unless
    `cfg` has other classes or another head; then it is initialised. Both are reported on stderr.
    """
    source, tensors = _read_vit(cfg.vit_model_type, cfg.vit_pool, revision)
    head, is_vlm = _classifier_fields(cfg, source), isinstance(cfg, VLMConfig)
    pool = source.vit_pool if cfg.vit_pool == "auto" and not is_vlm else cfg.vit_pool
    kept = ("vit_img_size", "vit_dropout", "vit_drop_path", "vit_model_type")
    sizes = {name: v for name, v in vars(source).items() if name not in kept}
    new = replace(cfg, **sizes | head | {"vit_pool": pool})
    tensors = _without_unused_pool(tensors, new)
    if head != {name: getattr(source, name) for name in head}:
        fresh = build_head(new)
        init_weights(fresh, n_residual=1)
        tensors = {name: t for name, t in tensors.items() if not name.startswith("head.")}
        tensors |= {f"head.{name}": t.detach() for name, t in fresh.named_parameters()}
        if new.vit_n_classes:
            _notify(f"{cfg.vit_model_type}: new classifier head for {new.vit_n_classes} classes.")
    if new.vit_grid != source.vit_grid:
        _notify(
            f"{cfg.vit_model_type}: position embeddings of {source.vit_grid} x {source.vit_grid} "
            f"patches resampled (bicubic) to {new.vit_grid} x {new.vit_grid}, because "
            f"vit_img_size = {new.vit_img_size}."
        )
        n_prefix, antialias = int(new.vit_cls_flag), new.vit_n_registers > 0
        table = resample_positions(tensors[POSITION], n_prefix, new.vit_grid, antialias)
        tensors[POSITION] = table
    return load_tensors(ViT, new, tensors)


def load_lm(cfg: LMConfig, revision: str | None = None) -> LanguageModel:
    """The decoder that `cfg.lm_model_type` names; raises `InputError`.

    Its vocabulary has at least `cfg.lm_vocab_size` rows; new rows are the mean of the old ones.
    """
    directory = find(cfg.lm_model_type, revision)
    source, tensors = _read_backbone(LanguageModel, LMConfig, directory)
    kept = ("lm_dropout", "lm_model_type", "lm_tokenizer")
    sizes = {name: v for name, v in vars(source).items() if name not in kept}
    n = max(cfg.lm_vocab_size, source.lm_vocab_size)
    new = replace(cfg, **sizes | {"lm_vocab_size": n})
    for name in (EMBEDDING, HEAD):
        tensors[name] = extend_rows(tensors[name], n)
    return load_tensors(LanguageModel, new, tensors)


def load_classifier(cfg: ViTConfig, revision: str | None = None) -> Classifier:
    """`load_vit` as a Classifier; ValueError if neither `cfg` nor the source has classes."""
    return Classifier(load_vit(cfg, revision)).eval()


LOADERS: dict[type, Callable[..., nn.Module]] = {
    VisionLanguageModel: load_vlm,
    ViT: load_vit,
    LanguageModel: load_lm,
    Classifier: load_classifier,
}


def load_pretrained(cls: type, source: Any, revision: str | None = None) -> Any:
    """Implements `cls.from_pretrained` (mixin.py)."""
    load = next(load for base, load in LOADERS.items() if issubclass(cls, base))
    return load(source, revision)

"""The only file that touches disk for weights: read, check, write.

Not here: names (models/pretrained), the Hub (hub.py), the state of a training run
(engine/checkpoint.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import InputError, VLMConfig, from_dict, read_json, require, to_dict
from models.attention import rope_frequencies
from models.hub import find
from models.language_model import LanguageModel
from models.pretrained import idefics3, nanovlm
from models.pretrained.engine import SAME, Pair, to_ours, to_theirs
from models.quantized import Int8Linear
from models.vision_language_model import VisionLanguageModel
from models.vision_transformer import without_storage

WEIGHTS, INDEX, CONFIG, OWN_KEY = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "picovlm",
)
IMAGES, TOKENS = "preprocessor_config.json", "tokenizer.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
EMBEDDING, HEAD = "token_embedding.weight", "head.weight"


# --- Files --------------------------------------------------------------------------------------


def read_config(directory: Path) -> dict:
    """config.json; raises `InputError` also where it asks for code of its own."""
    config = read_json(directory / CONFIG)
    if "auto_map" in config:
        raise InputError(
            f"{directory / CONFIG}: auto_map asks for code of its own, which is never run; "
            "only layouts that transformers has built in are read."
        )
    return config


def read_weights(directory: Path, single: str = WEIGHTS) -> dict[str, Tensor]:
    """All tensors of a directory, a `single` file or shards, only safetensors.

    Each is a copy in memory of its own: those of the mapped file start anywhere, and MKL rounds a
    product of unaligned matrices otherwise, so that a resumed run would differ from a whole one.
    Raises `InputError`.
    """
    if (directory / INDEX).is_file() and not (directory / single).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        where = f"{directory / INDEX}: weight_map"
        require(isinstance(weight_map, dict), where, weight_map, "must be an object")
        files = sorted(set(map(str, weight_map.values())))
    else:
        files = [single]
    tensors: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{directory / INDEX}: {name!r} is not the name of a safetensors file beside it."
            )
        try:
            with safe_open(directory / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise InputError(f"{directory / name}: no such file{_pickle(directory)}.") from None
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{directory / name}: not a whole safetensors file ({error})."
            ) from None
    return tensors


def _pickle(directory: Path) -> str:
    """Words about a file that may have been meant, but could run code when opened."""
    found = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    return f"; {found[0]} is a pickle, which could run code and is never opened" if found else ""


def write(directory: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """model.safetensors and config.json; an older model's index goes, as it names its shards."""
    directory.mkdir(parents=True, exist_ok=True)
    # Each its own memory: safetensors refuses tensors that share it.
    owners = {t.data_ptr(): name for name, t in tensors.items()}
    tensors = {n: t if owners[t.data_ptr()] == n else t.clone() for n, t in tensors.items()}
    save_tensors(tensors, directory / WEIGHTS)
    (directory / WEIGHTS).chmod(0o644)  # safetensors writes 0600
    (directory / INDEX).unlink(missing_ok=True)
    write_json(directory / CONFIG, config)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file; raises OSError where the disk refuses it."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from None


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """A model's tensors as files want them, and the name of their dtype.

    Raises `InputError` of one in 8 bits, for which no file has a place.
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise InputError("a model in 8 bits is for answering alone: save it before quantize_int8.")
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    return state, str(next(model.parameters()).dtype).removeprefix("torch.")


# --- Models -------------------------------------------------------------------------------------


def outline(cls: type, cfg, n_tensors: int, where: str) -> nn.Module:
    """A model without storage, whose names and shapes a file is held against."""
    blocks = max(getattr(cfg, name, 0) for name in ("vit_n_blocks", "lm_n_blocks"))
    require(blocks <= n_tensors, f"{where}: blocks", blocks, f"the file has {n_tensors} tensors")
    try:
        with without_storage():
            return cls(cfg)
    except (RuntimeError, TypeError) as error:  # sizes that no machine can count
        reason = str(error).splitlines()[0]
        raise InputError(f"{where}: no model has such sizes ({reason}).") from None


def fill(cls: type, cfg, tensors: dict[str, Tensor]) -> nn.Module:
    """A model of these tensors; a tied head shares its storage with the embedding."""
    with without_storage():
        model = cls(cfg)
    model.load_state_dict(tensors, assign=True)
    for part in model.modules():
        if isinstance(part, LanguageModel) and cfg.lm_tie_weights:
            part.head.weight = part.token_embedding.weight
    return model.requires_grad_(True).eval()


def own_names(model: nn.Module) -> list[Pair]:
    """The layout that is our own: every tensor under its name."""
    return [Pair((name,), name, SAME) for name in model.state_dict()]


def understand(cls: type, read: Callable[[], dict], where: str):
    """What `read` makes of somebody's config.json; raises `InputError` on one without sense."""
    try:
        return from_dict(cls, read(), where)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise InputError(f"{where}: not the config of such a model ({error!r}).") from None


def tie(found: dict[str, Tensor], pairs: list[Pair], where: str, strict: bool = False) -> None:
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


# --- Whole models -------------------------------------------------------------------------------


def misfit(cfg: VLMConfig) -> str:
    """Why a checkpoint of this model is not an Idefics3 directory, in words; "" when it is."""
    return idefics3.misfit(cfg)


def layout_of(cfg: VLMConfig) -> list[Pair]:
    """Our names and those on disk: Idefics3's where it has a place for everything."""
    model = None
    if idefics3.misfit(cfg):
        with without_storage():
            model = VisionLanguageModel(cfg)
    return idefics3.pairs(cfg) if model is None else own_names(model)


def save_vlm(model: VisionLanguageModel, directory: str | Path) -> None:
    """Write weights, config.json and generation_config.json: an Idefics3 directory.

    Our config stands under its own key. An architecture Idefics3 has no place for is written under
    model_type picovlm with our tensor names.
    """
    directory, cfg = Path(directory), model.cfg
    tensors, dtype = state_of(model)
    if idefics3.misfit(cfg):
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
    reason = idefics3.misfit(cfg) or nanovlm.misfit(cfg)
    if reason:
        raise InputError(f"this model cannot be written for nanoVLM: it has no place for {reason}.")
    tensors, _ = state_of(model)
    tensors = to_theirs(nanovlm.unfold(tensors), nanovlm.pairs(cfg))
    if cfg.lm_tie_weights:
        del tensors[nanovlm.EMBEDDING]  # as its save_model does, and its load_model wants
    tensors[nanovlm.INV_FREQ] = rope_frequencies(cfg)
    config = nanovlm.write(cfg) | {"lm_tokenizer": tokenizer or cfg.lm_tokenizer}
    write(Path(directory), tensors, config)


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
        cfg = understand(VLMConfig, lambda: _read_idefics3(directory, config), where)
    elif is_nano:
        same = {"lm_vocab_size": config["lm_vocab_size"], **ours} if ours else {}
        cfg = understand(VLMConfig, lambda: nanovlm.read(config, where) | same, where)
    else:
        raise InputError(
            f"{where}: model_type = {kind!r} and no {OWN_KEY!r} key: neither a picoVLM checkpoint "
            "nor an Idefics3, SmolVLM or nanoVLM one."
        )
    found = read_weights(directory)
    model = outline(VisionLanguageModel, cfg, len(found), where)
    layout = nanovlm if is_nano else idefics3
    pairs = own_names(model) if kind == OWN_KEY else layout.pairs(cfg)
    if is_nano and not ours:
        heads = [name for name in (nanovlm.EMBEDDING, nanovlm.HEAD) if name in found]
        found |= {name: nanovlm.swap_tokens(found[name], config) for name in heads}
    if cfg.lm_tie_weights:
        tie(found, pairs, str(directory), strict=OWN_KEY in config)
    tensors = to_ours(found, pairs, model.state_dict(), layout.IGNORE, str(directory))
    return fill(VisionLanguageModel, cfg, nanovlm.fold(tensors) if is_nano else tensors)


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

"""The only file that touches disk for weights: find, read, check, write.

Not here: names (models/pretrained), the state of a training run (engine/checkpoint.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs import InputError, VLMConfig, from_dict, read_json, require, to_dict
from models.pretrained import idefics3
from models.pretrained.engine import to_ours, to_theirs
from models.vision_language_model import VisionLanguageModel

WEIGHTS, INDEX, CONFIG, OWN_KEY = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "picovlm",
)


def save_vlm(model: VisionLanguageModel, directory: str | Path) -> None:
    """Write weights, config.json and generation_config.json: an Idefics3 directory.

    Our config stands under its own key. An architecture Idefics3 has no place for is written under
    model_type picovlm with our tensor names.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    cfg = model.cfg
    dtype = str(model.MP.proj.weight.dtype).removeprefix("torch.")
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if cfg.lm_tie_weights:
        # The same values under both names; a copy, as safetensors refuses shared memory.
        tensors["decoder.head.weight"] = tensors["decoder.token_embedding.weight"].clone()
    if idefics3.is_expressible(cfg):
        tensors = to_theirs(tensors, idefics3.names(cfg))
        config = idefics3.config_json(cfg, dtype)
    else:
        config = {"model_type": "picovlm", "torch_dtype": dtype}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(0o644)  # safetensors writes 0600
    ids = {
        "pad_token_id": cfg.vlm_pad_token_id,
        "bos_token_id": cfg.vlm_bos_token_id,
        "eos_token_id": [cfg.vlm_eos_token_id],
    }
    _write_json(directory / "generation_config.json", ids)
    _write_json(directory / CONFIG, config | {OWN_KEY: to_dict(cfg)})


def load_vlm(source: str | Path) -> VisionLanguageModel:
    """A model from a directory `save_vlm` wrote; every tensor is checked, raises `InputError`."""
    directory = Path(source)
    if not directory.is_dir():
        raise InputError(f"{source}: no such checkpoint directory.")
    config = read_json(directory / CONFIG)
    if OWN_KEY not in config:
        raise InputError(
            f"{directory / CONFIG}: no {OWN_KEY!r} key, so this is not a picoVLM checkpoint."
        )
    kind = config.get("model_type")
    where = f"{directory / CONFIG}: model_type"
    require(kind in ("idefics3", "picovlm"), where, kind, "must be idefics3 or picovlm")
    cfg = from_dict(VLMConfig, config[OWN_KEY], str(directory / CONFIG))
    with torch.device("meta"):
        model = VisionLanguageModel(cfg)
    wanted = dict(model.state_dict())
    names = idefics3.names(cfg) if kind == "idefics3" else {name: name for name in wanted}
    found = to_ours(read_weights(directory), names, wanted, idefics3.IGNORE, str(directory))
    if cfg.lm_tie_weights:
        embedding, head = found["decoder.token_embedding.weight"], found.pop("decoder.head.weight")
        require(
            torch.equal(embedding, head),
            f"{directory}: lm_tie_weights",
            True,
            "but the file's embedding and head differ",
        )
        found["decoder.head.weight"] = embedding
    model.load_state_dict(found, assign=True)
    if cfg.lm_tie_weights:
        model.decoder.head.weight = model.decoder.token_embedding.weight
    return model.requires_grad_(True).eval()


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, one file or shards, only safetensors; raises `InputError`."""
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        require(
            isinstance(weight_map, dict),
            f"{directory / INDEX}: weight_map",
            weight_map,
            "must be an object",
        )
        files = sorted(set(map(str, weight_map.values())))
    else:
        files = [WEIGHTS]
    tensors: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{directory / INDEX}: {name!r} is not the name of a safetensors file beside it."
            )
        try:
            with safe_open(directory / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise InputError(f"{directory / name}: no such file.") from None
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{directory / name}: not a whole safetensors file ({error})."
            ) from None
    return tensors


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""Weights and config.json on disk: read, checked, written. Only safetensors, never code."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config_tools import InputError, read_json, require
from models.inference.int8 import Int8Linear

WEIGHTS, INDEX, CONFIG, OWN_KEY = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "picovlm",
)
IMAGES, TOKENS = "preprocessor_config.json", "tokenizer.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


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


def tensors_and_dtype(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """A model's tensors as files want them, and the name of their dtype.

    Raises `InputError` of one in 8 bits, for which no file has a place.
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise InputError("a model in 8 bits is for answering alone: save it before quantize_int8.")
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    return state, str(next(model.parameters()).dtype).removeprefix("torch.")

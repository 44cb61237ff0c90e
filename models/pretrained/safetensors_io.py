"""Read and write safetensors files and config.json. Loads no pickle and runs no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config_tools import InputError, read_json, require
from models.inference.int8 import Int8Linear

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, OWN_KEY = "config.json", "picovlm"
IMAGES, TOKENS = "preprocessor_config.json", "tokenizer.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_config(directory: Path) -> dict:
    """config.json. Raises `InputError`, also if it asks for custom code (auto_map)."""
    config = read_json(directory / CONFIG)
    if "auto_map" in config:
        raise InputError(
            f"{directory / CONFIG}: auto_map asks for custom code, which is never run; "
            "only architectures built into transformers are supported."
        )
    return config


def read_weights(directory: Path, single: str = WEIGHTS) -> dict[str, Tensor]:
    """All tensors of a directory: of the `single` file, else of its shards. Raises `InputError`.

    Tensors are copied out of the memory-mapped file, where they may be unaligned. MKL rounds
    products of unaligned tensors differently, so a resumed run would not be bit-identical.
    """
    if (directory / INDEX).is_file() and not (directory / single).is_file():
        weight_map: Any = read_json(directory / INDEX).get("weight_map")
        where = f"{directory / INDEX}: weight_map"
        require(isinstance(weight_map, dict), where, weight_map, "must be an object")
        files = sorted(set(map(str, weight_map.values())))
    else:
        files = [single]
    tensors: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{directory / INDEX}: {name!r} is not a safetensors file in the same directory."
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
    """A note about a pickle in the directory, for the error about missing weights."""
    found = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    return f"; {found[0]} is a pickle, which can run code and is never opened" if found else ""


def write(directory: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """Write model.safetensors and config.json, and delete the index of an earlier model."""
    directory.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share storage, as tied weights do.
    owners = {t.data_ptr(): name for name, t in tensors.items()}
    tensors = {n: t if owners[t.data_ptr()] == n else t.clone() for n, t in tensors.items()}
    save_tensors(tensors, directory / WEIGHTS)
    (directory / WEIGHTS).chmod(0o644)  # safetensors writes 0600
    (directory / INDEX).unlink(missing_ok=True)
    write_json(directory / CONFIG, config)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; raises OSError if it cannot be written."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from None


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tensors_and_dtype(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """A model's state dict on the CPU, contiguous, and the name of its dtype.

    Raises `InputError` after `quantize_int8`, whose weights no supported format stores.
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise InputError("an int8 model cannot be saved; save it before quantize_int8.")
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    return state, str(next(model.parameters()).dtype).removeprefix("torch.")

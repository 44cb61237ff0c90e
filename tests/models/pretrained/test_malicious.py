"""Malicious checkpoints: each raises an InputError, and none of their code runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct

import pytest
from safetensors.torch import load_file, save_file

from config_tools import InputError
from engine.training.checkpoint import load_state
from models.vision_language_model import VisionLanguageModel


class Bomb:
    """Unpickling it creates a directory."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def target(small_checkpoint, tmp_path):
    shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refused(directory, *words: str) -> None:
    with pytest.raises(InputError) as error:
        VisionLanguageModel.from_pretrained(directory)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    for word in words:
        assert word in message, message
    assert not (directory.parent / "harm").exists()


def write_header(target, header: dict | bytes, size: int | None = None) -> None:
    """Write a safetensors file with any header."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = struct.pack("<Q", len(data) if size is None else size)
    (target / "model.safetensors").write_bytes(length + data + bytes(64))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "w.ckpt", "a.pkl", "b.pth"])
def test_a_pickle_instead_of_weights(name, target):
    (target / name).write_bytes(pickle.dumps(Bomb(target.parent / "harm")))
    (target / "model.safetensors").unlink()
    refused(target, "no such file", f"{name} is a pickle, which can run code and is never opened")
    shutil.copy(
        target / name, target / "model.safetensors"
    )  # the same file under the expected name
    refused(target, "not a whole safetensors file")


def test_a_pickle_next_to_the_weights_is_ignored(target):
    (target / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(target.parent / "harm")))
    VisionLanguageModel.from_pretrained(target)
    assert not (target.parent / "harm").exists()


def test_a_pickle_in_the_index(target):
    (target / "evil.bin").write_bytes(pickle.dumps(Bomb(target.parent / "harm")))
    index = {"weight_map": {"lm_head.weight": "evil.bin"}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "model.safetensors").unlink()
    refused(target, "'evil.bin' is not a safetensors file in the same directory")


def test_a_pickle_as_training_state(target):
    """Resuming reads tensors and plain values only."""
    (target / "state.pt").write_bytes(pickle.dumps(Bomb(target.parent / "harm")))
    with pytest.raises(InputError, match=r"state\.pt: damaged"):
        load_state(target, None)
    assert not (target.parent / "harm").exists()


@pytest.mark.parametrize("is_published", [False, True], ids=["own", "published"])
def test_code_in_a_checkpoint(is_published, target, edit_config):
    harm = str(target.parent / "harm")
    (target / "modeling_evil.py").write_text(f"import os; os.mkdir({harm!r})")
    edit_config(target, auto_map={"AutoModel": "modeling_evil.Evil"})
    if is_published:
        config = json.loads((target / "config.json").read_text())
        del config["picovlm"]
        (target / "config.json").write_text(json.dumps(config))
    refused(target, "auto_map asks for custom code, which is never run")


@pytest.mark.parametrize(
    "own",
    [{"vit_hidden_dim": 10**15, "vit_n_heads": 1}, {"lm_n_blocks": 10**9}, {"vit_n_blocks": 10**18},
     {"lm_vocab_size": 10**40}, {"vit_img_size": 8 * 10**12, "max_img_size": 8 * 10**12}],
    ids=str,
)  # fmt: skip
def test_huge_sizes_in_the_config(own, target, edit_config):
    config = json.loads((target / "config.json").read_text())
    edit_config(target, picovlm=config["picovlm"] | own)
    refused(target, "config.json")


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 64]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 64]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**60]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"a": 7},
        b"{" * 5000,
        b"\xff\xfe\xfd",
    ],
    ids=lambda h: str(h)[:60],
)
def test_invalid_headers_of_the_weights(header, target):
    write_header(target, header)
    refused(target, "not a whole safetensors file")


def test_a_header_of_huge_size(target):
    write_header(target, {}, size=2**63)
    refused(target, "not a whole safetensors file")


def test_a_tensor_of_another_shape_is_named(target):
    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:3].clone()
    save_file(tensors, target / "model.safetensors")
    refused(target, "misshapen: lm_head.weight is [3, 32]")

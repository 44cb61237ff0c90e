"""Every model class has `from_pretrained`, `save_pretrained` and `push_to_hub` of the mixin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs import LMConfig, ViTConfig
from models.classifier import Classifier
from models.language_model import LanguageModel
from models.pretrained import hub
from models.pretrained.load import LOADERS
from models.pretrained.mixin import PretrainedMixin
from models.pretrained.save import SAVERS
from models.vision_language_model import VisionLanguageModel
from models.vision_transformer import ViT

VISION = dict(vit_cls_flag=True, vit_n_classes=3)


@pytest.fixture(params=[ViT, Classifier, LanguageModel, VisionLanguageModel])
def saved(request, small_model, randomise, tmp_path):
    """(model, argument of from_pretrained that loads it again from `tmp_path`)."""
    cls = request.param
    if cls is VisionLanguageModel:
        return small_model(), tmp_path
    if cls is LanguageModel:
        return small_model().decoder, LMConfig(lm_model_type=str(tmp_path), lm_vocab_size=3)
    vit = randomise(ViT(ViTConfig(**VISION)))
    return vit if cls is ViT else Classifier(vit).eval(), ViTConfig(vit_model_type=str(tmp_path))


def test_every_class_saves_and_loads(saved, tmp_path):
    model, source = saved
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(source)
    assert type(again) is type(model) and not again.training
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_push_uploads_the_saved_files(saved, monkeypatch):
    model, _ = saved
    pushed = {}

    def push(folder: str, repo_id: str, private: bool) -> str:
        pushed[repo_id] = private, {path.name for path in Path(folder).iterdir()}
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub, "push", push)
    assert model.push_to_hub("user/name") == "https://hub/user/name"
    model.push_to_hub("user/public", private=False)
    assert [private for private, _ in pushed.values()] == [True, False]
    assert all(names >= {"config.json", "model.safetensors"} for _, names in pushed.values())


@pytest.mark.parametrize("cls", [ViT, Classifier, LanguageModel, VisionLanguageModel])
def test_methods_are_defined_in_the_mixin_only(cls):
    assert cls in LOADERS and cls in SAVERS
    for name in ("from_pretrained", "save_pretrained", "push_to_hub"):
        owner = next(base for base in cls.__mro__ if name in vars(base))
        assert owner is PretrainedMixin, f"{cls.__name__}.{name}"


def test_processor_files_are_saved(small_model, tmp_path):
    class Processor:
        def save(self, directory) -> None:
            (Path(directory) / "tokenizer.json").write_text("{}")

    small_model().save_pretrained(tmp_path, Processor())
    assert (tmp_path / "tokenizer.json").is_file()

"""docs/reference.md is what the dataclasses say today, field by field."""

from __future__ import annotations

import dataclasses

from config_tools import InputError
from configs import PRESETS, RunConfig, TrainConfig, ViTConfig, VLMConfig
from configs_classify import ClassifyConfig
from docs import make_reference as reference


def test_the_page_is_up_to_date(tmp_path, monkeypatch):
    kept = reference.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(reference, "PAGE", tmp_path / "reference.md")
    reference.main([])
    assert reference.PAGE.read_text(encoding="utf-8") == kept, "run `make reference`"


def test_every_field_has_a_meaning_and_a_row():
    page = reference.PAGE.read_text(encoding="utf-8")
    for run in (RunConfig, ClassifyConfig):
        for part in dataclasses.fields(run):
            cls = type(getattr(run(), part.name))
            docs = reference.field_docs(cls)
            for field in dataclasses.fields(cls):
                assert docs[field.name], f"{cls.__name__}.{field.name} has no docstring"
                row = f"| `{part.name}.{field.name}` | {docs[field.name]} |"
                assert row in page.replace("\\|", "|")


def test_ranges_are_those_of_the_validation():
    assert reference.limits(TrainConfig(), "beta1", float) == "must be at least 0 and below 1"
    assert "multiple of vit_n_heads = 4" in reference.limits(ViTConfig(), "vit_hidden_dim", int)
    both = reference.limits(VLMConfig(), "vit_n_channels", int)
    assert both == "must be greater than 0; must be 3 in a VLM"
    assert reference.limits(TrainConfig(), "wandb", bool) == ""
    for fields in (dict(beta1=1.0), dict(steps=0)):  # and they are errors
        try:
            TrainConfig(**fields)
        except InputError as error:
            assert "must be" in str(error)
        else:
            raise AssertionError(fields)


def test_presets_that_change_a_default_are_listed():
    assert reference.changed_by(PRESETS, "model", "lm_dropout") == "tiny-long: `0.1`"
    assert "222m, 222m-1, 222m-2: `224`" in reference.changed_by(PRESETS, "model", "vit_img_size")
    assert reference.changed_by(PRESETS, "train", "wandb") == ""

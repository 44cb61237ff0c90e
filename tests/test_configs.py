"""Config fields are validated with clear errors and survive JSON and the command line."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

import config_tools
from cli import parse_run
from config_tools import InputError, from_dict, read_json, to_dict
from configs import (
    PRESETS,
    DataConfig,
    LMConfig,
    ProjectorConfig,
    RunConfig,
    TrainConfig,
    ViTConfig,
    VLMConfig,
)
from configs_classify import ClassifyConfig, ClassifyDataConfig, ClassifyTrainConfig

VIT, LM, MP, VLM, DATA, TRAIN = (
    ViTConfig,
    LMConfig,
    ProjectorConfig,
    VLMConfig,
    DataConfig,
    TrainConfig,
)

# (classes with the field, wrong values, field and value in the message, part of the fix)
BROKEN = [
    ((VIT, VLM), dict(vit_n_blocks=0), "vit_n_blocks", "0", "greater than 0"),
    ((VIT,), dict(vit_img_size=50), "vit_img_size", "50", "multiple of vit_patch_size = 8"),
    ((VIT, VLM), dict(vit_hidden_dim=130), "vit_hidden_dim", "130", "multiple of vit_n_heads = 4"),
    ((VIT, VLM), dict(vit_dropout=1.0), "vit_dropout", "1.0", "below 1"),
    ((VIT, VLM), dict(vit_n_registers=-1), "vit_n_registers", "-1", "not be negative"),
    ((VIT,), dict(vit_n_classes=-1), "vit_n_classes", "-1", "not be negative"),
    ((VLM,), dict(vlm_pad_token_id=-1), "vlm_pad_token_id", "-1", "not be negative"),
    ((VIT,), dict(vit_n_classes=3, vit_pool="none"), "vit_pool", "'none'", "mean, cls or map"),
    ((VIT, VLM), dict(vit_pool="cls"), "vit_pool", "'cls'", "set vit_cls_flag = True"),
    ((VIT, VLM), dict(vit_pool="max"), "vit_pool", "'max'", "auto, none, cls, mean, map"),
    ((VIT, VLM), dict(vit_hidden_act="gleu"), "vit_hidden_act", "'gleu'", "gelu_tanh, gelu"),
    (
        (VIT, VLM),
        dict(vit_image_std=(0.5, 0.0, 1.0)),
        "vit_image_std",
        "(0.5, 0.0, 1.0)",
        "positive",
    ),
    ((VIT, VLM), dict(vit_ln_eps=float("nan")), "vit_ln_eps", "nan", "must be finite"),
    ((LM, VLM), dict(lm_n_kv_heads=3), "lm_n_kv_heads", "3", "divide lm_n_heads = 4"),
    ((LM, VLM), dict(lm_hidden_dim=126), "lm_hidden_dim", "126", "multiple of lm_n_heads = 4"),
    ((LM, VLM), dict(lm_head_dim=33), "lm_head_dim", "33", "even"),
    ((LM, VLM), dict(lm_head_dim=-2), "lm_head_dim", "-2", "greater than 0"),
    ((LM, VLM), dict(lm_nope_every=-1), "lm_nope_every", "-1", "not be negative"),
    ((LM, VLM), dict(lm_vocab_size=-5), "lm_vocab_size", "-5", ""),
    ((LM, VLM), dict(lm_rope_type="yarn"), "lm_rope_type", "'yarn'", "default, linear, llama3"),
    ((LM, VLM), dict(lm_dropout=-0.1), "lm_dropout", "-0.1", "at least 0"),
    ((MP,), dict(mp_pixel_shuffle_factor=0), "mp_pixel_shuffle_factor", "0", "greater than 0"),
    (
        (VLM,),
        dict(mp_pixel_shuffle_factor=4),
        "mp_pixel_shuffle_factor",
        "4",
        "divide the 6 patches",
    ),
    ((VLM,), dict(max_img_size=100), "max_img_size", "100", "multiple of vit_img_size = 48"),
    ((VLM,), dict(max_img_size=48 * 7), "max_img_size", "336", "at most 6 x vit_img_size = 288"),
    ((VLM,), dict(vlm_image_token_id=2), "vlm_image_token_id", "[0, 1, 2, 2]", "four different"),
    ((VLM,), dict(vlm_eos_token_id=640), "lm_vocab_size", "640", "the largest is 640"),
    ((VLM,), dict(vit_n_channels=1), "vit_n_channels", "1", "must be 3"),
    ((VLM,), dict(vit_n_classes=3, vit_pool="mean"), "vit_n_classes", "3", "must be 0 in a VLM"),
    ((VLM,), dict(vit_pool="map"), "vit_pool", "'map'", "uses all patches"),
    ((DATA,), dict(batch_size=0), "batch_size", "0", "greater than 0"),
    ((DATA,), dict(val_fraction=1.0), "val_fraction", "1.0", "below 1"),
    ((DATA,), dict(world_min_shapes=5), "world_min_shapes", "5", "from 1 to 4"),
    ((DATA,), dict(workers=-1), "workers", "-1", "not be negative"),
    ((TRAIN,), dict(seed=2**63), "seed", str(2**63), "from 0 to"),
    ((DATA,), dict(seed=-1), "seed", "-1", "from 0 to"),
    ((TRAIN,), dict(steps=0), "steps", "0", "greater than 0"),
    ((TRAIN,), dict(lr_muon=-1e-3), "lr_muon", "-0.001", "not be negative"),
    ((TRAIN,), dict(beta2=1.0), "beta2", "1.0", "below 1"),
    ((TRAIN,), dict(push="user/"), "push", "'user/'", "must be user/name"),
    ((TRAIN,), dict(push="user/my model"), "push", "'user/my model'", "must be user/name"),
    ((TRAIN,), dict(optimizer="sgd"), "optimizer", "'sgd'", "adamw, muon, adamw8bit"),
    (
        (TrainConfig,),
        dict(activation_checkpointing=("projector",)),
        "activation_checkpointing",
        "('projector',)",
        "may name vision, language",
    ),
    ((TRAIN,), dict(freeze=("decoder",)), "freeze", "('decoder',)", "vision, projector, language"),
    (
        (TRAIN,),
        dict(freeze=("vision", "projector", "language")),
        "freeze",
        "('vision', 'projector', 'language')",
        "nothing to train",
    ),
    ((RunConfig,), dict(data=DataConfig(max_length=4096)), "data.max_length", "4096", "= 2048"),
]


# --- Validation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls, values, name, value, fix",
    [(cls, *rest) for parts, *rest in BROKEN for cls in parts],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_errors_name_field_value_and_fix(cls, values, name, value, fix):
    """Also when the field belongs to the second or third base of VLMConfig."""
    with pytest.raises(InputError) as caught:
        cls(**values)
    message = str(caught.value)
    assert re.search(rf"(^|[ ,]){re.escape(name)} = {re.escape(value)}: ", message), message
    assert fix in message and message.endswith(".") and "\n" not in message
    with pytest.raises(InputError):
        replace(cls(), **values)


def test_each_class_has_a_wrong_field_above():
    assert {cls for parts, *_ in BROKEN for cls in parts} == {
        VIT, LM, MP, VLM, DATA, TRAIN, RunConfig
    }  # fmt: skip


def test_configs_cannot_be_changed():
    for cls in (VLMConfig, RunConfig, DataConfig):
        cfg = cls()
        name = dataclasses.fields(cfg)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cfg, name, 3)
    with pytest.raises(TypeError):
        VLMConfig(48)  # by keyword only


# --- Presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, tokens, tile, longest, vocab",
    [
        ("tiny", 9, 48, 48, 640),
        ("tiny-long", 9, 48, 48, 640),
        ("portable", 9, 48, 96, 49280),
        ("222m", 49, 224, 224, 49280),
        ("460m", 64, 512, 2048, 49280),
        ("qwen3", 64, 512, 2048, 151936),
    ],
)
def test_presets(preset, tokens, tile, longest, vocab):
    cfg = PRESETS[preset].model
    assert type(cfg) is VLMConfig
    assert cfg.tokens_per_tile == tokens
    assert (cfg.vit_img_size, cfg.max_img_size, cfg.lm_vocab_size) == (tile, longest, vocab)
    assert cfg.vit_n_patches == tokens * cfg.mp_pixel_shuffle_factor**2
    # The largest image (all tiles and the global view) and an answer fit into a row.
    tiles = 1 if tile == longest else (longest // tile) ** 2 + 1
    assert tiles * (tokens + 3) + 100 < PRESETS[preset].data.max_length


def test_every_preset_is_listed_above():
    staged = {f"{name}-{stage}" for name in ("222m", "460m") for stage in "12"}
    names = {"tiny", "tiny-long", "portable", "222m", "460m", "qwen3"}
    assert set(PRESETS) == names | staged
    assert PRESETS["tiny"] == RunConfig()
    outs = [run.train.out for run in PRESETS.values()]
    assert len(set(outs)) == len(outs)


def test_derived_properties():
    cfg = VLMConfig(vit_cls_flag=True, vit_n_registers=4, vit_patch_size=12, lm_n_heads=8)
    assert (cfg.vit_grid, cfg.vit_n_patches, cfg.vit_n_prefix) == (4, 16, 5)
    assert (cfg.tokens_per_tile, LMConfig(lm_n_heads=2, lm_n_kv_heads=1).lm_head_width) == (4, 64)
    assert LMConfig(lm_head_dim=10).lm_head_width == 10


# --- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["222m", "460m"])
def test_two_stages_train_the_projector_then_all(name):
    first, second = PRESETS[f"{name}-1"], PRESETS[f"{name}-2"]
    assert first.train.freeze == ("vision", "language") and second.train.freeze == ()
    assert second.train.init_from == first.train.out != second.train.out
    assert second.train.lr_vision < second.train.lr_language <= second.train.lr_projector
    assert first.train.lr_projector > 10 * second.train.lr_projector
    assert first.model == second.model == PRESETS[name].model


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_through_json(preset):
    run = PRESETS[preset]
    text = json.dumps(to_dict(run))
    again = from_dict(RunConfig, json.loads(text))
    assert again == run and json.dumps(to_dict(again)) == text
    assert json.loads(text)["format_version"] == config_tools.FORMAT_VERSION
    model = from_dict(VLMConfig, json.loads(json.dumps(to_dict(run.model))))
    assert model == run.model and isinstance(model.vit_image_mean, tuple)


def test_values_other_than_the_defaults_round_trip():
    run = RunConfig(
        model=VLMConfig(lm_head_dim=48, vit_image_mean=(0.1, 0.2, 0.3), vit_pool="mean"),
        data=DataConfig(packing=False, val_fraction=0.0),
        train=TrainConfig(freeze=("vision", "language"), wandb=True, lr_muon=0.0),
    )
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run


def test_missing_keys_have_defaults_and_input_is_not_changed():
    values = {"train": {"steps": 3}, "format_version": 1}
    kept = json.dumps(values)
    assert from_dict(RunConfig, values) == RunConfig(train=TrainConfig(steps=3))
    assert json.dumps(values) == kept
    assert from_dict(TrainConfig, {"lr_muon": 1}).lr_muon == 1.0
    assert type(from_dict(TrainConfig, {"lr_muon": 1}).lr_muon) is float


@pytest.mark.parametrize(
    "cls, values, message",
    [
        (VLMConfig, {"vit_hiden_dim": 3}, "'vit_hiden_dim'; did you mean 'vit_hidden_dim'?"),
        (
            RunConfig,
            {"train": {"step": 3}},
            "c.json.train: unknown field 'step'; did you mean 'steps'",
        ),
        (RunConfig, {"modle": {}}, "did you mean 'model'?"),
        (ProjectorConfig, {"zzz": 1}, "known fields are mp_pixel_shuffle_factor"),
    ],
)
def test_an_unknown_key_names_the_nearest(cls, values, message):
    with pytest.raises(InputError) as caught:
        from_dict(cls, values, "c.json")
    assert message in str(caught.value) and str(caught.value).startswith("c.json")


@pytest.mark.parametrize(
    "values, name, wanted",
    [
        ({"model": {"vit_img_size": "48"}}, "vit_img_size = '48'", "int"),
        ({"model": {"vit_img_size": 48.0}}, "vit_img_size = 48.0", "int"),
        ({"model": {"vit_img_size": True}}, "vit_img_size = True", "int"),
        ({"model": {"vit_cls_flag": 1}}, "vit_cls_flag = 1", "bool"),
        ({"model": {"vit_ln_eps": "1e-6"}}, "vit_ln_eps = '1e-6'", "float"),
        ({"model": {"lm_tokenizer": None}}, "lm_tokenizer = None", "str"),
        ({"model": {"lm_head_dim": "64"}}, "lm_head_dim = '64'", "int"),
        ({"model": {"lm_rope_type": 3}}, "lm_rope_type = 3", "default, linear"),
        ({"model": {"vit_image_mean": 0.5}}, "vit_image_mean = 0.5", "three numbers"),
        ({"model": {"vit_image_mean": [0.5, 0.5]}}, "vit_image_mean = (0.5, 0.5)", "three numbers"),
        ({"model": {"vit_image_std": "abc"}}, "vit_image_std = 'abc'", "three numbers"),
        ({"train": {"freeze": "vision"}}, "freeze = 'vision'", "names"),
        ({"train": {"freeze": [["vision"]]}}, "freeze = (['vision'],)", "names"),
        ({"train": {"lr_muon": False}}, "lr_muon = False", "float"),
        ({"data": None}, "data = None", "object"),
        ({"model": [1]}, "model = [1]", "object"),
        ({"format_version": "x"}, "format_version = 'x'", "int"),
        ({"format_version": 99}, "format_version = 99", "update picoVLM"),
    ],
)
def test_a_wrong_type_is_named(values, name, wanted):
    with pytest.raises(InputError) as caught:
        from_dict(RunConfig, values)
    assert name in str(caught.value) and wanted in str(caught.value)


OLD_RUN = {
    "format_version": 1,
    "model": {"vit_n_blocks": 2},
    "data": {"world_first": 70, "world_described": 0.3, "world_shapes": 1},
    "train": {"answers_every": 3, "muon_momentum": 0.95, "steps": 9},
}
OLD_CLASSIFIER = {
    "data": {"crop": 0.4, "stretch": 1.2, "flip": 0.5, "magnitude": 3.0, "erase": 0.1},
    "train": {"muon_momentum": 0.95},
}


def test_a_config_of_an_earlier_version_loads(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD_RUN))
    assert parse_run([str(tmp_path / "config.json")]) == RunConfig(
        model=VLMConfig(vit_n_blocks=2),
        data=DataConfig(world_captions_first=70, world_caption_fraction=0.3, world_min_shapes=1),
        train=TrainConfig(answer_sheet_every=3, steps=9),
    )
    assert from_dict(ClassifyConfig, OLD_CLASSIFIER) == ClassifyConfig(
        data=ClassifyDataConfig(
            crop_min_scale=0.4, crop_max_ratio=1.2, horizontal_flip=0.5,
            randaugment_magnitude=3.0, random_erasing=0.1,
        )
    )  # fmt: skip
    with pytest.raises(InputError, match=r"c: muon_momentum = 0\.9: .*always 0\.95"):
        from_dict(TrainConfig, {"muon_momentum": 0.9}, "c")
    with pytest.raises(InputError, match="unknown field 'crop'"):
        from_dict(TrainConfig, {"crop": 0.9})


def test_every_renamed_field_is_in_an_old_config_above():
    old = {
        key for run in (OLD_RUN, OLD_CLASSIFIER) for part in ("data", "train") for key in run[part]
    }
    assert set(config_tools.RENAMED) | set(config_tools.REMOVED) == old - {"steps"}


@pytest.mark.parametrize(
    "cls", [VIT, LM, VLM, DATA, TRAIN, ClassifyDataConfig, ClassifyTrainConfig]
)
def test_every_float_must_be_finite(cls):
    hints = get_type_hints(cls)
    names = [name for name, hint in hints.items() if hint is float or float in get_args(hint)]
    assert len(names) > 1
    for name in names:
        for value in (float("nan"), float("inf")):
            wrong = value if hints[name] is float else (0.5, value, 0.5)
            with pytest.raises(InputError, match=rf"{name} = .*(nan|inf).*: must be finite"):
                cls(**{name: wrong})


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe{}", b"", b'{"a": ' + b"[" * 100_000])
def test_files_without_a_json_object(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(InputError, match=r"c\.json: (not JSON|must hold a JSON object)"):
        read_json(tmp_path / "c.json")
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")

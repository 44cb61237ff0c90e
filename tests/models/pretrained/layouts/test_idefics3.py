"""Published Idefics3 and SmolVLM checkpoints, as transformers saves them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file

from config_tools import InputError
from engine.inference.chat import Chat
from models.inference.sampling import Sampling
from models.vision_language_model import VisionLanguageModel

TEXT = dict(
    vocab_size=640, hidden_size=48, intermediate_size=72, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-3, max_position_embeddings=512,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2,
    image_size=16, patch_size=4, layer_norm_eps=1e-3,
)  # fmt: skip
MODELS = {
    "idefics3": (hf.Idefics3ForConditionalGeneration, hf.Idefics3Config),
    "smolvlm": (hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig),
}
IMAGES = {
    "image_processor_type": "Idefics3ImageProcessor",
    "do_image_splitting": True,
    "size": {"longest_edge": 64},
    "max_image_size": {"longest_edge": 16},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}


def write_json(path, content) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture(params=[(kind, tied) for kind in MODELS for tied in (False, True)], ids=str)
def published(request, lively, tiny_processor, tmp_path):
    """(transformers' model, a directory with the files of a published checkpoint)."""
    kind, tied = request.param
    cls, config_cls = MODELS[kind]
    config = config_cls(
        text_config=dict(TEXT, model_type="llama", tie_word_embeddings=tied), vision_config=VISION,
        scale_factor=2, image_token_id=3, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = lively(cls(config))
    reference.save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", IMAGES)
    tiny_processor.tokenizer.save(str(tmp_path / "tokenizer.json"))
    return reference, tmp_path


@torch.no_grad()
def test_logits_equal_transformers(published, make_sample):
    reference, folder = published
    model = VisionLanguageModel.from_pretrained(folder)
    cfg = model.cfg
    assert (cfg.max_img_size, cfg.vit_image_std, cfg.lm_re_base) == (64, (0.5, 0.6, 0.7), 5000.0)
    assert (cfg.vlm_pad_token_id, cfg.vlm_bos_token_id, cfg.vlm_eos_token_id) == (0, 1, 2)
    assert cfg.lm_tie_weights == reference.config.tie_word_embeddings
    ids, tiles = make_sample(cfg, 3, 30, seed=1)
    expected = reference(input_ids=ids[None], pixel_values=tiles[None]).logits
    assert expected.std() > 0.3
    # These weights make logits of up to 50, so the tolerance is relative.
    torch.testing.assert_close(model(ids[None], tiles)[0], expected, rtol=1e-5, atol=1e-4)


def test_a_checkpoint_resaved_by_transformers_gives_the_same_answers(
    small_checkpoint, tmp_path, tiny_processor, minute_config, lively
):
    """transformers 5 writes only processor_config.json and only rope_parameters."""
    cfg = minute_config(lm_tie_weights=False, vit_img_size=16, max_img_size=64)
    lively(VisionLanguageModel(cfg)).save_pretrained(
        tmp_path / "saved", replace(tiny_processor, cfg=cfg)
    )
    model = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    del model.config.picovlm  # which transformers would save again
    model.save_pretrained(tmp_path / "again")
    hf.AutoProcessor.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "preprocessor_config.json").exists()
    chats = [Chat.load(tmp_path / name) for name in ("saved", "again")]
    again = chats[1].model.cfg
    assert again.vlm_base_models == ("again (local)",), "nothing in the files says where it is from"
    assert again == replace(cfg, lm_tokenizer=again.lm_tokenizer,
                            vlm_base_models=again.vlm_base_models)  # fmt: skip
    rng = np.random.default_rng(0)
    for width, height in ((30, 20), (90, 33), (16, 16)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        one, two = (chat("What?", [image], Sampling(max_new_tokens=12)) for chat in chats)
        assert one == two and one


def edit(path, change) -> None:
    config = json.loads(path.read_text())
    change(config)
    write_json(path, config)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda c: c["text_config"].update(model_type="gemma2"), "'gemma2': must"),
        ("config.json", lambda c: c.pop("text_config"), "text_config = None: must be an object"),
        ("config.json", lambda c: c["vision_config"].update(image_size=32), "max_image_size = 16"),
        ("config.json", lambda c: c["vision_config"].update(hidden_size=[3]), "vit_hidden_dim"),
        ("config.json", lambda c: c.update(scale_factor=3), "must divide the 4 patches per side"),
        ("preprocessor_config.json", lambda c: c.update(do_image_splitting=False), "splitting"),
        ("preprocessor_config.json", lambda c: c.update(size=9), "not a valid config of this"),
        ("preprocessor_config.json", lambda c: c["size"].update(longest_edge=120), "max_img_size"),
        (
            "tokenizer.json",
            lambda c: [t.update(content="x") for t in c["added_tokens"] if t["id"] == 1],
            "the tokenizer has no <|im_start|>, which picoVLM's prompts need",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors_of_the_configs(name, change, message, published):
    _, folder = published
    edit(folder / name, change)
    with pytest.raises(InputError) as error:
        VisionLanguageModel.from_pretrained(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_leftover_a_missing_and_a_misshapen_tensor(published):
    _, folder = published
    tensors = load_file(folder / "model.safetensors")
    norm = "model.text_model.layers.1.input_layernorm.weight"
    proj = "model.connector.modality_projection.proj.weight"
    tensors["model.extra.weight"] = torch.zeros(3)
    del tensors[norm]
    tensors[proj] = tensors[proj].T.contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        VisionLanguageModel.from_pretrained(folder)
    wrong = ("left over: model.extra.weight", f"missing: {norm}", f"misshapen: {proj} is [128,")
    for words in wrong:
        assert words in str(error.value)

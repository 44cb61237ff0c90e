"""Configs of vision-language models, their data and training, and the presets.

The defaults are the preset `tiny`, which trains on two CPU cores in minutes. A field's docstring is
its `--help` text. Not here: classifiers (configs_classify.py), flags (cli.py), JSON and validation
helpers (config_tools.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from config_tools import (
    HUB_ID,
    Validated,
    check,
    require,
    require_positive,
    require_rate,
    require_seed,
)


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Validated):
    """The vision encoder."""

    vit_img_size: int = 48
    """Height and width of an input image (in a VLM: of a tile), in pixels."""
    vit_patch_size: int = 8
    """Height and width of a patch, in pixels."""
    vit_n_channels: int = 3
    """Number of colour channels of the input."""
    vit_hidden_dim: int = 128
    """Embedding dimension."""
    vit_inter_dim: int = 256
    """Hidden dimension of the MLP."""
    vit_n_heads: int = 4
    """Number of attention heads."""
    vit_n_blocks: int = 3
    """Number of transformer blocks."""
    vit_hidden_act: Literal["gelu_tanh", "gelu", "quick_gelu", "relu", "swiglu"] = "gelu_tanh"
    """MLP activation; SigLIP uses gelu_tanh, ViT gelu, DINOv2 gelu or swiglu, CLIP quick_gelu."""
    vit_ln_eps: float = 1e-6
    """Epsilon of LayerNorm."""
    vit_qkv_bias: bool = True
    """Bias on the query, key and value projections."""
    vit_dropout: float = 0.0
    """Dropout probability in attention and on both residual branches."""
    vit_drop_path: float = 0.0
    """Stochastic depth: drop probability in the last block; it grows linearly from 0."""
    vit_cls_flag: bool = False
    """Prepend a learned CLS token."""
    vit_n_registers: int = 0
    """Number of register tokens after CLS (Darcet et al. 2023), without position embeddings."""
    vit_pre_norm: bool = False
    """Apply LayerNorm before the first block and omit the bias of the patch convolution (CLIP)."""
    vit_layer_scale: bool = False
    """Learned scale per channel on both residual branches (DINOv2)."""
    vit_n_classes: int = 0
    """Number of classes of the classifier head; 0: no head."""
    vit_labels: tuple[str, ...] = ()
    """Class names."""
    vit_head: Literal["linear", "mlp"] = "linear"
    """Classifier head: one linear layer, or mlp with a hidden tanh layer (ViT pretraining)."""
    vit_pool: Literal["auto", "none", "cls", "mean", "map"] = "auto"
    """Pooling of the output tokens; auto: cls if there is a CLS token, mean for a head, or none."""
    vit_image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean per channel, subtracted from pixels in [0, 1]."""
    vit_image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Standard deviation per channel; pixels are divided by it after the mean is subtracted."""
    vit_model_type: str = ""
    """Hub id or directory of pretrained weights; empty: random initialization."""

    @property
    def vit_grid(self) -> int:
        """Patches per side."""
        return self.vit_img_size // self.vit_patch_size

    @property
    def vit_pooling(self) -> str:
        """`vit_pool` with auto resolved."""
        auto = "cls" if self.vit_cls_flag else "mean" if self.vit_n_classes else "none"
        return auto if self.vit_pool == "auto" else self.vit_pool

    @property
    def vit_n_patches(self) -> int:
        """Number of patches per tile."""
        return self.vit_grid**2

    @property
    def vit_n_prefix(self) -> int:
        """Number of tokens before the patches: CLS and registers."""
        return int(self.vit_cls_flag) + self.vit_n_registers

    def validate(self):
        require_positive(
            self,
            "vit_img_size vit_patch_size vit_n_channels vit_hidden_dim vit_inter_dim "
            "vit_n_heads vit_n_blocks vit_ln_eps",
        )
        require_rate(self, "vit_dropout vit_drop_path")
        fix = f"must be a multiple of vit_patch_size = {self.vit_patch_size}"
        check(self.vit_img_size % self.vit_patch_size == 0, self, "vit_img_size", fix)
        fix = f"must be a multiple of vit_n_heads = {self.vit_n_heads}"
        check(self.vit_hidden_dim % self.vit_n_heads == 0, self, "vit_hidden_dim", fix)
        check(self.vit_n_registers >= 0, self, "vit_n_registers", "must not be negative")
        check(self.vit_n_classes >= 0, self, "vit_n_classes", "must not be negative")
        fix = "cls needs a CLS token; set vit_cls_flag = True, or use mean or map"
        check(self.vit_pool != "cls" or self.vit_cls_flag, self, "vit_pool", fix)
        fix = "must be mean, cls or map in a classifier"
        check(self.vit_pool != "none" or not self.vit_n_classes, self, "vit_pool", fix)
        n, labels = self.vit_n_classes, self.vit_labels
        fix = f"must be {n} different names (vit_n_classes), or empty; set both fields together"
        require(not labels or len(set(labels)) == len(labels) == n, "vit_labels", labels, fix)
        check(min(self.vit_image_std) > 0, self, "vit_image_std", "must be positive")


@dataclass(frozen=True, kw_only=True)
class LMConfig(Validated):
    """The decoder language model."""

    lm_hidden_dim: int = 128
    """Embedding dimension."""
    lm_inter_dim: int = 256
    """Hidden dimension of the gated MLP."""
    lm_n_heads: int = 4
    """Number of query heads."""
    lm_n_kv_heads: int = 4
    """Number of key and value heads; if fewer than lm_n_heads, attention is grouped-query."""
    lm_head_dim: int | None = None
    """Dimension of a head; none: lm_hidden_dim / lm_n_heads."""
    lm_n_blocks: int = 4
    """Number of transformer blocks."""
    lm_vocab_size: int = 640
    """Vocabulary size: rows of the token embedding, at least the size of the tokenizer."""
    lm_max_position_embeddings: int = 2048
    """Maximum sequence length in tokens."""
    lm_rms_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    lm_re_base: float = 10000.0
    """Base (theta) of the rotary embedding."""
    lm_rope_type: Literal["default", "linear", "llama3"] = "default"
    """Scaling of the rotary frequencies for long contexts."""
    lm_rope_factor: float = 1.0
    """Scaling factor of linear and llama3 RoPE."""
    lm_rope_low_freq_factor: float = 1.0
    """llama3 RoPE: wavelengths above original context length / this value are scaled fully."""
    lm_rope_high_freq_factor: float = 4.0
    """llama3 RoPE: wavelengths below original context length / this value are not scaled."""
    lm_rope_original_max_positions: int = 8192
    """llama3 RoPE: original context length, before scaling, in tokens."""
    lm_nope_every: int = 0
    """Omit the rotary embedding in every n-th block (NoPE; SmolLM3: 4); 0: never."""
    lm_qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    lm_qk_norm: bool = False
    """RMSNorm on queries and keys, per head (Qwen3)."""
    lm_tie_weights: bool = True
    """Share the weights of token embedding and output head."""
    lm_dropout: float = 0.0
    """Dropout probability in attention and on both residual branches."""
    lm_model_type: str = ""
    """Hub id or directory of pretrained weights; empty: random initialization."""
    lm_tokenizer: str = "world"
    """Hub id or directory of the tokenizer; world: built-in byte-level BPE for synthetic data."""

    @property
    def lm_head_width(self) -> int:
        """Dimension of an attention head."""
        return self.lm_head_dim or self.lm_hidden_dim // self.lm_n_heads

    def validate(self):
        require_positive(
            self,
            "lm_hidden_dim lm_inter_dim lm_n_heads lm_n_kv_heads lm_n_blocks lm_vocab_size "
            "lm_max_position_embeddings lm_rms_eps lm_re_base lm_rope_factor",
        )
        require_rate(self, "lm_dropout")
        positive = self.lm_head_dim is None or self.lm_head_dim > 0
        check(positive, self, "lm_head_dim", "must be greater than 0, or left out")
        fix = f"must divide lm_n_heads = {self.lm_n_heads}"
        check(self.lm_n_heads % self.lm_n_kv_heads == 0, self, "lm_n_kv_heads", fix)
        whole = self.lm_head_dim is not None or self.lm_hidden_dim % self.lm_n_heads == 0
        fix = f"must be a multiple of lm_n_heads = {self.lm_n_heads}, or set lm_head_dim"
        check(whole, self, "lm_hidden_dim", fix)
        check(self.lm_nope_every >= 0, self, "lm_nope_every", "must not be negative")
        even = self.lm_head_width % 2 == 0
        require(even, "lm_head_dim", self.lm_head_width, "must be even, for the rotary embedding")


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig(Validated):
    """The projector from patches to image tokens."""

    mp_pixel_shuffle_factor: int = 2
    """Pixel shuffle factor n: n x n neighbouring patches become one image token."""

    def validate(self):
        require_positive(self, "mp_pixel_shuffle_factor")


@dataclass(frozen=True, kw_only=True)
class VLMConfig(ViTConfig, LMConfig, ProjectorConfig):
    """A vision-language model; the field names are those of nanoVLM."""

    max_img_size: int = 48
    """Longest image side after resizing, in pixels; above vit_img_size, images are tiled."""
    vlm_pad_token_id: int = 0
    """Id of the padding token, which is never supervised."""
    vlm_bos_token_id: int = 1
    """Id of the first token of every conversation."""
    vlm_eos_token_id: int = 2
    """Id of the end-of-turn token: supervised, and the only token that stops generation."""
    vlm_image_token_id: int = 3
    """Id of the placeholder token, whose embeddings are replaced by projected image tokens."""
    vlm_base_models: tuple[str, ...] = ()
    """Whole models that the weights come from, oldest first; loaders add names, model cards use."""

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile: (grid / pixel shuffle factor) squared."""
        return (self.vit_grid // self.mp_pixel_shuffle_factor) ** 2

    def validate(self):
        fits = self.vit_grid % self.mp_pixel_shuffle_factor == 0
        fix = f"must divide the {self.vit_grid} patches per side"
        check(fits, self, "mp_pixel_shuffle_factor", fix)
        fix = f"must be a multiple of vit_img_size = {self.vit_img_size}"
        check(self.max_img_size % self.vit_img_size == 0, self, "max_img_size", fix)
        limit = 6 * self.vit_img_size
        fix = f"must be at most 6 x vit_img_size = {limit}; Idefics3 supports 6 x 6 tiles"
        check(self.max_img_size <= limit, self, "max_img_size", fix)
        names = [f"vlm_{kind}_token_id" for kind in ("pad", "bos", "eos", "image")]
        ids = [getattr(self, name) for name in names]
        for name in names:
            check(getattr(self, name) >= 0, self, name, "must not be negative")
        require(len(set(ids)) == 4, ", ".join(names), ids, "must be four different tokens")
        fix = f"must exceed every special token id; the largest is {max(ids)}"
        check(max(ids) < self.lm_vocab_size, self, "lm_vocab_size", fix)
        check(self.vit_n_channels == 3, self, "vit_n_channels", "must be 3 in a VLM")
        check(self.vit_n_classes == 0, self, "vit_n_classes", "must be 0 in a VLM")
        fix = "must not be map in a VLM, which uses all patches and would never train the pooling"
        check(self.vit_pool != "map", self, "vit_pool", fix)


RATINGS = ("min_relevance", "min_image_correspondence", "min_visual_dependency", "min_formatting")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Validated):
    """Training data of a vision-language model."""

    source: str = "world"
    """world, a file (.jsonl .json .csv .tsv .parquet), a folder, or hf:owner/name[:config][@split].
    A mixture lists several with their shares: a.jsonl=0.7 b.jsonl=0.3."""
    stream: bool = False
    """Stream rows: no indexing pass, unknown length, nothing cached."""
    stream_block: int = 1000
    """Size of a stream's shuffle buffer, in rows."""
    min_relevance: int = 1
    """Minimum `relevance_ratings` (1 to 5) of a question and answer, in FineVision's columns."""
    min_image_correspondence: int = 1
    """Minimum `image_correspondence_ratings` (1 to 5) of a question and answer."""
    min_visual_dependency: int = 1
    """Minimum `visual_dependency_ratings` (1 to 5) of a question and answer."""
    min_formatting: int = 1
    """Minimum `formatting_ratings` (1 to 5) of a question and answer."""
    fetch_images: bool = False
    """Download images given as URLs; without it, rows with URLs are unusable."""
    seed: int = 0
    """Seed of the built-in scenes and of the order of rows."""
    batch_size: int = 2
    """Rows per batch and process."""
    max_length: int = 1024
    """Maximum length of a row, in tokens; with packing, several conversations share a row."""
    packing: bool = True
    """Pack several conversations into a row; attention never crosses between them."""
    max_tiles: int = 64
    """Maximum tiles per conversation; conversations with more are unusable, never truncated."""
    tiles_per_batch: int = 0
    """Maximum tiles per packed batch; 0: no limit besides max_length."""
    val_fraction: float = 0.02
    """Fraction of rows held out for validation, chosen by a hash of the row."""
    world_questions: int = 4
    """Built-in data: questions per training conversation."""
    world_caption_fraction: float = 0.2
    """Built-in data: fraction of scenes with a caption instead of questions."""
    world_captions_first: int = 14000
    """Built-in data: the first n training scenes have captions only (a curriculum)."""
    world_min_shapes: int = 2
    """Built-in data: minimum size (1 to 4) of the set of shapes that a training scene uses."""
    workers: int = 0
    """Worker processes that prepare samples; 0: the training process prepares them."""

    def validate(self):
        require_positive(self, "batch_size max_length max_tiles world_questions stream_block")
        check(1 <= self.world_min_shapes <= 4, self, "world_min_shapes", "must be from 1 to 4")
        fix = f"must be 0, or at least batch_size x max_tiles = {self.batch_size * self.max_tiles}"
        enough = self.tiles_per_batch >= self.batch_size * self.max_tiles
        check(not self.tiles_per_batch or enough, self, "tiles_per_batch", fix)
        for name in RATINGS:
            check(1 <= getattr(self, name) <= 5, self, name, "must be from 1 to 5")
        require_rate(self, "val_fraction")
        require_seed(self)
        require(
            self.world_captions_first >= 0,
            "world_captions_first",
            self.world_captions_first,
            "must not be negative",
        )
        share = self.world_caption_fraction
        require(0 <= share <= 1, "world_caption_fraction", share, "must be between 0 and 1")
        require(self.workers >= 0, "workers", self.workers, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Validated):
    """Training settings that vision-language models and classifiers share."""

    out: str = "runs/tiny"
    """Run folder: config, log, loss curve, checkpoints."""
    steps: int = 1500
    """Number of optimizer steps."""
    accumulate: int = 1
    """Gradient accumulation: batches per optimizer step and process."""
    optimizer: Literal["adamw", "muon", "adamw8bit"] = "muon"
    """Optimizer; muon: Muon for block matrices, AdamW for the rest; adamw8bit needs torchao."""
    lr_muon: float = 0.012
    """Peak learning rate of Muon."""
    weight_decay: float = 0.05
    """Decoupled weight decay, except on norms, biases and embeddings."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.98
    """AdamW: decay of the second moment."""
    warmup: int = 50
    """Length of the linear learning rate warmup, in steps."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Learning rate after warmup; cosine and linear decay to zero."""
    layer_decay: float = 1.0
    """Layer-wise learning rate decay: factor per block, from the last to the first; 1: none."""
    ema: float = 0.0
    """Decay of the weights' moving average, which is then evaluated and saved; 0: no average."""
    grad_clip: float = 1.0
    """Maximum gradient norm; 0: no clipping."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute precision; auto: bf16 autocast if it is faster on this hardware, else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for each transformer block; auto: only on a GPU."""
    seed: int = 0
    """Seed of weight initialization and dropout."""
    log_every: int = 10
    """Log every n steps."""
    eval_every: int = 300
    """Evaluate every n steps; 0: only at the end."""
    eval_samples: int = 200
    """Validation questions per evaluation of a VLM; classifiers use all validation images."""
    save_every: int = 500
    """Save a checkpoint every n steps; 0: only at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep; the best evaluated one is kept as well."""
    resume: Literal["no", "auto"] = "no"
    """auto: resume from the newest checkpoint in the run folder, if there is one."""
    max_bad_steps: int = 3
    """Stop after n consecutive steps with a NaN or Inf loss or gradient; fewer are skipped."""
    push: str = ""
    """Hub repository (user/name) to push the result to; created private."""
    wandb: bool = False
    """Also log to Weights & Biases, offline unless WANDB_MODE is set."""

    def validate(self):
        require_positive(self, "steps accumulate log_every eval_samples keep max_bad_steps")
        require_rate(self, "beta1 beta2 ema")
        require_seed(self)
        check(0 < self.layer_decay <= 1, self, "layer_decay", "must be above 0 and at most 1")
        names = "lr_muon weight_decay warmup grad_clip eval_every save_every"
        for name in names.split():
            check(getattr(self, name) >= 0, self, name, "must not be negative")
        is_name = re.fullmatch(HUB_ID, self.push)
        check(not self.push or is_name, self, "push", "must be user/name")


def require_freeze(cfg: Any, parts: str) -> None:
    """Raise `InputError` unless `cfg.freeze` names some of `parts`, but not all."""
    names = parts.split()
    check(set(cfg.freeze) <= set(names), cfg, "freeze", f"may name {', '.join(names)}")
    check(set(cfg.freeze) != set(names), cfg, "freeze", "leaves nothing to train")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """Training settings of a vision-language model."""

    steps: int = 2300
    """Number of optimizer steps."""
    lr_muon: float = 0.008
    """Peak learning rate of Muon."""
    eval_every: int = 500
    """Evaluate every n steps; 0: only at the end."""
    weight_decay: float = 0.2
    """Decoupled weight decay, except on norms, biases and embeddings."""
    lr_vision: float = 0.0015
    """Peak learning rate of the vision encoder (AdamW)."""
    lr_projector: float = 0.0015
    """Peak learning rate of the projector (AdamW)."""
    lr_language: float = 0.0015
    """Peak learning rate of the language model (AdamW)."""
    freeze: tuple[Literal["vision", "projector", "language"], ...] = ()
    """Parts that are not trained."""
    init_from: str = ""
    """Checkpoint whose weights, tokenizer and model config training starts from."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: replicate the model (ddp) or shard every block (fsdp)."""
    lora: tuple[Literal["vision", "projector", "language"], ...] = ()
    """Parts that train LoRA adapters instead of their weights (needs peft)."""
    lora_r: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """Adapter outputs are scaled by lora_alpha / lora_r."""
    lora_targets: tuple[str, ...] = ()
    """Name suffixes of linear layers that get adapters, for example q_proj v_proj; empty: all."""
    activation_checkpointing: tuple[Literal["vision", "language"], ...] = ()
    """Parts whose blocks are recomputed in backward; others only if memory would be short."""
    answer_sheet_every: int = 1
    """Draw an answer sheet (answers-STEP.png) at every n-th evaluation; 0: never."""
    dry_run: bool = False
    """Measure time and memory of the largest batch, print them and stop; writes nothing."""

    def validate(self):
        require_positive(self, "lora_r lora_alpha")
        check(self.answer_sheet_every >= 0, self, "answer_sheet_every", "must not be negative")
        blocks = set(self.activation_checkpointing) <= {"vision", "language"}
        check(blocks, self, "activation_checkpointing", "may name vision, language")
        names = ("vision", "projector", "language")
        check(set(self.lora) <= set(names), self, "lora", f"may name {', '.join(names)}")
        plain = self.optimizer == "adamw" and not self.ema and not self.lora
        fix = "fsdp supports optimizer = adamw only, without ema and lora"
        check(self.parallel == "ddp" or plain, self, "parallel", fix)
        fix = "must not name a part in freeze; a frozen part trains no adapters"
        check(not set(self.lora) & set(self.freeze), self, "lora", fix)
        for name in ("lr_vision", "lr_projector", "lr_language"):
            check(getattr(self, name) >= 0, self, name, "must not be negative")
        require_freeze(self, "vision projector language")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Validated):
    """A training run: model, data, training."""

    model: VLMConfig = field(default_factory=VLMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate(self):
        length, limit = self.data.max_length, self.model.lm_max_position_embeddings
        fix = f"must be at most lm_max_position_embeddings = {limit}"
        require(length <= limit, "data.max_length", length, fix)


# fmt: off
SIGLIP_B = dict(vit_hidden_dim=768, vit_inter_dim=3072, vit_n_heads=12, vit_n_blocks=12,
                vit_patch_size=16)
SMOLVLM_TOKENS = dict(lm_vocab_size=49280, vlm_pad_token_id=2, vlm_bos_token_id=1,
                      vlm_eos_token_id=49279, vlm_image_token_id=49190)
SMOLLM2 = dict(lm_re_base=100000.0, lm_max_position_embeddings=8192, lm_rms_eps=1e-5,
               lm_tie_weights=True, **SMOLVLM_TOKENS)
FINE_TUNE: dict[str, Any] = dict(
                 optimizer="adamw", lr_vision=5e-5, lr_projector=0.005, lr_language=5e-5,
                 warmup=1000, schedule="cosine", beta2=0.95, weight_decay=0.05, steps=40000,
                 accumulate=8, eval_every=500, save_every=500)


def two_stages(name: str, run: RunConfig) -> dict[str, RunConfig]:
    """Presets that train pretrained backbones in two stages: the projector, then everything."""
    first = replace(run.train, out=f"runs/{name}-1", freeze=("vision", "language"), steps=2000,
                    warmup=100, lr_projector=0.001)
    second = replace(run.train, out=f"runs/{name}-2", init_from=f"runs/{name}-1", warmup=300,
                     lr_projector=2e-5, lr_vision=2e-6, lr_language=2e-5)
    return {f"{name}-1": replace(run, train=first), f"{name}-2": replace(run, train=second)}


PRESETS: dict[str, RunConfig] = {
    # The class defaults: 1.2 M parameters.
    "tiny": RunConfig(),
    # `tiny` trained longer. Without dropout, longer training lowered the accuracy on held-out
    # combinations (docs/recipes.md).
    "tiny-long": RunConfig(model=VLMConfig(lm_dropout=0.1),
                           data=DataConfig(world_min_shapes=1),
                           train=TrainConfig(out="runs/tiny-long", steps=6000, weight_decay=0.3,
                                             eval_every=1000, save_every=1000)),
    # `tiny` with SmolLM2's tokenizer and tiles, which llama.cpp requires (docs/deploy.md).
    "portable": RunConfig(
        model=VLMConfig(**SMOLVLM_TOKENS, max_img_size=96,
                        lm_tokenizer="HuggingFaceTB/SmolLM2-135M"),
        train=TrainConfig(out="runs/portable")),
    # nanoVLM's first release: SigLIP-B/16-224 + SmolLM2-135M.
    "222m": RunConfig(
        model=VLMConfig(**SIGLIP_B, **SMOLLM2, vit_img_size=224, max_img_size=224,
                        mp_pixel_shuffle_factor=2, vit_model_type="google/siglip-base-patch16-224",
                        lm_model_type="HuggingFaceTB/SmolLM2-135M",
                        lm_tokenizer="HuggingFaceTB/SmolLM2-135M", lm_hidden_dim=576,
                        lm_inter_dim=1536, lm_n_heads=9, lm_n_kv_heads=3, lm_n_blocks=30),
        data=DataConfig(batch_size=2, workers=2), train=TrainConfig(out="runs/222m", **FINE_TUNE)),
    # SigLIP2-B/16-512 + SmolLM2-360M, tiles and a global view. Without activation checkpointing
    # the activations of 4,096 tokens (63 tiles) take 66 GB, with it 3 GB.
    "460m": RunConfig(
        model=VLMConfig(**SIGLIP_B, **SMOLLM2, vit_img_size=512, max_img_size=2048,
                        mp_pixel_shuffle_factor=4, vit_model_type="google/siglip2-base-patch16-512",
                        lm_model_type="HuggingFaceTB/SmolLM2-360M-Instruct",
                        lm_tokenizer="HuggingFaceTB/SmolLM2-360M-Instruct", lm_hidden_dim=960,
                        lm_inter_dim=2560, lm_n_heads=15, lm_n_kv_heads=5, lm_n_blocks=32),
        data=DataConfig(batch_size=1, max_length=4096, workers=2),
        train=TrainConfig(out="runs/460m", activation_checkpointing=("vision", "language"),
                          **FINE_TUNE)),
    # SigLIP2-B/16-512 + Qwen3-0.6B, tiles and a global view. Qwen3's embedding has 151,936 rows;
    # its tokenizer uses 151,669, and the image tokens use the next ones.
    "qwen3": RunConfig(
        model=VLMConfig(**SIGLIP_B, vit_img_size=512, max_img_size=2048, mp_pixel_shuffle_factor=4,
                        vit_model_type="google/siglip2-base-patch16-512",
                        lm_model_type="Qwen/Qwen3-0.6B", lm_tokenizer="Qwen/Qwen3-0.6B",
                        lm_hidden_dim=1024, lm_inter_dim=3072, lm_n_heads=16, lm_n_kv_heads=8,
                        lm_head_dim=128, lm_n_blocks=28, lm_qk_norm=True, lm_rms_eps=1e-6,
                        lm_re_base=1000000.0, lm_max_position_embeddings=40960,
                        lm_vocab_size=151936, vlm_pad_token_id=151643, vlm_bos_token_id=151644,
                        vlm_image_token_id=151707, vlm_eos_token_id=151708),
        data=DataConfig(batch_size=1, max_length=4096, workers=2),
        train=TrainConfig(out="runs/qwen3", **FINE_TUNE)),
}


for _name in ("222m", "460m"):
    PRESETS |= two_stages(_name, PRESETS[_name])

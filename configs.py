"""The blueprint: every number that shapes a model, its data and its training.

Not here: how a number is used (see the room that reads it), anything computed from a checkpoint.
Class defaults are the `tiny` preset, which trains on two CPU cores in minutes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from config_tools import (
    HUB_NAME,
    Checked,
    need,
    require,
    require_positive,
    require_rate,
    require_seed,
)


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Checked):
    """The vision encoder."""

    vit_img_size: int = 48
    """Height and width of one tile in pixels."""
    vit_patch_size: int = 8
    """Height and width of one patch in pixels."""
    vit_n_channels: int = 3
    """Colour channels of the input."""
    vit_hidden_dim: int = 128
    """Width of the encoder."""
    vit_inter_dim: int = 256
    """Width of the hidden layer of its MLP."""
    vit_n_heads: int = 4
    """Attention heads."""
    vit_n_blocks: int = 3
    """Transformer blocks."""
    vit_hidden_act: Literal["gelu_tanh", "gelu", "quick_gelu", "relu", "swiglu"] = "gelu_tanh"
    """Activation of the MLP: SigLIP gelu_tanh, ViT gelu, DINOv2 gelu or swiglu, CLIP quick_gelu."""
    vit_ln_eps: float = 1e-6
    """Epsilon of the layer norms."""
    vit_qkv_bias: bool = True
    """Bias on the query, key and value projections."""
    vit_dropout: float = 0.0
    """Dropout in attention and on both residual branches."""
    vit_drop_path: float = 0.0
    """Stochastic depth: share of samples that skip the last block's branches, 0 for the first."""
    vit_cls_flag: bool = False
    """Prepend a learned CLS token."""
    vit_n_registers: int = 0
    """Learned register tokens after CLS (Darcet et al. 2023); they carry no position."""
    vit_pre_norm: bool = False
    """A norm before the first block instead of a bias of the patch convolution (CLIP)."""
    vit_layer_scale: bool = False
    """A learned factor per channel on both residual branches (DINOv2)."""
    vit_n_classes: int = 0
    """Outputs of a classifier on the pooled features; 0: no classifier."""
    vit_labels: tuple[str, ...] = ()
    """Names of the classes."""
    vit_head: Literal["linear", "mlp"] = "linear"
    """The classifier; mlp has a hidden layer with tanh, as the ViT paper pretrains."""
    vit_pool: Literal["auto", "none", "cls", "mean", "map"] = "auto"
    """What ViT(images) pools. auto: cls with a CLS token, else mean to classify, else none."""
    vit_image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Pixel mean subtracted per channel, after scaling to [0, 1]."""
    vit_image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Pixel standard deviation divided by per channel."""
    vit_model_type: str = ""
    """Hub id or directory of pretrained weights; empty: from scratch."""

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
        return self.vit_grid**2

    @property
    def vit_n_prefix(self) -> int:
        """Tokens in front of the patches: CLS and registers."""
        return int(self.vit_cls_flag) + self.vit_n_registers

    def validate(self):
        require_positive(
            self,
            "vit_img_size vit_patch_size vit_n_channels vit_hidden_dim vit_inter_dim "
            "vit_n_heads vit_n_blocks vit_ln_eps",
        )
        require_rate(self, "vit_dropout vit_drop_path")
        fix = f"must be a multiple of vit_patch_size = {self.vit_patch_size}"
        need(self.vit_img_size % self.vit_patch_size == 0, self, "vit_img_size", fix)
        fix = f"must be a multiple of vit_n_heads = {self.vit_n_heads}"
        need(self.vit_hidden_dim % self.vit_n_heads == 0, self, "vit_hidden_dim", fix)
        need(self.vit_n_registers >= 0, self, "vit_n_registers", "must not be negative")
        need(self.vit_n_classes >= 0, self, "vit_n_classes", "must not be negative")
        fix = "needs a CLS token, so set vit_cls_flag = True or pool by mean or map"
        need(self.vit_pool != "cls" or self.vit_cls_flag, self, "vit_pool", fix)
        fix = "a classifier needs mean, cls or map"
        need(self.vit_pool != "none" or not self.vit_n_classes, self, "vit_pool", fix)
        n, labels = self.vit_n_classes, self.vit_labels
        fix = f"must be {n} different names, as vit_n_classes says, or none; set both"
        require(not labels or len(set(labels)) == len(labels) == n, "vit_labels", labels, fix)
        need(min(self.vit_image_std) > 0, self, "vit_image_std", "must be positive")


@dataclass(frozen=True, kw_only=True)
class LMConfig(Checked):
    """The decoder language model."""

    lm_hidden_dim: int = 128
    """Width of the decoder."""
    lm_inter_dim: int = 256
    """Width of the hidden layer of the gated MLP."""
    lm_n_heads: int = 4
    """Query heads."""
    lm_n_kv_heads: int = 4
    """Key and value heads; fewer than lm_n_heads is grouped-query attention."""
    lm_head_dim: int | None = None
    """Width of one head; none means lm_hidden_dim / lm_n_heads."""
    lm_n_blocks: int = 4
    """Transformer blocks."""
    lm_vocab_size: int = 640
    """Rows of the token embedding; at least the tokenizer's size."""
    lm_max_position_embeddings: int = 2048
    """Longest sequence."""
    lm_rms_eps: float = 1e-5
    """Epsilon of the RMS norms."""
    lm_re_base: float = 10000.0
    """Base (theta) of the rotary embedding."""
    lm_rope_type: Literal["default", "linear", "llama3"] = "default"
    """How the rotary frequencies are stretched for long contexts."""
    lm_rope_factor: float = 1.0
    """Stretch factor of linear and llama3 rope."""
    lm_rope_low_freq_factor: float = 1.0
    """llama3 rope: wavelengths longer than original length / this are stretched fully."""
    lm_rope_high_freq_factor: float = 4.0
    """llama3 rope: wavelengths shorter than original length / this are left alone."""
    lm_rope_original_max_positions: int = 8192
    """llama3 rope: context length before stretching."""
    lm_nope_every: int = 0
    """Every so many-th block attends without positions (SmolLM3: 4); 0: none does."""
    lm_qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    lm_qk_norm: bool = False
    """RMS norm of queries and keys per head (Qwen3)."""
    lm_tie_weights: bool = True
    """Share the token embedding with the output head."""
    lm_dropout: float = 0.0
    """Dropout in attention and on both residual branches."""
    lm_model_type: str = ""
    """Hub id or directory of pretrained weights; empty: from scratch."""
    lm_tokenizer: str = "world"
    """Hub id or directory; world: a byte-level BPE of the built-in data and a little English."""

    @property
    def lm_head_width(self) -> int:
        """Width of one attention head."""
        return self.lm_head_dim or self.lm_hidden_dim // self.lm_n_heads

    def validate(self):
        require_positive(
            self,
            "lm_hidden_dim lm_inter_dim lm_n_heads lm_n_kv_heads lm_n_blocks lm_vocab_size "
            "lm_max_position_embeddings lm_rms_eps lm_re_base lm_rope_factor",
        )
        require_rate(self, "lm_dropout")
        positive = self.lm_head_dim is None or self.lm_head_dim > 0
        need(positive, self, "lm_head_dim", "must be greater than 0, or left out")
        fix = f"must divide lm_n_heads = {self.lm_n_heads}"
        need(self.lm_n_heads % self.lm_n_kv_heads == 0, self, "lm_n_kv_heads", fix)
        whole = self.lm_head_dim is not None or self.lm_hidden_dim % self.lm_n_heads == 0
        fix = f"must be a multiple of lm_n_heads = {self.lm_n_heads}, or set lm_head_dim"
        need(whole, self, "lm_hidden_dim", fix)
        need(self.lm_nope_every >= 0, self, "lm_nope_every", "must not be negative")
        even = self.lm_head_width % 2 == 0
        require(even, "lm_head_dim", self.lm_head_width, "must be even, for the rotary embedding")


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig(Checked):
    """From patches to tokens."""

    mp_pixel_shuffle_factor: int = 2
    """Patches per side folded into one image token."""

    def validate(self):
        require_positive(self, "mp_pixel_shuffle_factor")


@dataclass(frozen=True, kw_only=True)
class VLMConfig(ViTConfig, LMConfig, ProjectorConfig):
    """A whole vision-language model. Fields are flat and carry nanoVLM's names."""

    max_img_size: int = 48
    """Longest image edge after resizing, in pixels; beyond vit_img_size, tiles are cut."""
    vlm_pad_token_id: int = 0
    """Token that fills the end of rows; never a target."""
    vlm_bos_token_id: int = 1
    """First token of every conversation."""
    vlm_eos_token_id: int = 2
    """End of turn: supervised, and the only token that stops generation."""
    vlm_image_token_id: int = 3
    """Placeholder that the projected image tokens replace."""

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile: (grid / pixel shuffle factor) squared."""
        return (self.vit_grid // self.mp_pixel_shuffle_factor) ** 2

    def validate(self):
        fits = self.vit_grid % self.mp_pixel_shuffle_factor == 0
        fix = f"must divide the {self.vit_grid} patches per side"
        need(fits, self, "mp_pixel_shuffle_factor", fix)
        fix = f"must be a multiple of vit_img_size = {self.vit_img_size}"
        need(self.max_img_size % self.vit_img_size == 0, self, "max_img_size", fix)
        most = 6 * self.vit_img_size
        fix = f"must be at most 6 x vit_img_size = {most}, as Idefics3 names 6 x 6 tiles"
        need(self.max_img_size <= most, self, "max_img_size", fix)
        names = [f"vlm_{kind}_token_id" for kind in ("pad", "bos", "eos", "image")]
        ids = [getattr(self, name) for name in names]
        require(len(set(ids)) == 4, ", ".join(names), ids, "must be four different tokens")
        fix = f"must exceed every special token id, of which the largest is {max(ids)}"
        need(min(ids) >= 0 and max(ids) < self.lm_vocab_size, self, "lm_vocab_size", fix)
        need(self.vit_n_channels == 3, self, "vit_n_channels", "must be 3 in a VLM")
        need(self.vit_n_classes == 0, self, "vit_n_classes", "must be 0 in a VLM")
        fix = "must be another in a VLM, which takes all patches, so that it would never learn"
        need(self.vit_pool != "map", self, "vit_pool", fix)


RATINGS = ("min_relevance", "min_image_correspondence", "min_visual_dependency", "min_formatting")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """What the model is trained on."""

    source: str = "world"
    """world, a .jsonl .json .csv .parquet file, a folder, hf:owner/name[:set][@split]; a=1 b=2."""
    stream: bool = False
    """Read rows in passing: no pass over all of them first, no length, nothing kept."""
    stream_block: int = 1000
    """Rows of a stream that are held and shuffled together."""
    min_relevance: int = 1
    """Least `relevance_ratings` of a question and answer, 1 to 5, where FineVision rates them."""
    min_image_correspondence: int = 1
    """Least `image_correspondence_ratings`."""
    min_visual_dependency: int = 1
    """Least `visual_dependency_ratings`."""
    min_formatting: int = 1
    """Least `formatting_ratings`."""
    fetch_images: bool = False
    """Download pictures that rows name by web address; otherwise such rows are refused."""
    seed: int = 0
    """Seed of the world's scenes and of the order of the rows."""
    batch_size: int = 2
    """Rows per batch and process."""
    max_length: int = 1024
    """Longest row in tokens; with packing, the length that several conversations fill together."""
    packing: bool = True
    """Put several conversations in one row; they never see each other."""
    max_tiles: int = 64
    """Most tiles of one conversation; more is refused, never cut."""
    tiles_per_batch: int = 0
    """Most tiles of a packed batch, shared by its rows; 0: as many as its tokens allow."""
    val_fraction: float = 0.02
    """Share of a file's rows kept for validation, chosen by a hash of the row."""
    world_questions: int = 4
    """Questions about a built-in scene in one training conversation."""
    world_described: float = 0.2
    """Share of built-in scenes that are described, not asked about."""
    world_first: int = 14000
    """Training scenes that come first and are all described: seeing before answering."""
    world_shapes: int = 2
    """Fewest shapes a training scene is drawn from, of 4; with 1, four of a kind are less rare."""
    workers: int = 0
    """Processes that prepare samples; 0: the training process does."""

    def validate(self):
        require_positive(self, "batch_size max_length max_tiles world_questions stream_block")
        need(1 <= self.world_shapes <= 4, self, "world_shapes", "must be from 1 to 4")
        fix = f"must be 0, or at least batch_size x max_tiles = {self.batch_size * self.max_tiles}"
        enough = self.tiles_per_batch >= self.batch_size * self.max_tiles
        need(not self.tiles_per_batch or enough, self, "tiles_per_batch", fix)
        for name in RATINGS:
            need(1 <= getattr(self, name) <= 5, self, name, "must be from 1 to 5")
        require_rate(self, "val_fraction")
        require_seed(self)
        require(self.world_first >= 0, "world_first", self.world_first, "must not be negative")
        share = self.world_described
        require(0 <= share <= 1, "world_described", share, "must be between 0 and 1")
        require(self.workers >= 0, "workers", self.workers, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Checked):
    """What every training run has, whatever the model."""

    out: str = "runs/tiny"
    """Run folder: configuration, log, loss curve, checkpoints."""
    steps: int = 1500
    """Optimizer steps."""
    accumulate: int = 1
    """Batches per optimizer step."""
    optimizer: Literal["adamw", "muon", "adamw8bit"] = "muon"
    """muon: Muon for the blocks' matrices, AdamW for the rest. adamw8bit needs torchao."""
    lr_muon: float = 0.012
    """Peak learning rate of matrices trained by Muon."""
    weight_decay: float = 0.05
    """Decoupled weight decay; never on norms, biases, embeddings."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.98
    """AdamW's second moment decay."""
    muon_momentum: float = 0.95
    """Muon's momentum."""
    warmup: int = 50
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Shape of the decay to zero after warm-up."""
    layer_decay: float = 1.0
    """Learning rate of each block as a share of the next one's; the embeddings stand below all."""
    ema: float = 0.0
    """Decay of averaged weights, which are evaluated and saved in place of the last; 0: none."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0: none."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the hardware computes it faster, else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block. auto: on a GPU; a CPU earns it back in minutes to hours."""
    seed: int = 0
    """Seed of initial weights and dropout."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 300
    """Steps between evaluations; 0: only at the end."""
    eval_samples: int = 200
    """Validation questions per evaluation."""
    save_every: int = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints kept, newest first; beside them the best evaluated one."""
    resume: Literal["no", "auto"] = "no"
    """auto: continue from the newest checkpoint in the run folder, if there is one."""
    max_bad_steps: int = 3
    """Non-finite steps skipped in a row before stopping."""
    push: str = ""
    """Hub repository, user/name, that gets the result at the end; private if made by this."""
    wandb: bool = False
    """Also log to Weights & Biases (offline unless WANDB_MODE says otherwise)."""

    def validate(self):
        require_positive(self, "steps accumulate log_every eval_samples keep max_bad_steps")
        require_rate(self, "beta1 beta2 muon_momentum ema")
        require_seed(self)
        need(0 < self.layer_decay <= 1, self, "layer_decay", "must be above 0 and at most 1")
        names = "lr_muon weight_decay warmup grad_clip eval_every save_every"
        for name in names.split():
            need(getattr(self, name) >= 0, self, name, "must not be negative")
        is_name = re.fullmatch(rf"{HUB_NAME}/{HUB_NAME}", self.push)
        need(not self.push or is_name, self, "push", "must be user/name")


def require_freeze(cfg: object, parts: str) -> None:
    """Every name of `cfg.freeze` is a part, and one is left to train."""
    names = parts.split()
    need(set(cfg.freeze) <= set(names), cfg, "freeze", f"may name {', '.join(names)}")
    need(set(cfg.freeze) != set(names), cfg, "freeze", "leaves nothing to train")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """How a vision-language model is trained."""

    steps: int = 2300
    """Optimizer steps."""
    lr_muon: float = 0.008
    """Peak learning rate of matrices trained by Muon."""
    eval_every: int = 500
    """Steps between evaluations; 0: only at the end."""
    weight_decay: float = 0.2
    """Decoupled weight decay; never on norms, biases, embeddings."""
    lr_vision: float = 0.0015
    """Peak learning rate of the vision encoder (AdamW)."""
    lr_projector: float = 0.0015
    """Peak learning rate of the projector (AdamW)."""
    lr_language: float = 0.0015
    """Peak learning rate of the language model (AdamW)."""
    freeze: tuple[Literal["vision", "projector", "language"], ...] = ()
    """Parts that do not train."""
    init_from: str = ""
    """Checkpoint whose weights and tokenizer start this run; the model fields are then its own."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Of several processes each has the whole model (ddp), or a part of every block (fsdp)."""
    lora: tuple[Literal["vision", "projector", "language"], ...] = ()
    """Parts that train low-rank adapters instead of their weights (needs peft)."""
    lora_r: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """Adapters count lora_alpha / lora_r."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers that get one, by the end of their names: q_proj v_proj; none named: all."""
    activation_checkpointing: tuple[Literal["vision", "language"], ...] = ()
    """Parts whose blocks run again in the backward pass, not kept; of others, memory decides."""
    answers_every: int = 1
    """Evaluations between pictures of sample answers, answers-STEP.png; 0: none."""
    dry_run: bool = False
    """Build everything, take one step with the largest batch, say what the run will take, stop."""

    def validate(self):
        require_positive(self, "lora_r lora_alpha")
        need(self.answers_every >= 0, self, "answers_every", "must not be negative")
        blocks = set(self.activation_checkpointing) <= {"vision", "language"}
        need(blocks, self, "activation_checkpointing", "may name vision, language")
        names = ("vision", "projector", "language")
        need(set(self.lora) <= set(names), self, "lora", f"may name {', '.join(names)}")
        plain = self.optimizer == "adamw" and not self.ema and not self.lora
        fix = "parts of matrices go with adamw alone: no muon, ema or lora"
        need(self.parallel == "ddp" or plain, self, "parallel", fix)
        fix = "a frozen part trains no adapters, so name it once"
        need(not set(self.lora) & set(self.freeze), self, "lora", fix)
        for name in ("lr_vision", "lr_projector", "lr_language"):
            need(getattr(self, name) >= 0, self, name, "must not be negative")
        require_freeze(self, "vision projector language")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """A training run: model, data, training."""

    model: VLMConfig = field(default_factory=VLMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate(self):
        length, most = self.data.max_length, self.model.lm_max_position_embeddings
        fix = f"must be at most lm_max_position_embeddings = {most}"
        require(length <= most, "data.max_length", length, fix)


# fmt: off
SIGLIP_B = dict(vit_hidden_dim=768, vit_inter_dim=3072, vit_n_heads=12, vit_n_blocks=12,
                vit_patch_size=16)
SMOLVLM_TOKENS = dict(lm_vocab_size=49280, vlm_pad_token_id=2, vlm_bos_token_id=1,
                      vlm_eos_token_id=49279, vlm_image_token_id=49190)
SMOLLM2 = dict(lm_re_base=100000.0, lm_max_position_embeddings=8192, lm_rms_eps=1e-5,
               lm_tie_weights=True, **SMOLVLM_TOKENS)
FINE_TUNE = dict(optimizer="adamw", lr_vision=5e-5, lr_projector=0.005, lr_language=5e-5,
                 warmup=1000, schedule="cosine", beta2=0.95, weight_decay=0.05, steps=40000,
                 accumulate=8, eval_every=500, save_every=500)


def two_stages(name: str, whole: RunConfig) -> dict[str, RunConfig]:
    """A run of other people's backbones in two: the projector alone, then everything."""
    first = replace(whole.train, out=f"runs/{name}-1", freeze=("vision", "language"), steps=2000,
                    warmup=100, lr_projector=0.001)
    second = replace(whole.train, out=f"runs/{name}-2", init_from=f"runs/{name}-1", warmup=300,
                     lr_projector=2e-5, lr_vision=2e-6, lr_language=2e-5)
    return {f"{name}-1": replace(whole, train=first), f"{name}-2": replace(whole, train=second)}


PRESETS: dict[str, RunConfig] = {
    # 1.2 M parameters; the class defaults.
    "tiny": RunConfig(),
    # The same model, trained long enough for the last skills (docs/recipes.md).
    # Dropout, as without it more steps made the pairs that training never shows rarer answers.
    "tiny-long": RunConfig(model=VLMConfig(lm_dropout=0.1),
                           data=DataConfig(world_shapes=1),
                           train=TrainConfig(out="runs/tiny-long", steps=6000, weight_decay=0.3,
                                             eval_every=1000, save_every=1000)),
    # As small, but with SmolLM2's tokenizer and tiles, as llama.cpp wants them (docs/deploy.md).
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
    # SigLIP2-B/16-512 + SmolLM2-360M, tiles and a global view. Kept for the backward pass, the
    # blocks of 4,096 tokens that are 63 tiles would fill 66 GB; their inputs alone fill 3.
    "460m": RunConfig(
        model=VLMConfig(**SIGLIP_B, **SMOLLM2, vit_img_size=512, max_img_size=2048,
                        mp_pixel_shuffle_factor=4, vit_model_type="google/siglip2-base-patch16-512",
                        lm_model_type="HuggingFaceTB/SmolLM2-360M-Instruct",
                        lm_tokenizer="HuggingFaceTB/SmolLM2-360M-Instruct", lm_hidden_dim=960,
                        lm_inter_dim=2560, lm_n_heads=15, lm_n_kv_heads=5, lm_n_blocks=32),
        data=DataConfig(batch_size=1, max_length=4096, workers=2),
        train=TrainConfig(out="runs/460m", activation_checkpointing=("vision", "language"),
                          **FINE_TUNE)),
    # SigLIP2-B/16-512 + Qwen3-0.6B, tiles and a global view. Qwen3's table has 151,936 rows, of
    # which its tokenizer uses 151,669; the image tokens take the next ones.
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

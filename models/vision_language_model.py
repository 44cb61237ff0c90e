"""The whole model: encode images, project them, put them at the text's `<image>`, run the decoder.

Not here: files and the Hub (models/pretrained/load.py), tokenizer and pixels (data/processor.py).

Letters: B batch, T tokens, N tiles, Q image tokens per tile, D width of the language model,
V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from configs import VLMConfig
from models.inference.generate import generate, stream
from models.inference.kv_cache import KVCache
from models.inference.sampling import Sampling
from models.language_model import LanguageModel
from models.modality_projector import ModalityProjector
from models.ops.init import on_meta_device
from models.ops.memory import to_device_async
from models.vision_transformer import ViT

# Patches the encoder sees together: with more a CPU needs memory, but is no faster. To start a
# block costs a GPU's host as much for few as for many.
AT_ONCE = {"cpu": 1 << 13, "cuda": 1 << 17}


class VisionLanguageModel(nn.Module):
    """`logits, loss = model(input_ids, images, attention_mask, targets)`.

    A batch without images runs one blank tile multiplied by zero, so that every process of a
    distributed run builds the same graph and text-only rows train.
    """

    def __init__(
        self, cfg: VLMConfig, vision: ViT | None = None, decoder: LanguageModel | None = None
    ):
        """Parts that are not given are new."""
        super().__init__()
        self.cfg = cfg
        self.vision_encoder = ViT(cfg) if vision is None else vision
        self.MP = ModalityProjector(cfg)
        self.decoder = LanguageModel(cfg) if decoder is None else decoder
        self.compiled_decoder = None  # models/inference/compile.py's compile_decoding sets it

    @property
    def device(self) -> torch.device:
        return self.MP.proj.weight.device

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that freeze and learn at their own rates."""
        return {"vision": self.vision_encoder, "projector": self.MP, "language": self.decoder}

    def embed_images(self, images: Tensor | None) -> Tensor:
        """Tiles [N, 3, H, W] -> image tokens [N, Q, D].

        Without images [0, Q, D], still part of the graph where there is one.
        """
        if images is None or len(images) == 0:
            cfg = self.cfg
            if not torch.is_grad_enabled():
                weight = self.MP.proj.weight
                return weight.new_zeros(0, cfg.tokens_per_tile, weight.shape[0])  # [0, Q, D]
            blank = self.MP.proj.weight.new_zeros(
                1, cfg.vit_n_channels, cfg.vit_img_size, cfg.vit_img_size
            )
            return (self.MP(self.vision_encoder.patches(blank)) * 0)[:0]  # [0, Q, D]
        images = images.to(self.MP.proj.weight.dtype)
        most = AT_ONCE.get(images.device.type, AT_ONCE["cpu"])
        n = math.ceil(len(images) * self.cfg.vit_n_patches / most)
        parts = images.tensor_split(n)  # of equal size, so that all are recomputed or none
        return torch.cat([self.MP(self.vision_encoder.patches(part)) for part in parts])

    def embed(self, input_ids: Tensor, images: Tensor | None) -> Tensor:
        """Token embeddings [B, T, D] with the image tokens at their placeholders, in reading order.

        Raises ValueError naming the row when a row's placeholders are no whole number of tiles, and
        when all placeholders together are not N x Q: scattering anyway would silently corrupt.
        Nobody waits for a GPU to find that out where `input_ids` are on the CPU.
        """
        image_tokens = self.embed_images(images)  # [N, Q, D]
        # Behind the images, so that backwards the table's gradient, as large as it, is gone before.
        x = self.decoder.token_embedding(to_device_async(input_ids, self.device))  # [B, T, D]
        is_image = input_ids == self.cfg.vlm_image_token_id  # [B, T]
        per_row, per_tile = is_image.sum(1), self.cfg.tokens_per_tile
        if (per_row % per_tile).any():
            row = int((per_row % per_tile).nonzero()[0])
            raise ValueError(
                f"row {row} has {int(per_row[row])} image placeholders, "
                f"not a multiple of tokens_per_tile = {per_tile}"
            )
        if int(per_row.sum()) != len(image_tokens) * per_tile:
            raise ValueError(
                f"rows have {(per_row // per_tile).tolist()} tiles' worth of placeholders, "
                f"but {len(image_tokens)} tiles were given"
            )
        slots = to_device_async(is_image.flatten().nonzero()[:, 0], self.device)  # [N * Q]
        found = image_tokens.flatten(0, 1).to(x.dtype)  # [N * Q, D]
        flat = x.flatten(0, 1).index_copy(0, slots, found)  # [B * T, D]
        return flat.view_as(x)

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        reduction: str = "mean",
        return_logits: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """`(logits [B, T, V] or None, loss or None)`.

        input_ids [B, T]; images [N, 3, H, W], normalised, in reading order of the placeholders.
        targets [B, T], already shifted, -100 = no loss; with targets, logits is None unless
        `return_logits`. attention_mask [B, T] marks padding with 0, at the ends of a row only;
        segments [B, T] keep packed samples apart (0 = padding). Both together are a ValueError.
        positions [B, T] restart with every packed sample.
        """
        if attention_mask is not None:
            if segments is not None:
                raise ValueError(
                    "give attention_mask (one sample a row) or segments (packed rows), not both"
                )
            segments = attention_mask.long()
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)  # [B, T]
        hidden = self.decoder(self.embed(input_ids, images), positions, segments)  # [B, T, D]
        loss = None if targets is None else self.decoder.loss(hidden, targets, reduction)
        logits = self.decoder.logits(hidden) if targets is None or return_logits else None
        return logits, loss

    def prefill(
        self,
        input_ids: Tensor,
        images: Tensor | None,
        lengths: Tensor,
        cache: KVCache,
        start: int = 0,
    ) -> Tensor:
        """Run prompts [B, T] into the cache, behind its first `start` tokens -> next logits [B, V].

        The prompts are of unequal `lengths` [B], padded at the end.
        """
        positions = start + torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = positions.expand(input_ids.shape)  # [B, T]
        hidden = self.decoder(self.embed(input_ids, images), positions, cache=cache)  # [B, T, D]
        return self.decoder.logits(
            hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
        )

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """One more token per row, [B] at positions [B] -> next logits [B, V]."""
        x = self.decoder.token_embedding(tokens[:, None])  # [B, 1, D]
        return self.decoder.logits(self.decoder(x, positions[:, None], cache=cache)[:, 0])

    def generate(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sampling: Sampling = Sampling(),
    ) -> Tensor:
        """New tokens [B, at most max_new_tokens]; rows that stopped early end in pad.

        See models/inference/generate.py.
        """
        return generate(self, input_ids, images, attention_mask, sampling)

    def stream(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sampling: Sampling = Sampling(),
    ):
        """`generate`, one step at a time: yields tokens [B], pad for rows that have stopped."""
        return stream(self, input_ids, images, attention_mask, sampling)

    def assembled(self, tensors: dict[str, Tensor]) -> VisionLanguageModel:
        """A plain model of this one's config around other tensors, which are not copied."""
        with on_meta_device():
            model = type(self)(self.cfg)
        model.load_state_dict(tensors, assign=True)
        if self.cfg.lm_tie_weights:
            model.decoder.head.weight = model.decoder.token_embedding.weight
        return model.train(self.training)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None
    ) -> VisionLanguageModel:
        """A model in evaluation mode from a checkpoint directory or the Hub; raises `InputError`.

        Ours, published Idefics3 and SmolVLM, nanoVLM's; a Hub id is taken from the cache offline.
        """
        from models.pretrained import load

        return load.load_vlm(source, revision)

    @classmethod
    def from_backbones(cls, cfg: VLMConfig) -> VisionLanguageModel:
        """A new model whose encoder and decoder start from the weights that `cfg` names, if any.

        `model.cfg` has their sizes. Raises `InputError`.
        """
        vision = ViT.from_pretrained(cfg) if cfg.vit_model_type else None
        cfg = vision.cfg if vision else cfg
        decoder = LanguageModel.from_pretrained(cfg) if cfg.lm_model_type else None
        return cls(decoder.cfg if decoder else cfg, vision, decoder)

    def save_pretrained(self, directory: str | Path, processor=None) -> None:
        """Write an Idefics3 directory: weights, config.json and, given a processor, its files."""
        from models.pretrained import save

        save.save_vlm(self, directory)
        if processor is not None:
            processor.save(directory)

    def push_to_hub(self, repo_id: str, private: bool = True, processor=None) -> str:
        """Upload what `save_pretrained` writes to user/name; returns its address.

        A repository made by this is private unless told otherwise. `export.py --push` also writes a
        model card. Raises `InputError`.
        """
        from models.pretrained import hub

        save = partial(self.save_pretrained, processor=processor)
        return hub.push_saved(save, repo_id, private)

"""The whole model: encode images, project them, splice them into the text, run the decoder.

Not here: files and the Hub (models/pretrained), tokenizer and image processing (data/processor.py).

Letters: B batch, T tokens, N tiles, Q image tokens per tile, D decoder width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import VLMConfig
from models.language_model import LanguageModel
from models.modality_projector import ModalityProjector
from models.ops.memory import split_tiles, to_device_async
from models.pretrained.mixin import PretrainedMixin
from models.vision_transformer import ViT

if TYPE_CHECKING:
    from models.inference.kv_cache import KVCache
    from models.inference.sampling import Sampling


class VisionLanguageModel(PretrainedMixin, nn.Module):
    """`logits, loss = model(input_ids, images, attention_mask, targets)`."""

    def __init__(
        self, cfg: VLMConfig, vision: ViT | None = None, decoder: LanguageModel | None = None
    ):
        super().__init__()
        self.cfg = cfg
        self.vision_encoder = ViT(cfg) if vision is None else vision
        self.MP = ModalityProjector(cfg)
        self.decoder = LanguageModel(cfg) if decoder is None else decoder
        self.compiled_decode: Callable | None = None  # set by compile_decoding

    def __getstate__(self) -> dict:
        """Leave compiled code out of copies and pickles, as `nn.Module` does."""
        return {**super().__getstate__(), "compiled_decode": None}

    @property
    def device(self) -> torch.device:
        return self.MP.proj.weight.device

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules that can be frozen and have their own learning rates."""
        return {"vision": self.vision_encoder, "projector": self.MP, "language": self.decoder}

    def embed_images(self, images: Tensor | None) -> Tensor:
        """Tiles [N, 3, H, W] -> image tokens [N, Q, D]; without images [0, Q, D].

        DDP and FSDP wait for a gradient of every parameter on every process. With gradients
        enabled, a batch without images therefore encodes one blank tile and drops its tokens.
        """
        cfg, weight = self.cfg, self.MP.proj.weight
        if images is None or len(images) == 0:
            if not torch.is_grad_enabled():
                return weight.new_zeros(0, cfg.tokens_per_tile, cfg.lm_hidden_dim)  # [0, Q, D]
            blank = weight.new_zeros(1, cfg.vit_n_channels, cfg.vit_img_size, cfg.vit_img_size)
            return self.MP(self.vision_encoder.patches(blank))[:0]  # [0, Q, D]
        # Encode in chunks to bound the memory of a batch with many tiles.
        chunks = split_tiles(images.to(weight.dtype), cfg.vit_n_patches)
        tokens = [self.MP(self.vision_encoder.patches(chunk)) for chunk in chunks]
        return torch.cat(tokens)  # [N, Q, D]

    def embed(self, input_ids: Tensor, images: Tensor | None) -> Tensor:
        """Token embeddings [B, T, D] with image tokens at their placeholders, in reading order.

        Raises ValueError unless the number of placeholders is a multiple of Q in every row and
        N * Q in total. Keep `input_ids` on the CPU to avoid a GPU synchronisation.
        """
        image_tokens = self.embed_images(images)  # [N, Q, D]
        # Embed tokens after images: the embedding gradient is then created early in backward and
        # does not add to the peak memory.
        x = self.decoder.token_embedding(to_device_async(input_ids, self.device))  # [B, T, D]
        is_image = input_ids == self.cfg.vlm_image_token_id  # [B, T]
        n_placeholders, Q = is_image.sum(1), self.cfg.tokens_per_tile
        if (n_placeholders % Q).any():
            row = int((n_placeholders % Q).nonzero()[0])
            raise ValueError(
                f"input_ids, row {row}: {int(n_placeholders[row])} image placeholders; "
                f"expected a multiple of tokens_per_tile = {Q}"
            )
        if int(n_placeholders.sum()) != len(image_tokens) * Q:
            raise ValueError(
                f"input_ids: rows have placeholders for {(n_placeholders // Q).tolist()} tiles, "
                f"but {len(image_tokens)} tiles were given"
            )
        where = to_device_async(is_image.flatten().nonzero()[:, 0], self.device)  # [N * Q]
        image_tokens = image_tokens.flatten(0, 1).to(x.dtype)  # [N * Q, D]
        return x.flatten(0, 1).index_copy(0, where, image_tokens).view_as(x)  # [B, T, D]

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

        `input_ids` [B, T]. `images` [N, 3, H, W]: normalised tiles in the reading order of their
        placeholders. `targets` [B, T]: already shifted, -100 = unsupervised; with targets, logits
        are None unless `return_logits`. `attention_mask` [B, T]: 0 is padding, left or right.
        `segments` [B, T]: the number of each token's sample in a packed row, 0 = padding;
        `positions` [B, T] restart with every sample. Raises ValueError for inner padding.
        """
        if attention_mask is not None:
            if segments is not None or positions is not None:
                raise ValueError("attention_mask implies segments and positions; pass only it")
            segments = attention_mask.long()
            n_starts = (F.pad(segments, (1, 0)).diff(dim=1) == 1).sum(1)  # [B] runs of ones
            if (n_starts > 1).any():
                row = int((n_starts > 1).nonzero()[0])
                raise ValueError(f"attention_mask, row {row}: padding lies between tokens")
            positions = (segments.cumsum(1) - 1).clamp(min=0)  # [B, T]
        hidden = self.decoder(self.embed(input_ids, images), positions, segments)  # [B, T, D]
        loss = None if targets is None else self.decoder.loss(hidden, targets, reduction)
        logits = self.decoder.logits(hidden) if targets is None or return_logits else None
        return logits, loss

    def prefill(
        self, input_ids: Tensor, images: Tensor | None, lengths: Tensor, cache: KVCache, start=0
    ) -> Tensor:
        """Append prompts [B, T] to a cache of `start` tokens -> next logits [B, V].

        Prompts have `lengths` [B] and padding at the end, which causal attention hides.
        """
        positions = start + torch.arange(input_ids.shape[1], device=input_ids.device)  # [T]
        positions = positions.expand(input_ids.shape)  # [B, T]
        hidden = self.decoder(self.embed(input_ids, images), positions, cache=cache)  # [B, T, D]
        rows = torch.arange(len(lengths), device=hidden.device)
        return self.decoder.logits(hidden[rows, lengths - 1])  # after each row's last token

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Feed one token per row, [B] at positions [B] -> next logits [B, V]."""
        x = self.decoder.token_embedding(tokens[:, None])  # [B, 1, D]
        return self.decoder.logits(self.decoder(x, positions[:, None], cache=cache)[:, 0])

    def generate(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sampling: Sampling | None = None,
    ) -> Tensor:
        """New tokens [B, n], greedy by default; a row is padded after its end-of-turn token."""
        from models.inference.generate import steps

        answer = steps(self, input_ids, images, attention_mask, sampling)
        return torch.stack([step.tokens for step in answer], dim=1)

    @classmethod
    def from_backbones(cls, cfg: VLMConfig) -> VisionLanguageModel:
        """A model from the encoder and decoder that `cfg` names; `model.cfg` gets their sizes."""
        vision = ViT.from_pretrained(cfg) if cfg.vit_model_type else None
        cfg = vision.cfg if vision else cfg  # with the encoder's sizes
        decoder = LanguageModel.from_pretrained(cfg) if cfg.lm_model_type else None
        return cls(decoder.cfg if decoder else cfg, vision, decoder)

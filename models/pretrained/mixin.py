"""`from_pretrained`, `save_pretrained` and `push_to_hub` of every model class.

ViT, LanguageModel, VisionLanguageModel and Classifier inherit them. Each method imports its module
when called, so that the architecture files import no file or network code. LOADERS in load.py and
SAVERS in save.py map a class to its functions.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Self


class PretrainedMixin:
    """Checkpoints and the Hub, for the model classes in LOADERS and SAVERS."""

    @classmethod
    def from_pretrained(cls, source: Any, revision: str | None = None) -> Self:
        """A model in evaluation mode. Raises `InputError`.

        VisionLanguageModel: `source` is a checkpoint directory or Hub id, in our format, Idefics3,
        SmolVLM or nanoVLM. ViT, LanguageModel, Classifier: `source` is a config whose
        `vit_model_type` or `lm_model_type` names the directory or Hub id. Sizes come from the
        weights; `model.cfg` holds them. A ViT keeps the config's `vit_img_size`, a LanguageModel at
        least its `lm_vocab_size`. `revision` is a branch, tag or commit of the Hub repository.
        """
        from models.pretrained import load

        return load.load_pretrained(cls, source, revision)

    def save_pretrained(self, directory: str | Path, processor: Any = None) -> None:
        """Write weights, config.json and, given a processor, its files. Raises `InputError`.

        transformers loads the directory without conversion if it has this architecture.
        """
        from models.pretrained import save

        save.save_pretrained(self, directory)
        if processor is not None:
            processor.save(directory)

    def push_to_hub(self, repo_id: str, private: bool = True, processor: Any = None) -> str:
        """Upload the files of `save_pretrained` to `repo_id`, user/name; returns its URL.

        A new repository is private unless `private` is False. A model card is written by
        `export.py --push` and `classify.py export --push`, not here. Raises `InputError`.
        """
        from models.pretrained import hub

        save = partial(self.save_pretrained, processor=processor)
        return hub.push_saved(save, repo_id, private)

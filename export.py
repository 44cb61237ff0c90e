"""Export a checkpoint: to another format or dtype, or to the Hub.

python export.py runs/demo --out demo-idefics3 --dtype bf16
python export.py runs/demo --to nanovlm --out demo-nanovlm
python export.py runs/demo --to text-only --out demo-text
python export.py runs/demo --push user/name
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from cli import command, parse
from config_tools import InputError
from data.processor import Processor
from engine.inference.chat import open_checkpoint
from engine.publishing.model_card import write_repository
from models.pretrained import hub
from models.pretrained.save import save_nanovlm, unsupported_reason
from models.vision_language_model import VisionLanguageModel

DTYPES = {"same": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Patches per side for which every transformers version computes the right positions.
SAFE_GRIDS = (16, 32)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Export a checkpoint."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint, run folder (its newest checkpoint), or Hub id."""
    to: Literal["transformers", "nanovlm", "text-only"] = "transformers"
    """transformers: Idefics3 format; text-only: only the language model."""
    out: Path | None = None
    """New directory to write."""
    dtype: Literal["same", "fp32", "bf16", "fp16"] = "same"
    """Data type of the weights."""
    push: str = ""
    """Hub repository (user/name) to upload to, in Idefics3 format and with a model card."""
    public: bool = False
    """Make the repository public if this push creates it."""
    push_dry_run: Path | None = None
    """New directory to write what --push would upload; nothing is uploaded."""


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    target = args.out or args.push_dry_run
    if (args.out is not None) + (args.push_dry_run is not None or bool(args.push)) != 1:
        raise InputError("export.py needs one of --out, --push and --push-dry-run.")
    if args.out is None and args.to != "transformers":
        raise InputError(f"to = {args.to!r}: only --to transformers can be pushed; use --out.")
    if target is not None and target.exists():
        raise InputError(f"{target} already exists; name a new directory.")
    with tempfile.TemporaryDirectory(dir=_parent(target)) as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        if args.out is not None:
            export(args, folder)
        else:
            name = args.push or args.push_dry_run.name
            write_repository(args.checkpoint, folder, name, DTYPES[args.dtype])
        if target is None:
            print(hub.push(folder, args.push, private=not args.public))
        else:
            shutil.move(folder, target)  # only once it is complete
            print(f"wrote {target}")


def _parent(target: Path | None) -> Path | None:
    if target is not None and not target.absolute().parent.is_dir():
        raise InputError(f"{target}: its parent folder does not exist; create it first.")
    return None if target is None else target.absolute().parent


def export(args: Arguments, folder: Path) -> None:
    """Write the checkpoint into `folder` in the format `args.to`."""
    model, processor = open_checkpoint(args.checkpoint)
    model = model.to(DTYPES[args.dtype])
    if args.to == "text-only":
        save_text(model, processor, folder)
    elif args.to == "nanovlm":
        save_nanovlm(model, folder, tokenizer=str(args.out))
        processor.save(folder)
    else:
        reason, grid = unsupported_reason(model.cfg), model.cfg.vit_grid
        if reason:
            print(f"only picoVLM loads this export: Idefics3 format does not support {reason}")
        elif grid not in SAFE_GRIDS:
            print(
                f"{grid} x {grid} patches per tile: transformers 4.55 to 5.16 may compute wrong "
                "positions in bf16, and 4.55 to 4.57 do in fp32; see docs/deploy.md"
            )
        model.save_pretrained(folder, processor)


def save_text(model: VisionLanguageModel, processor: Processor, folder: Path) -> None:
    """Write the decoder and its tokenizer as a ...ForCausalLM of transformers."""
    model.decoder.save_pretrained(folder)
    processor.save(folder)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        (folder / name).unlink()


if __name__ == "__main__":
    command(main)

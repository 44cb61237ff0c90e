"""Every test runs offline, from the repository root, on random weights of tiny shapes."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

from configs import VLMConfig
from data import processor as processors
from models.vision_language_model import VisionLanguageModel

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    return SHARED


@pytest.fixture(scope="session")
def tiny_processor() -> processors.Processor:
    return processors.build(VLMConfig())


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random norms, biases and positions: ones and zeros would hide a mapping error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "position" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture
def tiny_model() -> VisionLanguageModel:
    torch.manual_seed(0)
    return randomise(VisionLanguageModel(VLMConfig()))

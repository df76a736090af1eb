"""The embedded tiny VLM: a LLaVA-OneVision of about 1.5 million parameters that ships with the package."""

from pathlib import Path

from focuslib.models.base import Needs
from focuslib.models.llava_onevision import LlavaOnevision
from focuslib.models.media import FrameSampling

CHECKPOINT = Path(__file__).parent / "tiny_onevision"  # config.json, model.safetensors, tokenizer files …


class TinyOnevision(LlavaOnevision):
    """The embedded model: every frame of the embedded benchmark's clips (4 a second), at most 32, 6 × 6 tokens each."""

    name = "tiny_onevision"
    checkpoint = str(CHECKPOINT)
    default_sampling = FrameSampling(max_frames=32, per_second=4)
    needs = Needs(memory_gb=2)

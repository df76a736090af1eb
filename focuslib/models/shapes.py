"""Decoders of a published shape with random weights: what time and memory need of a model, without a checkpoint."""

from typing import Any, ClassVar

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from focuslib.errors import UserError, pick
from focuslib.grid import VisualGrid
from focuslib.models.base import VLM, Inputs
from focuslib.models.media import FrameSampling

SHAPES = {
    "qwen2-7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
SHAPE_NAME = "shape"  # no adapter of the registry, which completion reads by their names in these files
VOCABULARY = 1024  # the output head is no part of what is compared
ROWS, COLUMNS, BEFORE, AFTER = 13, 14, 14, 20  # tokens a frame, as LLaVA-Video pools them; text before and after


class Shape(VLM):
    """A decoder alone: its inputs are embeddings that change slowly over time, and it has no vision tower."""

    name: ClassVar[str] = SHAPE_NAME

    def clip(self, frames: int) -> Inputs:
        """A prompt of so many frames: what stays the same in them, plus noise that differs from frame to frame."""
        generator = torch.Generator().manual_seed(0)
        width = self.model.config.hidden_size
        still = torch.randn(1, ROWS * COLUMNS, width, generator=generator)
        noise = 0.4 * torch.randn(frames, ROWS * COLUMNS, 1, generator=generator).abs()
        video = still + noise * torch.randn(frames, ROWS * COLUMNS, width, generator=generator)
        text = torch.randn(BEFORE + AFTER, width, generator=generator)
        embeds = torch.cat([text[:BEFORE], video.flatten(0, 1), text[BEFORE:]]).to(self.device, self.dtype)
        grid = VisualGrid(BEFORE, frames * ROWS * COLUMNS, frames, ROWS, COLUMNS, ROWS * COLUMNS, COLUMNS)
        return self.inputs_from_embeds(embeds, grid)


def load_shape(
    name: str, *, layers: int | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Shape:
    """A decoder of a shape (see SHAPES). layers: how many of its layers; None: all."""
    dimensions: dict[str, Any] = dict(pick(SHAPES, name, "shape"))
    if layers is not None:
        if not 1 <= layers <= dimensions["num_hidden_layers"]:
            raise UserError(f"shape:{name} has {dimensions['num_hidden_layers']} layers; layers is {layers}")
        dimensions["num_hidden_layers"] = layers
    rotary = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen2Config(**dimensions, vocab_size=VOCABULARY, tie_word_embeddings=False, rope_parameters=rotary)
    with torch.device("meta"):
        model: Any = Qwen2ForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, config.initializer_range, generator=generator)
            else:
                parameter.fill_(0)
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                torch.nn.init.ones_(module.weight)
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.generation_config.eos_token_id = None
    return Shape(model, None, FrameSampling(max_frames=64))

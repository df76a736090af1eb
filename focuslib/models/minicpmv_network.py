"""MiniCPM-V 2.6 as a transformers model, built from stock blocks: SigLIP at native aspect ratio, a resampler, Qwen2.

Parameter names are the checkpoint's own (vpm., resampler., llm.): it loads without any renaming or remote code.
"""

import warnings
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2Encoder, Idefics2VisionEmbeddings


class MiniCPMVConfig(PreTrainedConfig):
    """query_num: visual tokens a slice (64). The rest are the configurations of the two towers."""

    model_type = "focuslib_minicpmv"
    sub_configs: ClassVar[Any] = {"text_config": Qwen2Config, "vision_config": Idefics2VisionConfig}

    text_config: Qwen2Config | None = None
    vision_config: Idefics2VisionConfig | None = None
    query_num: int = 64


class Embeddings(Idefics2VisionEmbeddings):
    """Patch embeddings whose positions are spread over the tower's table, whatever the image's shape."""

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [B, 3, H, W], sides multiples of the patch size → [B, patches, D]."""
        maps = self.patch_embedding(pixels)
        rows, columns = maps.shape[-2:]
        positions = self.buckets(rows)[:, None] * self.num_patches_per_side + self.buckets(columns)
        return maps.flatten(2).transpose(1, 2) + self.position_embedding(positions.flatten().to(pixels.device))

    def buckets(self, count: int) -> Tensor:
        """Which row (column) of the table each of `count` rows of patches takes, [count] int64.

        In float32 with the original's rounding: the stock helper differs from it for some counts.
        """
        side = self.num_patches_per_side
        boundaries = torch.arange(1 / side, 1.0, 1 / side, device="cpu")
        step: Any = 1 / torch.tensor(count, device="cpu")  # a tensor, as the original has it: it rounds to float32
        fractions = torch.arange(0, 1 - 1e-6, step, device="cpu")
        return torch.bucketize(fractions, boundaries, right=True)


class VisionTower(nn.Module):
    """SigLIP without pooling head."""

    def __init__(self, config: Idefics2VisionConfig):
        super().__init__()
        config._attn_implementation = "sdpa"  # the encoder reads it; only a whole stock model would set it
        self.embeddings = Embeddings(config)
        whole: Any = config  # the stock encoder is annotated with the whole model's configuration
        self.encoder = Idefics2Encoder(whole)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [B, 3, H, W] → [B, patches, D_vision]."""
        hidden = self.encoder(inputs_embeds=self.embeddings(pixels)).last_hidden_state
        return self.post_layernorm(hidden)


class Resampler(nn.Module):
    """One cross attention from learned queries to an image's patches, with 2-D sine-cosine positions on the keys."""

    def __init__(self, queries: int, hidden: int, vision: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, hidden))
        self.kv_proj = nn.Linear(vision, hidden, bias=False)
        self.attn = nn.MultiheadAttention(hidden, hidden // 128, batch_first=True)
        self.ln_q = nn.LayerNorm(hidden, eps=1e-6)
        self.ln_kv = nn.LayerNorm(hidden, eps=1e-6)
        self.ln_post = nn.LayerNorm(hidden, eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(hidden, hidden))

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """patches: [B, rows · columns, D_vision] → [B, queries, D]."""
        values = self.ln_kv(self.kv_proj(patches))
        positions = sine_cosine_positions(values.shape[-1], rows, columns).to(values)
        queries = self.ln_q(self.query).expand(len(values), -1, -1)
        return self.ln_post(self._attend(queries, values + positions, values)) @ self.proj

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What `self.attn` computes, but with its output projection called as a layer, which may be an 8-bit one."""
        weights, biases = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)  # [B, heads, N, d]
            for x, weight, bias in zip((queries, keys, values), weights, biases, strict=True)
        )
        return self.attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def sine_cosine_positions(width: int, rows: int, columns: int) -> Tensor:
    """[rows · columns, width] float32: one half of the channels encodes the column, the other the row."""
    frequency = np.arange(width // 4, dtype=np.float32) / (width / 4.0)
    frequency = 1.0 / 10000**frequency

    def encode(count: int) -> np.ndarray:
        angle = np.outer(np.arange(count, dtype=np.float32), frequency)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    column = np.broadcast_to(encode(columns)[None], (rows, columns, width // 2))
    row = np.broadcast_to(encode(rows)[:, None], (rows, columns, width // 2))
    return torch.from_numpy(np.concatenate([column, row], axis=2).reshape(rows * columns, width)).float()


class MiniCPMVModel(PreTrainedModel):
    """The whole model. Its inputs are the language model's (`inputs_embeds`); `encode` turns slices into embeddings."""

    config_class = MiniCPMVConfig
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Qwen2DecoderLayer", "Idefics2EncoderLayer", "Resampler"]  # noqa: RUF012

    def __init__(self, config: MiniCPMVConfig):
        super().__init__(config)
        text: Any = config.text_config
        vision: Any = config.vision_config
        self.vpm = VisionTower(vision)
        self.resampler = Resampler(config.query_num, text.hidden_size, vision.hidden_size)
        self.llm: Any = Qwen2ForCausalLM(text)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def encode(self, pixels: Tensor) -> Tensor:
        """Slices of one shape [B, 3, H, W] → [B, query_num, D]."""
        patch = self.config.vision_config.patch_size
        return self.resampler(self.vpm(pixels), pixels.shape[2] // patch, pixels.shape[3] // patch)

    def forward(self, **inputs: Any):
        return self.llm(**inputs)

    def generate(self, **inputs: Any) -> Tensor:
        with warnings.catch_warnings():  # as in the original, the repetition penalty sees the new tokens only
            warnings.filterwarnings("ignore", message="Passing `repetition_penalty` with `inputs_embeds`")
            return self.llm.generate(**inputs)

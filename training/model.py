"""The tiny VLM: a stock ``LlavaOnevisionForConditionalGeneration`` with small numbers in its configuration."""

import torch
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.qwen2 import modeling_qwen2

from focuslib.tasks.tinyvideo.scenes import SIZE


def tiny_config(tokenizer) -> LlavaOnevisionConfig:
    """96 × 96 pixels → 12 × 12 patches → 6 × 6 = 36 tokens a frame; 8 decoder layers, hidden 128, 4 heads of 32."""
    token = tokenizer.convert_tokens_to_ids
    vision = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=SIZE,
        patch_size=8,
        vision_use_head=False,
    )
    text = Qwen2Config(
        initializer_range=0.06,  # about 1 / sqrt(hidden): .02 starts a model this narrow too slowly
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=token("<image>"),
        video_token_id=token("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[SIZE, SIZE], [SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]],
        tie_word_embeddings=True,
    )


def build_model(tokenizer, seed: int) -> LlavaOnevisionForConditionalGeneration:
    """The untrained model, float32, the same for the same seed."""
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(tiny_config(tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.text_config.eos_token_id,
        pad_token_id=model.config.text_config.pad_token_id,
        do_sample=False,
    )
    return model


def fuse(model: LlavaOnevisionForConditionalGeneration) -> None:
    """Compile, in place, what is element-wise: on a CPU it otherwise takes as long as the matrix products."""
    modeling_qwen2.apply_rotary_pos_emb = torch.compile(modeling_qwen2.apply_rotary_pos_emb, dynamic=True)
    for layer in model.model.language_model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.compile(dynamic=True)
    for layer in (*model.model.vision_tower.encoder.layers, model.model.multi_modal_projector):
        layer.compile(dynamic=True)


def pixels(frames: torch.Tensor) -> torch.Tensor:
    """What the tower reads: uint8 [..., H, W, 3] → float32 [..., 3, H, W] in −1..1."""
    return frames.movedim(-1, -3).float().div_(127.5).sub_(1.0)

"""Tiny random models of many decoder families of transformers, none of whose parameters is left at a neutral value."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny_processors as processors
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PI0Config,
    PI0ForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from focuslib.grid import VisualGrid
from focuslib.methods import Dense, Focus

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GRID = VisualGrid(4, 24, 2, 3, 4, 12, 4)
TOKENS = 40
IMAGE = 90
MARKERS = list(range(90, 96))  # the vocabulary ends here


@dataclass(frozen=True)
class Asks(Dense):
    """Asks for every attention matrix, and changes none."""

    def wants_probabilities(self, prefill, layer):
        return True


@dataclass(frozen=True)
class Replay(Focus):
    """Focus that keeps given tokens instead of choosing them."""

    kept: dict = field(default_factory=dict)

    def after_attention(self, prefill, layer, hidden):
        if layer not in self.kept:
            return hidden, None
        return hidden, prefill.keep(torch.isin(prefill.present, self.kept[layer]))


def family(name: str, attention: str, **settings) -> SimpleNamespace:
    """A language model whose prompt holds GRID, as `install` takes it."""
    config = CONFIG_MAPPING[name](**{**TEXT, **settings})
    return vlm(AutoModelForCausalLM.from_config(config, attn_implementation=attention))


def text_model(name: str, attention: str, **settings) -> SimpleNamespace:
    """The same for families without a class for text alone."""
    return vlm(AutoModel.from_config(CONFIG_MAPPING[name](**{**TEXT, **settings}), attn_implementation=attention))


def vlm(model: PreTrainedModel, grid: VisualGrid = GRID, seed: int = 0) -> SimpleNamespace:
    """Evaluation mode, and noise on every parameter: scales of one and biases of zero would hide a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if model.can_generate():
        model.generation_config.eos_token_id = None
    return SimpleNamespace(model=model.eval(), grid=grid)


def prompt(tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, IMAGE, (1, tokens), generator=torch.Generator().manual_seed(1))}


def decoding_error(vlm, inputs: dict, layers: tuple, retention: tuple, steps: int = 16) -> float:
    """The largest difference of logits between cached decoding under Focus and recomputation of the whole prompt."""
    settings = {"selected_layers": layers, "retention": retention, "vector_size": 8, "m_tile": 64}
    with Focus(**settings)(vlm) as run:
        answer = vlm.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=steps,
            suppress_tokens=MARKERS,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert len(run.last.kept[layers[-1]]) < run.last.grid.length
    new, worst = answer.sequences[:, inputs["input_ids"].shape[1] :], 0.0
    for step in range(steps):
        with Replay(**settings, kept=run.last.kept)(vlm):
            logits = vlm.model(**longer(inputs, new[:, :step]), use_cache=False).logits[0, -1]
        worst = max(worst, float((logits - answer.logits[step][0]).abs().max()))
    return worst


def longer(inputs: dict, new: torch.Tensor) -> dict:
    """The inputs of a prompt with new tokens [1, N] after it."""
    more = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new], 1)}
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            more[name] = torch.nn.functional.pad(inputs[name], (0, new.shape[1]), value=int(name == "attention_mask"))
    if (seen := inputs.get("image_attention_mask")) is not None:  # which images each token attends to
        more["image_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, new.shape[1], -1)], 1)
    return more


def qwen3_vl(attention: str) -> tuple[SimpleNamespace, dict]:
    """Qwen3-VL with visual features added after layers 0, 1 and 2, and a prompt with an image of 4 × 4 tokens."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config={**TEXT, "num_hidden_layers": 5, "rope_parameters": rope}, vision_config=vision,
        image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    config._attn_implementation = attention
    ids = prompt(28)["input_ids"]
    ids[0, 3], ids[0, 4:20], ids[0, 20] = 92, IMAGE, 93
    pixels = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    inputs = {
        "input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == IMAGE).int(), "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    return vlm(Qwen3VLForConditionalGeneration(config), VisualGrid(4, 16, 1, 4, 4, 16, 4)), inputs


def paligemma_config() -> PaliGemmaConfig:
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 32,
    }  # fmt: skip
    text = {**TEXT, "model_type": "gemma"}
    return PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32)


def paligemma(attention: str) -> tuple[SimpleNamespace, dict]:
    """PaliGemma, whose whole prompt attends in both directions, and a prompt with an image of 4 × 4 tokens."""
    config = paligemma_config()
    config._attn_implementation = attention
    ids = prompt(24)["input_ids"]
    ids[0, :16] = IMAGE
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    return vlm(PaliGemmaForConditionalGeneration(config), VisualGrid(0, 16, 1, 4, 4, 16, 4)), inputs


def pi0() -> PreTrainedModel:
    """A VLM beside an action expert of the same shape."""
    text = {**TEXT, "num_hidden_layers": 2}
    return PI0ForConditionalGeneration(PI0Config(vlm_config=paligemma_config(), dit_config=GemmaConfig(**text)))


def gemma4() -> PreTrainedModel:
    """A VLM whose vision tower has layers of the decoder's shape."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    return Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=TEXT | {"vocab_size_per_layer_input": 96}, vision_config=vision)
    )


# ---- checkpoints of today's families with real processors, for the generic adapter ---------------------------------

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 4}  # fmt: skip
WORDS = TEXT | {"num_hidden_layers": 5, "vocab_size": processors.VOCABULARY, "max_position_embeddings": 4096}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
               "out_hidden_size": 32, "temporal_patch_size": 2, "spatial_merge_size": 2}  # fmt: skip
CHECKPOINTS = {  # family → its processor, and the parts of its config beside the placeholders' ids
    "qwen2_5_vl": (lambda: processors.qwen("qwen2_5_vl"), {
        "text_config": WORDS | {"rope_parameters": MROPE},
        "vision_config": QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
    }),
    "qwen3_vl": (lambda: processors.qwen("qwen3_vl"), {
        "text_config": WORDS | {"rope_parameters": MROPE | {"mrope_interleaved": True}},
        "vision_config": QWEN_VISION
        | {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]},
    }),
    "internvl": (processors.internvl, {
        "text_config": WORDS | {"model_type": "qwen3"}, "image_seq_length": 4,
        "vision_config": VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
    }),
    "smolvlm": (processors.smolvlm, {
        "text_config": WORDS | {"model_type": "llama"}, "vision_config": VISION, "scale_factor": 2,
    }),
    "llava_next_video": (processors.llava_next_video, {
        "text_config": WORDS | {"model_type": "llama"}, "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
        "vision_config": VISION | {"model_type": "clip_vision_model", "num_hidden_layers": 2},
        "image_seq_length": 16, "video_seq_length": 4,
    }),
    "video_llama_3": (processors.video_llama_3, {
        "text_config": WORDS | {"model_type": "qwen2"}, "vision_config": {**VISION, "image_size": None},
    }),
    "mistral3": (processors.mistral3, {
        "text_config": WORDS | {"model_type": "ministral3"}, "spatial_merge_size": 2,
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
    }),
    "paddleocr_vl": (processors.paddleocr_vl, {
        "text_config": WORDS | {"rope_parameters": MROPE}, "vision_config": VISION | {"image_size": 32},
    }),
}  # fmt: skip
VIDEO_FAMILIES = [name for name in CHECKPOINTS if name not in ("mistral3", "paddleocr_vl")]


def write_checkpoint(name: str, folder: Path, tower: int | None = None, **text: Any) -> Path:
    """A checkpoint of one of CHECKPOINTS: random weights, config, processor and tokenizer.

    tower: layers of its vision tower. text: of its text_config.
    """
    make, settings = CHECKPOINTS[name]
    processor = make()
    number = processor.tokenizer.convert_tokens_to_ids
    tokens = {kind: number(getattr(processor, f"{kind}_token", None) or "<|endoftext|>") for kind in ("image", "video")}
    ids = {f"{kind}_token_{part}": token for kind, token in tokens.items() for part in ("id", "index")}
    ids |= {f"vision_{end}_token_id": number(f"<|vision_{end}|>") or 0 for end in ("start", "end")}
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    if settings["vision_config"].get("image_size", 0) is None:
        del settings["vision_config"]["image_size"]
    if tower is not None:
        settings["vision_config"]["depth" if "depth" in settings["vision_config"] else "num_hidden_layers"] = tower
    settings["text_config"] |= {"eos_token_id": number("<|im_end|>"), "pad_token_id": number("<|endoftext|>"), **text}
    family = CONFIG_MAPPING[name]
    known = {key: value for key, value in ids.items() if key in family().to_dict() or key in family.attribute_map}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(family(**settings, **known))
    vlm(model).model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

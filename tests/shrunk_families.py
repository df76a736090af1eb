"""Tiny random models of the installed transformers' families, and prompts with an image, by rule.

A config is shrunk by the names of its numbers; CHANGES has what the rule misses. An image is whatever tensors the
family's own `get_image_features` takes; how many placeholders it needs is what that gives back.
"""

import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tiny_families import IMAGE, MARKERS, prompt, vlm
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as FAMILIES

from focuslib.errors import UserError
from focuslib.grid import VisualGrid
from focuslib.models.placeholders import plane, runs_of
from focuslib.prefill.decoder import find_decoder

# number by the end of its name; the first that fits
SIZES = {
    r"num_key_value_heads|num_kv_heads|n_kv_heads|num_query_groups": 2,
    r"heads|n_head|num_attention_heads": 4,
    r"experts_per_tok(en)?|top_?k|moe_k": 2,
    r"num_(local_|routed_)?experts|n_routed_experts": 4,
    r"n_group|topk_group|first_k_dense_replace": 1,
    r"(layers|depth|n_layer|num_blocks)": 3,
    r"head_dim": 8,
    r"(intermediate_size|ffn_dim|mlp_dim|ffn_hidden_size|d_ff|dim_feedforward)": 48,
    r"vocab_size(_per_layer_input)?": 96,
    r"(hidden_size|d_model|embed_dim|hidden_dim|_width|(?<!head)_dim|projection_size|lora_rank)": 32,
}
LAYER_LISTS = r"(deepstack|fullatt|layer).*(ind|ids|layers)|feature_layers?$"
KEPT = ("image", "patch", "max_position", "window", "num_channels", "in_channels", "chunk", "position_embedding")
SECTIONS = (None, [2, 1, 1], [1, 1, 2], [1, 1, 0])  # parts of a rotary embedding that default to a large head
PATCHES = 8  # a side
ROPE = {"rope_type": "default", "rope_theta": 1e4}
WORDS = {"<image>": IMAGE, "<|extra_200|>": IMAGE + 1, "<|image token|>": IMAGE + 2}
CHANGES: dict[str, dict[str, Any]] = {  # of the shrunk config, part by part
    "chameleon": {"vocabulary_map": WORDS, "vq_config": {"resolution": 64, "base_channels": 32}},
    "cohere_compass": {"text_config": {
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"full_attention": ROPE | {"mrope_section": [2, 1, 1]}},
    }},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dots3_note": {
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
        "text_config": {
            "per_layer_config": {}, "layer_types": ["indexed_attention"] * 3, "num_key_value_heads": 4,
        },
    },
    "emu3": {"vocabulary_map": WORDS, "vq_config": {"base_channels": 32}},
    "fast_vlm": {"vision_config": {"hidden_size": 3072}},
    "gemma3": {"mm_tokens_per_image": 16},
    "gemma3n": {"text_config": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_topk": 16}},
    "granite4_vision": {
        "downsample_rate": "1/2", "deepstack_layer_map": [[0, 0], [1, 1]], "spatial_target_layers": [0, 0, 1, 1],
        "vision_config": {"hidden_size": 64},
    },
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": ROPE | {"mrope_section": [1, 1, 1, 1]}}},
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 1, 2]}},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "perception_lm": {"vision_config": {"architecture": "vit_tiny_patch16_224", "model_args": {
        "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64,
    }, "image_size": 64}},
    "shieldgemma2": {"mm_tokens_per_image": 16},
    "qwen4_exp": {"text_config": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 128,
    }},
}  # fmt: skip


@dataclass(frozen=True)
class Tried:
    """A family's tiny model, and a prompt that it runs.

    model: as `install` takes it, with the grid of the prompt. image: whether the prompt has one; else it is text.
    """

    model: SimpleNamespace
    inputs: dict[str, Tensor]
    image: bool


def tried(name: str, attention: str) -> Tried:
    """A family as the first of the rules builds it that runs a prompt with an image; if none does, a prompt of text.

    Raises UserError if its decoder is refused, whatever it would run; else whatever hinders it.
    """
    text: Tried | None = None
    why: Exception | None = None
    seen = set()
    for small_image, sections in product((True, False), SECTIONS):
        try:
            config = shrunk(name, sections, small_image)
            if (written := config.to_json_string(use_diff=False)) in seen:
                continue
            seen.add(written)
            model = built(name, config, attention)
            find_decoder(model)
            if (found := image_prompt(model)) is not None:
                return Tried(vlm(model, found[1]), found[0], True)
            if text is None:
                inputs = prompt() | cross_attended(model)
                with torch.inference_mode():
                    model(**inputs, use_cache=False)
                text = Tried(vlm(model), inputs, False)
        except UserError:
            raise
        except Exception as error:  # whatever a family may raise
            why = why or error
    if text is None:
        assert why is not None
        raise why
    return text


def built(name: str, config: Any, attention: str) -> PreTrainedModel:
    """A family's model of a config."""
    classes = FAMILIES[name]
    model_class = getattr(transformers, classes if isinstance(classes, str) else classes[0])
    torch.manual_seed(0)
    return model_class._from_config(config, attn_implementation=attention).eval()


def shrunk(name: str, sections: list[int] | None, small_image: bool) -> Any:
    """A config whose numbers are small, part by part."""
    family = CONFIG_MAPPING[name]
    values = shrink(family().to_dict(), iter(MARKERS))
    if small_image:
        shrink_images(values)
    text = values.get("text_config", values)
    if sections and isinstance(text, dict) and isinstance(text.get("rope_parameters"), dict):
        text["rope_parameters"]["mrope_section"] = sections
    merge(values, CHANGES.get(name, {}))
    if name.endswith("omni_thinker"):  # which its own generate reads
        values["vision_start_token_id"] = MARKERS[-1]
    return family.from_dict(values)


def merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, change in changes.items():
        if change and isinstance(change, dict) and isinstance(values.get(key), dict):
            merge(values[key], change)
        else:
            values[key] = change


def shrink(values: dict[str, Any], markers: Iterator[int]) -> dict[str, Any]:
    small, layers = {}, next((values[key] for key in ("num_hidden_layers", "depth") if key in values), None)
    for key, value in values.items():
        if key == "per_layer_config" and isinstance(value, dict):
            small[key] = {layer: own for layer, own in value.items() if int(layer) < 3}
        elif isinstance(value, dict) and all(isinstance(name, str) for name in value):
            small[key] = shrink(value, markers)
        elif key in ("mrope_section", "xdrope_section") and isinstance(value, list):
            small[key] = [2, 1, 1] if len(value) == 3 else [1] * len(value)
        elif isinstance(value, list) and len(value) == layers:
            small[key] = [value[0], value[-1], value[-1]]
        elif isinstance(value, list) and re.search(LAYER_LISTS, key):
            small[key] = list(range(min(len(value), 3)))
        elif re.search(r"token_(id|index)s?$", key) and type(value) is int and value > 2:
            small[key] = next(markers, MARKERS[-1])
        else:
            small[key] = smaller(key, value)
    return small


def smaller(key: str, value: Any) -> Any:
    if type(value) is not int or any(word in key for word in KEPT):
        return value
    return next((min(size, value) for name, size in SIZES.items() if value > 0 and re.search(f"{name}$", key)), value)


def shrink_images(values: dict[str, Any]) -> None:
    """A tower that sees PATCHES × PATCHES patches of a tile."""
    for part in [values, *(value for value in values.values() if isinstance(value, dict))]:
        patch, side = first(part.get("patch_size")), first(part.get("image_size"))
        if patch and side:
            tile = PATCHES * patch
            part["image_size"] = [tile, tile] if isinstance(part["image_size"], (list, tuple)) else tile
            if values.get("image_grid_pinpoints"):
                values["image_grid_pinpoints"] = [[tile, 2 * tile], [2 * tile, tile]]


def first(value: Any) -> int:
    """A side that may be given as a pair."""
    return int((value[0] if isinstance(value, (list, tuple)) else value) or 0)


# ---- prompts -----------------------------------------------------------------------------------------------------


def image_prompt(model: Any) -> tuple[dict[str, Tensor], VisualGrid] | None:
    """A prompt with an image in its middle, and its grid; None if no guess at the tower's input fits."""
    image = image_token(model)
    holder = next((one for one in (model, getattr(model, "model", None)) if hasattr(one, "get_image_features")), None)
    if image is None or holder is None:
        return None
    takes = set(inspect.signature(holder.get_image_features).parameters)
    for pixels in image_tensors(model.config):
        if not set(pixels) - {"image_merge_sizes"} <= takes:
            continue
        try:
            with torch.inference_mode():
                count = tokens_of(holder.get_image_features(**pixels, return_dict=True))
                inputs = around(model, image, count, pixels)
                model(**inputs, use_cache=False)
        except Exception:  # not this one
            continue
        runs = runs_of((inputs["input_ids"][0] == image).nonzero().flatten())
        rows, columns = plane(count)
        return inputs, VisualGrid(runs[0][0], count, 1, rows, columns, count, columns, runs=runs)
    return None


def image_token(model: Any) -> int | None:
    """The placeholder of an image, by the config or by a vocabulary that the model keeps."""
    holders = (model.config, getattr(getattr(model, "model", None), "vocabulary_mapping", None))
    found = [getattr(holder, name, None) for holder in holders for name in ("image_token_id", "image_token_index")]
    return next((value for value in found if isinstance(value, int)), None)


def image_tensors(config: Any) -> Iterator[dict[str, Tensor]]:
    """Guesses at what a vision tower takes of one image."""
    vision = next((part for name in ("vision_config", "vq_config") if (part := getattr(config, name, None))), config)
    patch = first(getattr(vision, "patch_size", None)) or 16
    side = first(getattr(vision, "image_size", None)) or first(getattr(vision, "resolution", None)) or PATCHES * patch
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for shape in ((64, 3 * 2 * patch**2), (64, 3 * patch**2), (64, 3, patch, patch)):
        grid = {"pixel_values": noise(*shape), "image_grid_thw": torch.tensor([[1, 8, 8]])}
        yield grid
        yield grid | {"image_merge_sizes": torch.tensor([2])}
    for shape in *((1, tiles, 3, side, side) for tiles in (3, 2, 5, 1)), (1, 3, side, side):
        yield {"pixel_values": noise(*shape), "image_sizes": torch.tensor([[side, side]])}
    for shape in ((1, 3, side, side), (1, 1, 3, side, side)):
        yield {"pixel_values": noise(*shape)}
    large = first(getattr(getattr(config, "high_res_vision_config", None), "image_size", None))
    yield {"pixel_values": noise(1, 3, side, side), "high_res_pixel_values": noise(1, 3, large, large)}
    yield {"pixel_values": noise(1, 3, side, side), "pixel_attention_mask": torch.ones(1, 1, side, side)}
    pooling, whole = torch.arange(64).view(1, 16, 4), torch.tensor([[4, 4, 0, 0]])
    yield {"pixel_values": noise(1, 64, 3 * patch**2), "image_token_pooling": pooling[0], "image_grids": whole}


def cross_attended(model: Any) -> dict[str, Tensor]:
    """What a model that reads its image in cross-attention takes beside a prompt of text (Idefics)."""
    ids, known = prompt()["input_ids"], inspect.signature(model.forward).parameters
    if "image_attention_mask" not in known:
        return {}
    side = model.config.vision_config.image_size
    pixels = torch.randn((1, 1, 3, side, side), generator=torch.Generator().manual_seed(2))
    return {"pixel_values": pixels, "image_attention_mask": torch.ones((1, ids.shape[1], 1), dtype=torch.long)}


def tokens_of(features: Any) -> int:
    """How many tokens a tower's output stands for."""
    pooled = getattr(features, "pooler_output", None)
    if pooled is None and (deepstack := getattr(features, "deepstack_features", None)):
        pooled = deepstack[0][1]  # Granite: (layer, features)
    features = features if pooled is None else pooled
    features = getattr(features, "last_hidden_state", features)
    parts = features if isinstance(features, (list, tuple)) else [features]
    return sum(math.prod(part.shape[:-1]) for part in parts)


def around(model: Any, image: int, count: int, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prompt of text with so many placeholders in it, and what goes with them."""
    text = torch.randint(3, IMAGE, (18,), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([text[:6], torch.full((count,), image), text[6:]])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    known = set(inspect.signature(model.forward).parameters)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in known:
            inputs[name] = (ids == image).int()
    return inputs

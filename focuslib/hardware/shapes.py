"""The dimensions of a decoder: the known models', or those of a checkpoint's config.json."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from focuslib.errors import UserError
from focuslib.models.tiny import CHECKPOINT as TINY
from focuslib.prefill.ops import DecoderShape

QWEN2_7B = DecoderShape(layers=28, hidden=3584, mlp=18944, heads=28, kv_heads=4, head_dim=128)
# The paper's models, all on the decoder of Qwen2-7B, and the embedded one.
KNOWN: dict[str, DecoderShape | Path] = {
    **dict.fromkeys(("llava_vid", "llava_onevision", "minicpm_v", "qwen2_5_vl"), QWEN2_7B),
    "tiny_onevision": TINY,
}


def shape_of(model: str, checkpoint: str | Path | None = None) -> DecoderShape:
    """The decoder's dimensions: of a checkpoint (folder, or hub id in the cache), else of a known model's name.

    Raises UserError if neither is known.
    """
    known = KNOWN.get(model)
    if checkpoint is None and isinstance(known, DecoderShape):
        return known
    source = checkpoint or known
    if source is None or isinstance(source, DecoderShape):
        raise UserError(f"{model}: its decoder is unknown; give its checkpoint, or one of {', '.join(KNOWN)}")
    return shape_from_config(_config_file(source))


def _config_file(checkpoint: str | Path) -> Path:
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path / "config.json"
    try:
        cached = try_to_load_from_cache(str(checkpoint), "config.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise UserError(f"{checkpoint}: no such folder, and not in the hub's cache; focus fetch it first")
    return Path(cached)


def shape_from_config(path: Path) -> DecoderShape:
    """A decoder's dimensions from a checkpoint's config.json. Raises UserError if it names none."""
    try:
        config = json.loads(path.read_text())
        config = config.get("text_config") or config.get("llm_config") or config
        heads = config["num_attention_heads"]
        return DecoderShape(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            mlp=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the configuration of a decoder ({error}); give a checkpoint's folder") from error

"""The embedded tiny VLM: a stock LLaVA-OneVision of about 1.5 M parameters, its tokenizer, and how it was trained."""

from pathlib import Path

# config.json, model.safetensors, generation_config.json, tokenizer files
CHECKPOINT = Path(__file__).parent / "checkpoint"

"""A tokenizer of one token a character for the tiny checkpoints (160 tokens), with all families' special tokens."""

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>", "</image>", "<slice>", "</slice>", "<unk>",
    "<|vision_start|>", "<|vision_end|>",
]  # fmt: skip
IMAGE_PAD = 150  # image_token_id of the tiny Qwen2.5-VL


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer files into a checkpoint folder."""
    vocabulary = {character: index for index, character in enumerate("\n" + string.printable[:95])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    tokenizer.decoder = decoders.Fuse()
    filler = [f"<filler{index}>" for index in range(IMAGE_PAD - len(vocabulary) - len(SPECIAL))]
    tokenizer.add_special_tokens([*SPECIAL, *filler, "<|image_pad|>"])
    assert tokenizer.token_to_id("<|image_pad|>") == IMAGE_PAD
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

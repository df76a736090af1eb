"""The tiny VLM's tokenizer: byte-level BPE learnt from the benchmark's own texts, so nearly every word is one token."""

import itertools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from focuslib.tasks.tinyvideo.questions import CHOICES, LETTERS, prompt, questions
from focuslib.tasks.tinyvideo.scenes import FRAMES, sample_scene

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")  # ids 0 to 4
HEADER = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"  # before the visual tokens
FOOTER = "<|im_end|>\n<|im_start|>assistant\n"  # after the question


def corpus() -> list[str]:
    """The texts that the merges are learnt from: every question form with every word, and the chat template."""
    scenes = [sample_scene("train", kind, index) for kind, index in itertools.product(FRAMES, range(100))]
    texts = sorted({q.text for scene in scenes for q in questions(scene)})
    words = sorted({word for choice in CHOICES.values() for word in choice})
    lists = ["\n".join(f"{letter}. {word}" for letter in LETTERS) for word in words]
    return 20 * [HEADER + "\n" + prompt("", words[:4]) + FOOTER] + 20 * (texts + lists)


def build_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same texts always give the same vocabulary. Any text can be encoded (byte fallback)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>", "<video>"],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )

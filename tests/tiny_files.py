"""A tiny Llama with random weights, a tiny tokenizer, and data to learn from; all in files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
"""A chat template that does not mark what the assistant says."""

MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""One that does."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few words: every text has tokens."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(["the cat sat on the mat", "a dog ran in the park"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def build_model(folder: Path, *, layers: int = 2, hidden: int = 64) -> Path:
    """A model folder as `symbiosis serve` takes it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=304,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = MARKED
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(file: Path, lines: list[object]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_training_data(file: Path) -> Path:
    """Twenty examples of different lengths."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "dogs", "ran", "in", "parks"]
    lines: list[object] = [
        {"prompt": f"say {n}: ", "completion": " ".join(words[n % 5 : n % 5 + 3 + n % 6])}
        for n in range(20)
    ]
    return write_lines(file, lines)

"""Tiny random models of every supported architecture, with tokenizers, saved as a user would save them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

WORDS = ["the", "a", "cat", "dog", "bird", "fish", "runs", "sleeps", "flies", "swims", "fast", "slowly", "happy", "sad"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
TINY = {"vocab_size": 64}
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, **TINY}
DECODER = {**ENCODER, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(max_position_embeddings=64, **ENCODER),
    "roberta": lambda: transformers.RobertaConfig(max_position_embeddings=64, pad_token_id=0, **ENCODER),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=32, hidden_dim=48, n_layers=2, n_heads=2, max_position_embeddings=64, **TINY
    ),
    "llama": lambda: transformers.LlamaConfig(pad_token_id=0, eos_token_id=4, **DECODER),
    "qwen2": lambda: transformers.Qwen2Config(pad_token_id=0, eos_token_id=4, **DECODER),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=4, eos_token_id=4, **TINY
    ),
}
ENCODERS = ("bert", "roberta", "distilbert")
DECODERS = ("llama", "qwen2", "gpt2")


def make_qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a letter: the library insists on this class, and it on byte pairs."""
    letters = sorted({letter for word in WORDS for letter in word} | {"\u0120"})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token="[UNK]", eos_token="</s>", pad_token="[PAD]")


def make_tokenizer(*, encoder: bool) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if not encoder:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save_model(folder: Path, architecture: str, head: str = "") -> Path:
    """Save a random model with its tokenizer; head "" saves the bare encoder or decoder, as most checkpoints are."""
    kinds = {
        "": transformers.AutoModel,
        "causal-lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = kinds[head].from_config(CONFIGS[architecture]())
    network.save_pretrained(folder)
    tokenizer = make_qwen_tokenizer() if architecture == "qwen2" else make_tokenizer(encoder=architecture in ENCODERS)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sample_rows(count: int) -> list[dict[str, Any]]:
    """Texts about cats or dogs, of different lengths; the animal is the label."""
    rows = []
    for index in range(count):
        animal = ("cat", "dog")[index % 2]
        tail = " ".join(WORDS[(index + step) % len(WORDS)] for step in range(index % 7))
        rows.append({"text": f"the {animal} {tail}".strip(), "label": animal})
    return rows

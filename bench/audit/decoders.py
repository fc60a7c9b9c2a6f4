"""Small decoders with random weights: span checks are algebra and do not ask whether a model is any good."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
import transformers

from services.client_agent.config import ModelSection
from services.client_agent.training.checkpoint import locate

_WIDTH: Final = 128
_HEADS: Final = 4
_LAYERS: Final = 2
_PLACES: Final = 128

NAMES: Final = ("GPT-2 architecture", "Llama architecture")


def make_decoder(name: str, folder: Path) -> Path:
    """Save a random decoder with the embedded model's tokenizer, unless it is there."""
    if (folder / "model.safetensors").exists():
        return folder
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(locate(ModelSection()), local_files_only=True)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    tokens |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    config: Any = {
        "GPT-2 architecture": lambda: transformers.GPT2Config(
            n_embd=_WIDTH, n_layer=_LAYERS, n_head=_HEADS, n_positions=_PLACES, **tokens
        ),
        "Llama architecture": lambda: transformers.LlamaConfig(
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=_LAYERS,
            num_attention_heads=_HEADS,
            num_key_value_heads=_HEADS,
            max_position_embeddings=_PLACES,
            **tokens,
        ),
    }[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config)
    transformers.utils.logging.disable_progress_bar()
    network.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return folder

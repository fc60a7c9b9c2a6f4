"""Loading a base model with its tokenizer for a task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from services.client_agent.config import ModelSection
from services.client_agent.training.checkpoint import digest_model, digest_tokenizer, locate
from shelora.errors import InvalidConfiguration

DEFAULT_MAX_TOKENS: Final = 128
"""Length that texts are cut to unless the configuration says otherwise."""

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# These architectures count positions from the padding index + 1.
_OFFSET_POSITIONS: Final = frozenset({"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "data2vec-text"})


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A base model ready for LoRA.

    Attributes:
        network: the transformers model.
        tokenizer: its tokenizer.
        folder: where the files are.
        fresh: names of the tensors that the checkpoint does not hold and that were therefore drawn at random.
        max_tokens: length that texts are cut to.
        base_model_digest: SHA-256 over configuration and stored weights.
        tokenizer_digest: SHA-256 over the tokenizer's files.
    """

    network: Any
    tokenizer: Any
    folder: Path
    fresh: frozenset[str]
    max_tokens: int
    base_model_digest: bytes
    tokenizer_digest: bytes

    @property
    def pad_token_id(self) -> int:
        """Token that fills short rows of a batch."""
        return int(self.tokenizer.pad_token_id)


def load_model(section: ModelSection, labels: Sequence[str], precision: str) -> LoadedModel:
    """Load model and tokenizer from their folder, never running code from it.

    Args:
        section: which model and task.
        labels: ordered class names for classification, else empty.
        precision: "float32" or "bfloat16", the type the frozen weights are held in.

    Raises:
        InvalidConfiguration: the files cannot be used for the task.
    """
    folder = locate(section)
    options: dict[str, Any] = {}
    architecture: Any = AutoModelForCausalLM
    if section.task == "sequence-classification":
        architecture = AutoModelForSequenceClassification
        options = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "problem_type": "single_label_classification",
            "ignore_mismatched_sizes": True,
        }
    try:
        with _quiet(), torch.random.fork_rng():
            torch.manual_seed(0)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network, info = architecture.from_pretrained(
                folder,
                dtype=DTYPES[precision],
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InvalidConfiguration(
            f"model.source: cannot load {folder} for {section.task}: {type(error).__name__}: {error}",
            hint="the folder must hold a model with that task's architecture and its tokenizer",
        ) from error
    _set_padding(network, tokenizer)
    return LoadedModel(
        network=network,
        tokenizer=tokenizer,
        folder=folder,
        fresh=frozenset(info["missing_keys"]) | {str(name) for name, *_ in info["mismatched_keys"]},
        max_tokens=_settle_length(section.max_tokens, network.config, tokenizer),
        base_model_digest=digest_model(folder),
        tokenizer_digest=digest_tokenizer(folder),
    )


def vocabulary_size(network: Any) -> int:
    """Number of tokens that the model has an embedding for."""
    return int(network.get_input_embeddings().num_embeddings)


def choose_device(wanted: str) -> torch.device:
    """The device to train on: "auto" takes CUDA where there is one.

    Raises:
        InvalidConfiguration: CUDA was asked for and is not there.
    """
    available = torch.cuda.is_available()
    if wanted == "auto":
        return torch.device("cuda" if available else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
        raise InvalidConfiguration(
            f"training.device: expected a CUDA device for {wanted!r}, found {torch.cuda.device_count()}",
            hint="set training.device to auto or cpu",
        )
    return device


def _set_padding(network: Any, tokenizer: Any) -> None:
    """Decoders often come without a padding token; the end token serves, since padding is masked everywhere."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary_size(network):
        if tokenizer.eos_token is None:
            raise InvalidConfiguration(
                "model.source: expected a tokenizer with a padding or an end token, got neither",
                hint="set pad_token and save the tokenizer again",
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    network.config.pad_token_id = tokenizer.pad_token_id


def _settle_length(wanted: int | None, config: Any, tokenizer: Any) -> int:
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 10**9
    if config.model_type in _OFFSET_POSITIONS:
        longest -= config.pad_token_id + 1
    longest = min(int(longest), int(tokenizer.model_max_length))
    if wanted is not None and wanted > longest:
        raise InvalidConfiguration(f"model.max_tokens: expected at most {longest} for this model, got {wanted}")
    return min(DEFAULT_MAX_TOKENS, longest) if wanted is None else wanted


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and the report on new heads, which are expected here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from services.client_agent.config import ModelSection
from services.client_agent.training.model import choose_device, load_model
from shelora.errors import InvalidConfiguration
from support.tiny_models import DECODERS, ENCODERS

HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
    "distilbert": {f"{part}.{kind}" for part in ("pre_classifier", "classifier") for kind in ("weight", "bias")},
    "llama": {"score.weight"},
    "qwen2": {"score.weight"},
    "gpt2": {"score.weight"},
}


@pytest.mark.parametrize("architecture", [*ENCODERS, *DECODERS])
def test_tensors_that_the_checkpoint_lacks_are_known(model_folder: Callable[..., Path], architecture: str):
    section = ModelSection(source=str(model_folder(architecture)))
    loaded = load_model(section, ("a", "b", "c"), "float32")
    assert loaded.fresh == HEADS[architecture]
    assert loaded.network.config.num_labels == 3
    assert loaded.network.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert loaded.network.config.pad_token_id is not None
    assert loaded.max_tokens == (63 if architecture == "roberta" else 64)


def test_a_head_for_the_same_labels_is_kept_and_another_is_replaced(model_folder: Callable[..., Path]):
    section = ModelSection(source=str(model_folder("bert", "classification")))
    assert load_model(section, ("a", "b"), "float32").fresh == frozenset()
    assert load_model(section, ("a", "b", "c"), "float32").fresh == HEADS["bert"]


@pytest.mark.parametrize("architecture", DECODERS)
def test_causal_models_are_complete(model_folder: Callable[..., Path], architecture: str):
    section = ModelSection(source=str(model_folder(architecture, "causal-lm")), task="causal-lm")
    loaded = load_model(section, (), "bfloat16")
    assert loaded.fresh == frozenset()
    assert loaded.network.dtype == torch.bfloat16


def test_loading_is_repeatable_and_leaves_the_random_state_alone(model_folder: Callable[..., Path]):
    section = ModelSection(source=str(model_folder("bert")))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = load_model(section, ("a", "b"), "float32").network.classifier.weight
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, load_model(section, ("a", "b"), "float32").network.classifier.weight)


def test_loading_is_silent_and_keeps_the_log_level(
    model_folder: Callable[..., Path], capfd: pytest.CaptureFixture[str]
):
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_model(ModelSection(source=str(model_folder("bert"))), ("a", "b"), "float32")
    assert capfd.readouterr() == ("", "")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == (level, bars)


@pytest.mark.parametrize(("wanted", "settled"), [(None, 64), (10, 10), (64, 64)])
def test_texts_are_as_long_as_the_model_takes(model_folder: Callable[..., Path], wanted: Any, settled: int):
    section = ModelSection(source=str(model_folder("bert")), max_tokens=wanted)
    assert load_model(section, ("a", "b"), "float32").max_tokens == settled


def test_what_cannot_be_loaded_is_refused(model_folder: Callable[..., Path]):
    section = ModelSection(source=str(model_folder("bert")), max_tokens=65)
    with pytest.raises(InvalidConfiguration, match=r"model.max_tokens: expected at most 64 for this model, got 65"):
        load_model(section, ("a", "b"), "float32")
    section = ModelSection(source=str(model_folder("distilbert")), task="causal-lm")
    with pytest.raises(InvalidConfiguration, match="for causal-lm"):
        load_model(section, (), "float32")


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InvalidConfiguration, match=r"training.device: expected a CUDA device for 'cuda:99'"):
        choose_device("cuda:99")

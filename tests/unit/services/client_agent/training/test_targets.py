from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from services.client_agent.training.targets import choose_saved_modules, choose_targets, uses_transposed_weights
from shelora.errors import InvalidConfiguration
from support.tiny_models import CONFIGS

TASK = "sequence-classification"


def build(architecture: str) -> Any:
    return AutoModelForSequenceClassification.from_config(CONFIGS[architecture]())


@pytest.mark.parametrize(
    ("architecture", "targets", "saved", "transposed"),
    [
        ("bert", ("query", "key", "value", "pooler.dense"), ("classifier",), False),
        ("roberta", ("query", "key", "value"), ("classifier",), False),
        ("distilbert", ("q_lin", "k_lin", "v_lin"), ("classifier", "pre_classifier"), False),
        ("llama", ("q_proj", "k_proj", "v_proj"), ("score",), False),
        ("qwen2", ("q_proj", "k_proj", "v_proj"), ("score",), False),
        ("gpt2", ("c_attn",), ("score",), True),
    ],
)
def test_usual_choices(architecture: str, targets: tuple[str, ...], saved: tuple[str, ...], transposed: bool):
    network = build(architecture)
    fresh = {"pre_classifier.weight", "pre_classifier.bias"} if architecture == "distilbert" else {"score.weight"}
    fresh = fresh if architecture != "bert" else {"classifier.weight", "classifier.bias"}
    fresh = fresh if architecture != "roberta" else {"classifier.dense.weight"}
    assert choose_targets(network, None, fresh) == targets
    assert choose_saved_modules(network, None, TASK, fresh) == saved
    assert uses_transposed_weights(network, targets) is transposed


def test_a_pooler_that_the_checkpoint_lacks_is_trained_whole():
    network = build("bert")
    fresh = {"classifier.weight", "bert.pooler.dense.bias"}
    assert choose_targets(network, None, fresh) == ("query", "key", "value")
    assert choose_saved_modules(network, None, TASK, fresh) == ("classifier", "bert.pooler.dense")


def test_owners_of_missing_tensors_are_trained_for_any_task():
    network = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    assert choose_saved_modules(network, None, "causal-lm", {"head.weight", "head.bias"}) == ("head",)
    assert choose_saved_modules(network, None, "causal-lm", ()) == ()


def test_explicit_choices_are_checked(model_folder: Callable[..., Path]):
    network = build("bert")
    assert choose_targets(network, ["key", "output.dense"]) == ("key", "output.dense")
    assert choose_saved_modules(network, ["classifier"], TASK, ()) == ("classifier",)
    with pytest.raises(InvalidConfiguration, match=r"lora.target_modules: .*got 'q_proj' \(this model has for example"):
        choose_targets(network, ["query", "q_proj"])
    with pytest.raises(InvalidConfiguration, match=r"expected linear layers, got .*LayerNorm"):
        choose_targets(network, ["LayerNorm"])
    with pytest.raises(InvalidConfiguration, match=r"lora.modules_to_save: .*got 'head'"):
        choose_saved_modules(network, ["head"], TASK, ())
    with pytest.raises(InvalidConfiguration, match="attention projections"):
        choose_targets(torch.nn.Sequential(torch.nn.Linear(2, 2)), None)

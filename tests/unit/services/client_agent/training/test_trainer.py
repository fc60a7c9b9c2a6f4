from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.client_agent.adapter import AdapterState
from services.client_agent.config import AgentConfig
from services.client_agent.training import Evaluation, Trainer
from services.client_agent.training.trainer import never
from shelora.errors import InvalidConfiguration, NonFiniteValue, ShapeMismatch
from support.tiny_models import sample_rows, write_jsonl

Config = Callable[..., AgentConfig]
Folder = Callable[..., Path]


def equal(one: AdapterState, other: AdapterState) -> bool:
    pairs = [(a.a, b.a) for a, b in zip(one.modules, other.modules, strict=True)]
    pairs += [(a.b, b.b) for a, b in zip(one.modules, other.modules, strict=True)]
    pairs += list(zip(one.dense, other.dense, strict=True))
    return all(np.array_equal(a, b) for a, b in pairs)


def test_training_learns_and_is_repeatable(model_folder: Folder, agent_config: Config):
    config = agent_config(model_folder("bert"), training={"steps": 60, "batch_size": 8, "learning_rate": 0.01})
    trainer = Trainer.load(config, clock=count().__next__)
    start = trainer.get_adapter()
    assert not any(module.b.any() for module in start.modules)
    seen: list[tuple[float, str]] = []
    before = trainer.evaluate()
    figures = trainer.train(1, lambda fraction, detail: seen.append((fraction, detail)), never)
    after = trainer.evaluate()
    assert isinstance(after, Evaluation)
    assert after.loss < before.loss / 2
    assert after.accuracy == 1.0
    assert after.examples == 10
    assert (figures["steps"], figures["seconds"], figures["stopped"]) == (60, 1, 0)
    assert figures["loss"] < figures["loss_first"]
    assert [fraction for fraction, _ in seen] == [step / 60 for step in range(1, 61)]
    assert seen[-1][1].startswith("step 60 of 60, loss ")
    first = trainer.get_adapter()
    again = Trainer.load(config)
    torch.manual_seed(12345)
    again.train(1)
    assert equal(first, again.get_adapter())
    again.set_adapter(start)
    again.train(2)
    assert not equal(first, again.get_adapter())


def test_training_leaves_the_random_state_and_the_base_alone(model_folder: Folder, agent_config: Config):
    trainer = Trainer.load(agent_config(model_folder("bert")))
    frozen = {n: p.clone() for n, p in trainer._model.peft.named_parameters() if not p.requires_grad}
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    trainer.train(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(frozen[n], p) for n, p in trainer._model.peft.named_parameters() if n in frozen)


def test_balanced_draws_keep_a_one_sided_agent_from_forgetting_the_other_label(
    model_folder: Folder, agent_config: Config, tmp_path: Path
):
    rows = [row for row in sample_rows(40) if row["label"] == "cat"] + [sample_rows(2)[1]]
    one_sided = str(write_jsonl(tmp_path / "cats.jsonl", rows))
    shares = []
    for strength in (0.0, 1.0):
        training = {"steps": 10, "batch_size": 8, "learning_rate": 0.01, "label_balance": strength}
        config = agent_config(
            model_folder("bert"), model={"labels": ["cat", "dog"]}, data={"train": one_sided}, training=training
        )
        trainer = Trainer.load(config)
        trainer.train(1)
        shares.append(trainer.evaluate().loss)
    assert shares[1] < 0.75 * shares[0]


def test_a_stopped_training_leaves_no_trace(model_folder: Folder, agent_config: Config):
    trainer = Trainer.load(agent_config(model_folder("roberta")))
    start = trainer.get_adapter()
    answers = iter([False, False, True])
    figures = trainer.train(1, should_stop=lambda: next(answers))
    assert figures["stopped"] == 1.0
    assert equal(start, trainer.get_adapter())
    trainer.train(1)
    undisturbed = trainer.get_adapter()
    trainer.set_adapter(start)
    trainer.train(1)
    assert equal(undisturbed, trainer.get_adapter())


def test_a_diverging_training_is_refused_and_put_back(model_folder: Folder, agent_config: Config):
    config = agent_config(model_folder("bert"))
    trainer = Trainer.load(config)
    huge = trainer.get_adapter()
    for tensor in huge.dense:
        tensor[...] = np.float32(3e38)
    trainer.set_adapter(huge)
    with pytest.raises(NonFiniteValue, match=r"expected a finite training loss.*lower training.learning_rate"):
        trainer.train(1)
    assert equal(huge, trainer.get_adapter())


def test_signatures_agree_between_ranks_and_data_and_differ_between_models(
    model_folder: Folder, agent_config: Config, tmp_path: Path
):
    one = Trainer.load(agent_config(model_folder("bert")))
    other_data = write_jsonl(tmp_path / "other.jsonl", sample_rows(6))
    other = Trainer.load(agent_config(model_folder("bert"), lora={"rank": 8}, data={"train": str(other_data)}))
    assert one.signature == other.signature
    assert (one.rank, other.rank, one.examples, other.examples) == (4, 8, 24, 6)
    assert (one.scaling, one.labels) == (2.0, ("cat", "dog"))
    assert one.signature.task == "sequence-classification"
    swapped = Trainer.load(agent_config(model_folder("bert"), model={"labels": ["dog", "cat"]}))
    assert swapped.signature != one.signature
    assert Trainer.load(agent_config(model_folder("roberta"))).signature != one.signature
    with pytest.raises(ShapeMismatch):
        one.set_adapter(Trainer.load(agent_config(model_folder("gpt2"))).get_adapter())


def test_initial_dense_is_equal_for_all_agents(model_folder: Folder, agent_config: Config):
    def stream(name: str, size: int) -> Any:
        return np.random.default_rng(len(name)).random(size)

    states = []
    for rank in (2, 4):
        trainer = Trainer.load(agent_config(model_folder("distilbert"), lora={"rank": rank}))
        state = AdapterState(trainer.get_adapter().modules, trainer.initial_dense(stream))
        trainer.set_adapter(state)
        states.append(trainer.get_adapter())
    for one, other in zip(states[0].dense, states[1].dense, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [bool(tensor.any()) for tensor in states[0].dense] == [True, False, True, False]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_causal_training(model_folder: Folder, agent_config: Config, architecture: str, precision: str, tmp_path: Path):
    config = agent_config(
        model_folder(architecture, "causal-lm"),
        "causal-lm",
        training={"steps": 20, "learning_rate": 0.05, "precision": precision},
    )
    trainer = Trainer.load(config)
    assert trainer.labels == ()
    assert trainer.signature.labels_digest == b""
    assert trainer.initial_dense(lambda name, size: np.zeros(size)) == ()
    before = trainer.evaluate()
    trainer.train(1)
    after = trainer.evaluate()
    assert after.loss < 0.98 * before.loss
    assert after.accuracy > before.accuracy
    assert {layer.lora_A["default"].weight.dtype for layer in trainer._model.layers} == {torch.float32}
    state = trainer.get_adapter()
    trainer.save_adapter(tmp_path / "adapter", state)
    assert equal(state, trainer.load_adapter(tmp_path / "adapter"))


def test_half_precision_trains_heads_in_full_precision(model_folder: Folder, agent_config: Config):
    trainer = Trainer.load(agent_config(model_folder("bert"), training={"precision": "bfloat16"}))
    assert {tensor.dtype for tensor in trainer._model.tensors} == {torch.float32}
    before = trainer.get_adapter()
    trainer.train(1)
    assert not equal(before, trainer.get_adapter())


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_activation_norms_are_positive_and_repeatable(model_folder: Folder, agent_config: Config, architecture: str):
    trainer = Trainer.load(agent_config(model_folder(architecture), training={"calibration_batches": 2}))
    seen: list[float] = []
    norms = trainer.activation_norms(lambda fraction, _: seen.append(fraction))
    assert seen == [0.5, 1.0]
    assert [norm.shape for norm in norms] == [(shape.in_features,) for shape in trainer.signature.shapes.modules]
    assert all((norm > 0).all() for norm in norms)
    for one, other in zip(norms, trainer.activation_norms(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_evaluation_needs_test_texts(model_folder: Folder, agent_config: Config):
    config = agent_config(model_folder("bert"), data={"test": None})
    with pytest.raises(InvalidConfiguration, match=r"data.test"):
        Trainer.load(config).evaluate()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_cuda(model_folder: Folder, agent_config: Config):
    trainer = Trainer.load(agent_config(model_folder("bert"), training={"device": "auto"}))
    before = trainer.get_adapter()
    trainer.train(1)
    assert not equal(before, trainer.get_adapter())
    assert trainer.evaluate().examples == 10

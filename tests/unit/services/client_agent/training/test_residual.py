"""A residual in the frozen weights: the model says what the uncut average says, and nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.client_agent.adapter import AdapterState
from services.client_agent.config import AgentConfig, LoraSection, ModelSection
from services.client_agent.training import Trainer
from services.client_agent.training.adapters import TunedModel, attach
from services.client_agent.training.model import load_model
from shelora.errors import InvalidConfiguration, NonFiniteValue, ShapeMismatch
from shelora.lora import Adapter, Factors, split

TOKENS = torch.tensor([[2, 6, 7, 8, 3], [2, 9, 10, 3, 0]])
RANK, SENT = 3, 9
Config = Callable[..., AgentConfig]
Folder = Callable[..., Path]


def tune(folder: Path, precision: str = "float32", **lora: Any) -> TunedModel:
    section = ModelSection.model_validate({"source": str(folder)})
    fields = {"rank": RANK, "alpha": 6.0, "sent_rank": SENT, **lora}
    return attach(
        load_model(section, ("a", "b"), precision), LoraSection(**fields), "sequence-classification", ("a", "b")
    )


def whole_state(tuned: TunedModel, rank: int) -> AdapterState:
    rng = np.random.default_rng(3)
    modules = tuple(
        Adapter(0.3 * rng.normal(size=(shape.out_features, rank)), 0.3 * rng.normal(size=(rank, shape.in_features)))
        for shape in tuned.shapes.modules
    )
    return AdapterState(modules, tuple(rng.normal(size=shape.shape) for shape in tuned.shapes.dense))


def parted(state: AdapterState, scaling: float) -> AdapterState:
    parts = [split(module, RANK, scaling) for module in state.modules]
    return AdapterState(tuple(fit for fit, _ in parts), state.dense, tuple(rest for _, rest in parts))


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        return model(input_ids=TOKENS, attention_mask=(TOKENS != 0).long()).logits


def weights(tuned: TunedModel) -> list[torch.Tensor]:
    return [layer.get_base_layer().weight.detach().clone() for layer in tuned.layers]


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_adapter_and_residual_say_what_the_uncut_average_says(model_folder: Folder, architecture: str):
    """GPT-2 keeps its weights transposed."""
    large = tune(model_folder(architecture), rank=SENT, sent_rank=None, alpha=2.0 * SENT)
    small = tune(model_folder(architecture))
    assert (small.scaling, small.rank, small.sent_rank) == (2.0, RANK, SENT) == (large.scaling, RANK, large.sent_rank)
    state = whole_state(large, SENT)
    large.write(state)
    expected = logits(large.peft)
    both = parted(state, small.scaling)
    small.write(both)
    before, alone = weights(small), logits(small.peft)
    assert not torch.allclose(alone, expected, atol=1e-2)
    small.frozen.keep(both.residual)
    torch.testing.assert_close(logits(small.peft), expected, atol=2e-5, rtol=1e-4)
    small.frozen.keep(both.residual)
    torch.testing.assert_close(logits(small.peft), expected, atol=2e-5, rtol=1e-4)
    small.frozen.keep(None)
    assert all(torch.equal(one, other) for one, other in zip(before, weights(small), strict=True))
    assert torch.equal(logits(small.peft), alone)


def test_a_tied_weight_keeps_its_other_use(model_folder: Folder):
    tuned = tune(model_folder("bert"))
    base = tuned.layers[0].get_base_layer()
    tied = base.weight
    before = tied.detach().clone()
    tuned.frozen.keep(parted(whole_state(tuned, SENT), 2.0).residual)
    assert torch.equal(tied, before)
    assert not torch.equal(base.weight, before)
    assert not base.weight.requires_grad
    tuned.frozen.keep(())
    assert base.weight is tied


def test_half_precision_is_rounded_once(model_folder: Folder):
    tuned = tune(model_folder("bert"), "bfloat16")
    residual = parted(whole_state(tuned, SENT), 2.0).residual
    before = weights(tuned)
    tuned.frozen.keep(residual)
    for original, kept, layer in zip(before, residual, tuned.layers, strict=True):
        exact = original.double() + torch.from_numpy(kept.left @ kept.right)
        assert torch.equal(layer.get_base_layer().weight, exact.to(torch.bfloat16))


def test_quantised_weights_are_refused_when_the_model_is_loaded(model_folder: Folder, monkeypatch: pytest.MonkeyPatch):
    loaded = load_model(ModelSection.model_validate({"source": str(model_folder("bert"))}), ("a", "b"), "float32")
    for name, module in loaded.network.named_modules():
        if name.endswith("query"):
            weight = module.weight.detach()
            module.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    section = LoraSection(rank=RANK, sent_rank=SENT, target_modules=("query",))
    with pytest.raises(InvalidConfiguration, match=r"lora\.sent_rank: module bert.*query: .*got torch\.int8") as caught:
        attach(loaded, section, "sequence-classification", ("a", "b"))
    assert "unquantised" in caught.value.hint


def test_a_sent_rank_that_a_module_cannot_have_is_refused(model_folder: Folder):
    with pytest.raises(InvalidConfiguration, match=r"lora\.sent_rank: expected at most 32 for module bert.*got 33"):
        tune(model_folder("bert"), sent_rank=33)


def test_a_residual_of_another_model_is_refused(model_folder: Folder):
    tuned = tune(model_folder("bert"))
    residual = parted(whole_state(tuned, SENT), 2.0).residual
    before = weights(tuned)
    with pytest.raises(ShapeMismatch, match="residual of"):
        tuned.frozen.keep(residual[:1])
    with pytest.raises(ShapeMismatch, match="expected shape"):
        tuned.frozen.keep([Factors(kept.left[1:], kept.right) for kept in residual])
    with pytest.raises(NonFiniteValue):
        tuned.frozen.keep([Factors(np.full_like(kept.left, np.nan), kept.right) for kept in residual])
    assert all(torch.equal(one, other) for one, other in zip(before, weights(tuned), strict=True))


def test_training_evaluation_and_norms_go_on_top_of_a_residual(model_folder: Folder, agent_config: Config):
    config = agent_config(model_folder("bert"), lora={"rank": RANK, "sent_rank": SENT})
    trainer = Trainer.load(config)
    tuned = trainer._model
    assert trainer.sent_rank == SENT
    start = parted(whole_state(tuned, SENT), trainer.scaling)
    trainer.set_adapter(start)
    without = trainer.evaluate(), trainer.activation_norms()
    trainer.set_residual(start.residual)
    kept = weights(tuned)
    assert trainer.evaluate().loss != without[0].loss
    assert any((one != other).any() for one, other in zip(trainer.activation_norms(), without[1], strict=True))
    trainer.train(1)
    assert all(torch.equal(one, other) for one, other in zip(kept, weights(tuned), strict=True))
    with_residual = trainer.get_adapter()
    assert not with_residual.residual
    trainer.set_residual(None)
    trainer.set_adapter(start)
    again = trainer.evaluate(), trainer.activation_norms()
    assert again[0] == without[0]
    trainer.train(1)
    assert not np.array_equal(trainer.get_adapter().modules[0].a, with_residual.modules[0].a)

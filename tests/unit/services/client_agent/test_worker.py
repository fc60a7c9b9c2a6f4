from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from services.client_agent.adapter import AdapterState
from services.client_agent.domain import PayloadKind
from services.client_agent.state import load_tensors
from shelora.errors import StoredBytesCorrupt
from shelora.plan import Negotiation, Packing, cipher_bytes
from shelora.rounds import AgentTask, FederationState
from support.crew import Hand, run_to_end
from support.linear_trainer import SHAPES, LinearTrainer
from support.memory_federation import MemoryFederation, MemoryKeyManager
from support.revealed import verify_round

WIDTHS = tuple(module.in_features for module in SHAPES.modules)
BOUND = 1e-6
DENSE_BOUND = 5e-5
"""2 * 4.4e-6 for three agents, times their weighted Frobenius norms (docs/method.md section 8)."""
MakeCrew = Callable[..., list[Hand]]


@pytest.fixture(scope="module")
def keymanager() -> MemoryKeyManager:
    return MemoryKeyManager()


@pytest.fixture
def make_crew(tmp_path: Path) -> MakeCrew:
    def make(federation: MemoryFederation, budgets: dict[str, tuple[int, ...]], ranks: tuple[int, ...] = (4, 2, 3)):
        return [
            Hand(federation, name, tmp_path / name, LinearTrainer(seed, rank=rank, examples=20 + 30 * seed), columns)
            for seed, ((name, columns), rank) in enumerate(zip(budgets.items(), ranks, strict=False))
        ]

    return make


async def join(hands: list[Hand]) -> None:
    for hand in hands:
        await hand.register()


def verdict(hands: list[Hand], number: int):
    return verify_round({hand.name: hand.reveal for hand in hands}, number)


@pytest.mark.parametrize(
    ("negotiation", "budgets"),
    [
        (Negotiation.ENCRYPTED, {"a": WIDTHS, "b": WIDTHS, "c": WIDTHS}),
        (Negotiation.ENCRYPTED, {"a": WIDTHS, "b": (10, 8), "c": (3, 0)}),
        (Negotiation.OPE, {"a": (20, 15), "b": (10, 8), "c": (0, 0)}),
    ],
    ids=["full", "encrypted", "ope"],
)
async def test_three_agents_average_exactly_what_they_trained(keymanager, make_crew, negotiation, budgets):
    federation = MemoryFederation(keymanager, agents=3, rounds_=2, negotiation=negotiation)
    hands = make_crew(federation, budgets)
    await join(hands)
    await run_to_end(hands)
    assert federation.state.state is FederationState.FINISHED
    for number in (1, 2):
        found = verdict(hands, number)
        assert found.counted == found.openings == ("a", "b", "c")
        assert found.difference <= BOUND
    for hand in hands:
        assert hand.trainer.trained == [1, 2]
        assert hand.state.applied_round() == 2
        assert hand.state.adapter_rounds() == [0, 1, 2]
        assert not federation.resent


async def test_three_agents_average_densely_what_they_trained(keymanager, make_crew):
    federation = MemoryFederation(keymanager, agents=3, rounds_=2, packing=Packing.DENSE)
    hands = make_crew(federation, {"a": WIDTHS, "b": (10, 8), "c": (3, 0)})
    await join(hands)
    await run_to_end(hands)
    assert federation.state.state is FederationState.FINISHED
    for number in (1, 2):
        found = verdict(hands, number)
        assert found.counted == found.openings == ("a", "b", "c")
        assert found.difference <= DENSE_BOUND
        layout = federation.plan_of(number).layout([member.rank for member in federation.round_of(number).cohort])
        for hand in hands:
            sent = len(federation.accepted[PayloadKind.CIPHER, number, hand.name])
            assert sent == cipher_bytes(layout, hand.kit.columns)


async def test_agents_with_a_sent_rank_send_what_their_rank_cannot_hold(keymanager, tmp_path):
    """Two agents train ranks 2 and 3 and send 8; the third has rank 4 as ever. Nothing is lost between the rounds."""
    federation = MemoryFederation(keymanager, agents=3, rounds_=3)
    given = {"a": (2, 8, WIDTHS), "b": (3, 8, (10, 8)), "c": (4, None, (3, 0))}
    hands = [
        Hand(federation, name, tmp_path / name, LinearTrainer(seed, rank=rank, sent_rank=sent), columns)
        for seed, (name, (rank, sent, columns)) in enumerate(given.items())
    ]
    await join(hands)
    await run_to_end(hands)
    assert federation.state.state is FederationState.FINISHED
    for number in (1, 2, 3):
        found = verdict(hands, number)
        assert found.counted == found.openings == ("a", "b", "c")
        assert found.difference <= BOUND
    for hand, sent in zip(hands, (8, 8, 4), strict=True):
        for number in (1, 2, 3):
            factors = federation.tensors(PayloadKind.FACTORS, number, hand.name)
            assert factors["0.left"].shape == (SHAPES.modules[0].out_features, sent)
        assert hand.trainer.trained == [1, 2, 3]
        state = AdapterState.load(hand.state.adapter_state(3))
        assert [module.rank for module in state.modules] == [hand.trainer.rank] * 2
        assert [kept.rank for kept in state.residual] == ([] if sent == 4 else [sent - hand.trainer.rank] * 2)
    # The first round has nothing to keep; from then on what is sent fills the sent rank.
    first, second = (load_tensors(hands[0].reveal / f"round-00{number}-factors.safetensors") for number in (1, 2))
    assert not first["0.left"][:, 2:].any()
    assert second["0.left"].any(axis=0).all()
    opened = load_tensors(hands[0].reveal / "round-003-average.safetensors")
    state = AdapterState.load(hands[0].state.adapter_state(3))
    for index, (module, kept) in enumerate(zip(state.modules, state.residual, strict=True)):
        total = opened[f"{index}.basis"] @ opened[f"{index}.core"]
        left, energy, right = np.linalg.svd(total, full_matrices=False)
        best = (left[:, :8] * energy[:8]) @ right[:8]
        held = hands[0].trainer.scaling * module.b @ module.a + kept.left @ kept.right
        np.testing.assert_allclose(held, best, atol=BOUND * np.abs(total).max())


async def test_a_sent_rank_that_is_taken_back_ends_with_what_was_kept(keymanager, tmp_path):
    """Restarted without the setting between two rounds, an agent sends the best fit of its rank and keeps no more."""
    federation = MemoryFederation(keymanager, agents=2, rounds_=2)
    hands = [
        Hand(federation, name, tmp_path / name, LinearTrainer(seed, rank=2, sent_rank=6), WIDTHS)
        for seed, name in enumerate("ab")
    ]
    await join(hands)
    while federation.state.last_published_round < 1:
        for hand in hands:
            await hand.step()
    changed = hands[0]
    await changed.worker.apply(1)
    kept = AdapterState.load(changed.state.adapter_state(1)).residual
    assert [rest.rank for rest in kept] == [2, 2]  # the first average has two directions of each agent
    changed.trainer = LinearTrainer(0, rank=2)
    changed.start()
    await changed.register()
    await run_to_end(hands)
    assert verdict(hands, 2).counted == ("a", "b")
    assert verdict(hands, 2).difference <= BOUND
    assert load_tensors(changed.reveal / "round-002-factors.safetensors")["0.left"].shape[1] == 2
    assert not AdapterState.load(changed.state.adapter_state(2)).residual
    assert AdapterState.load(hands[1].state.adapter_state(2)).residual


async def test_agents_start_equal_and_smaller_ranks_take_the_first_rows(keymanager, make_crew):
    federation = MemoryFederation(keymanager, agents=3)
    hands = make_crew(federation, {"a": WIDTHS, "b": WIDTHS, "c": WIDTHS})
    await join(hands)
    for hand in hands:
        await hand.step()
    first, *others = (AdapterState.load(hand.state.adapter_state(0)) for hand in hands)
    for other in others:
        for mine, theirs in zip(first.modules, other.modules, strict=True):
            np.testing.assert_array_equal(mine.a[: theirs.rank], theirs.a)
            assert not theirs.b.any()
        np.testing.assert_array_equal(first.dense[0], other.dense[0])


async def test_figures_are_complete_and_reported_once_per_round(keymanager, make_crew):
    federation = MemoryFederation(keymanager, agents=2, rounds_=2)
    hands = make_crew(federation, {"a": WIDTHS, "b": (5, 5)})
    await join(hands)
    await run_to_end(hands)
    for number in (1, 2):
        for hand in hands:
            figures = federation.metrics[number][hand.name]
            assert figures == hand.kit.figures.get(number)
            sizes = {
                "factors_bytes_up": len(federation.accepted[PayloadKind.FACTORS, number, hand.name]),
                "cipher_bytes_up": len(federation.accepted[PayloadKind.CIPHER, number, hand.name]),
                "projection_bytes_down": len(federation.results[PayloadKind.PROJECTION, number, hand.name]),
                "average_bytes_down": len(federation.results[PayloadKind.AVERAGE, number, ""]),
                "cipher_bytes_down": len(federation.results[PayloadKind.CIPHER, number, ""]),
            }
            assert {name: figures[name] for name in sizes} == sizes
            assert figures["bytes_up"] == sizes["factors_bytes_up"] + sizes["cipher_bytes_up"]
            assert figures["examples"] == hand.trainer.examples
            for name in ("train", "factors_upload", "encrypt", "cipher_upload", "download", "apply", "evaluate"):
                assert figures[f"seconds_{name}"] >= 0
            assert 0 < figures["accuracy_before"] < 1
            assert 0 < figures["accuracy_after"] < 1
    for hand in hands:
        # The accuracy after a round is the one before the next; it is measured once.
        first, second = federation.metrics[1][hand.name], federation.metrics[2][hand.name]
        assert second["accuracy_before"] == first["accuracy_after"]
        assert hand.trainer.evaluations == 3


async def test_nothing_is_evaluated_when_that_is_switched_off(keymanager, make_crew):
    federation = MemoryFederation(keymanager, agents=2, rounds_=1)
    hands = make_crew(federation, {"a": WIDTHS, "b": WIDTHS})
    for hand in hands:
        hand.evaluate = False
        hand.start()
    await join(hands)
    await run_to_end(hands)
    assert all(hand.trainer.evaluations == 0 for hand in hands)
    assert "accuracy_after" not in federation.metrics[1]["a"]


async def test_plain_columns_of_the_payload_are_not_the_encrypted_ones(keymanager, make_crew):
    """What the aggregator gets in the clear must lack the k most sensitive columns of every module."""
    federation = MemoryFederation(keymanager, agents=2, rounds_=1)
    hands = make_crew(federation, {"a": (12, 9), "b": (6, 0)})
    await join(hands)
    await run_to_end(hands)
    for hand in hands:
        update = load_tensors(hand.reveal / "round-001-factors.safetensors")
        sent = federation.tensors(PayloadKind.FACTORS, 1, hand.name)
        for index, (module, k) in enumerate(zip(SHAPES.modules, hand.columns, strict=True)):
            order = load_tensors(next(hand.state.plan(1).glob("priority-*")))[str(index)]
            hidden, shown = set(order[:k].tolist()), sent[f"{index}.right"]
            assert shown.shape == (hand.trainer.rank, module.in_features - k)
            true = update[f"{index}.right"].astype(np.float32)
            positions = [int(np.flatnonzero((true == column[:, None]).all(axis=0))[0]) for column in shown.T]
            assert hidden.isdisjoint(positions)
            assert len(set(positions)) == module.in_features - k


async def test_an_agent_without_a_ciphertext_is_left_out_of_both_parts(keymanager, make_crew):
    federation = MemoryFederation(keymanager, agents=3, rounds_=2)
    hands = make_crew(federation, {"a": (12, 9), "b": (6, 0), "c": WIDTHS})
    await join(hands)
    lost = hands[2]
    while lost.federation.view(lost.name).task is not AgentTask.CIPHER:
        for hand in hands:
            if hand.federation.view(hand.name).task is not AgentTask.CIPHER:
                await hand.step()
    for hand in hands[:2]:
        await hand.step()
    federation.expire()
    assert federation.ended[1].total_weight < 1
    found = await run_and_verify(hands, 1)
    assert found.counted == ("a", "b")
    assert found.openings == ("a", "b", "c")
    assert found.difference <= BOUND
    assert verdict(hands, 2).counted == ("a", "b", "c")
    assert verdict(hands, 2).difference <= BOUND


async def run_and_verify(hands: list[Hand], number: int):
    await run_to_end(hands)
    return verdict(hands, number)


async def test_a_late_agent_begins_with_the_newest_average(keymanager, make_crew):
    federation = MemoryFederation(keymanager, agents=2, rounds_=2)
    hands = make_crew(federation, {"a": WIDTHS, "b": WIDTHS, "late": WIDTHS})
    await join(hands[:2])
    while not federation.state.last_published_round:
        for hand in hands[:2]:
            await hand.step()
    late = hands[2]
    await late.register()
    await late.step()
    assert late.state.applied_round() == 1
    assert late.trainer.trained == [2]
    assert late.state.adapter_rounds() == [1]
    await run_to_end(hands)
    assert verdict(hands, 2).difference <= BOUND


async def test_a_new_plan_version_is_negotiated_from_the_newest_average(keymanager, make_crew):
    federation = MemoryFederation(keymanager, agents=2, rounds_=2, renegotiate_every=1)
    hands = make_crew(federation, {"a": (12, 9), "b": (6, 0)})
    await join(hands)
    await run_to_end(hands)
    assert sorted(federation.plans) == [1, 2]
    assert {key[1] for key in federation.accepted if key[0] is PayloadKind.SENSITIVITY} == {1, 2}
    for number in (1, 2):
        assert verdict(hands, number).difference <= BOUND


async def test_a_new_key_epoch_takes_over_at_the_boundary(tmp_path, make_crew):
    keymanager = MemoryKeyManager(epochs=2)
    federation = MemoryFederation(keymanager, agents=2, rounds_=2)
    hands = make_crew(federation, {"a": WIDTHS, "b": WIDTHS})
    await join(hands)
    await hands[0].step()
    from shelora.rounds import EpochAdopted

    federation.emit(EpochAdopted(2))
    await run_to_end(hands)
    assert [federation.plan_of(number).epoch for number in (1, 2)] == [1, 2]
    assert verdict(hands, 2).difference <= BOUND


async def test_own_factors_that_are_gone_are_told(keymanager, make_crew):
    federation = MemoryFederation(keymanager, agents=2, rounds_=1)
    hands = make_crew(federation, {"a": WIDTHS, "b": WIDTHS})
    await join(hands)
    for hand in hands:
        await hand.step()
    (hands[0].state.round(1) / "factors.safetensors").unlink()
    with pytest.raises(StoredBytesCorrupt, match="round 1"):
        await hands[0].step()


async def test_an_average_whose_adapter_is_gone_is_fetched_again(keymanager, make_crew):
    federation = MemoryFederation(keymanager, agents=2, rounds_=1)
    hands = make_crew(federation, {"a": WIDTHS, "b": WIDTHS})
    await join(hands)
    await run_to_end(hands)
    path = hands[0].state.adapter_state(1)
    before = AdapterState.load(path)
    path.unlink()
    hands[0].start()
    await hands[0].step()
    after = AdapterState.load(path)
    np.testing.assert_allclose(after.modules[0].b, before.modules[0].b, atol=1e-12)

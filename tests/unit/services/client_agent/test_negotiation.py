from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.client_agent.keys import EpochKeys, KeyRing
from services.client_agent.negotiation import (
    encrypted_scores,
    natural_priorities,
    priorities_from_ranking,
    priorities_from_sum,
    sensitivities,
    vote_tensors,
)
from services.client_agent.state import AgentState
from shelora.errors import MalformedPayload, ResidueOutOfRange, SizeMismatch
from shelora.he.residues import as_blocks, sum_residues
from shelora.plan import ColumnVote, FederationSeed, ModelShapes, ModuleShape, Negotiation, Plan, rank_tokens
from support.memory_federation import FEDERATION, MemoryKeyManager

SHAPES = ModelShapes((ModuleShape("q", 8, 300), ModuleShape("v", 8, 50)), ())
WIDTHS = tuple(module.in_features for module in SHAPES.modules)
SEED = FederationSeed(bytes(32))


def make_plan(negotiation: Negotiation, parameters_digest: bytes = bytes(32)) -> Plan:
    return Plan(FEDERATION, 3, 1, SHAPES, 16, negotiation, ((10, 40), (5,)), parameters_digest, 4096)


async def open_keys(keymanager: MemoryKeyManager, folder: Path, agent: str) -> EpochKeys:
    membership_fetch = keymanager.fetch

    async def fetch(number, public):
        return await membership_fetch(agent, number, public)

    return await KeyRing(AgentState(folder), FEDERATION, agent, fetch, threads=1).epoch(1)


def random_scores(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    norms = tuple(rng.gamma(0.7, size=n) for n in WIDTHS)
    return sensitivities(norms, [rng.normal(size=(4, n)) for n in WIDTHS])


async def test_encrypted_agents_derive_the_priority_of_the_summed_scores(tmp_path):
    keymanager = MemoryKeyManager()
    keys = [await open_keys(keymanager, tmp_path / name, name) for name in ("a", "b", "c")]
    plan = make_plan(Negotiation.ENCRYPTED, keys[0].parameters.digest())
    rng = np.random.default_rng(1)
    scores = [random_scores(rng) for _ in keys]
    payloads = [encrypted_scores(key, SHAPES, mine) for key, mine in zip(keys, scores, strict=True)]
    assert {len(payload) for payload in payloads} == {keys[0].parameters.block_bytes}
    blocks = [as_blocks(payload, keys[0].parameters) for payload in payloads]
    total = sum_residues(blocks, keys[0].parameters.modulus).tobytes()
    found = [priorities_from_sum(key, plan, total) for key in keys]
    for index, n in enumerate(WIDTHS):
        for other in found[1:]:
            np.testing.assert_array_equal(found[0][index], other[index])
        assert sorted(found[0][index].tolist()) == list(range(n))
        summed = np.sum([mine[index] for mine in scores], axis=0)[found[0][index]]
        # Scores are rounded to 2^-12 of the mean before encryption: neighbours closer than that may change places.
        assert (np.diff(summed) <= 3 * 2**-12).all()


async def test_a_sum_that_is_none_is_refused(tmp_path):
    keys = await open_keys(MemoryKeyManager(), tmp_path, "a")
    plan = make_plan(Negotiation.ENCRYPTED, keys.parameters.digest())
    with pytest.raises(SizeMismatch):
        priorities_from_sum(keys, plan, bytes(100))
    with pytest.raises(SizeMismatch):
        priorities_from_sum(keys, plan, bytes(2 * keys.parameters.block_bytes))
    with pytest.raises(ResidueOutOfRange):
        priorities_from_sum(keys, plan, b"\xff" * keys.parameters.block_bytes)


@settings(max_examples=8)  # an order-preserving score costs a millisecond, and every example asks for hundreds
@given(st.integers(0, 2**32 - 1))
def test_voting_agents_derive_the_same_priorities_and_their_favourites_lead(entropy):
    rng = np.random.default_rng(entropy)
    plan = make_plan(Negotiation.OPE)
    limits = (40, 5)
    scores = [random_scores(rng) for _ in range(3)]
    # Everybody's favourites: they are named by all, so they come before all others.
    favourites = [rng.choice(n, size=3, replace=False) for n in WIDTHS]
    for mine in scores:
        for module_scores, columns in zip(mine, favourites, strict=True):
            module_scores[columns] = module_scores.max() + rng.uniform(0.5, 1.0, size=3)
    sent = [vote_tensors(SEED, plan, mine, limits) for mine in scores]
    ranked = {}
    for index in range(2):
        votes = [
            [
                ColumnVote(int(token), int(score))
                for token, score in zip(one[f"{index}.token"], one[f"{index}.score"], strict=True)
            ]
            for one in sent
        ]
        ranked[f"{index}.token"] = np.asarray(rank_tokens(votes, limits[index]), dtype=np.int64)
    found = priorities_from_ranking(SEED, plan, ranked)
    for order, n, columns in zip(found, WIDTHS, favourites, strict=True):
        assert sorted(order.tolist()) == list(range(n))
        assert set(order[:3].tolist()) == set(columns.tolist())


def test_votes_name_exactly_the_top_columns_in_an_order_that_tells_nothing():
    rng = np.random.default_rng(2)
    plan = make_plan(Negotiation.OPE)
    scores = random_scores(rng)
    tensors = vote_tensors(SEED, plan, scores, (40, 0))
    assert tensors["0.token"].shape == tensors["0.score"].shape == (40,)
    assert tensors["1.token"].shape == tensors["1.score"].shape == (0,)
    assert (np.diff(tensors["0.token"]) > 0).all()
    order = priorities_from_ranking(SEED, plan, {"0.token": tensors["0.token"], "1.token": tensors["1.token"]})[0]
    assert set(order[:40].tolist()) == set(np.argsort(-scores[0], kind="stable")[:40].tolist())
    by_token = dict(zip(order[:40].tolist(), tensors["0.score"].tolist(), strict=True))
    ranked = sorted(by_token, key=lambda column: scores[0][column])
    told = [by_token[column] for column in ranked]
    assert told == sorted(told)
    assert len(set(told)) > 20


def test_a_ranking_that_lacks_a_module_is_refused():
    with pytest.raises(MalformedPayload, match="lacks module 'v'"):
        priorities_from_ranking(SEED, make_plan(Negotiation.OPE), {"0.token": np.arange(3)})


def test_natural_priorities_are_the_columns_themselves():
    for order, n in zip(natural_priorities(SHAPES), WIDTHS, strict=True):
        np.testing.assert_array_equal(order, np.arange(n))

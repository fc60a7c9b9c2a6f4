"""Scenarios on the secret column order, on decoders, and on membership."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from bench.audit import decoders
from bench.audit.attacks import gradient_span, right_span
from bench.audit.orders import link, match_known_vector, match_statistics
from bench.audit.scenarios import (
    DEFAULT_BATCH,
    DEFAULT_RANK,
    DEFAULT_STEPS,
    DEFAULT_TEXTS,
    LENGTH,
    REPEATS,
    WIDE_RANK,
    Record,
    Setting,
    aim,
    attacked,
    figures,
    later_start,
)
from bench.audit.scores import area_under_curve
from bench.audit.victim import Victim, load_victim
from bench.audit.wire import Float64, Int64, transmit
from services.client_agent.adapter import AdapterState
from services.client_agent.round import local_update
from shelora.lora import average, basis, canonical, plain_part, project, reparameterize

KNOWN_TOKEN: Final = ((4, 1, 5), (8, 1, 5), (8, 1, 8), (8, 1, 16), (64, 1, 5), (64, 1, 16), (64, 2, 27))
"""(rank, texts, tokens of each)"""

STATISTIC_ROUNDS: Final = (1, 5)
STATISTIC_TEXTS: Final = 16
PUBLIC_TEXTS: Final = 300

DECODER_BATCHES: Final = ((8, 1, 8), (64, 1, 16), (64, 2, 27))
"""(rank, texts, tokens of each)"""

MEMBERSHIP: Final = (
    (DEFAULT_TEXTS, DEFAULT_BATCH, DEFAULT_STEPS, DEFAULT_RANK), (64, 16, 8, 8), (64, 16, 30, 8), (64, 16, 30, 64),
    (64, 4, 30, 8), (16, 16, 5, 8),
)  # fmt: skip
"""(texts, texts a step, steps, rank)"""

JUDGED: Final = 256
"""Members and others whose losses are compared, at most."""


def orders(setting: Setting) -> Iterator[Record]:
    """Attacks on the wire order, everything plain, one plain gradient step a round."""
    for rank, texts, length in KNOWN_TOKEN:
        for repeat in range(REPEATS):
            yield from _by_known_token(setting, rank, texts, length, repeat)
    yield from _by_statistics(setting)


def decoder_models(setting: Setting) -> Iterator[Record]:
    """One plain gradient step of decoders."""
    for name in decoders.NAMES:
        source = decoders.make_decoder(name, setting.folder / name.split()[0].lower())
        for rank, texts, length in DECODER_BATCHES:
            for repeat in range(REPEATS):
                rows = setting.texts(texts, length, repeat) + setting.starters()
                victim = load_victim(
                    rows, setting.folder / "agent", rank=rank, source=str(source.resolve()), task="causal-lm"
                )
                probe = aim(victim, 0, texts, repeat)
                tokens = sum(map(len, victim.texts[:texts]))
                first = victim.first_start()
                for start_name, start in (
                    ("first", first),
                    ("later", later_start(victim)),
                ):
                    common = {"model": name, "repeat": repeat, "rank": rank, "texts": texts, "tokens": tokens}
                    for attacker, found in attacked(victim, probe, start, victim.step(start, range(texts)), "0%"):
                        yield common | {"start": start_name, "attacker": attacker} | figures(found)


def membership(setting: Setting) -> Iterator[Record]:
    """Does the loss of a text tell that an agent trained on it? From the agent's own adapter and from averages."""
    neighbour = setting.victim(
        setting.corpus.sample(DEFAULT_TEXTS, 2 * DEFAULT_TEXTS), rank=DEFAULT_RANK, steps=DEFAULT_STEPS
    )
    other = (neighbour.train(neighbour.first_start(), 1), neighbour.trainer.scaling, DEFAULT_TEXTS)
    for texts, batch, steps, rank in MEMBERSHIP:
        judged = min(texts, JUDGED)
        own, foreign = setting.corpus.sample(texts), setting.corpus.sample(judged, DEFAULT_TEXTS)
        victim = setting.victim(own, rank=rank, batch_size=batch, steps=steps)
        judge = setting.victim([*own[:judged], *foreign], rank=rank)
        trained = victim.train(victim.first_start(), 1)
        published = _average(victim, (trained, victim.trainer.scaling, texts), other)
        common = {"texts": texts, "batch": batch, "steps": steps, "rank": rank, "passes": batch * steps / texts}
        for attacker, adapter in (
            ("the agent's own adapter", trained),
            ("average of two agents", published),
        ):
            losses = judge.losses(adapter)
            members, others = losses[:judged], losses[judged:]
            yield common | {"attacker": attacker, "auc": area_under_curve(-members, -others), "judged": judged}


def placed(guess: Int64, order: Int64) -> float:
    """Share of columns that were put where they belong."""
    return float(np.mean(guess == order))


def _by_known_token(setting: Setting, rank: int, texts: int, length: int, repeat: int) -> Iterator[Record]:
    """Places columns by the opening token; the start is known in wire order, as linking rounds gives it."""
    victim, probe = setting.target(texts, length, repeat, rank=rank)
    start = later_start(victim)
    trained = victim.step(start, range(texts))
    natural = [np.arange(shape.in_features) for shape in victim.shapes.modules]
    sent = transmit(trained, victim.trainer.scaling, victim.shapes, "0%", natural, repeat + 1)
    value = victim.first[-1]
    sight, order = sent.sights[value], sent.orders[value]
    change = (trained.modules[value].a - start.modules[value].a)[:, order]
    natural_columns = np.arange(sight.width)
    for view, span in (
        ("our wire", right_span(sight, natural_columns, start.modules[value].a[:, order])),
        ("gradient of A", gradient_span(change, natural_columns)),
    ):
        rows = span.rows[: span.cuts[0]]
        guess, residual = match_known_vector(rows, probe.opening, np.random.default_rng(repeat))
        guesses = list(sent.orders)
        guesses[value] = guess
        found = probe.right(sent, start, guesses, modules=(value,))
        yield {
            "attacker": "known opening token",
            "view": view,
            "repeat": repeat,
            "rank": rank,
            "texts": texts,
            "tokens": sum(map(len, victim.texts[:texts])),
            "dimensions": len(rows),
            "residual": residual,
            "columns_placed": placed(guess, order),
        } | figures(found)


def _by_statistics(setting: Setting) -> Iterator[Record]:
    """Places columns by their second moments over rounds, the start split off, against public texts."""
    count = STATISTIC_TEXTS * STATISTIC_ROUNDS[-1]
    rows = setting.corpus.of_length(LENGTH, count + PUBLIC_TEXTS) + setting.starters()
    victim = setting.victim(rows, rank=WIDE_RANK)
    start = later_start(victim)
    public = _second_moment(victim, victim.texts[count : count + PUBLIC_TEXTS])
    value = victim.first[-1]
    order = np.random.default_rng(0).permutation(len(public))
    changes = np.zeros_like(public)
    for round in range(1, STATISTIC_ROUNDS[-1] + 1):
        chosen = range((round - 1) * STATISTIC_TEXTS, round * STATISTIC_TEXTS)
        trained = victim.step(start, chosen)
        update = _product(trained, value, victim.trainer.scaling)
        before = _product(start, value, victim.trainer.scaling)
        linked = link(before[:, order], update[:, order])
        change = (update - before)[:, order]
        changes += change.T @ change
        if round in STATISTIC_ROUNDS:
            guess = match_statistics(changes, public)
            yield {
                "attacker": "statistics of the updates",
                "rank": WIDE_RANK,
                "rounds": round,
                "texts": STATISTIC_TEXTS * round,
                "columns_linked": placed(linked, np.arange(len(order))),
                "columns_placed": placed(guess, order),
            }
    seen = _second_moment(victim, victim.texts[:count])
    guess = match_statistics(seen[np.ix_(order, order)], public)
    yield {
        "attacker": "statistics of the inputs themselves",
        "texts": count,
        "columns_placed": placed(guess, order),
    }


def _second_moment(victim: Victim, texts: Sequence[Int64]) -> Float64:
    """Second moment of the first layer's inputs over texts, float64[n, n]."""
    depth = max(map(len, texts))
    total: Float64 | None = None
    for place in range(depth):
        tokens = np.array([text[place] for text in texts if len(text) > place])
        vectors = victim.input(tokens, place).astype(np.float64)
        part = vectors.T @ vectors
        total = part if total is None else total + part
    assert total is not None
    return total / sum(map(len, texts))


def _product(adapter: AdapterState, module: int, scaling: float) -> Float64:
    """An update multiplied out, float64[m, n]."""
    factors = canonical(adapter.modules[module].b, adapter.modules[module].a, scaling)
    return factors.left @ factors.right


def _average(
    victim: Victim, one: tuple[AdapterState, float, int], other: tuple[AdapterState, float, int]
) -> AdapterState:
    """The published average of two agents at the victim's rank, by the method's own steps with nothing encrypted."""
    updates = [local_update(adapter, scaling) for adapter, scaling, _ in (one, other)]
    weights = [part[2] / (one[2] + other[2]) for part in (one, other)]
    cap = 4 * max(update.factors[0].rank for update in updates)
    modules = []
    for index, shape in enumerate(victim.shapes.modules):
        lefts = [update.factors[index].left for update in updates]
        common = basis(lefts, weights, cap)
        core = np.sum(
            [
                plain_part(
                    project(common, update.factors[index].left), update.factors[index].right, weight, shape.in_features
                )
                for update, weight in zip(updates, weights, strict=True)
            ],
            axis=0,
        )
        core = average(core, np.zeros((core.shape[0], 0)), 1.0)
        rows = np.zeros((victim.trainer.rank, shape.in_features))
        rows[:, : victim.trainer.rank] = np.eye(victim.trainer.rank)
        modules.append(reparameterize(common, core, victim.trainer.rank, victim.trainer.scaling, rows, missing=1e-6))
    dense = tuple(
        np.asarray(sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True)))
        for tensors in zip(*(update.dense for update in updates), strict=True)
    )
    return AdapterState(tuple(modules), dense)

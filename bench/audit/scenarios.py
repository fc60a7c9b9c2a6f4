"""What is measured: each scenario yields flat records, one an attacker and setting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.audit.attacks import hidden_column
from bench.audit.corpus import Corpus, Row
from bench.audit.probe import MISSED, Finding, Probe
from bench.audit.victim import Victim, load_victim
from bench.audit.wire import Float64, Int64, Transmission, transmit
from services.client_agent.adapter import AdapterState

Record = dict[str, Any]

BUDGETS: Final = (
    "0%", "0.3%", "1%", "5%", "25%", "50%", "60%", "66%", "68%", "70%", "75%", "80%", "85%", "86%", "88%", "90%", "95%",
    "full",
)  # fmt: skip
ZEROED_UP_TO: Final = 5
"""Zeroed columns are tried with the first so many budgets: their attacks are over by then."""

WIDE_RANK: Final = 64
LENGTH: Final = 27
"""Two texts of so many tokens have 53 different inputs: they share the opening."""

STARTERS: Final = 8
"""Texts that a published average was learned from: the last of an agent's file."""

_SKIPPED: Final = 1000

RANKS: Final = (4, 8, 16, 64)
BATCHES: Final = ((1, 8), (1, 16), (1, 30), (2, 27), (4, 20), (16, 30))
"""(texts, tokens of each)"""

BATCH_PLACES: Final = 12
"""The first so many places are judged, which keeps the run short."""

DEFAULT_RANK: Final = 8
DEFAULT_TEXTS: Final = 480
DEFAULT_STEPS: Final = 30
DEFAULT_BATCH: Final = 16
DEFAULT_BUDGETS: Final = ("0%", "10%", "50%", "90%", "full")
DEFAULT_PLACES: Final = 8
TRAININGS: Final = (
    (1, 1, 1, 8), (1, 1, 1, 64), (1, 1, 30, 8), (1, 1, 30, 64), (4, 4, 30, 8), (4, 4, 30, 64), (16, 16, 30, 8),
    (64, 16, 30, 8),
)  # fmt: skip
"""(texts, texts a step, steps, rank)"""

SHORT: Final = 16
"""Tokens of the texts that an agent with few of them has."""

REPEATS: Final = 2

LEFT_ATTACKERS: Final = ("left factors only", "left factors, start known")
RIGHT_ATTACKERS: Final = ("order unknown", "order known", "order and start known")


@dataclass(frozen=True)
class Setting:
    """Where scenarios take texts from and put files to."""

    corpus: Corpus
    folder: Path

    def victim(self, rows: Sequence[Row], **options: Any) -> Victim:
        """An agent with these texts."""
        return load_victim(rows, self.folder / "agent", labels=self.corpus.labels, **options)

    def texts(self, texts: int, length: int, repeat: int) -> list[Row]:
        """First the texts under attack, then as many for control."""
        return self.corpus.of_length(length, 2 * texts, repeat * 2 * texts)

    def starters(self) -> list[Row]:
        """Another agent's texts, which a published average was learned from."""
        return self.corpus.of_length(LENGTH, STARTERS, _SKIPPED)

    def target(self, texts: int, length: int, repeat: int, *, rank: int) -> tuple[Victim, Probe]:
        """An agent that has such texts and the starters, and a probe."""
        victim = self.victim(self.texts(texts, length, repeat) + self.starters(), rank=rank)
        return victim, aim(victim, 0, texts, repeat)


def aim(victim: Victim, at: int, texts: int, repeat: int, places: int = 32) -> Probe:
    """A probe of some texts of a victim; as many after them are the control."""
    attacked_texts, control = victim.texts[at : at + texts], victim.texts[at + texts : at + 2 * texts]
    return Probe(victim, attacked_texts, control, np.random.default_rng(repeat), places=places)


def budgets(setting: Setting) -> Iterator[Record]:
    """One plain gradient step on two texts, the value projection, over budgets: what hiding columns is worth."""
    for repeat in range(REPEATS):
        victim, probe = setting.target(2, LENGTH, repeat, rank=WIDE_RANK)
        start = later_start(victim)
        trained = victim.step(start, [0, 1])
        tokens = sum(map(len, victim.texts[:2]))
        priorities = victim.priorities(start)
        for number, budget in enumerate(BUDGETS):
            sent = transmit(trained, victim.trainer.scaling, victim.shapes, budget, priorities, repeat + 1)
            share = sent.sights[0].hidden / sent.sights[0].width
            common = {"repeat": repeat, "budget": budget, "hidden": share, "rank": WIDE_RANK, "tokens": tokens}
            if budget in ("0%", "full"):
                yield common | {"attacker": "left factors only"} | figures(probe.left(sent))
            for attacker, found in _on_one_module(victim, probe, sent, start, trained, number < ZEROED_UP_TO):
                yield common | {"attacker": attacker} | figures(found)
        yield {"repeat": repeat, "attacker": "gram, one column", **_single_column(trained, victim, priorities)}


def batches(setting: Setting) -> Iterator[Record]:
    """One plain gradient step, everything plain, over ranks and batches: where span checks work at all."""
    cells = [(texts, length, repeat) for texts, length in BATCHES for repeat in range(REPEATS)]
    groups = [setting.texts(texts, length, repeat) for texts, length, repeat in cells]
    for rank in RANKS:
        victim = setting.victim([row for group in [*groups, setting.starters()] for row in group], rank=rank)
        first, later, at = victim.first_start(), later_start(victim), 0
        for (texts, _, repeat), group in zip(cells, groups, strict=True):
            probe = aim(victim, at, texts, repeat, BATCH_PLACES)
            tokens = sum(map(len, victim.texts[at : at + texts]))
            common = {"repeat": repeat, "rank": rank, "texts": texts, "tokens": tokens}
            for name, start in (("first", first), ("later", later)):
                trained = victim.step(start, range(at, at + texts))
                for attacker, found in attacked(victim, probe, start, trained, "0%"):
                    yield common | {"start": name, "attacker": attacker} | figures(found)
            at += len(group)


def trainings(setting: Setting) -> Iterator[Record]:
    """The product's own local training on few texts, every column plain."""
    for texts, batch, steps, rank in TRAININGS:
        for repeat in range(REPEATS):
            rows = setting.corpus.of_length(SHORT, texts, 2 * repeat * texts)
            others = setting.corpus.of_length(SHORT, texts, (2 * repeat + 1) * texts)
            victim = setting.victim(rows, rank=rank, batch_size=batch, steps=steps)
            control = setting.victim(others, rank=1)
            probe = Probe(victim, victim.texts, control.texts, np.random.default_rng(repeat))
            start = victim.first_start()
            tokens = sum(map(len, victim.texts))
            common = {"repeat": repeat, "rank": rank, "texts": texts, "batch": batch, "steps": steps, "tokens": tokens}
            for attacker, found in attacked(victim, probe, start, victim.train(start, 1), "0%"):
                yield common | {"attacker": attacker} | figures(found)


def defaults(setting: Setting) -> Iterator[Record]:
    """An agent with default settings, first round and second, over budgets; left factors do not depend on them."""
    rows = setting.corpus.sample(DEFAULT_TEXTS)
    victim = setting.victim(rows, rank=DEFAULT_RANK, batch_size=DEFAULT_BATCH, steps=DEFAULT_STEPS)
    control = setting.victim(setting.corpus.sample(DEFAULT_TEXTS, DEFAULT_TEXTS), rank=1)
    probe = Probe(victim, victim.texts, control.texts, np.random.default_rng(0), places=DEFAULT_PLACES)
    start = victim.first_start()
    priorities = victim.priorities(start)
    for round in (1, 2):
        trained = victim.train(start, round)
        for budget in DEFAULT_BUDGETS:
            for attacker, found in attacked(victim, probe, start, trained, budget, priorities, left=budget == "full"):
                yield {"round": round, "budget": budget, "attacker": attacker} | figures(found)
        start = trained


def later_start(victim: Victim) -> AdapterState:
    """A published average to start from: what another agent learned from the starters, refitted to the rank."""
    starters = range(len(victim.texts) - STARTERS, len(victim.texts))
    return victim.later_start(victim.step(victim.first_start(), starters), victim.trainer.scaling)


def attacked(
    victim: Victim,
    probe: Probe,
    start: AdapterState,
    trained: AdapterState,
    budget: str,
    priorities: Sequence[Int64] | None = None,
    *,
    left: bool = True,
) -> Iterator[tuple[str, Finding]]:
    """All attackers on one transmission, with or without the one on left factors."""
    natural = [np.arange(shape.in_features) for shape in victim.shapes.modules]
    sent = transmit(trained, victim.trainer.scaling, victim.shapes, budget, priorities or natural, 1)
    later = any(module.b.any() for module in start.modules)
    if left:
        yield "left factors only", probe.left(sent)
        if later:
            yield "left factors, start known", probe.left(sent, start)
    if all(sent.sights[index].right.shape[1] == 0 for index in victim.first):
        for attacker in RIGHT_ATTACKERS:
            yield attacker, MISSED
        return
    yield "order unknown", probe.right(sent, start)
    yield "order known", probe.right(sent, None, sent.orders)
    known = [probe.right(sent, start, sent.orders)]
    if not later:
        known.append(probe.sketched(sent, start, sent.orders))
    yield "order and start known", max(known, key=lambda found: found.leakage)


def figures(found: Finding) -> Record:
    """A finding as numbers."""
    return {
        "recall": found.nearest.recall,
        "control": found.control.recall,
        "leakage": found.leakage,
        "error": found.error,
        "recall_below_threshold": found.below.recall,
        "rouge1": found.nearest.rouge1,
        "rouge2": found.nearest.rouge2,
    }


def _on_one_module(
    victim: Victim, probe: Probe, sent: Transmission, start: AdapterState, trained: AdapterState, zeroed: bool
) -> Iterator[tuple[str, Finding]]:
    """Attackers on the first layer's value projection (the last of the modules that read its input)."""
    value = victim.first[-1]
    gradients = [after.a - before.a for after, before in zip(trained.modules, start.modules, strict=True)]
    columns = [order[sight.hidden :] for order, sight in zip(sent.orders, sent.sights, strict=True)]
    if not len(columns[value]):
        names = ("gradient of A, dropped", "order and start known, dropped", "order known, dropped", "order unknown")
        for attacker in names:
            yield attacker, MISSED
        return
    only = (value,)
    if zeroed:
        yield "gradient of A, zeroed", probe.gradient(gradients, columns, zeroed=True, modules=only)
        yield "order and start known, zeroed", probe.right(sent, start, sent.orders, zeroed=True, modules=only)
    yield "gradient of A, dropped", probe.gradient(gradients, columns, modules=only)
    yield "order and start known, dropped", probe.right(sent, start, sent.orders, modules=only)
    yield "order and start known, Gram", probe.gram(sent, start, sent.orders, only)
    yield "order known, dropped", probe.right(sent, None, sent.orders, modules=only)
    yield "order unknown", probe.right(sent, start, modules=only)


def _single_column(trained: AdapterState, victim: Victim, priorities: Sequence[Int64]) -> Record:
    """How well the only hidden column is known: largest error over modules, sign aside."""
    sent = transmit(trained, victim.trainer.scaling, victim.shapes, "1 columns", priorities, 1)
    whole = transmit(trained, victim.trainer.scaling, victim.shapes, "0%", priorities, 1)
    errors = []
    for sight, clear, order, full in zip(sent.sights, whole.sights, sent.orders, whole.orders, strict=True):
        truth: Float64 = clear.right[:, int(np.flatnonzero(full == order[0])[0])]
        guess = hidden_column(sight)
        errors.append(float(min(np.abs(guess - truth).max(), np.abs(guess + truth).max())))
    return {"hidden_columns": 1, "largest_error": max(errors)}

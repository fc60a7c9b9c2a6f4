"""What is measured: one method on one split with one seed is a unit; its records are flat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Final

import numpy as np

from bench.parity.corpus import Corpus, shares
from bench.parity.exchange import Exchange, Keys
from bench.parity.lab import Lab, Learner, Model
from bench.parity.methods import (
    Cohort,
    FedIt,
    FlexLora,
    Flora,
    HetLora,
    Method,
    Ours,
    OursCapped,
    OursDense,
    OursKeeping,
    updates_of,
)
from bench.parity.setting import Setting
from bench.records import Record
from services.client_agent.adapter import AdapterState
from services.client_agent.training import Evaluation
from shelora.plan import FederationSeed, Packing, uniform_stream

CENTRALISED: Final = "centralised"
UNTRUNCATED: Final = "the average itself"

METHODS: Final[Mapping[str, type[Method]]] = {
    "fedit": FedIt,
    "hetlora": HetLora,
    "flexlora": FlexLora,
    "flora": Flora,
    "exact": Ours,
    "capped": OursCapped,
    "dense": OursDense,
    "keeping": OursKeeping,
}


@dataclass
class Study:
    """What units share.

    Attributes:
        setting, corpus: what is trained on what.
        folder: for files of the exchange.
        lab: the model.
        keys: of the exchange.
        first: what all agents trained in the first round, by split and seed: it is the same for every method.
    """

    setting: Setting
    corpus: Corpus
    folder: Path
    lab: Lab
    keys: Keys
    first: dict[tuple[str, int], list[AdapterState]] = field(default_factory=dict)


def units(setting: Setting, study: Callable[[], Study]) -> dict[str, Callable[[], Iterator[Record]]]:
    """All units by name, one after the other by seed and split, so that they find what they share.

    Args:
        setting: what is trained.
        study: makes or gives what units share; called when the first unit runs.
    """
    found: dict[str, Callable[[], Iterator[Record]]] = {}
    for seed in setting.seeds:
        for split in setting.concentrations:
            for key in METHODS:
                found[f"{key}-{split}-{seed}"] = partial(federated, study, key, split, seed)
        found[f"centralised-{seed}"] = partial(centralised, study, seed)
    return found


def federated(study: Callable[[], Study], key: str, split: str, seed: int) -> Iterator[Record]:
    """Rounds of one method: accuracy of every agent's model after each."""
    shared = study()
    setting, lab = shared.setting, shared.lab
    rows = shares(lab.labels, len(setting.ranks), setting.concentrations[split], seed)
    learners = lab.learners(rows, seed)
    method = make_method(shared, key, learners, seed)
    common = {"method": method.name, "split": split, "seed": seed}
    for number in range(1, setting.rounds + 1):
        trained = _train(shared, learners, method, split, seed, number)
        method.combine(number, trained)
        last = number == setting.rounds
        found = _evaluate(lab, learners, method.models, last, one_model=method.one_model)
        for index, (learner, evaluation, sent) in enumerate(zip(learners, found, method.sent_bytes(), strict=True)):
            yield common | {
                "round": number,
                "agent": index,
                "rank": learner.rank,
                "examples": learner.examples,
                "commonest": commonest([lab.labels[row] for row in rows[index]]),
                "sent_bytes": sent,
                **_figures(evaluation, last),
            }
        exported = method.exported() if last else None
        if exported is not None:
            for learner, evaluation in zip(learners, _evaluate(lab, learners, exported, last), strict=True):
                yield common | {"exported": True, "rank": learner.rank, "round": number, **_figures(evaluation, last)}
        if type(method) is Ours:
            yield from _beside_flexlora(lab, learners, method, trained, found, common, number, last)
            yield from _untruncated(lab, learners[-1], method, common, number, last)


def centralised(study: Callable[[], Study], seed: int) -> Iterator[Record]:
    """One learner with all texts; see `Lab.central`."""
    shared = study()
    setting, lab = shared.setting, shared.lab
    learner = lab.central(seed)
    cohort = _cohort(shared, [learner], seed)
    model = Model(cohort.fresh(0, learner.rank, cohort.dense))
    for number in range(1, setting.rounds + 1):
        model = Model(lab.alone(partial(learner.train, model, number)))
        last = number == setting.rounds
        evaluation = lab.alone(partial(learner.evaluate, model, whole=last))
        yield {
            "method": CENTRALISED,
            "seed": seed,
            "round": number,
            "rank": learner.rank,
            "examples": learner.examples,
            **_figures(evaluation, last),
        }


def make_method(shared: Study, key: str, learners: Sequence[Learner], seed: int) -> Method:
    """A method at its start."""
    cohort, kind = _cohort(shared, learners, seed), METHODS[key]
    caps = {OursCapped: max(cohort.ranks), OursKeeping: sum(cohort.ranks)}
    if not issubclass(kind, Ours):
        return kind(cohort)
    exchange = Exchange(
        shared.folder / "exchange",
        shared.keys,
        cohort.shapes,
        [max(cohort.ranks)] * len(cohort.ranks) if kind is OursKeeping else cohort.ranks,
        cohort.seed,
        packing=Packing.DENSE if kind is OursDense else Packing.EXACT,
        cap=caps.get(kind),
    )
    return kind(cohort, exchange)


def _cohort(shared: Study, learners: Sequence[Learner], seed: int) -> Cohort:
    secret = FederationSeed(sha256(f"parity {seed}".encode()).digest())
    return Cohort(
        shapes=shared.lab.shapes,
        ranks=tuple(learner.rank for learner in learners),
        scalings=tuple(learner.scaling for learner in learners),
        examples=tuple(learner.examples for learner in learners),
        seed=secret,
        dense=learners[0].initial_dense(lambda name, count: uniform_stream(secret.derive("dense", name), count)),
    )


def _train(
    shared: Study, learners: Sequence[Learner], method: Method, split: str, seed: int, number: int
) -> list[AdapterState]:
    known = shared.first.get((split, seed)) if number == 1 else None
    if known is not None:
        return known
    trained = [
        shared.lab.alone(partial(learner.train, model, number))
        for learner, model in zip(learners, method.models, strict=True)
    ]
    if number == 1:
        shared.first = {(split, seed): trained}  # units come by split and seed: older ones are not asked for again
    return trained


def _evaluate(
    lab: Lab, learners: Sequence[Learner], models: Sequence[Model], whole: bool, *, one_model: bool = False
) -> list[Evaluation]:
    """All agents' models, or the one that all of them work with."""
    if one_model:
        return [lab.alone(partial(learners[-1].evaluate, models[-1], whole=whole))] * len(learners)
    works = [partial(learner.evaluate, model, whole=whole) for learner, model in zip(learners, models, strict=True)]
    return lab.each(works)


def _beside_flexlora(
    lab: Lab,
    learners: Sequence[Learner],
    method: Ours,
    trained: Sequence[AdapterState],
    found: Sequence[Evaluation],
    common: Record,
    number: int,
    last: bool,
) -> Iterator[Record]:
    """The same trained adapters, averaged in the clear."""
    clear = FlexLora(method.cohort)
    clear.combine(number, trained)
    other = _evaluate(lab, learners, clear.models, last)
    for learner, mine, model, evaluation, evaluated in zip(
        learners, method.models, clear.models, found, other, strict=True
    ):
        pairs = zip(updates_of(mine.adapter, learner.scaling), updates_of(model.adapter, learner.scaling), strict=True)
        factors = zip(mine.adapter.modules, model.adapter.modules, strict=True)
        yield common | {
            "beside": FlexLora.name,
            "round": number,
            "rank": learner.rank,
            "update_difference": max(float(np.abs(one - two).max()) for one, two in pairs),
            "factor_difference": max(
                max(float(np.abs(one.a - two.a).max()), float(np.abs(one.b - two.b).max())) for one, two in factors
            ),
            "dense_difference": max(
                float(np.abs(one - two).max()) for one, two in zip(mine.adapter.dense, model.adapter.dense, strict=True)
            ),
            "accuracy_difference": evaluation.accuracy - evaluated.accuracy,
            "loss_difference": evaluation.loss - evaluated.loss,
        }


def _untruncated(lab: Lab, learner: Learner, method: Ours, common: Record, number: int, last: bool) -> Iterator[Record]:
    """The average on the base model, not cut to any rank: what truncation at load takes is the difference to it."""
    cohort = method.cohort
    dense = method.models[-1].adapter.dense
    whole = Model(cohort.fresh(0, learner.rank, dense), method.average)
    evaluation = lab.alone(partial(learner.evaluate, whole, whole=last))
    yield common | {"measure": UNTRUNCATED, "round": number, **_figures(evaluation, last)}


def commonest(labels: Sequence[str]) -> float:
    """Share of the label that occurs most."""
    return Counter(labels).most_common(1)[0][1] / len(labels)


def _figures(evaluation: Evaluation, whole: bool) -> Record:
    return {
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "texts": evaluation.examples,
        "whole": whole,
    }

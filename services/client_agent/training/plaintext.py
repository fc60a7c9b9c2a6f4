"""The same federated training with the average formed in the clear: what the protocol's accuracy is compared with.

Every update is multiplied out to m x n, averaged by number of examples, and cut back to each agent's rank by SVD; an
agent with a sent rank keeps the residual up to it. Same configurations, seeds and rounds as the agents; one process, no
network, no encryption.

    python -m services.client_agent.training.plaintext --agents a.yaml b.yaml --rounds 3 --out report.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from services.client_agent.adapter import AdapterState
from services.client_agent.config import AgentConfig
from services.client_agent.training.trainer import Trainer
from services.common.config import load_config
from services.common.files import write_atomically
from shelora.errors import InvalidConfiguration, ModelMismatch, SheLoraError
from shelora.lora import Adapter, decompose, initial_adapter, reparameterize, split
from shelora.plan import FederationSeed, ModuleShape, fresh_rows, uniform_stream

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Participant:
    """One agent of the comparison."""

    name: str
    trainer: Trainer
    start: AdapterState


def average(
    states: Sequence[AdapterState], scalings: Sequence[float], weights: Sequence[float]
) -> tuple[tuple[NDArray[np.float64], ...], tuple[NDArray[np.float64], ...]]:
    """Weighted mean of the updates, residuals included, and of the dense tensors.

    Args:
        states: one per agent, ranks may differ.
        scalings: alpha / rank of each.
        weights: positive, in any unit.

    Returns:
        (float64[m, n] per module, one array per dense tensor).
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    modules = []
    for index, pairs in enumerate(zip(*(state.modules for state in states), strict=True)):
        total = np.zeros((pairs[0].b.shape[0], pairs[0].a.shape[1]))
        for share, scaling, pair, state in zip(shares, scalings, pairs, states, strict=True):
            total += share * scaling * (pair.b @ pair.a)
            if state.residual:
                total += share * (state.residual[index].left @ state.residual[index].right)
        modules.append(total)
    dense = [
        sum((share * tensor for share, tensor in zip(shares, tensors, strict=True)), np.zeros_like(tensors[0]))
        for tensors in zip(*(state.dense for state in states), strict=True)
    ]
    return tuple(modules), tuple(dense)


def cut(update: NDArray[np.float64], rank: int, scaling: float, rows: NDArray[np.float64]) -> Adapter:
    """Best adapter of a rank for an m x n update, by a full SVD.

    Args:
        update: float64[m, n].
        rank: the agent's rank.
        scaling: its alpha / rank.
        rows: float64[rank, n], rows of A for directions that the update does not have.
    """
    left, energy, right = decompose(update)
    return reparameterize(left, energy[:, None] * right, rank, scaling, rows)


def run(participants: Sequence[Participant], rounds: int) -> list[dict[str, Any]]:
    """Train all participants for some rounds.

    Returns:
        One record a round: round, and per agent name, rank, examples, loss, accuracy_before and accuracy_after.
    """
    states = [participant.start for participant in participants]
    before = _evaluate(participants, states)
    records: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        figures, trained = [], []
        for participant, state in zip(participants, states, strict=True):
            _load(participant, state)
            figures.append(participant.trainer.train(number))
            trained.append(replace(participant.trainer.get_adapter(), residual=state.residual))
        states = _average_and_cut(participants, trained, number)
        after = _evaluate(participants, states)
        agents = [
            {
                "agent": participant.name,
                "rank": participant.trainer.rank,
                "examples": participant.trainer.examples,
                "loss": figure["loss"],
                "seconds_train": figure["seconds"],
                "accuracy_before": accuracy_before,
                "accuracy_after": accuracy_after,
            }
            for participant, figure, accuracy_before, accuracy_after in zip(
                participants, figures, before, after, strict=True
            )
        ]
        records.append({"round": number, "agents": agents})
        _log.info("plaintext round done", round=number, accuracy=after)
        before = after
    return records


def load_participants(configs: Sequence[Path], initial: Sequence[Path], seed: FederationSeed) -> list[Participant]:
    """Load one trainer a configuration, with the adapters saved in `initial` or, without, equal ones from the seed.

    Raises:
        InvalidConfiguration: a bad file, or another number of initial folders.
        ModelMismatch: the agents tune different models.
    """
    if initial and len(initial) != len(configs):
        raise InvalidConfiguration(f"--initial: expected {len(configs)} folders, one per agent, got {len(initial)}")
    participants: list[Participant] = []
    for index, path in enumerate(configs):
        trainer = Trainer.load(load_config(AgentConfig, path, service="agent"))
        if participants and trainer.signature != participants[0].trainer.signature:
            raise ModelMismatch(
                f"{path}: expected the model, tokenizer, labels and LoRA targets of {configs[0]}, got others",
                hint="only ranks, data and budgets may differ between agents",
            )
        start = trainer.load_adapter(initial[index]) if initial else _starting_state(trainer, seed)
        participants.append(Participant(_name(path, configs), trainer, start))
    return participants


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison from the command line; 0 when the report is written, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="plaintext", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--agents", nargs="+", type=Path, required=True, help="agent configuration files")
    parser.add_argument("--initial", nargs="+", type=Path, default=[], help="PEFT folders to start from, one per agent")
    parser.add_argument("--rounds", type=int, required=True, help="number of rounds")
    parser.add_argument("--seed", default="", help="text that the start is drawn from when there are no folders")
    parser.add_argument("--out", type=Path, required=True, help="JSON report")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    seed = FederationSeed(hashlib.sha256(options.seed.encode()).digest())
    try:
        participants = load_participants(options.agents, options.initial, seed)
        records = run(participants, options.rounds)
    except SheLoraError as error:
        _log.error("plaintext comparison failed", code=error.code, detail=str(error))
        return 2
    write_atomically(options.out, json.dumps({"rounds": records}, indent=2).encode())
    return 0


def _average_and_cut(
    participants: Sequence[Participant], trained: Sequence[AdapterState], number: int
) -> list[AdapterState]:
    trainers = [participant.trainer for participant in participants]
    updates, dense = average(
        trained, [trainer.scaling for trainer in trainers], [trainer.examples for trainer in trainers]
    )
    shapes = trainers[0].signature.shapes.modules
    states = []
    for trainer in trainers:
        rank, sent, scaling = trainer.rank, trainer.sent_rank, trainer.scaling
        fits = [
            cut(update, sent, scaling, _rows(_FIXED_SEED, shape, number, sent))
            for update, shape in zip(updates, shapes, strict=True)
        ]
        if sent == rank:
            states.append(AdapterState(tuple(fits), dense))
        else:
            parts = [split(fit, rank, scaling) for fit in fits]
            states.append(AdapterState(tuple(fit for fit, _ in parts), dense, tuple(rest for _, rest in parts)))
    return states


def _load(participant: Participant, state: AdapterState) -> None:
    participant.trainer.set_residual(state.residual)
    participant.trainer.set_adapter(state)


def _starting_state(trainer: Trainer, seed: FederationSeed) -> AdapterState:
    modules = tuple(
        initial_adapter(trainer.rank, shape.out_features, _rows(seed, shape, 0, trainer.rank))
        for shape in trainer.signature.shapes.modules
    )
    dense = trainer.initial_dense(lambda name, count: uniform_stream(seed.derive("initial dense", name), count))
    return AdapterState(modules, dense)


def _rows(seed: FederationSeed, shape: ModuleShape, number: int, rank: int) -> NDArray[np.float64]:
    return fresh_rows(seed, "plaintext", 1, shape.name, number, rank, shape.in_features)


def _evaluate(participants: Sequence[Participant], states: Sequence[AdapterState]) -> list[float]:
    accuracies = []
    for participant, state in zip(participants, states, strict=True):
        _load(participant, state)
        accuracies.append(participant.trainer.evaluate().accuracy)
    return accuracies


def _name(path: Path, configs: Sequence[Path]) -> str:
    """File name without its ending, or the folder's name when all files are called the same."""
    stems = {config.stem for config in configs}
    return path.stem if len(stems) == len(configs) else path.resolve().parent.name


_FIXED_SEED = FederationSeed(bytes(32))


if __name__ == "__main__":
    raise SystemExit(main())

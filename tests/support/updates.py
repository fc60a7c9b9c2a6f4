"""What agents send in a round, made with the agent's own arithmetic but without an HE library.

Instead of ciphertexts there are fixed-point integers in the residues: they add modulo q exactly like the real ones, and
the sum can be read back, so it proves who was counted and how often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy

from services.client_agent.round import LocalUpdate, cipher_values, factor_tensors, wire_orders
from shelora.he.parameters import CkksParameters
from shelora.lora import canonical
from shelora.plan import DenseShape, FederationSeed, ModelShapes, ModuleShape, Negotiation, Packing, Plan

PARAMETERS = CkksParameters(ring_dimension=2048, modulus=2**53 + 1, modulus_bits=54, scale_bits=40)
SHAPES = ModelShapes(
    (ModuleShape("encoder.query", 24, 40), ModuleShape("encoder.value", 16, 25)), (DenseShape("head.weight", (3, 7)),)
)
SEED = FederationSeed(bytes(range(32)))
STEP = 2.0**-36


def make_plan(
    columns: Sequence[Sequence[int]],
    *,
    cap: int = 64,
    negotiation: Negotiation = Negotiation.ENCRYPTED,
    shapes: ModelShapes = SHAPES,
    federation: str = "ward",
    version: int = 1,
    packing: Packing = Packing.EXACT,
) -> Plan:
    """A plan whose levels are the given agents' encrypted columns."""
    levels = tuple(tuple(sorted({agent[index] for agent in columns})) for index in range(len(shapes.modules)))
    return Plan(
        federation=federation,
        version=version,
        epoch=1,
        shapes=shapes,
        cap=cap,
        negotiation=negotiation,
        levels=levels,
        parameters_digest=PARAMETERS.digest(),
        values_per_block=PARAMETERS.values_per_block,
        packing=packing,
    )


@dataclass(frozen=True, eq=False)
class Contribution:
    """One agent's update of one round.

    Attributes:
        agent: name.
        rank: LoRA rank.
        columns: encrypted columns per module.
        examples: training examples.
        update: the update in the clear, true column order.
    """

    agent: str
    rank: int
    columns: tuple[int, ...]
    examples: int
    update: LocalUpdate

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        agent: str,
        rank: int,
        columns: Sequence[int],
        examples: int,
        shapes: ModelShapes = SHAPES,
    ) -> Contribution:
        factors = tuple(
            canonical(rng.normal(size=(shape.out_features, rank)), rng.normal(size=(rank, shape.in_features)), 0.5)
            for shape in shapes.modules
        )
        dense = tuple(rng.normal(size=shape.shape) for shape in shapes.dense)
        return cls(agent, rank, tuple(columns), examples, LocalUpdate(factors, dense))

    def factors(self, plan: Plan, round_number: int = 1) -> bytes:
        """The factors payload."""
        return safetensors.numpy.save(factor_tensors(self.update, orders(plan, round_number), self.columns))

    def ciphertext(
        self, plan: Plan, ranks: Sequence[int], projection: bytes, weight: float, round_number: int = 1
    ) -> bytes:
        """The cipher payload, readable by `open_residues`."""
        values = cipher_values(
            self.update,
            orders(plan, round_number),
            self.columns,
            safetensors.numpy.load(projection),
            weight,
            plan.layout(ranks),
        )
        return to_residues(values)


def orders(plan: Plan, round_number: int = 1) -> tuple[np.ndarray, ...]:
    """Wire orders of a round, with priorities in natural order."""
    priorities = [np.arange(module.in_features) for module in plan.shapes.modules]
    return wire_orders(SEED, plan, round_number, priorities)


def sensitivities(seed: int = 0, shapes: ModelShapes = SHAPES) -> bytes:
    """A sensitivity payload, readable by `open_residues`."""
    return to_residues(np.random.default_rng(seed).integers(0, 1000, sum(m.in_features for m in shapes.modules)) * STEP)


def to_residues(values: np.ndarray, parameters: CkksParameters = PARAMETERS) -> bytes:
    """Values as fixed-point residues in the first polynomial of as many blocks as they fill."""
    ring = parameters.ring_dimension
    blocks = np.zeros((parameters.blocks_for(len(values)), 2, ring), dtype=np.uint64)
    padded = np.zeros(len(blocks) * ring)
    padded[: len(values)] = values
    steps = np.rint(padded / STEP).astype(np.int64)
    blocks[:, 0] = np.mod(steps, parameters.modulus).astype(np.uint64).reshape(-1, ring)
    return blocks.tobytes()


def open_residues(payload: bytes, count: int, parameters: CkksParameters = PARAMETERS) -> np.ndarray:
    """The values behind a sum of `to_residues`."""
    blocks = np.frombuffer(payload, dtype="<u8").reshape(-1, 2, parameters.ring_dimension)
    steps = blocks[:, 0].ravel().astype(np.int64)
    steps[steps > parameters.modulus // 2] -= parameters.modulus
    return steps[:count] * STEP

"""Simulated agents: they keep what they made on their disk and send it byte by byte, as the real ones do.

What they send is chosen so that a sum tells who is in it and how often. Ciphertext residues of agent i begin with
16**i, so every hexadecimal digit of the sum counts one agent; everything behind is random and adds up modulo q. Factors
are random and small enough for a basis that captures them exactly.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from services.aggregator.domain import (
    AgentView,
    Download,
    PayloadKind,
    Registration,
    Signature,
    SoftwareVersion,
    UploadTicket,
)
from services.common.digests import digest_of
from services.common.identity import Identity, Role
from shelora.he.parameters import CkksParameters
from shelora.plan import DenseShape, ModelShapes, ModuleShape, Negotiation, Plan
from shelora.rounds import AgentTask

FEDERATION = "ward"
PARAMETERS = CkksParameters(ring_dimension=1024, modulus=134_215_681, modulus_bits=27, scale_bits=20)
SHAPES = ModelShapes((ModuleShape("query", 12, 9), ModuleShape("value", 8, 7)), (DenseShape("head", (2, 3)),))
WIDTHS = tuple(module.in_features for module in SHAPES.modules)
CAP = 64
DIGIT = 16

# Rank, encrypted columns per module, examples. Powers of two make every weight exact.
PROFILES = (
    (1, WIDTHS, 64),
    (2, (3, 2), 128),
    (1, (5, 0), 32),
    (2, WIDTHS, 16),
    (1, (3, 2), 16),
)


def signature(base: bytes = b"base") -> Signature:
    return Signature(SHAPES, hashlib.sha256(base).digest(), bytes(32), "sequence-classification", bytes(32))


@dataclass(frozen=True)
class Payload:
    """A payload on an agent's disk."""

    ticket: UploadTicket
    data: bytes


@dataclass
class Device:
    """One agent.

    Attributes:
        index: its digit.
        rank: LoRA rank.
        columns: encrypted columns per module.
        examples: training examples.
        payloads: what it made so far, by kind and round (or plan version).
    """

    index: int
    rank: int
    columns: tuple[int, ...]
    examples: int
    payloads: dict[tuple[PayloadKind, int], Payload] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"agent-{self.index}"

    @property
    def identity(self) -> Identity:
        return Identity(FEDERATION, Role.AGENT, self.name)

    def registration(self, epoch: int = 1, base: bytes = b"base") -> Registration:
        return Registration(
            federation=FEDERATION,
            version=SoftwareVersion("0.1.0", 1),
            rank=self.rank,
            columns=self.columns,
            budget="full" if self.columns == WIDTHS else "25%",
            signature=signature(base),
            epoch=epoch,
            parameters_digest=PARAMETERS.digest(),
            examples=self.examples,
        )

    def payload(self, view: AgentView, projection: Download | None) -> Payload | None:
        """What the view asks for, made once and kept."""
        plan = view.plan
        if plan is None or view.task in {AgentTask.WAIT, AgentTask.LEAVE}:
            return None
        if view.task is AgentTask.NEGOTIATE:
            encrypted = plan.negotiation is Negotiation.ENCRYPTED
            kind, number = (PayloadKind.SENSITIVITY if encrypted else PayloadKind.VOTES), plan.version
        else:
            kind = PayloadKind.FACTORS if view.task is AgentTask.FACTORS else PayloadKind.CIPHER
            number = view.round
        if (kind, number) not in self.payloads:
            self.payloads[kind, number] = self._make(kind, number, view, plan, projection)
        return self.payloads[kind, number]

    def _make(
        self, kind: PayloadKind, number: int, view: AgentView, plan: Plan, projection: Download | None
    ) -> Payload:
        layout_digest = b""
        if kind is PayloadKind.FACTORS:
            data = self.factors(number)
        elif kind is PayloadKind.VOTES:
            data = self._votes(view.vote_columns)
        elif kind is PayloadKind.SENSITIVITY:
            data = self.residues(number, -(-sum(WIDTHS) // plan.values_per_block))
        else:
            assert projection is not None
            layout = plan.layout([member.rank for member in projection.cohort])
            assert layout.digest() == projection.layout_digest
            layout_digest = projection.layout_digest
            data = self.residues(number, layout.blocks(self.columns))
        is_round = kind in {PayloadKind.FACTORS, PayloadKind.CIPHER}
        ticket = UploadTicket(
            federation=FEDERATION,
            kind=kind,
            round=number if is_round else 0,
            plan_version=plan.version,
            epoch=plan.epoch,
            plan_digest=plan.digest(),
            size_bytes=len(data),
            digest=digest_of(data),
            layout_digest=layout_digest,
            examples=self.examples if kind is PayloadKind.FACTORS else 0,
            metrics={"loss": 0.5} if kind is PayloadKind.FACTORS else {},
        )
        return Payload(ticket, data)

    def update(self, number: int) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Left and right factor per module of a round; the rows of the right ones are orthonormal."""
        rng = np.random.default_rng((self.index, number))
        factors = []
        for module in SHAPES.modules:
            left = rng.normal(size=(module.out_features, self.rank)).astype(np.float32)
            right = np.linalg.qr(rng.normal(size=(module.in_features, self.rank)))[0].T.astype(np.float32)
            factors.append((left, right))
        return factors

    def factors(self, number: int) -> bytes:
        tensors = {}
        for index, (left, right) in enumerate(self.update(number)):
            tensors[f"{index}.left"] = np.ascontiguousarray(left)
            tensors[f"{index}.right"] = np.ascontiguousarray(right[:, self.columns[index] :])
        return safetensors.numpy.save(tensors)

    def residues(self, number: int, blocks: int) -> bytes:
        rng = np.random.default_rng((self.index, number, blocks))
        values = rng.integers(0, PARAMETERS.modulus, size=(blocks, 2, PARAMETERS.ring_dimension), dtype=np.uint64)
        values[0, 0, 0] = DIGIT**self.index
        return values.tobytes()

    def _votes(self, columns: tuple[int, ...]) -> bytes:
        rng = np.random.default_rng(self.index)
        tensors = {}
        for index, (count, width) in enumerate(zip(columns, WIDTHS, strict=True)):
            tensors[f"{index}.token"] = rng.permutation(width)[:count].astype(np.int64)
            tensors[f"{index}.score"] = rng.integers(0, 1 << 40, size=count, dtype=np.int64)
        return safetensors.numpy.save(tensors)


def digits(total: int) -> list[int]:
    """How often every agent is in a sum."""
    return [total // DIGIT**index % DIGIT for index in range(len(PROFILES))]

"""What a round costs one agent: bytes by docs/method.md section 7, seconds and memory by docs/operations.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from services.operators.planning.rates import Rates
from services.operators.planning.terms import Participant
from shelora.plan import (
    ModelShapes,
    Packing,
    SlotLayout,
    average_bytes,
    cipher_bytes,
    factors_bytes,
    range_bytes,
)

FLOAT_BYTES: Final = 4
"""Bytes of a plain value on the wire."""

DOUBLE_BYTES: Final = 8
"""Bytes of a value in memory."""

_STEPS: Final = 3
"""Steps of an agent in a round: factors, cipher, apply."""

_PACK_PASSES: Final = {Packing.EXACT: 4, Packing.DENSE: 8}
"""How often packing walks through the values, the first touch of fresh memory included."""

_REFIT_PASSES: Final = 2.5
"""How often re-fitting walks through a core, besides the decomposition."""

_FRESH_ROW_PASSES: Final = 4.5
"""What drawing a fresh value costs, in values moved."""


@dataclass(frozen=True)
class AgentCost:
    """What one agent sends, receives, computes and holds in one round, training left out.

    Bytes are raw tensor and ciphertext bytes without framing; seconds are predicted by the rates that were given.

    Attributes:
        agent, rank, budget, columns: as registered; `columns` is the encrypted k per module.
        encrypted_share: encrypted columns over all columns.
        blocks: ciphertext blocks sent.
        factors_bytes, cipher_up_bytes: up, in all `up_bytes`.
        projection_bytes, average_bytes, cipher_down_bytes: down, in all `down_bytes`.
        canonical_s: from trained weights to the factors that are sent.
        pack_s: from the answered projection to the numbers that are encrypted.
        encrypt_s, decrypt_s: the HE library alone.
        upload_s, download_s: on the link.
        refit_s: opening the average and fitting it to the own rank.
        overhead_s: requests, and files written and flushed, in the three steps factors, cipher, apply.
        peak_ram_bytes: most that a step of the round holds at once, on top of model and process.
        measured: whether the seconds rest on figures that the agent reported.
    """

    agent: str
    rank: int
    budget: str
    columns: tuple[int, ...]
    encrypted_share: float
    blocks: int
    factors_bytes: int
    cipher_up_bytes: int
    up_bytes: int
    projection_bytes: int
    average_bytes: int
    cipher_down_bytes: int
    down_bytes: int
    canonical_s: float
    pack_s: float
    encrypt_s: float
    upload_s: float
    download_s: float
    decrypt_s: float
    refit_s: float
    overhead_s: float
    peak_ram_bytes: int
    measured: bool

    @property
    def seconds(self) -> float:
        """All seconds together: what a round takes this agent besides training and waiting."""
        computed = self.canonical_s + self.pack_s + self.encrypt_s + self.decrypt_s + self.refit_s
        return computed + self.upload_s + self.download_s + self.overhead_s


@dataclass(frozen=True)
class Published:
    """What every agent fetches at the end of a round.

    Attributes:
        smallest, largest: smallest and largest k of the agents, per module.
        average_bytes: plain part.
        cipher_bytes: summed blocks.
        blocks: how many of them.
    """

    smallest: tuple[int, ...]
    largest: tuple[int, ...]
    average_bytes: int
    cipher_bytes: int
    blocks: int


def published_by(shapes: ModelShapes, layout: SlotLayout, participants: tuple[Participant, ...]) -> Published:
    """The average of a round in which all participants count."""
    modules = range(len(shapes.modules))
    smallest = tuple(min(one.columns[index] for one in participants) for index in modules)
    largest = tuple(max(one.columns[index] for one in participants) for index in modules)
    plain = average_bytes(shapes, layout.basis_rows, smallest) + range_bytes(layout.packing, layout.basis_rows)
    return Published(smallest, largest, plain, cipher_bytes(layout, largest), layout.blocks(largest))


def agent_cost(
    shapes: ModelShapes, layout: SlotLayout, participant: Participant, published: Published, rates: Rates
) -> AgentCost:
    """What a round costs one agent.

    Args:
        shapes: what is trained.
        layout: slots of the cohort.
        participant: the agent.
        published: what it fetches.
        rates: its speeds.

    Raises:
        SizeMismatch, ShapeMismatch: columns that do not fit the shapes.

    Source: docs/method.md section 7.
    """
    rank, columns = participant.rank, participant.columns
    factors = factors_bytes(shapes, rank, columns)
    blocks = layout.blocks(columns)
    cipher = cipher_bytes(layout, columns)
    projection = FLOAT_BYTES * rank * sum(layout.basis_rows) + range_bytes(layout.packing, layout.basis_rows)
    down = projection + published.average_bytes + published.cipher_bytes
    width = sum(module.in_features for module in shapes.modules)
    return AgentCost(
        agent=participant.name,
        rank=rank,
        budget=participant.budget,
        columns=columns,
        encrypted_share=sum(columns) / width if width else 0.0,
        blocks=blocks,
        factors_bytes=factors,
        cipher_up_bytes=cipher,
        up_bytes=factors + cipher,
        projection_bytes=projection,
        average_bytes=published.average_bytes,
        cipher_down_bytes=published.cipher_bytes,
        down_bytes=down,
        canonical_s=_canonical_s(shapes, rank, rates),
        pack_s=_pack_s(layout, rank, columns, rates),
        encrypt_s=rates.encrypt_s(blocks * layout.values_per_block),
        upload_s=(factors + cipher) / rates.upload_bytes_per_s,
        download_s=down / rates.download_bytes_per_s,
        decrypt_s=rates.decrypt_s(published.blocks * layout.values_per_block),
        refit_s=_refit_s(shapes, layout, rank, rates),
        overhead_s=_STEPS * rates.step_s,
        peak_ram_bytes=peak_ram_bytes(shapes, layout, participant, published),
        measured=rates.measured,
    )


def peak_ram_bytes(shapes: ModelShapes, layout: SlotLayout, participant: Participant, published: Published) -> int:
    """Most bytes that one step of a round holds at once.

    The steps are those of the client agent: save the update, write the factors, pack and encrypt, open the average.
    """
    return max(step_bytes(shapes, layout, participant, published).values())


def step_bytes(
    shapes: ModelShapes, layout: SlotLayout, participant: Participant, published: Published
) -> dict[str, int]:
    """Bytes that are alive at the peak of each step, by step; the HE library's own objects are left out.

    Args:
        shapes: what is trained.
        layout: slots of the cohort.
        participant: the agent.
        published: what it fetches at the end.
    """
    dense = layout.dense_slots
    update = DOUBLE_BYTES * (
        participant.rank * sum(module.out_features + module.in_features for module in shapes.modules) + dense
    )
    factors = factors_bytes(shapes, participant.rank, participant.columns)
    slots = DOUBLE_BYTES * layout.used_slots(participant.columns)
    cipher = cipher_bytes(layout, participant.columns)
    reals = DOUBLE_BYTES * layout.reals(layout.used_slots(participant.columns))
    rows = list(zip(shapes.modules, layout.basis_rows, strict=True))
    cores = DOUBLE_BYTES * sum(s * module.in_features for module, s in rows)
    largest_core = DOUBLE_BYTES * max((s * module.in_features for module, s in rows), default=0)
    bases = DOUBLE_BYTES * sum(s * module.out_features for module, s in rows)
    opened = DOUBLE_BYTES * published.blocks * layout.values_per_block
    pairs = layout.packing is Packing.DENSE
    fetched = published.cipher_bytes + opened + published.average_bytes
    return {
        # Trained weights, canonical factors, and both again as they are rendered for the disk.
        "save": 4 * update,
        "factors": update + 3 * factors,
        # Parts and slots, with pairs also what they become; then what is encrypted and its residues.
        "pack": update + 2 * slots + (reals if pairs else 0),
        "encrypt": update + reals + cipher,
        # Residues and opened numbers stay while the payload is parsed, then taken apart.
        "parse": fetched + published.average_bytes,
        "split": fetched + (5 * opened if pairs else 0),
        "open": fetched + (2 * opened if pairs else 0) + 2 * cores + bases + 2 * largest_core,
    }


def _canonical_s(shapes: ModelShapes, rank: int, rates: Rates) -> float:
    return sum(
        2 * rates.call_s + rates.qr_s(module.out_features + module.in_features, rank) for module in shapes.modules
    )


def _pack_s(layout: SlotLayout, rank: int, columns: tuple[int, ...], rates: Rates) -> float:
    passes = _PACK_PASSES[layout.packing]
    return sum(
        rates.call_s / 2 + passes * rates.move_s(s * k) + rates.product_s(s, rank, k)
        for s, k in zip(layout.basis_rows, columns, strict=True)
    )


def _refit_s(shapes: ModelShapes, layout: SlotLayout, rank: int, rates: Rates) -> float:
    """Opening walks once through basis and core, re-fitting decomposes the core."""
    return sum(
        rates.call_s
        + rates.move_s(s * (module.in_features + module.out_features))
        + rates.move_s(_REFIT_PASSES * s * module.in_features + _FRESH_ROW_PASSES * rank * module.in_features)
        + rates.svd_s(s, module.in_features)
        for module, s in zip(shapes.modules, layout.basis_rows, strict=True)
    )

"""Use cases of operators: create, start, stop, move to another key epoch."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from services.aggregator import store
from services.aggregator.domain import FederationSpec
from services.aggregator.ledger import Change, Ledger
from services.aggregator.store import StoredFederation
from services.common.clock import Clock
from services.common.identity import check_name
from shelora.errors import FederationExists, InvalidPlan
from shelora.he.parameters import CkksParameters
from shelora.plan.packing import check_packing
from shelora.rounds import EpochAdopted, Started, Stopped, strategy_named

LONGEST_TIMEOUT_S: Final = 2_592_000
MOST_ROUNDS: Final = 10_000
REASON_BYTES: Final = 200

_BOUNDS: Final = {
    "rounds": (1, MOST_ROUNDS),
    "target_agents": (2, 100_000),
    "quorum": (2, 100_000),
    "renegotiate_every": (0, MOST_ROUNDS),
    "gather_timeout_s": (1, LONGEST_TIMEOUT_S),
    "negotiate_timeout_s": (1, LONGEST_TIMEOUT_S),
    "train_timeout_s": (1, LONGEST_TIMEOUT_S),
    "cipher_timeout_s": (1, LONGEST_TIMEOUT_S),
    "basis_cap": (0, 4_096),
    "epoch": (1, 2**31 - 1),
    "max_abandoned": (0, 100),
}


class Operations:
    """What operators may do to federations."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock

    async def create(self, spec: FederationSpec) -> StoredFederation:
        """Create a federation; the same specification again answers the existing one.

        Raises:
            InvalidIdentifier, InvalidPlan: the specification breaks a rule.
            FederationExists: it exists with another specification.
        """
        spec = replace(spec, strategy=spec.strategy or strategy_named("").name)
        check_spec(spec)
        existing = await self._ledger.create(store.new_federation(spec, self._clock.now_ms()))
        if existing.spec != spec:
            raise FederationExists(
                f"expected the specification that {spec.federation} was created with, got another one",
                hint="create a federation of another name, or repeat the first specification",
                context={"federation": spec.federation},
            )
        return existing

    async def start(self, name: str, more_rounds: int) -> StoredFederation:
        """Start a federation, or start it again with more rounds.

        Raises:
            UnknownFederation: there is none of that name.
            FederationEnded: all its rounds are published and none are added.
            WrongPhase: rounds are added while it runs.
            InvalidPlan: more rounds than allowed.
        """

        async def body(change: Change) -> StoredFederation:
            rounds = change.stored.state.rounds + more_rounds
            if not 0 <= more_rounds <= rounds <= MOST_ROUNDS:
                raise InvalidPlan(
                    f"expected at most {MOST_ROUNDS} rounds in all, got {rounds}", hint="create another federation"
                )
            change.emit(Started(more_rounds))
            return change.stored

        return await self._ledger.change("start_federation", name, body)

    async def stop(self, name: str, reason: str) -> StoredFederation:
        """Stop a federation; one that has ended stays as it is.

        Raises:
            UnknownFederation: there is none of that name.
            InvalidPlan: the reason is too long.
        """
        return await self._ledger.emit("stop_federation", name, Stopped(checked_reason(reason)))

    async def adopt_epoch(self, name: str, epoch: int, parameters: CkksParameters) -> StoredFederation:
        """Move a federation to another key epoch at the next boundary.

        Raises:
            UnknownFederation: there is none of that name.
            WrongEpoch: the epoch is older than the newest one known here.
            InvalidPlan: other parameters than those the epoch is known by, or too weak for the federation's packing.
        """

        async def body(change: Change) -> StoredFederation:
            _check_bounds("epoch", epoch)
            change.emit(EpochAdopted(epoch))
            known = change.stored.parameters.get(epoch)
            if known is None:
                check_packing(change.stored.spec.packing, parameters, change.stored.spec.target_agents)
                change.set(parameters={**change.stored.parameters, epoch: parameters})
                spec = replace(change.stored.spec, epoch=epoch, parameters=parameters)
                await store.federations.insert_epoch(change.connection, spec)
            elif known != parameters:
                raise InvalidPlan(
                    f"expected the parameters that epoch {epoch} is known by, got others",
                    hint="fetch the epoch from the key manager again",
                    context={"federation": name},
                )
            return change.stored

        return await self._ledger.change("adopt_epoch", name, body)


def check_spec(spec: FederationSpec) -> None:
    """Check a specification against the bounds of the wire contract.

    Raises:
        InvalidIdentifier, InvalidPlan: naming the field, what was expected and what it holds.
    """
    check_name(spec.federation, "federation")
    for field in _BOUNDS:
        _check_bounds(field, getattr(spec, field))
    if spec.quorum > spec.target_agents:
        raise InvalidPlan(
            f"expected a quorum of at most target_agents ({spec.target_agents}), got {spec.quorum}",
            hint="correct the federation's specification",
            context={"field": "quorum"},
        )
    strategy_named(spec.strategy)
    spec.parameters.validate()
    check_packing(spec.packing, spec.parameters, spec.target_agents)


def _check_bounds(field: str, value: int) -> None:
    least, most = _BOUNDS[field]
    if not least <= value <= most:
        raise InvalidPlan(
            f"expected {field} from {least} to {most}, got {value}",
            hint="correct the federation's specification",
            context={"field": field},
        )


def checked_reason(reason: str) -> str:
    """The reason itself.

    Raises:
        InvalidPlan: it is longer than the wire contract allows.
    """
    size = len(reason.encode())
    if size > REASON_BYTES:
        raise InvalidPlan(f"expected a reason of at most {REASON_BYTES} bytes, got {size}", hint="shorten it")
    return reason

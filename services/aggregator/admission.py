"""Whether an announced upload is welcome, and what its payload has to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from services.aggregator.agents import MOST_EXAMPLES, check_metrics
from services.aggregator.domain import NEGOTIATION_KINDS, UPLOAD_KINDS, ExpectedPayload, PayloadKind, UploadTicket
from services.aggregator.plans import (
    cohort_layout,
    layout_digest,
    present_plan,
    sensitivity_blocks,
    widths,
)
from services.aggregator.store import StoredFederation
from services.aggregator.store.payloads import PayloadKey
from services.common.digests import DIGEST_BYTES
from shelora.errors import DigestMismatch, MalformedPayload, StalePlan, ValueOutOfRange, WrongEpoch, WrongPhase
from shelora.plan.plan import Negotiation, Plan
from shelora.rounds import (
    BallotReceived,
    CipherReceived,
    Event,
    FactorsReceived,
    Federation,
    admit_ballot,
    admit_cipher,
    admit_factors,
    vote_columns,
)

_BALLOT_KINDS: Final = {
    Negotiation.ENCRYPTED: PayloadKind.SENSITIVITY,
    Negotiation.OPE: PayloadKind.VOTES,
}


@dataclass(frozen=True)
class PayloadName:
    """Which payload of which agent; there is at most one accepted payload per name."""

    federation: str
    kind: PayloadKind
    round: int
    plan_version: int
    agent: str

    @property
    def key(self) -> PayloadKey:
        """The name in the store."""
        return PayloadKey(self.federation, self.kind.value, self.round, self.plan_version, self.agent)

    def possible(self, state: Federation) -> bool:
        """Whether such a round or plan version has ever been; numbers beyond may not even fit the database."""
        if self.round:
            return state.round is not None and self.round <= state.round.number
        return state.plan is not None and self.plan_version <= state.plan.version

    def blob_key(self, digest: bytes) -> str:
        """Where the accepted bytes are."""
        folder = folder_of(self.federation, self.round, self.plan_version)
        return f"{folder}{self.kind.value}/{self.agent}-{digest.hex()[:16]}"

    def staging_id(self, digest: bytes) -> str:
        """Where incomplete bytes are."""
        return self.blob_key(digest)

    def event(self, ticket: UploadTicket) -> Event:
        """What its acceptance is to the state machine."""
        if self.kind is PayloadKind.FACTORS:
            return FactorsReceived(self.round, self.agent, ticket.examples)
        if self.kind is PayloadKind.CIPHER:
            return CipherReceived(self.round, self.agent)
        return BallotReceived(self.plan_version, self.agent)


def folder_of(federation: str, round_: int, plan_version: int = 0) -> str:
    """Prefix of all bytes of a round, or (round 0) of the negotiation of a plan version."""
    return f"{federation}/r{round_:06d}/" if round_ else f"{federation}/p{plan_version:06d}/"


def name_of(ticket: UploadTicket, agent: str) -> PayloadName:
    """The name of what a ticket announces."""
    version = ticket.plan_version if ticket.kind in NEGOTIATION_KINDS else 0
    return PayloadName(ticket.federation, ticket.kind, ticket.round, version, agent)


def announced(ticket: UploadTicket) -> None:
    """Check what can be checked on the ticket alone.

    Raises:
        MalformedPayload, ValueOutOfRange, NonFiniteValue: it can never be right.
    """
    if ticket.kind not in UPLOAD_KINDS:
        raise MalformedPayload(f"expected a kind that agents upload, got {ticket.kind.value}", hint="download it")
    if len(ticket.digest) != DIGEST_BYTES:
        raise MalformedPayload(
            f"expected a digest of {DIGEST_BYTES} bytes, got {len(ticket.digest)}", hint="repair the sender"
        )
    if ticket.size_bytes < 0:
        raise ValueOutOfRange(f"expected a size of 0 bytes or more, got {ticket.size_bytes}", hint="repair the sender")
    if (ticket.round == 0) != (ticket.kind in NEGOTIATION_KINDS):
        raise MalformedPayload(
            f"expected round 0 exactly for sensitivities and votes, got round {ticket.round} for {ticket.kind.value}",
            hint="take the round from the view of the federation",
        )
    if ticket.kind is PayloadKind.FACTORS and not 1 <= ticket.examples <= MOST_EXAMPLES:
        raise ValueOutOfRange(
            f"expected 1 to {MOST_EXAMPLES} training examples, got {ticket.examples}", hint="check the data set"
        )
    check_metrics(ticket.metrics)


def admitted(stored: StoredFederation, name: PayloadName, ticket: UploadTicket) -> ExpectedPayload:
    """What the announced payload has to be.

    Raises:
        UnknownAgent, UnknownRound, WrongPhase, FederationEnded, NotInCohort, ConflictingResend: see shelora.rounds.
        StalePlan, WrongEpoch, DigestMismatch: made for another plan, epoch, or layout.
    """
    if name.kind in NEGOTIATION_KINDS:
        return _admitted_ballot(stored, name, ticket)
    if name.kind is PayloadKind.FACTORS:
        _, participant = admit_factors(stored.state, name.agent, name.round)
        plan = _agreed_plan(stored, ticket)
        parameters = stored.parameters[plan.epoch]
        return ExpectedPayload(name.kind, plan, parameters, rank=participant.rank, columns=participant.columns)
    return _admitted_cipher(stored, name, ticket)


def _admitted_ballot(stored: StoredFederation, name: PayloadName, ticket: UploadTicket) -> ExpectedPayload:
    admit_ballot(stored.state, name.agent, name.plan_version)
    plan = _agreed_plan(stored, ticket)
    wanted = _BALLOT_KINDS[plan.negotiation]
    if name.kind is not wanted:
        raise WrongPhase(
            f"expected {wanted.value} for this negotiation, got {name.kind.value}", hint="follow the plan in the view"
        )
    votes = name.kind is PayloadKind.VOTES
    return ExpectedPayload(
        name.kind,
        plan,
        stored.parameters[plan.epoch],
        columns=vote_columns(stored.state, widths(plan.shapes)) if votes else (),
        blocks=0 if votes else sensitivity_blocks(plan),
    )


def _admitted_cipher(stored: StoredFederation, name: PayloadName, ticket: UploadTicket) -> ExpectedPayload:
    round_, member = admit_cipher(stored.state, name.agent, name.round)
    plan = _agreed_plan(stored, ticket)
    if ticket.layout_digest != layout_digest(plan, round_):
        raise DigestMismatch(
            f"expected the slot layout of the cohort of round {name.round}, got another one",
            hint="derive the layout from the members in the projection's header",
            context={"agent": name.agent, "round": str(name.round)},
        )
    return ExpectedPayload(
        name.kind,
        plan,
        stored.parameters[plan.epoch],
        rank=member.rank,
        columns=member.columns,
        blocks=cohort_layout(plan, round_).blocks(member.columns),
    )


def _agreed_plan(stored: StoredFederation, ticket: UploadTicket) -> Plan:
    plan = present_plan(stored)
    if plan is None:
        raise WrongPhase("expected a plan in force, got none", hint="follow the view of the federation")
    if ticket.plan_version != plan.version:
        raise StalePlan(
            f"expected a payload for plan version {plan.version}, got {ticket.plan_version}",
            hint="make it again for the plan in the view",
        )
    if ticket.epoch != plan.epoch:
        raise WrongEpoch(
            f"expected a payload for key epoch {plan.epoch}, got {ticket.epoch}",
            hint="fetch the keys of the plan's epoch from the key manager",
        )
    if ticket.plan_digest != plan.digest():
        raise DigestMismatch(
            f"expected the digest of plan version {plan.version}, got another one",
            hint="derive the digest from the plan in the view; if it still differs, run the same release on all sides",
        )
    return plan

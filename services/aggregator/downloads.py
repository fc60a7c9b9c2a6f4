"""Giving payloads out: projections to members, averages and sums to every agent, now or later."""

from __future__ import annotations

from services.aggregator import store
from services.aggregator.domain import Download, DownloadRequest, PayloadKind
from services.aggregator.ledger import Change, Ledger
from services.aggregator.plans import layout_digest, plan_of
from services.aggregator.store import payloads
from services.aggregator.store.payloads import PayloadKey, StoredPayload
from services.common.identity import Identity
from shelora.errors import (
    CorruptState,
    MalformedPayload,
    NotInCohort,
    OffsetMismatch,
    UnknownBlob,
    UnknownRound,
    WrongPhase,
)
from shelora.rounds import PlanOutline, Round, RoundPhase, registered

_PUBLISHED = {PayloadKind.CIPHER: payloads.CIPHER_SUM, PayloadKind.AVERAGE: payloads.AVERAGE}
_NEGOTIATED = {PayloadKind.SENSITIVITY: payloads.SENSITIVITY_SUM, PayloadKind.VOTES: payloads.RANKING}


class Downloads:
    """Downloads of agents; the agent is the caller's identity."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def open(self, identity: Identity, request: DownloadRequest) -> Download:
        """What to stream for a request.

        Raises:
            UnknownFederation, UnknownAgent, UnknownRound: as the names say; a round that is not published counts as
                unknown for averages and sums.
            NotInCohort, WrongPhase: a projection is asked for by somebody else, or before there is one.
            UnknownBlob: there is nothing, or nothing any more.
            OffsetMismatch: the offset lies beyond the payload's end.
            MalformedPayload: nobody downloads that kind.
        """

        async def body(change: Change) -> Download:
            registered(change.stored.state, identity.name)
            if request.kind in _NEGOTIATED:
                return await _negotiated(change, request)
            return await _of_round(change, identity.name, request)

        return await self._ledger.change("open_download", request.federation, body)


async def _negotiated(change: Change, request: DownloadRequest) -> Download:
    key = PayloadKey(request.federation, _NEGOTIATED[request.kind], plan_version=request.plan_version)
    latest = change.stored.state.plan
    known = latest is not None and 1 <= request.plan_version <= latest.version
    found = _present(await payloads.find(change.connection, key) if known else None, request)
    outline = await _outline(change, request.plan_version)
    return Download(found.blob, request.offset, plan_of(change.stored, outline), outline.negotiated_by)


async def _of_round(change: Change, agent: str, request: DownloadRequest) -> Download:
    round_ = await _round(change, request.round)
    if request.kind is PayloadKind.PROJECTION:
        _check_projection(round_, agent)
        key = PayloadKey(request.federation, payloads.PROJECTION, request.round, agent=agent)
    elif request.kind in _PUBLISHED:
        if round_.phase is not RoundPhase.PUBLISHED:
            raise UnknownRound(
                f"expected a published round, got round {round_.number} in phase {round_.phase.value}",
                hint="wait for the view of the federation to name it as published",
                context={"round": str(round_.number)},
            )
        key = PayloadKey(request.federation, _PUBLISHED[request.kind], request.round)
    else:
        raise MalformedPayload(
            f"expected a kind that agents download, got {request.kind.value}", hint="ask for the average instead"
        )
    found = _present(await payloads.find(change.connection, key), request)
    outline = await _outline(change, round_.plan_version)
    plan = plan_of(change.stored, outline)
    return Download(
        blob=found.blob,
        offset=request.offset,
        plan=plan,
        negotiated_by=outline.negotiated_by,
        layout_digest=layout_digest(plan, round_),
        cohort=round_.cohort,
        weight=round_.weights.get(agent, 0.0),
        total_weight=round_.total_weight,
        first_plain=round_.first_plain,
    )


async def _round(change: Change, number: int) -> Round:
    latest = change.stored.state.round
    if latest is not None and latest.number == number:
        return latest
    # Numbers from the wire may be larger than the database's integers.
    known = latest is not None and 1 <= number < latest.number
    earlier = await store.federations.load_round(change.connection, change.stored.name, number) if known else None
    if earlier is None:
        raise UnknownRound(
            f"expected a round of {change.stored.name}, got {number}",
            hint="take the round from the view of the federation",
            context={"round": str(number)},
        )
    return earlier


async def _outline(change: Change, version: int) -> PlanOutline:
    latest = change.stored.state.plan
    if latest is not None and latest.version == version:
        return latest
    outline = await store.federations.load_plan(change.connection, change.stored.name, version)
    if outline is None:
        raise CorruptState(
            f"expected plan version {version} of {change.stored.name}, got none",
            hint="restore the database from a backup",
        )
    return outline


def _check_projection(round_: Round, agent: str) -> None:
    if not round_.cohort:
        raise WrongPhase(
            f"expected a round whose cohort is closed, got round {round_.number} in phase {round_.phase.value}",
            hint="wait for the view of the federation to ask for ciphertext",
        )
    if agent not in {member.agent for member in round_.cohort}:
        raise NotInCohort(
            f"expected a member of the cohort of round {round_.number}, got {agent!r}",
            hint="take part from the next round on",
            context={"agent": agent, "round": str(round_.number)},
        )


def _present(found: StoredPayload | None, request: DownloadRequest) -> StoredPayload:
    if found is None or not found.present:
        raise UnknownBlob(
            f"expected a kept {request.kind.value} of round {request.round} or plan {request.plan_version}, got none",
            hint="wait until it is computed; if the round is long over, fetch the last published one instead",
            context={"round": str(request.round)},
        )
    if not 0 <= request.offset <= found.blob.size_bytes:
        raise OffsetMismatch(
            f"expected an offset of at most {found.blob.size_bytes}, got {request.offset}", hint="start from offset 0"
        )
    return found

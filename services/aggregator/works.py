"""Runs one computation that the state asks for, and records its result together with the event it causes.

Every attempt writes under a prefix of its own. A result counts when the transaction that names it is committed; what is
never named is deleted at once, or at the next start.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from services.aggregator.admission import folder_of
from services.aggregator.domain import CohortMember, PayloadKind
from services.aggregator.ledger import Change, Ledger
from services.aggregator.plans import plan_of, sensitivity_blocks, sum_blocks, widths
from services.aggregator.ports import Compute
from services.aggregator.store import Connection, StoredFederation, payloads
from services.aggregator.store.payloads import PayloadKey, StoredPayload
from services.common.blobs import Blob, BlobStore
from services.common.threads import in_thread
from shelora.errors import CorruptState, SheLoraError, Unavailable, WrongPhase
from shelora.plan.plan import Plan
from shelora.rounds import (
    ComputeAverage,
    ComputeBasis,
    Computed,
    FoldResidues,
    Member,
    RankVotes,
    Round,
    SumSensitivities,
    Work,
    vote_columns,
)


class Works:
    """Runs computations.

    Args:
        ledger: where results become state.
        blobs: where payloads are.
        compute: does the arithmetic.
        token: a fresh word of a-z 0-9 for every attempt.
    """

    def __init__(self, ledger: Ledger, blobs: BlobStore, compute: Compute, token: Callable[[], str]) -> None:
        self._ledger = ledger
        self._blobs = blobs
        self._compute = compute
        self._token = token

    async def run(self, stored: StoredFederation, work: Work) -> None:
        """Compute and record; a result that nobody waits for any more is dropped.

        Raises:
            SheLoraError: the computation failed; nothing has changed.
        """
        number, version = (
            (work.round, 0) if not isinstance(work, SumSensitivities | RankVotes) else (0, work.plan_version)
        )
        prefix = f"{folder_of(stored.name, number, version)}{self._token()}/"
        try:
            if isinstance(work, SumSensitivities | RankVotes):
                await self._negotiate(stored, work, prefix)
            elif isinstance(work, ComputeBasis):
                await self._basis(stored, work, prefix)
            elif isinstance(work, FoldResidues):
                await self._fold(stored, work, prefix)
            else:
                await self._average(stored, work, prefix)
        except Unavailable:
            # The database may have taken the result; if it did not, the bytes are collected at the next start.
            raise
        except SheLoraError as error:
            await in_thread(self._blobs.delete_prefix, prefix)
            if not isinstance(error, WrongPhase):
                raise

    async def _negotiate(self, stored: StoredFederation, work: SumSensitivities | RankVotes, prefix: str) -> None:
        plan = _plan(stored)
        summing = isinstance(work, SumSensitivities)
        kind = PayloadKind.SENSITIVITY if summing else PayloadKind.VOTES
        keys = [PayloadKey(stored.name, kind.value, 0, work.plan_version, agent) for agent in work.agents]
        inputs = await self._inputs(keys)
        if summing:
            blocks, parameters = sensitivity_blocks(plan), stored.parameters[plan.epoch]
            result = await self._compute.fold_residues(None, inputs, blocks, parameters, prefix + "sum")
        else:
            columns = vote_columns(stored.state, widths(plan.shapes))
            result = await self._compute.rank_votes(plan, inputs, columns, prefix + "ranking.safetensors")
        result_kind = payloads.SENSITIVITY_SUM if summing else payloads.RANKING
        await self._record(stored, work, {PayloadKey(stored.name, result_kind, plan_version=work.plan_version): result})

    async def _basis(self, stored: StoredFederation, work: ComputeBasis, prefix: str) -> None:
        round_ = _round(stored)
        members = await self._members(stored, round_, round_.cohort, projected=False)
        result = await self._compute.compute_basis(_plan(stored), members, prefix.rstrip("/"))
        named = {
            PayloadKey(stored.name, payloads.PROJECTION, round_.number, agent=agent): blob
            for agent, blob in result.projections.items()
        }
        named[PayloadKey(stored.name, payloads.BASIS, round_.number)] = result.basis
        await self._record(stored, work, named)

    async def _fold(self, stored: StoredFederation, work: FoldResidues, prefix: str) -> None:
        round_, plan = _round(stored), _plan(stored)
        sum_key = PayloadKey(stored.name, payloads.CIPHER_SUM, round_.number)
        keys = [PayloadKey(stored.name, PayloadKind.CIPHER.value, round_.number, agent=agent) for agent in work.agents]
        already = any(member.folded for member in round_.complete)
        total = (await self._inputs([sum_key]))[0] if already else None
        terms = await self._inputs(keys)
        parameters = stored.parameters[plan.epoch]
        blocks = sum_blocks(plan, round_)
        result = await self._compute.fold_residues(total, terms, blocks, parameters, prefix + "sum")

        async def same_total(change: Change) -> None:
            present = await payloads.find(change.connection, sum_key)
            if (None if present is None else present.blob) != total:
                raise CorruptState(
                    f"expected the running sum of round {round_.number} that was added to, got another one",
                    hint="run one aggregator per database",
                    context={"federation": stored.name},
                )

        await self._record(stored, work, {sum_key: result}, same_total)
        if total is not None:
            await in_thread(self._blobs.delete, total.key)

    async def _average(self, stored: StoredFederation, work: ComputeAverage, prefix: str) -> None:
        round_ = _round(stored)
        members = await self._members(stored, round_, round_.counted, projected=True)
        basis = (await self._inputs([PayloadKey(stored.name, payloads.BASIS, round_.number)]))[0]
        key = prefix + "average.safetensors"
        result = await self._compute.compute_average(_plan(stored), basis, members, key)
        named = {PayloadKey(stored.name, payloads.AVERAGE, round_.number): result}
        await self._record(stored, work, named)

    async def _record(
        self,
        stored: StoredFederation,
        work: Work,
        results: Mapping[PayloadKey, Blob],
        check: Callable[[Change], Awaitable[None]] | None = None,
    ) -> None:
        async def body(change: Change) -> None:
            change.emit(Computed(work))
            if check is not None:
                await check(change)
            for key, blob in results.items():
                await payloads.record(change.connection, key, blob, change.now_ms)

        await self._ledger.change("record_result", stored.name, body)

    async def _members(
        self, stored: StoredFederation, round_: Round, members: Sequence[Member], *, projected: bool
    ) -> list[CohortMember]:
        agents = [member.agent for member in members]
        number, name = round_.number, stored.name
        factors_keys = [PayloadKey(name, PayloadKind.FACTORS.value, number, agent=agent) for agent in agents]
        factors = await self._inputs(factors_keys)
        projections: list[Blob | None] = [None] * len(agents)
        if projected:
            keys = [PayloadKey(name, payloads.PROJECTION, number, agent=agent) for agent in agents]
            projections = [*await self._inputs(keys)]
        weights = round_.weights
        return [
            CohortMember(member.agent, member.rank, member.columns, weights[member.agent], member.examples, left, right)
            for member, left, right in zip(members, factors, projections, strict=True)
        ]

    async def _inputs(self, keys: Sequence[PayloadKey]) -> list[Blob]:
        """The named payloads, read once and compared with their digests.

        Raises:
            CorruptState: one is missing. The computation checks its bytes as it reads them.
        """

        async def body(connection: Connection) -> list[StoredPayload | None]:
            return [await payloads.find(connection, key) for key in keys]

        blobs: list[Blob] = []
        for key, found in zip(keys, await self._ledger.query("find_inputs", body), strict=True):
            if found is None or not found.present:
                raise CorruptState(
                    f"expected the {key.kind} of {key.agent or 'the round'}, got none",
                    hint="restore database and blobs from the same backup",
                    context={"federation": key.federation, "round": str(key.round)},
                )
            blobs.append(found.blob)
        return blobs


def _folder(federation: str, work: Work) -> str:
    if isinstance(work, SumSensitivities | RankVotes):
        return folder_of(federation, 0, work.plan_version)
    return folder_of(federation, work.round)


def _plan(stored: StoredFederation) -> Plan:
    if stored.state.plan is None:
        raise CorruptState(f"expected a plan in {stored.name}, got none", hint="restore the database from a backup")
    return plan_of(stored, stored.state.plan)


def _round(stored: StoredFederation) -> Round:
    if stored.state.live_round is None:
        raise CorruptState(f"expected a running round in {stored.name}, got none", hint="restore the database")
    return stored.state.live_round

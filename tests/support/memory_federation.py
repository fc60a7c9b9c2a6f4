"""A federation in memory: the real state machine and the real algebra, behind the ports that an agent dials."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import safetensors.numpy

from services.client_agent.domain import Member, PayloadKind, Received, Registration, Signature, Terms, Upload, View
from services.client_agent.progress import Report
from services.common.keymanager_client import FetchedEpoch, seal_secrets
from shelora import rounds
from shelora.errors import ConflictingResend, PeerUnreachable, UnknownAgent, UnknownEpoch, UnknownRound
from shelora.he.residues import as_blocks, check_residues, sum_residues
from shelora.he.secret import CkksContext, KeyPair
from shelora.lora import basis, plain_part, project
from shelora.plan import ColumnVote, Negotiation, Packing, Plan, agree_ranges, rank_tokens

FEDERATION = "ward"
Fault = tuple[str, PayloadKind | str]
Key = tuple[PayloadKind, int, str]


class MemoryKeyManager:
    """Epochs with real keys, sealed to whoever asks.

    Attributes:
        away: whether nobody answers.
        fetches: epochs that were asked for.
    """

    def __init__(self, epochs: int = 1) -> None:
        self.context = CkksContext.create()
        self.away = False
        self.fetches: list[int] = []
        self._pairs: dict[int, KeyPair] = {}
        for _ in range(epochs):
            self.rotate()

    def rotate(self) -> int:
        number = len(self._pairs) + 1
        self._pairs[number] = self.context.generate_keys()
        return number

    def pair(self, number: int) -> KeyPair:
        return self._pairs[number]

    @staticmethod
    def seed(number: int) -> bytes:
        return hashlib.sha256(f"seed {number}".encode()).digest()

    async def fetch(self, agent: str, number: int, hpke_public: bytes) -> FetchedEpoch:
        self.fetches.append(number)
        if self.away:
            raise PeerUnreachable("no key manager")
        if number not in self._pairs:
            raise UnknownEpoch(f"no epoch {number}")
        pair = self._pairs[number]
        sealed = seal_secrets(pair.secret.expose(), self.seed(number), hpke_public, FEDERATION, number, agent)
        return FetchedEpoch(FEDERATION, number, "current", self.context.parameters, pair.public.data, sealed, 1)


class MemoryFederation:
    """One federation for any number of agents.

    Attributes:
        state: the state machine's state.
        accepted: every accepted payload.
        resent: how often each was sent again.
        metrics: figures that agents reported, by round and agent.
        before: errors that calls raise before they have any effect, by (agent, kind of payload or name of the call).
        after: errors that calls raise after they took effect: the answer is lost.
        holds: uploads wait for these events before they have any effect.
    """

    def __init__(
        self,
        keymanager: MemoryKeyManager,
        *,
        agents: int,
        rounds_: int = 2,
        quorum: int = 2,
        negotiation: Negotiation = Negotiation.ENCRYPTED,
        renegotiate_every: int = 0,
        packing: Packing = Packing.EXACT,
    ) -> None:
        self.keymanager = keymanager
        self.packing = packing
        rules = rounds.Rules(
            agents, quorum, 60_000, 60_000, 60_000, 60_000, negotiation=negotiation, renegotiate_every=renegotiate_every
        )
        self.state = rounds.Federation(FEDERATION, rules, rounds_, epoch=1)
        self.now_ms = 1_000
        self.signature: Signature | None = None
        self.accepted: dict[Key, bytes] = {}
        self.resent: Counter[Key] = Counter()
        self.metrics: dict[int, dict[str, dict[str, float]]] = defaultdict(dict)
        self.left: list[tuple[int, str, str]] = []
        self.before: dict[Fault, list[Exception]] = defaultdict(list)
        self.after: dict[Fault, list[Exception]] = defaultdict(list)
        self.holds: dict[Fault, asyncio.Event] = {}
        self.plans: dict[int, Plan] = {}
        self.ended: dict[int, rounds.Round] = {}
        self.results: dict[Key, bytes] = {}
        self.breaks = 0
        self.changed = asyncio.Event()
        self.emit(rounds.Started())

    def emit(self, event: rounds.Event) -> None:
        """Apply an event and compute whatever becomes necessary."""
        self._apply(event)
        while work := rounds.pending(self.state):
            self._compute(work[0])
            self._apply(rounds.Computed(work[0]))
        self.changed.set()
        self.changed = asyncio.Event()

    def expire(self) -> None:
        """Let the running deadline pass."""
        self.now_ms = max(self.now_ms, self.state.next_deadline_ms)
        self.emit(rounds.Ticked())

    def break_streams(self) -> None:
        """Cut all view streams."""
        self.breaks += 1
        self.changed.set()
        self.changed = asyncio.Event()

    def view(self, agent: str) -> View:
        state = self.state
        live = state.round if state.state is rounds.FederationState.RUNNING else None
        widths = () if self.signature is None else tuple(m.in_features for m in self.signature.shapes.modules)
        return View(
            state=state.state,
            task=rounds.task_for(state, agent),
            round=live.number if live else 0,
            phase=live.phase if live else None,
            plan=self.plans.get(state.plan.version) if state.plan else None,
            deadline_ms=state.next_deadline_ms,
            last_published_round=state.last_published_round,
            rounds=state.rounds,
            vote_columns=rounds.vote_columns(state, widths),
            reason=state.reason,
            now_ms=self.now_ms,
        )

    def membership(self, agent: str) -> MemoryMembership:
        return MemoryMembership(self, agent)

    @property
    def factors(self) -> int:
        """Agents whose factors of the running round are in."""
        live = self.state.live_round
        return len(live.candidates) if live is not None else 0

    @property
    def ciphers(self) -> int:
        """Agents whose ciphertexts of the running round are in."""
        live = self.state.live_round
        return len(live.complete) if live is not None else 0

    def _apply(self, event: rounds.Event) -> None:
        self.state, effects = rounds.transition(self.state, event, self.now_ms)
        for effect in effects:
            if isinstance(effect, rounds.RoundEnded):
                self.ended[effect.round.number] = effect.round
        outline = self.state.plan
        if outline is not None and outline.version not in self.plans:
            assert self.signature is not None
            parameters = self.keymanager.context.parameters
            self.plans[outline.version] = Plan(
                federation=FEDERATION,
                version=outline.version,
                epoch=outline.epoch,
                shapes=self.signature.shapes,
                cap=outline.cap,
                negotiation=outline.negotiation,
                levels=outline.levels,
                parameters_digest=parameters.digest(),
                values_per_block=parameters.values_per_block,
                packing=self.packing,
            )

    def round_of(self, number: int) -> rounds.Round:
        live = self.state.round
        return live if live is not None and live.number == number else self.ended[number]

    def plan_of(self, number: int) -> Plan:
        return self.plans[self.round_of(number).plan_version]

    def tensors(self, kind: PayloadKind, number: int, agent: str) -> Mapping[str, np.ndarray]:
        return safetensors.numpy.load(self.accepted[kind, number, agent])

    def _compute(self, work: rounds.Work) -> None:
        parameters = self.keymanager.context.parameters
        if isinstance(work, rounds.SumSensitivities):
            kind, version = PayloadKind.SENSITIVITY, work.plan_version
            terms = [as_blocks(self.accepted[kind, version, agent], parameters) for agent in work.agents]
            self.results[kind, version, ""] = sum_residues(terms, parameters.modulus).tobytes()
        elif isinstance(work, rounds.RankVotes):
            self._rank(work)
        elif isinstance(work, rounds.ComputeBasis):
            self._basis(work.round)
        elif isinstance(work, rounds.FoldResidues):
            terms = [
                as_blocks(self.accepted[PayloadKind.CIPHER, work.round, agent], parameters) for agent in work.agents
            ]
            for term in terms:
                check_residues(term, parameters)
            earlier = self.results.get((PayloadKind.CIPHER, work.round, ""))
            if earlier is not None:
                terms.append(as_blocks(earlier, parameters))
            self.results[PayloadKind.CIPHER, work.round, ""] = sum_residues(terms, parameters.modulus).tobytes()
        else:
            self._average(work.round)

    def _rank(self, work: rounds.RankVotes) -> None:
        plan = self.plans[work.plan_version]
        votes = [self.tensors(PayloadKind.VOTES, work.plan_version, agent) for agent in work.agents]
        ranked = {}
        for index in range(len(plan.shapes.modules)):
            named = [
                [ColumnVote(int(t), int(s)) for t, s in zip(v[f"{index}.token"], v[f"{index}.score"], strict=True)]
                for v in votes
            ]
            limit = max(len(one) for one in named)
            ranked[f"{index}.token"] = np.asarray(rank_tokens(named, limit), dtype=np.int64)
        self.results[PayloadKind.VOTES, work.plan_version, ""] = safetensors.numpy.save(ranked)

    def _basis(self, number: int) -> None:
        plan, live = self.plan_of(number), self.round_of(number)
        weights = live.weights
        sent = {m.agent: self.tensors(PayloadKind.FACTORS, number, m.agent) for m in live.cohort}
        bases = {}
        for index in range(len(plan.shapes.modules)):
            lefts = [sent[m.agent][f"{index}.left"] for m in live.cohort]
            bases[index] = basis(lefts, [weights[m.agent] for m in live.cohort], plan.cap).astype(np.float32)
        answers = {
            agent: {
                f"{i}.projection": project(found, tensors[f"{i}.left"]).astype(np.float32) for i, found in bases.items()
            }
            for agent, tensors in sent.items()
        }
        ranges = {}
        if plan.packing is Packing.DENSE:
            for i in bases:
                shares = [weights[agent] for agent in answers]
                ranges[f"{i}.range"] = agree_ranges([own[f"{i}.projection"] for own in answers.values()], shares)
        published = {f"{i}.basis": found for i, found in bases.items()} | ranges
        self.results[PayloadKind.AVERAGE, number, "basis"] = _saved(published)
        for agent, own in answers.items():
            self.results[PayloadKind.PROJECTION, number, agent] = _saved(own | ranges)

    def _average(self, number: int) -> None:
        plan, live = self.plan_of(number), self.round_of(number)
        weights = live.weights
        found = dict(safetensors.numpy.load(self.results[PayloadKind.AVERAGE, number, "basis"]))
        for index, module in enumerate(plan.shapes.modules):
            rows, n = found[f"{index}.basis"].shape[1], module.in_features
            total = np.zeros((rows, n))
            for member in live.counted:
                projection = safetensors.numpy.load(self.results[PayloadKind.PROJECTION, number, member.agent])
                right = self.tensors(PayloadKind.FACTORS, number, member.agent)[f"{index}.right"]
                total += plain_part(projection[f"{index}.projection"], right, weights[member.agent], n)
            found[f"{index}.plain"] = total[:, min(member.columns[index] for member in live.counted) :]
        self.results[PayloadKind.AVERAGE, number, ""] = _saved(found)


class MemoryMembership:
    """One agent's connection to a MemoryFederation: the Membership port."""

    def __init__(self, federation: MemoryFederation, agent: str) -> None:
        self._federation = federation
        self.name = agent
        self.opened = 0

    async def __aenter__(self) -> MemoryMembership:
        self.opened += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.opened -= 1

    async def fetch_epoch(self, number: int, hpke_public_key: bytes) -> FetchedEpoch:
        return await self._federation.keymanager.fetch(self.name, number, hpke_public_key)

    async def terms(self) -> Terms:
        self._raise(self._federation.before, "terms")
        plan = self._federation.state.plan
        epoch = plan.epoch if plan else self._federation.state.epoch
        return Terms(epoch, basis_cap=0, packing=self._federation.packing)

    async def register(self, registration: Registration) -> View:
        federation = self._federation
        self._raise(federation.before, "register")
        assert registration.parameters_digest == federation.keymanager.context.parameters.digest()
        federation.signature = federation.signature or registration.signature
        widths = [module.in_features for module in registration.signature.shapes.modules]
        selective = any(0 < k < n for k, n in zip(registration.columns, widths, strict=True))
        participant = rounds.Participant(self.name, registration.rank, registration.columns, selective)
        federation.emit(rounds.AgentRegistered(participant))
        return federation.view(self.name)

    async def watch(self) -> AsyncGenerator[View, None]:
        federation = self._federation
        self._raise(federation.before, "watch")
        if self.name not in federation.state.agents:
            raise UnknownAgent(f"{self.name} is not registered")
        breaks = federation.breaks
        seen: View | None = None
        while True:
            changed = federation.changed
            if federation.breaks != breaks:
                raise PeerUnreachable("the stream was cut")
            view = federation.view(self.name)
            if view != seen:
                seen = view
                yield view
            else:
                await changed.wait()

    async def upload(self, upload: Upload, report: Report) -> int:
        federation, kind = self._federation, upload.kind
        if (self.name, kind) in federation.holds:
            await federation.holds[self.name, kind].wait()
        self._raise(federation.before, kind)
        data = upload.path.read_bytes()
        ballot = kind in (PayloadKind.SENSITIVITY, PayloadKind.VOTES)
        key = (kind, upload.plan.version if ballot else upload.round, self.name)
        if key in federation.accepted:
            if federation.accepted[key] != data:
                raise ConflictingResend(f"other bytes of {key}")
            federation.resent[key] += 1
        else:
            events: dict[PayloadKind, Any] = {
                PayloadKind.FACTORS: lambda: rounds.FactorsReceived(upload.round, self.name, upload.examples),
                PayloadKind.CIPHER: lambda: rounds.CipherReceived(upload.round, self.name),
            }
            event = events.get(kind, lambda: rounds.BallotReceived(upload.plan.version, self.name))()
            federation.accepted[key] = data
            try:
                federation.emit(event)
            except Exception:
                del federation.accepted[key]
                raise
        self._raise(federation.after, kind)
        await asyncio.sleep(0)
        report(1.0, "")
        return len(data)

    async def download(
        self, kind: PayloadKind, path: Path, report: Report, *, round_number: int = 0, plan_version: int = 0
    ) -> Received:
        federation = self._federation
        self._raise(federation.before, f"download {kind.value}")
        key = (kind, round_number or plan_version, self.name if kind is PayloadKind.PROJECTION else "")
        if key not in federation.results:
            raise UnknownRound(f"nothing published under {key}")
        data = federation.results[key]
        await asyncio.to_thread(path.write_bytes, data)
        if not round_number:
            return Received(path, len(data), federation.plans[plan_version], b"", (), 0.0, 0.0)
        plan, round_ = federation.plan_of(round_number), federation.round_of(round_number)
        return Received(
            path=path,
            size_bytes=len(data),
            plan=plan,
            layout_digest=plan.layout(round_.ranks).digest(),
            cohort=tuple(Member(m.agent, m.rank, m.counted) for m in round_.cohort),
            weight=round_.weights.get(self.name, 0.0),
            total_weight=round_.total_weight,
            first_plain=round_.first_plain,
        )

    async def report_round(self, round_number: int, metrics: Mapping[str, float]) -> None:
        self._raise(self._federation.before, "report")
        assert len(metrics) <= 64
        self._federation.metrics[round_number][self.name] = dict(metrics)

    async def leave_round(self, round_number: int, reason: str) -> None:
        self._raise(self._federation.before, "leave")
        self._federation.left.append((round_number, self.name, reason))
        self._federation.emit(rounds.AgentLeft(round_number, self.name, reason))

    def _raise(self, faults: dict[Fault, list[Exception]], call: PayloadKind | str) -> None:
        if faults[self.name, call]:
            raise faults[self.name, call].pop(0)


def _saved(tensors: Mapping[str, np.ndarray]) -> bytes:
    return safetensors.numpy.save(
        {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
    )

"""Use cases of agents that are not about bytes: register, watch the own view, leave a round, report figures."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from services.aggregator import store
from services.aggregator.domain import AgentView, Registration, Signature
from services.aggregator.events import Hub, Presence
from services.aggregator.federations import checked_reason
from services.aggregator.ledger import Change, Ledger
from services.aggregator.pacing import Pace
from services.aggregator.plans import is_selective, present_plan, widths
from services.aggregator.store import StoredFederation
from services.common.clock import Clock
from services.common.identity import Identity
from shelora.errors import (
    DigestMismatch,
    InvalidPlan,
    MalformedPayload,
    ModelMismatch,
    NonFiniteValue,
    QuotaExceeded,
    RankMismatch,
    SizeMismatch,
    ValueOutOfRange,
    WrongEpoch,
    WrongPhase,
)
from shelora.plan.plan import Negotiation
from shelora.rounds import (
    AgentLeft,
    AgentRegistered,
    FederationState,
    Participant,
    PlanOutline,
    registered,
    running_round,
    task_for,
    vote_columns,
)

MOST_EXAMPLES: Final = 10**12
MOST_RANK: Final = 1_024
BUDGET_BYTES: Final = 64
MOST_METRICS: Final = 64
METRIC_NAME_BYTES: Final = 200


@dataclass(frozen=True)
class AgentLimits:
    """What the operator of the aggregator allows.

    Attributes:
        max_agents: registered agents per federation.
        view_interval_s: longest silence of a view stream.
    """

    max_agents: int = 100_000
    view_interval_s: float = 20.0


class Agents:
    """What an agent may do; the agent is the caller's identity."""

    def __init__(
        self, ledger: Ledger, hub: Hub, presence: Presence, pace: Pace, clock: Clock, limits: AgentLimits
    ) -> None:
        self._ledger = ledger
        self._hub = hub
        self._presence = presence
        self._pace = pace
        self._clock = clock
        self._limits = limits

    async def register(self, identity: Identity, registration: Registration) -> AgentView:
        """Register the calling agent, or register it again with other capabilities.

        Raises:
            UnknownFederation: there is none of that name.
            WrongEpoch, DigestMismatch, ModelMismatch, RankMismatch, SizeMismatch, ValueOutOfRange, InvalidPlan: the
                registration does not fit the federation.
            QuotaExceeded: there are too many agents.
        """

        async def body(change: Change) -> StoredFederation:
            stored = change.stored
            _check_numbers(registration)
            _check_keys(registration, stored)
            _agree_on_signature(change, identity.name, registration)
            selective = is_selective(registration.columns, registration.signature.shapes)
            if selective and stored.spec.negotiation is Negotiation.NONE:
                raise InvalidPlan(
                    "expected budgets that encrypt every column or none, got one that encrypts a part of a module",
                    hint="use the budget full, or a federation that negotiates",
                    context={"agent": identity.name},
                )
            known = identity.name in stored.state.agents
            if not known and len(stored.state.agents) >= self._limits.max_agents:
                raise QuotaExceeded(
                    f"expected at most {self._limits.max_agents} agents, got one more",
                    hint="ask the aggregator's operator to raise the limit",
                )
            change.emit(AgentRegistered(Participant(identity.name, registration.rank, registration.columns, selective)))
            await store.federations.save_registration(
                change.connection, identity.name, registration, selective=selective, now_ms=change.now_ms
            )
            return change.stored

        stored = await self._ledger.change("register_agent", registration.federation, body)
        self._presence.touch(registration.federation, identity.name)
        return view_of(stored, identity.name, self._clock.now_ms())

    async def watch(self, identity: Identity, federation: str) -> AsyncIterator[AgentView]:
        """The calling agent's view: at once, after every change, and as a sign of life; once when there is no place.

        Raises:
            UnknownFederation, UnknownAgent: the agent has to register first.
            QuotaExceeded: the agent has too many streams open.
            Draining: the aggregator is shutting down.
        """
        present = await self._ledger.read(federation)
        registered(present.state, identity.name)
        with self._presence.stream(federation, identity.name) as stays:
            if not stays:
                self._hub.require_open()
                yield self._parting(present, identity.name)
                return
            shown: AgentView | None = None
            due_s = 0.0
            while True:
                self._hub.require_open()
                signal = self._hub.signal(federation, identity.name)
                silent = self._clock.monotonic_s() >= due_s
                # After a silence the database is asked, so that no view stays old for long.
                stored = await (self._ledger.read(federation) if silent else self._ledger.glance(federation))
                view = view_of(stored, identity.name, self._clock.now_ms())
                if silent or shown is None or replace(view, now_ms=shown.now_ms) != shown:
                    shown = view
                    due_s = self._clock.monotonic_s() + self._limits.view_interval_s
                    yield view
                await self._hub.wait(signal, max(0.0, due_s - self._clock.monotonic_s()))

    def _parting(self, stored: StoredFederation, agent: str) -> AgentView:
        """The view of an agent for whose stream there is no place."""
        wait_s = self._pace.come_back_s(len(stored.state.agents), stored.state.rules)
        self._presence.expect(stored.name, agent, wait_s)
        return replace(view_of(stored, agent, self._clock.now_ms()), come_back_ms=max(1, round(1000 * wait_s)))

    async def leave(self, identity: Identity, federation: str, number: int, reason: str) -> None:
        """Give up the running round for the calling agent; one that is over needs no giving up.

        Raises:
            UnknownFederation, UnknownAgent, UnknownRound: as the names say.
            InvalidPlan: the reason is too long.
        """
        await self._ledger.emit("leave_round", federation, AgentLeft(number, identity.name, checked_reason(reason)))
        self._presence.touch(federation, identity.name)

    async def report(self, identity: Identity, federation: str, number: int, metrics: Mapping[str, float]) -> None:
        """Remember the calling agent's figures of a round that is over, in place of earlier ones.

        Raises:
            UnknownFederation, UnknownAgent, UnknownRound: as the names say.
            WrongPhase: the round is still running.
            MalformedPayload, NonFiniteValue: the figures break a rule.
        """
        check_metrics(metrics)

        async def body(change: Change) -> None:
            registered(change.stored.state, identity.name)
            if running_round(change.stored.state, number) is not None:
                raise WrongPhase(
                    f"expected a round that is over, got round {number}, which is running", hint="report after it ended"
                )
            await store.history.put_figures(
                change.connection, federation, number, identity.name, store.history.REPORT, metrics
            )

        await self._ledger.change("report_round", federation, body)
        self._presence.touch(federation, identity.name)


def view_of(stored: StoredFederation, agent: str, now_ms: int) -> AgentView:
    """What an agent needs to know."""
    state = stored.state
    round_ = state.round if state.state is FederationState.RUNNING else None
    shapes = None if stored.signature is None else stored.signature.shapes
    return AgentView(
        state=state.state,
        task=task_for(state, agent),
        round=0 if round_ is None else round_.number,
        phase=None if round_ is None else round_.phase,
        plan=present_plan(stored),
        negotiated_by=0 if state.plan is None else state.plan.negotiated_by,
        deadline_ms=state.next_deadline_ms,
        last_published_round=state.last_published_round,
        rounds=state.rounds,
        vote_columns=() if shapes is None or not _votes(state.plan) else vote_columns(state, widths(shapes)),
        reason=state.reason,
        now_ms=now_ms,
    )


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Check reported figures.

    Raises:
        MalformedPayload: too many, or a bad name.
        NonFiniteValue: a figure that is not finite.
    """
    if len(metrics) > MOST_METRICS:
        raise MalformedPayload(f"expected at most {MOST_METRICS} figures, got {len(metrics)}", hint="send fewer")
    for name, value in metrics.items():
        if not 0 < len(name.encode()) <= METRIC_NAME_BYTES or not name.isprintable():
            raise MalformedPayload(
                f"expected names of 1 to {METRIC_NAME_BYTES} printable bytes, got {name[:40]!r}",
                hint="rename it",
            )
        if not math.isfinite(value):
            raise NonFiniteValue(f"expected a finite {name}, got {value}", hint="leave figures out that are not known")


def _votes(plan: PlanOutline | None) -> bool:
    return plan is not None and plan.negotiation is Negotiation.OPE


def _check_numbers(registration: Registration) -> None:
    modules = registration.signature.shapes.modules
    if len(registration.columns) != len(modules):
        raise SizeMismatch(
            f"expected encrypted columns for {len(modules)} modules, got {len(registration.columns)}",
            hint="give one count per module",
        )
    most = min((min(module.out_features, module.in_features) for module in modules), default=MOST_RANK)
    if not 1 <= registration.rank <= min(most, MOST_RANK):
        raise RankMismatch(
            f"expected a rank of 1 to {min(most, MOST_RANK)}, got {registration.rank}",
            hint="a rank is at most the smaller width of every module",
        )
    for module, k in zip(modules, registration.columns, strict=True):
        if not 0 <= k <= module.in_features:
            raise ValueOutOfRange(
                f"expected 0 to {module.in_features} encrypted columns in {module.name!r}, got {k}",
                hint="resolve the budget against the model",
                context={"module": module.name},
            )
    if not 1 <= registration.examples <= MOST_EXAMPLES:
        raise ValueOutOfRange(
            f"expected 1 to {MOST_EXAMPLES} training examples, got {registration.examples}", hint="check the data set"
        )
    if len(registration.budget.encode()) > BUDGET_BYTES:
        raise ValueOutOfRange(
            f"expected a budget of at most {BUDGET_BYTES} bytes, got {len(registration.budget.encode())}",
            hint="write for example full, 25% or auto:12s",
        )


def _check_keys(registration: Registration, stored: StoredFederation) -> None:
    accepted = stored.state.accepted_epochs
    if registration.epoch not in accepted:
        raise WrongEpoch(
            f"expected key epoch {' or '.join(map(str, sorted(accepted)))}, got {registration.epoch}",
            hint="fetch the keys of the federation's epoch from the key manager",
            context={"federation": stored.name},
        )
    if registration.parameters_digest != stored.parameters[registration.epoch].digest():
        raise DigestMismatch(
            f"expected the CKKS parameters of epoch {registration.epoch}, got others",
            hint="run the same release on all sides; if they agree, fetch the epoch from the key manager again",
            context={"federation": stored.name},
        )


def _agree_on_signature(change: Change, agent: str, registration: Registration) -> None:
    """The first agent decides; as long as it is alone and nothing is planned, it may change its mind."""
    stored = change.stored
    if stored.signature == registration.signature:
        return
    alone = stored.state.agents.keys() <= {agent} and stored.state.plan is None
    if stored.signature is not None and not alone:
        different = _difference(stored.signature, registration)
        raise ModelMismatch(
            f"expected the model of {stored.name}, got another one: {different} differ",
            hint="use the same base model, tokenizer, labels and LoRA targets as the other agents",
            context={"agent": agent, "federation": stored.name},
        )
    change.set(signature=registration.signature)


def _difference(known: Signature, registration: Registration) -> str:
    other = registration.signature
    names = {
        "shapes": "trained shapes",
        "base_model_digest": "base model",
        "tokenizer_digest": "tokenizer",
        "task": "task",
        "labels_digest": "labels",
    }
    return ", ".join(text for field, text in names.items() if getattr(known, field) != getattr(other, field))

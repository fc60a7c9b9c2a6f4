"""Random sequences of events: what holds in every state the machine can reach."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import SheLoraError
from shelora.plan import Negotiation
from shelora.rounds import (
    AgentLeft,
    AgentRegistered,
    AgentTask,
    BallotReceived,
    CipherReceived,
    ComputationFailed,
    Computed,
    EpochAdopted,
    FactorsReceived,
    Federation,
    FederationState,
    Participant,
    Resumed,
    Round,
    RoundEnded,
    RoundPhase,
    Rules,
    Started,
    Stopped,
    Tally,
    Ticked,
    awaits,
    concerned,
    pending,
    task_for,
    transition,
    vote_columns,
)
from unit.shelora.rounds.game import WIDTH, Game, rules

AGENTS = ("a", "b", "c", "d", "e")

agents = st.sampled_from(AGENTS)
numbers = st.integers(0, 6)
participants = st.builds(
    lambda agent, rank, k: Participant(agent, rank, (k, k), selective=0 < k < WIDTH),
    agents,
    st.integers(1, 8),
    st.sampled_from((0, 3, WIDTH, WIDTH, WIDTH)),
)


@st.composite
def federation_rules(draw: st.DrawFn) -> Rules:
    target = draw(st.integers(2, 4))
    return rules(
        target_agents=target,
        quorum=draw(st.integers(2, target)),
        negotiation=draw(st.sampled_from(Negotiation)),
        renegotiate_every=draw(st.integers(0, 2)),
        max_abandoned=draw(st.integers(0, 4)),
    )


# What happens in the order in which a healthy federation would see it, so that deep states are reached, with everything
# else thrown in between. "next" stands for whatever agents and workers should do now.
steps = st.one_of(
    st.just("next"),
    st.just("next"),
    st.just("next"),
    st.builds(AgentRegistered, participants),
    st.builds(Started, st.integers(0, 1)),
    st.builds(Stopped, st.just("enough")),
    st.builds(EpochAdopted, st.integers(1, 4)),
    st.builds(BallotReceived, numbers, agents),
    st.builds(FactorsReceived, numbers, agents, st.integers(1, 1000)),
    st.builds(CipherReceived, numbers, agents),
    st.builds(AgentLeft, numbers, agents, st.just("tired")),
    st.just(Ticked()),
    st.just(Resumed(700)),
    st.integers(1, 9_000),
)


@dataclass
class Run:
    """Applies steps and checks every transition on the way."""

    game: Game
    ended: dict[int, Round] = field(default_factory=dict)

    def apply(self, event) -> None:
        before = self.game.state
        snapshot = copy.deepcopy(before)
        try:
            after, effects = transition(before, event, self.game.now_ms)
        except SheLoraError:
            assert before == snapshot
            return
        assert before == snapshot
        again, _ = transition(before, event, self.game.now_ms)
        assert again == after
        self.game.state = after
        for effect in effects:
            if isinstance(effect, RoundEnded):
                assert effect.round.number not in self.ended
                self.ended[effect.round.number] = effect.round
        check_state(after)
        check_progress(before, after)
        check_concerned(before, after)
        settled, effects = transition(after, Ticked(), self.game.now_ms)
        assert (settled, effects) == (after, ()), "gates that could open were left closed"

    def next(self) -> None:
        """One thing that somebody should do now; time passes when there is none."""
        state = self.game.state
        work = pending(state)
        if work:
            return self.apply(Computed(work[0]))
        for agent in sorted(state.agents):
            event = answer(state, agent)
            if event is not None:
                return self.apply(event)
        self.game.wait(10_000)
        return self.apply(Ticked())


def answer(state: Federation, agent: str):
    """What an agent does about its task."""
    task = task_for(state, agent)
    if task is AgentTask.NEGOTIATE and state.plan is not None:
        return BallotReceived(state.plan.version, agent)
    if state.round is None:
        return None
    if task is AgentTask.FACTORS:
        return FactorsReceived(state.round.number, agent, 10)
    if task is AgentTask.CIPHER:
        return CipherReceived(state.round.number, agent)
    return None


def check_state(state: Federation) -> None:
    assert (state.ballot is None) == (state.state is not FederationState.NEGOTIATING)
    assert (state.live_round is not None) == (state.state is FederationState.RUNNING)
    assert len(pending(state)) <= 1
    assert all(awaits(state, work) for work in pending(state))
    if state.state is FederationState.RUNNING:
        assert state.deadline_ms == 0
        assert state.plan is not None
        assert state.round is not None
        assert state.plan.settled
        assert state.round.plan_version == state.plan.version
    if state.round is not None:
        check_round(state.round, state.rules.quorum)


def check_concerned(before: Federation, after: Federation) -> None:
    """Nobody else has anything new to know."""
    named = concerned(before, after)
    for agent in AGENTS:
        assert named is None or agent in named or told(before, agent) == told(after, agent)


def told(state: Federation, agent: str) -> tuple[object, ...]:
    """All that the view of an agent is made of."""
    round_ = None if state.round is None else (state.round.number, state.round.phase)
    common = (state.plan, state.next_deadline_ms, state.last_published_round, state.rounds, state.reason)
    return state.state, task_for(state, agent), round_, common, vote_columns(state, (WIDTH, WIDTH))


def check_round(round_: Round, quorum: int) -> None:
    for member in round_.members.values():
        assert not member.counted or member.complete
        assert not member.folded or member.complete
        assert not member.complete or member.in_cohort
        assert not member.in_cohort or member.uploaded
        assert member.uploaded == (member.examples > 0)
        assert member.uploaded or member.left
    assert round_.tally == Tally(
        candidates=len(round_.candidates),
        complete=len(round_.complete),
        awaited=sum(not member.complete and not member.left for member in round_.cohort),
        unfolded=frozenset(member.agent for member in round_.complete if not member.folded),
    )
    fresh = replace(round_)
    assert (round_.ranks, round_.weights) == (fresh.ranks, fresh.weights)
    if round_.cohort:
        assert len(round_.cohort) >= quorum
        assert abs(sum(round_.weights.values()) - 1) < 1e-12
    if round_.phase in {RoundPhase.SUM, RoundPhase.PUBLISHED}:
        assert round_.counted == round_.complete
        assert len(round_.counted) >= quorum
        assert 0 < round_.total_weight <= 1 + 1e-12
    if round_.phase is RoundPhase.PUBLISHED:
        assert all(member.folded for member in round_.counted)
    if round_.ended:
        assert round_.deadline_ms == 0
        assert sum(round_.phase_ms.values()) == round_.ended_at_ms - round_.started_at_ms


def check_progress(before: Federation, after: Federation) -> None:
    assert after.published - before.published in {0, 1}
    assert after.epoch >= before.epoch
    first, last = (0 if state.round is None else state.round.number for state in (before, after))
    assert last - first in {0, 1}
    versions = [0 if state.plan is None else state.plan.version for state in (before, after)]
    assert versions[1] - versions[0] in {0, 1}


@given(federation_rules(), st.integers(1, 3), st.lists(steps, max_size=60))
def test_every_reachable_state_is_sound(rules_, rounds, taken):
    run = Run(Game(rules_, rounds))
    for agent in AGENTS[:2]:
        run.apply(AgentRegistered(Participant(agent, 4, (WIDTH, WIDTH))))
    run.apply(Started())
    for step in taken:
        if step == "next":
            run.next()
        elif isinstance(step, int):
            run.game.wait(step)
            run.apply(Ticked())
            deadline_ms = run.game.state.next_deadline_ms
            assert deadline_ms == 0 or deadline_ms > run.game.now_ms
        else:
            run.apply(step)
    for round_ in run.ended.values():
        check_round(round_, rules_.quorum)
    last = run.game.state.round
    assert sorted(run.ended) == list(range(1, (last.number if last.ended else last.number - 1) + 1 if last else 1))


@given(federation_rules(), st.integers(1, 3), st.lists(steps, max_size=30))
def test_willing_agents_always_bring_a_federation_to_its_end(rules_, rounds, taken):
    run = Run(Game(rules_, rounds))
    for step in taken:
        if step == "next":
            run.next()
        elif not isinstance(step, int):
            run.apply(step)
    for agent in AGENTS:
        run.apply(AgentRegistered(Participant(agent, 4, (WIDTH, WIDTH))))
    run.apply(Started())
    for _ in range(400):
        if run.game.state.ended:
            break
        run.next()
    assert run.game.state.ended
    if run.game.state.state is FederationState.FINISHED:
        assert run.game.state.published == run.game.state.rounds


@given(federation_rules(), st.lists(steps, max_size=40), st.data())
def test_failing_computations_never_block(rules_, taken, data):
    run = Run(Game(rules_, 2))
    for agent in AGENTS[:4]:
        run.apply(AgentRegistered(Participant(agent, 4, (3, 3), selective=True)))
    run.apply(Started())
    for step in taken:
        if step == "next":
            work = pending(run.game.state)
            if work and data.draw(st.booleans()):
                run.apply(ComputationFailed(work[0], "disk gone"))
                assert work[0] not in pending(run.game.state)
            else:
                run.next()

"""A federation for tests: shortcuts to build one and to apply events to it."""

from __future__ import annotations

from dataclasses import replace

from shelora.plan import Negotiation
from shelora.rounds import (
    AgentRegistered,
    Ballot,
    CipherReceived,
    ComputeAverage,
    ComputeBasis,
    Computed,
    Effect,
    Event,
    FactorsReceived,
    Federation,
    FederationState,
    FoldResidues,
    Participant,
    PlanOutline,
    Record,
    Round,
    RoundPhase,
    Rules,
    Started,
    pending,
    transition,
)

WIDTH = 10
GATHER_MS = 1_000
NEGOTIATE_MS = 2_000
TRAIN_MS = 3_000
CIPHER_MS = 4_000

RULES = Rules(
    target_agents=3,
    quorum=2,
    gather_timeout_ms=GATHER_MS,
    negotiate_timeout_ms=NEGOTIATE_MS,
    train_timeout_ms=TRAIN_MS,
    cipher_timeout_ms=CIPHER_MS,
)


class Game:
    """Holds the present state and time; every event goes through `transition`."""

    def __init__(self, rules: Rules = RULES, rounds: int = 2) -> None:
        self.state = Federation(name="ward", rules=rules, rounds=rounds, epoch=1)
        self.now_ms = 1_000_000
        self.effects: tuple[Effect, ...] = ()
        self.history: list[Record] = []

    def do(self, *events: Event) -> Game:
        for event in events:
            self.state, self.effects = transition(self.state, event, self.now_ms)
            self.history += [effect for effect in self.effects if isinstance(effect, Record)]
        return self

    def wait(self, milliseconds: int) -> Game:
        self.now_ms += milliseconds
        return self

    def register(self, *agents: str, k: int = WIDTH, rank: int = 4) -> Game:
        for agent in agents:
            self.do(AgentRegistered(Participant(agent, rank, (k, k), selective=0 < k < WIDTH)))
        return self

    def started(self, *agents: str, k: int = WIDTH) -> Game:
        return self.register(*agents, k=k).do(Started())

    def factors(self, *agents: str, examples: int = 100) -> Game:
        for agent in agents:
            self.do(FactorsReceived(self.number, agent, examples))
        return self

    def cipher(self, *agents: str) -> Game:
        for agent in agents:
            self.do(CipherReceived(self.number, agent))
        return self

    def basis(self) -> Game:
        return self.do(Computed(ComputeBasis(self.number)))

    def fold(self) -> Game:
        work = pending(self.state)[0]
        assert isinstance(work, FoldResidues)
        return self.do(Computed(work))

    def average(self) -> Game:
        return self.do(Computed(ComputeAverage(self.number)))

    def play_round(self, *agents: str) -> Game:
        """A whole round in which these agents take part; the cohort must close with the last of them."""
        return self.factors(*agents).basis().cipher(*agents).fold().average()

    @property
    def round(self) -> Round:
        assert self.state.round is not None
        return self.state.round

    def last_effect(self) -> Effect:
        return self.effects[-1]

    def phase(self) -> RoundPhase:
        return self.round.phase

    def stage(self) -> FederationState:
        return self.state.state

    @property
    def plan(self) -> PlanOutline:
        assert self.state.plan is not None
        return self.state.plan

    @property
    def ballot(self) -> Ballot:
        assert self.state.ballot is not None
        return self.state.ballot

    @property
    def number(self) -> int:
        return self.round.number

    @property
    def kinds(self) -> list[str]:
        return [record.kind for record in self.history]


def rules(**changes) -> Rules:
    return replace(RULES, **changes)


OPE = Negotiation.OPE

"""One round: its members, its phase, and what can be read off them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from shelora.rounds.phases import RoundPhase
from shelora.rounds.strategy import FINAL_PHASES

_OF_PLACES: Final = ("ranks", "weights")
"""Properties of a round that depend on nothing but the places of all members in the cohort."""


@dataclass(frozen=True)
class Member:
    """One agent in one round.

    Attributes:
        agent: name.
        rank: LoRA rank its factors have.
        columns: encrypted columns per module.
        examples: training examples behind its factors, 0 before they came.
        uploaded: whether its factors were accepted.
        in_cohort: whether it is a member of the closed cohort.
        complete: whether its ciphertext was accepted.
        folded: whether the running sum of residues contains its ciphertext.
        counted: whether the published average contains it.
        left_reason: why it gave the round up; empty when it did not.
    """

    agent: str
    rank: int
    columns: tuple[int, ...]
    examples: int = 0
    uploaded: bool = False
    in_cohort: bool = False
    complete: bool = False
    folded: bool = False
    counted: bool = False
    left_reason: str = ""

    @property
    def left(self) -> bool:
        """Whether it gave the round up."""
        return bool(self.left_reason)

    @property
    def candidate(self) -> bool:
        """Whether its factors are in and it has not left."""
        return self.uploaded and not self.left

    @property
    def awaited(self) -> bool:
        """Whether it is in the cohort and its ciphertext may still come."""
        return self.in_cohort and not self.complete and not self.left


@dataclass(frozen=True)
class Tally:
    """How far the members of a round are.

    Attributes:
        candidates: members whose factors are in and who have not left.
        complete: cohort members whose ciphertext is complete.
        awaited: cohort members whose ciphertext may still come.
        unfolded: names of complete members whose ciphertext the running sum does not contain.
    """

    candidates: int
    complete: int
    awaited: int
    unfolded: frozenset[str]

    @classmethod
    def of(cls, members: Iterable[Member]) -> Tally:
        """Count these members."""
        found = tuple(members)
        complete = [member for member in found if member.in_cohort and member.complete]
        return cls(
            candidates=sum(member.candidate for member in found),
            complete=len(complete),
            awaited=sum(member.awaited for member in found),
            unfolded=frozenset(member.agent for member in complete if not member.folded),
        )

    def exchanged(self, old: Iterable[Member], new: Iterable[Member]) -> Tally:
        """The tally once some of the members counted here are replaced by others."""
        gone, come = Tally.of(old), Tally.of(new)
        return Tally(
            candidates=self.candidates - gone.candidates + come.candidates,
            complete=self.complete - gone.complete + come.complete,
            awaited=self.awaited - gone.awaited + come.awaited,
            unfolded=self.unfolded - gone.unfolded | come.unfolded,
        )


@dataclass(frozen=True)
class Round:
    """A round and everything the next decision depends on.

    Attributes:
        number: from 1; an abandoned round keeps its number.
        phase: running or final phase.
        plan_version: plan in force.
        started_at_ms: when it opened.
        phase_started_ms: when the phase began.
        deadline_ms: end of the phase, 0 for none.
        ended_at_ms: when it was published or abandoned, 0 before.
        reason: why it was abandoned.
        members: agents that uploaded or left, by name.
        phase_ms: milliseconds spent in the phases that are over.
    """

    number: int
    phase: RoundPhase
    plan_version: int
    started_at_ms: int
    phase_started_ms: int
    deadline_ms: int = 0
    ended_at_ms: int = 0
    reason: str = ""
    members: Mapping[str, Member] = field(default_factory=dict)
    phase_ms: Mapping[RoundPhase, int] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether it was published or abandoned."""
        return self.phase in FINAL_PHASES

    @cached_property
    def tally(self) -> Tally:
        """How far the members are."""
        return Tally.of(self.members.values())

    @cached_property
    def candidates(self) -> tuple[Member, ...]:
        """Members whose factors are in and who have not left, by name."""
        return tuple(member for _, member in sorted(self.members.items()) if member.candidate)

    @cached_property
    def cohort(self) -> tuple[Member, ...]:
        """The closed cohort in the order of the layout (by name); empty before it closes."""
        return tuple(member for _, member in sorted(self.members.items()) if member.in_cohort)

    @cached_property
    def complete(self) -> tuple[Member, ...]:
        """Cohort members whose ciphertext is complete, by name."""
        return tuple(member for member in self.cohort if member.complete)

    @cached_property
    def counted(self) -> tuple[Member, ...]:
        """Members that the published average contains, by name; empty before they are fixed."""
        return tuple(member for member in self.cohort if member.counted)

    @cached_property
    def first_plain(self) -> tuple[int, ...]:
        """Per module the columns that every counted member has encrypted; empty before they are fixed."""
        return tuple(map(min, zip(*(member.columns for member in self.counted), strict=True)))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """LoRA rank of every cohort member, in the order of the layout."""
        return tuple(member.rank for member in self.cohort)

    @cached_property
    def weights(self) -> Mapping[str, float]:
        """Each cohort member's share of the cohort's examples; they sum to 1."""
        total = sum(member.examples for member in self.cohort)
        return {member.agent: member.examples / total for member in self.cohort}

    @cached_property
    def total_weight(self) -> float:
        """Sum of the weights that count, 0 before they are fixed.

        A sum in the order of the cohort, so that the aggregator gets the same float64 every time.
        """
        return sum(self.weights[member.agent] for member in self.counted)

    def with_member(self, member: Member) -> Round:
        """The round with one member added or replaced."""
        return self.with_members({member.agent: member})

    def with_members(self, members: Mapping[str, Member]) -> Round:
        """The round with several members added or replaced."""
        changed = replace(self, members={**self.members, **members})
        old = {agent: self.members[agent] for agent in members if agent in self.members}
        # What the properties would find, without looking at thousands of members for every one that changes.
        known: dict[str, Any] = {"tally": self.tally.exchanged(old.values(), members.values())}
        if _places(old) == _places(members):
            known |= {name: value for name, value in vars(self).items() if name in _OF_PLACES}
        vars(changed).update(known)
        return changed


def _places(members: Mapping[str, Member]) -> dict[str, tuple[int, int]]:
    return {agent: (member.rank, member.examples) for agent, member in members.items() if member.in_cohort}

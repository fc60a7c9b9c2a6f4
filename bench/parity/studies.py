"""What is measured beside the main study: few methods, other texts or another training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from bench.parity.scenarios import Study, units
from bench.parity.setting import SKEWED, Setting
from bench.runner import Unit

ONE_SIDED: Final = {"one-sided": 0.1}
"""Concentration of a split that leaves most agents with hardly more than one label."""

ONE_SIDED_ROUNDS: Final = 3
"""Enough to see which way a training goes."""


@dataclass(frozen=True)
class SideStudy:
    """A study beside the main one.

    Attributes:
        name: of its folder; its units' names begin with it.
        title: what it is, in a table.
        methods: what is measured.
        change: makes its setting of the main study's.
    """

    name: str
    title: str
    methods: tuple[str, ...]
    change: Callable[[Setting], Setting]

    def units(self, setting: Setting, study: Callable[[], Study]) -> dict[str, Unit]:
        """Its units by name."""
        found = units(setting, study).items()
        return {f"{self.name}-{unit}": work for unit, work in found if unit.split("-")[0] in self.methods}


def _skewed_alone(setting: Setting) -> Setting:
    """There are few test texts, so all are always looked at."""
    return replace(setting, concentrations={SKEWED: Setting().concentrations[SKEWED]}, curve_texts=None)


def _one_sided(setting: Setting) -> Setting:
    return replace(setting, rounds=min(setting.rounds, ONE_SIDED_ROUNDS), concentrations=ONE_SIDED)


def _one_sided_as_they_occur(setting: Setting) -> Setting:
    return replace(_one_sided(setting), label_balance=0.0)


ROUTING: Final = SideStudy("routing", "routing messages", ("exact", "keeping"), _skewed_alone)

SKEW: Final = (
    SideStudy("onesided-defaults", "labels drawn evenly (default)", ("exact",), _one_sided),
    SideStudy("onesided-occurring", "labels drawn as they occur", ("exact",), _one_sided_as_they_occur),
)

"""One client agent of a measured federation, as a process of its own; leaves marks of when it did what.

    python -m bench.speed.agent --config agent.yaml --marks marks.json [--run run.json --index 0] [--plain] [--reveal]

With --run training is already done (`bench.speed.given`), else the configured one is the product's. With --plain the
agent averages in the clear with `bench.speed.plain`, else it is the product's agent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.speed.given import GivenTrainer
from bench.speed.load import read_run
from bench.speed.plain import PlainAgent
from services.client_agent.agent import Agent, load_trainer
from services.client_agent.config import AgentConfig
from services.client_agent.figures import RoundFigures
from services.client_agent.ports import Trainer
from services.client_agent.progress import Report
from services.common.config import load_config
from services.common.files import write_atomically
from services.common.logs import configure_logs


class MarkedTrainer:
    """Any trainer, and when each round's training began.

    Attributes:
        trained_s: monotonic seconds by round.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.trained_s: dict[int, float] = {}

    def train(self, round_number: int, report: Report, should_stop: Callable[[], bool]) -> dict[str, float]:
        """Note the time and train."""
        self.trained_s[round_number] = time.monotonic()
        return self._trainer.train(round_number, report, should_stop)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the trainer's."""
        return getattr(self._trainer, name)


def main() -> None:
    """Take part; leave marks of every round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--marks", type=Path, required=True, help="written at the end")
    parser.add_argument("--run", type=Path, help="sizes of given updates; without it the agent trains")
    parser.add_argument("--index", type=int, default=0, help="which agent of the run this is")
    parser.add_argument("--plain", type=int, default=0, metavar="ROUNDS", help="average in the clear for some rounds")
    parser.add_argument("--reveal", action="store_true", help="write clear factors, for a verification")
    options = parser.parse_args()
    configure_logs("agent", level="warning")
    changed: dict[str, object] = {"evaluate": False} | ({} if options.reveal else {"reveal_dir": None})
    config = load_config(AgentConfig, options.config, service="agent").model_copy(update=changed)
    run = read_run(options.run) if options.run else None
    trainer = MarkedTrainer(
        GivenTrainer(run, options.index) if run else load_trainer(config, lambda _share, _text: None)
    )
    took_part = _average_plainly(config, trainer, options.plain) if options.plain else _take_part(config, trainer)
    marks = asyncio.run(took_part)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    marks |= {
        "trained_s": trainer.trained_s,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }
    write_atomically(options.marks, json.dumps(marks).encode())


async def _take_part(config: AgentConfig, trainer: MarkedTrainer) -> dict[str, Any]:
    """The product's agent to its end: applied_s (monotonic seconds) and figures by round."""
    agent = Agent(config, trainer_factory=lambda _config, _report: trainer)
    applied: dict[int, float] = {}

    async def watch() -> None:
        async for status in agent.watch():
            if status.applied_round:
                applied.setdefault(status.applied_round, time.monotonic())

    watching = asyncio.ensure_future(watch())
    await agent.run()
    await watching
    return {"applied_s": applied, "figures": {number: RoundFigures(agent.state).get(number) for number in applied}}


async def _average_plainly(config: AgentConfig, trainer: MarkedTrainer, rounds: int) -> dict[str, Any]:
    agent = await PlainAgent.connect(config, trainer)
    applied: dict[int, float] = {}
    figures: dict[int, dict[str, float]] = {}
    async for number, moved in agent.run(rounds):
        applied[number] = time.monotonic()
        figures[number] = moved
    return {"applied_s": applied, "figures": figures}


if __name__ == "__main__":
    main()

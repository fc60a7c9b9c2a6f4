"""One client agent of a measured federation, as a process of its own: the product's agent with given updates.

python -m bench.workload.agent --config agent.yaml --run run.json --index 0 --marks marks.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from pathlib import Path

from bench.workload.given import GivenTrainer
from bench.workload.load import Run
from services.client_agent.agent import Agent
from services.client_agent.config import AgentConfig
from services.client_agent.figures import RoundFigures
from services.common.config import load_config
from services.common.files import write_atomically
from services.common.logs import configure_logs
from shelora.plan import Packing


def main() -> None:
    """Take part; leave marks of every round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True, help="what is measured")
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--marks", type=Path, required=True, help="written at the end: when what was done")
    parser.add_argument("--reveal", action="store_true", help="write clear factors, for a verification")
    options = parser.parse_args()
    configure_logs("agent", level="warning")
    changed: dict[str, object] = {"evaluate": False} | ({} if options.reveal else {"reveal_dir": None})
    config = load_config(AgentConfig, options.config, service="agent").model_copy(update=changed)
    fields = json.loads(options.run.read_text(encoding="utf-8"))
    run = Run(**{**fields, "packing": Packing(fields["packing"])})
    marks = asyncio.run(take_part(config, GivenTrainer(run, options.index)))
    write_atomically(options.marks, json.dumps(marks).encode())


async def take_part(config: AgentConfig, trainer: GivenTrainer) -> dict[str, object]:
    """Run an agent to its end.

    Returns:
        trained_s and applied_s by round (monotonic seconds), peak_rss_bytes, cpu_s, figures by round.
    """
    agent = Agent(config, trainer_factory=lambda _config, _report: trainer)
    applied: dict[int, float] = {}

    async def watch() -> None:
        async for status in agent.watch():
            if status.applied_round:
                applied.setdefault(status.applied_round, time.monotonic())

    watching = asyncio.ensure_future(watch())
    await agent.run()
    await watching
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "trained_s": trainer.trained_s,
        "applied_s": applied,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "figures": {number: RoundFigures(agent.state).get(number) for number in applied},
    }


if __name__ == "__main__":
    main()

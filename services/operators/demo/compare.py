"""The same training with plaintext averaging, for accuracies side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.operators.demo.folder import DemoFolder
from services.operators.demo.options import DemoOptions
from services.operators.demo.processes import Crew
from services.operators.render import percent
from services.operators.sheet import Sheet
from shelora.errors import StoredBytesCorrupt


async def run_comparison(options: DemoOptions, folder: DemoFolder, crew: Crew) -> dict[str, Any]:
    """Train again in one process with the same configurations and starting adapters; averages are m x n, in the clear.

    Returns:
        {"accuracy": {"before": {agent: x}, "after": {agent: x}}, "rounds": as the baseline wrote them}.

    Raises:
        InternalFault: the process failed; its context names the worker.
        StoredBytesCorrupt: it wrote no usable report.
    """
    names = options.names
    arguments = ["-m", "services.client_agent.training.plaintext", "--rounds", str(options.rounds)]
    arguments += ["--agents", *(str(folder.agent_config(name)) for name in names)]
    arguments += ["--initial", *(str(folder.adapter(name, 0)) for name in names)]
    arguments += ["--out", str(folder.comparison)]
    await crew.finish(crew.start("plaintext", arguments))
    return read_comparison(folder.comparison, names)


def read_comparison(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The baseline's report.

    Raises:
        StoredBytesCorrupt: unreadable, or not about these agents.
    """
    try:
        rounds = json.loads(path.read_text(encoding="utf-8"))["rounds"]
        first = {entry["agent"]: float(entry["accuracy_before"]) for entry in rounds[0]["agents"]}
        last = {entry["agent"]: float(entry["accuracy_after"]) for entry in rounds[-1]["agents"]}
        accuracy = {"before": {name: first[name] for name in names}, "after": {name: last[name] for name in names}}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise StoredBytesCorrupt(
            f"{path}: expected the plaintext run's report about {', '.join(names)}, got {type(error).__name__}: {error}"
        ) from error
    return {"accuracy": accuracy, "rounds": rounds}


def comparison_table(encrypted: Mapping[str, float | None], plaintext: Mapping[str, float]) -> Sheet:
    """Final accuracies side by side, with the difference in points."""
    table = Sheet(
        "agent", "encrypted>", "plaintext>", "points apart>",
        title="final accuracy: encrypted rounds, and the same training with plaintext m x n averaging",
    )  # fmt: skip
    for name, reference in plaintext.items():
        found = encrypted.get(name)
        difference = "-" if found is None else f"{100 * (found - reference):+.2f}"
        table.add(name, percent(found), percent(reference), difference)
    return table

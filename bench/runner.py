"""Runs the units of a measurement with a progress bar; keeps what each has measured, so that a later run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench.machine import describe_machine
from bench.records import Record
from services.common.files import write_atomically

Unit: TypeAlias = Callable[[], Iterator[Record]]
"""Measures one part and yields its records."""

Result: TypeAlias = Mapping[str, Any]
"""machine, stamp, seconds by unit, records by unit."""


def measure(
    name: str, units: Mapping[str, Unit], out: Path, *, stamp: Mapping[str, Any], fresh: bool, console: Console
) -> Result:
    """Run every unit that has no records of the same stamp yet; write NAME.json with all of them.

    Args:
        name: of the measurement.
        units: its parts; each is kept when it is complete.
        out: folder of records and result.
        stamp: what decides the figures besides the machine: code, data, seeds.
        fresh: measure everything again.
        console: where progress is shown.
    """
    machine, found, seconds = describe_machine(), {}, {}
    with _progress(console) as progress:
        total = progress.add_task(name, total=len(units), detail="")
        for unit, work in units.items():
            path = out / "records" / f"{unit}.json"
            wanted = {**stamp, "machine": machine}
            kept = None if fresh else _kept(path, wanted)
            if kept is None:
                progress.update(total, description=unit, detail="")
                started, records = time.perf_counter(), []
                for record in work():
                    records.append(record)
                    progress.update(total, detail=f"{len(records)} figures")
                kept = {"stamp": wanted, "seconds": time.perf_counter() - started, "records": records}
                write_atomically(path, json.dumps(kept, indent=1).encode())
            found[unit], seconds[unit] = kept["records"], kept["seconds"]
            progress.advance(total)
        progress.update(total, description=name, detail="")
    result = {"machine": machine, "stamp": dict(stamp), "seconds": seconds, "records": found}
    write_atomically(out / f"{name}.json", json.dumps(result, indent=1).encode())
    return result


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _kept(path: Path, stamp: Mapping[str, Any]) -> dict[str, Any] | None:
    """Records of an earlier run of the same stamp."""
    if not path.exists():
        return None
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept if kept.get("stamp") == stamp else None

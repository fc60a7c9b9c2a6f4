from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.common.clock import SystemClock
from services.operators.demo.processes import Crew, describe_exit
from shelora.errors import InternalFault, Unavailable

pytestmark = pytest.mark.anyio
STUBBORN = (
    "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
)
OBEDIENT = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    crew = Crew(os.environ, tmp_path, SystemClock())
    yield crew
    crew.kill()


async def test_output_goes_to_the_log_and_a_good_end_is_awaited(crew) -> None:
    worker = crew.start("talker", ["-c", "import os; print(os.environ['WORD']); print('b')"], {"WORD": "a"})
    await crew.finish(worker)
    assert worker.last_lines() == ["a", "b"]
    assert worker.last_lines(1) == ["b"]


async def test_a_bad_end_names_the_worker(crew) -> None:
    worker = crew.start("loser", ["-c", "raise SystemExit(3)"])
    with pytest.raises(InternalFault, match="loser ended with exit status 3") as caught:
        await crew.finish(worker)
    assert caught.value.context == {"worker": "loser"}
    with pytest.raises(InternalFault, match="loser ended with exit status 3 while it was needed"):
        crew.check(["loser"])


async def test_readiness_is_the_file_or_an_error(crew, tmp_path) -> None:
    good = crew.start("good", ["-c", OBEDIENT, str(tmp_path / "good")])
    await crew.ready(good, tmp_path / "good", 30.0)
    bad = crew.start("bad", ["-c", "pass"])
    with pytest.raises(InternalFault, match="bad ended with exit status 0 before it served"):
        await crew.ready(bad, tmp_path / "bad", 30.0)
    with pytest.raises(Unavailable, match="good does not serve after 0 s"):
        await crew.ready(good, tmp_path / "never", 0.0)


async def test_stop_asks_first_and_kills_those_that_do_not_listen(crew, tmp_path) -> None:
    obedient = crew.start("obedient", ["-c", OBEDIENT, str(tmp_path / "a")])
    stubborn = crew.start("stubborn", ["-c", STUBBORN, str(tmp_path / "b")])
    await crew.ready(obedient, tmp_path / "a", 30.0)
    await crew.ready(stubborn, tmp_path / "b", 30.0)
    await crew.stop(grace_s=0.3)
    assert obedient.exit_status == -signal.SIGTERM
    assert stubborn.exit_status == -signal.SIGKILL
    assert describe_exit(stubborn.exit_status) == "signal SIGKILL"


async def test_a_stop_of_nobody_is_fine(crew) -> None:
    await crew.stop()


def test_children_die_with_a_parent_that_is_killed_hard(tmp_path) -> None:
    """The leash holds when the parent has no chance to clean up."""
    ready = tmp_path / "ready"
    parent_code = (
        "import os, pathlib, sys, time\n"
        "from services.common.clock import SystemClock\n"
        "from services.operators.demo.processes import Crew\n"
        "crew = Crew(os.environ, pathlib.Path(sys.argv[1]), SystemClock())\n"
        f"worker = crew.start('child', ['-c', {STUBBORN!r}, {str(ready)!r}])\n"
        "print(worker.process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", parent_code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[4]) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.pid == child.ppid()
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive


def test_a_child_whose_parent_is_another_process_does_not_start(tmp_path) -> None:
    from services.operators.demo import leash

    command = [sys.executable, "-I", "-S", leash.__file__, "1", sys.executable, "-c", "print('ran')"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (1, "")

"""A health check for containers: `python -m services.common.probe URL` succeeds when a GET answers 200.

It is run every few seconds, so it imports nothing but small parts of the standard library. It follows no redirect and
no proxy variable.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from types import FrameType
from typing import Final
from urllib.parse import urlsplit

TIMEOUT_S: Final = 3.0
"""For connection and answer together."""

_BODY_BYTES: Final = 65_536
_LINE_CHARACTERS: Final = 500


def probe(url: str) -> str:
    """Ask once.

    Args:
        url: http://HOST:PORT/PATH.

    Returns:
        What is wrong, in one line; empty when the answer is 200.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            return f"expected http://HOST:PORT/PATH, got {url!r}"
        connection = HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
            answer = connection.getresponse()
            if answer.status == 200:
                return ""
            return f"{url}: {answer.status} {answer.reason}{_explained(answer.read(_BODY_BYTES))}"
        finally:
            connection.close()
    except (OSError, HTTPException, ValueError) as error:
        return f"{url}: {type(error).__name__}: {error}"


def _explained(body: bytes) -> str:
    """Code and message out of a JSON body, where it has them."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    fields = found if isinstance(found, dict) else {}
    return "".join(f": {fields[name]}" for name in ("code", "message") if fields.get(name))


def main(arguments: Sequence[str]) -> int:
    """Probe the URL in the arguments; answers the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m services.common.probe URL\n")
        return 1

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"no whole answer within {TIMEOUT_S:g} s")

    # A socket's timeout bounds each step of an exchange, not the whole of it.
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S)
    problem = probe(arguments[0])
    if problem:
        sys.stderr.write(" ".join(problem.split())[:_LINE_CHARACTERS] + "\n")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

from __future__ import annotations

import io
import json
import logging
from typing import Any

import numpy as np
import structlog

from services.common.logs import bound_ids, configure_logs, new_correlation_id


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_lines_are_json_off_a_terminal() -> None:
    stream = io.StringIO()
    configure_logs("aggregator", stream=stream)
    logger = structlog.get_logger("services.test")
    with bound_ids(agent="agent-1", round="3"):
        logger.info("factors accepted", size_bytes=7)
    logger.debug("not shown")
    logging.getLogger("library").warning("from a %s", "library")
    ours, theirs = lines(stream)
    assert ours["event"] == "factors accepted"
    assert (ours["agent"], ours["round"], ours["size_bytes"]) == ("agent-1", "3", 7)
    assert (ours["service"], ours["level"], ours["logger"]) == ("aggregator", "info", "services.test")
    assert ours["timestamp"].endswith("Z")
    assert (theirs["event"], theirs["level"], theirs["service"]) == ("from a library", "warning", "aggregator")
    assert "agent" not in theirs


def test_payloads_never_reach_a_log() -> None:
    stream = io.StringIO()
    configure_logs("agent", stream=stream, json=True)
    structlog.get_logger().info("x", key=b"secret", update=np.full((2, 3), 7.25), view=memoryview(b"abc"))
    (line,) = lines(stream)
    assert (line["key"], line["update"], line["view"]) == ("<6 bytes>", "<array of shape (2, 3)>", "<3 bytes>")


def test_exceptions_carry_their_traceback() -> None:
    stream = io.StringIO()
    configure_logs("agent", stream=stream, json=True, level="error")
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger().exception("step failed")
    structlog.get_logger().warning("below the level")
    (line,) = lines(stream)
    assert "ValueError: broken" in line["exception"]


def test_people_read_plain_lines() -> None:
    stream = io.StringIO()
    configure_logs("agent", stream=stream, json=False)
    structlog.get_logger().info("round published", round=3)
    assert "round published" in stream.getvalue()
    assert "round=3" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_correlation_ids_differ() -> None:
    ids = {new_correlation_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(found) == 16 and int(found, 16) >= 0 for found in ids)

from __future__ import annotations

import json
from dataclasses import replace

from rich.console import Console, RenderableType

from services.common.audit import AuditRecord
from services.common.keymanager_client import FetchedEpoch
from services.operators.domain import Event, RegisteredAgent
from services.operators.render import (
    agents_table,
    as_json,
    at,
    audit_table,
    column_range,
    epochs_table,
    event_line,
    federation_table,
    federations_table,
    names,
    round_members_table,
    rounds_table,
)
from shelora.rounds.phases import AgentTask, FederationState, RoundPhase
from support.operators import PARAMETERS, make_federation, make_member, make_plan, make_round


def text(renderable: RenderableType) -> str:
    console = Console(width=220, record=True, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_json_of_a_federation_is_complete_and_plain() -> None:
    found = json.loads(as_json(make_federation(found=make_round(1))))
    assert found["state"] == "running"
    assert found["spec"]["parameters"]["ring_dimension"] == 4096
    assert found["plan"]["parameters_digest"] == make_plan().parameters_digest.hex()
    assert found["round"]["members"][0]["metrics"]["accuracy_after"] == 0.6


def test_json_leaves_out_what_is_not_for_showing() -> None:
    epoch = FetchedEpoch("demo", 1, "current", PARAMETERS, b"public", b"sealed", 0)
    assert json.loads(as_json(epoch)).keys() == {"federation", "number", "state", "parameters", "created_at_ms"}


def test_round_table_shows_every_figure_and_who_was_left_out() -> None:
    figures = {
        "accuracy_before": 0.2,
        "accuracy_after": 0.6,
        "seconds_train": 12.34,
        "seconds_encrypt": 1.5,
        "seconds_factors_upload": 0.5,
        "seconds_cipher_upload": 1.0,
        "seconds_download": 0.5,
        "he_seconds": 0.125,
        "bytes_up": 4_000_000.0,
        "bytes_down": 5_000_000.0,
        "cipher_bytes_down": 3_000_000.0,
    }
    reported = replace(make_member("agent-1", 4, 32), metrics=figures)
    found = make_round(2, reported, make_member("agent-2", 8, 8, counted=False))
    shown = text(round_members_table(found))
    for part in ("round 2: 1 of 2 counted", "train 5.0 s", "20.0% -> 60.0%", "12.3", "0.125", "4.00", "5.00", "3.00"):
        assert part in shown
    assert "agent-2 (left out: lost its power)" in shown


def test_tables_have_a_line_for_each_thing() -> None:
    federation = make_federation(FederationState.STOPPED, found=make_round(1))
    assert "demo" in text(federations_table([federation]))
    shown = text(federation_table(federation))
    assert "stopped" in shown
    assert "1, published, 2 members, 2 ciphertexts" in shown
    assert "2 modules, 144 dense values" in shown
    agent = RegisteredAgent("agent-1", 4, (8, 16), "25%", "0.1.0", 0, True, AgentTask.FACTORS, 1234)
    shown = text(agents_table([agent]))
    for part in ("agent-1", "8..16", "1,234", "factors", "yes"):
        assert part in shown
    abandoned = make_round(3, phase=RoundPhase.ABANDONED)
    assert "abandoned" in text(rounds_table([make_round(1), abandoned]))
    assert "abandoned" in text(round_members_table(abandoned))
    epoch = FetchedEpoch("demo", 2, "current", PARAMETERS, b"", b"", 1_700_000_000_000)
    assert "2023-11-14 22:13:20Z" in text(epochs_table([epoch]))
    record = AuditRecord(7, 1_700_000_000_000, "spiffe://demo/agent/a", "fetch-secret", "epoch 2", "granted", b"")
    assert "fetch-secret" in text(audit_table([record]))


def test_text_from_outside_is_no_markup() -> None:
    agent = RegisteredAgent("agent-1", 4, (8,), "[red]25%[/red]", "0.1.0", 0, True, None, 1)
    assert "[red]25%[/red]" in text(agents_table([agent]))
    assert "[bold]x" in text(rounds_table([make_round(1, make_member("[bold]x", 4, 8))]))


def test_small_things() -> None:
    assert at(0) == "-"
    assert column_range(()) == "-"
    assert column_range((5, 5)) == "5"
    assert names([]) == "-"
    assert names([str(number) for number in range(8)]) == "0, 1, 2, 3, 4, 5 and 2 more"
    line = event_line(Event(1, 1_700_000_000_000, "factors_received", 2, "agent-1", "12 modules"))
    assert line == "2023-11-14 22:13:20Z round 2 factors_received agent-1 12 modules"

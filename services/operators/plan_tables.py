"""How explained plans and verdicts look on a terminal."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.operators.leakage import Level, Remark, Verdict
from services.operators.planning import AgentCost, Explanation
from services.operators.render import column_range, megabytes, names
from services.operators.sheet import Sheet
from shelora.plan import Packing

STYLES: Final = {Level.SAFE: "green", Level.CAUTION: "yellow", Level.UNSAFE: "bold red"}
"""How verdicts are coloured."""

Alike = TypeVar("Alike", bound=Hashable)


def explanation_tables(found: Explanation) -> Group:
    """All of it: what a round costs whom, how exact and how secure it is, what it gives away."""
    return Group(
        bytes_table(found),
        seconds_table(found),
        aggregator_table(found),
        _assurances(found),
        verdict_lines(found.verdicts),
    )


def bytes_table(found: Explanation) -> Sheet:
    """One line an agent, or several that are alike: what it sends and receives in one round."""
    rows = sorted(set(found.basis.rows))
    span = f"{rows[0]}" if len(rows) == 1 else (f"{rows[0]} to {rows[-1]}" if rows else "0")
    exact = found.basis.verdict
    if found.packing is Packing.DENSE:
        exact += f", rounded to about {found.precision.typical:.0e} of its norm"
    table = Sheet(
        "agent", "rank>", "budget", "k>", "share>", "blocks>", "factors up MB>", "cipher up MB>", "up MB>",
        "projection MB>", "average MB>", "cipher down MB>", "down MB>",
        title=f"{found.modules} modules, {found.dense_values:,} dense values, basis rows {span} "
        f"(cap {found.cap}), {found.packing.value} packing: {exact}",
    )  # fmt: skip
    for agents, cost in _costs(found):
        table.add(
            agents,
            str(cost.rank),
            cost.budget,
            column_range(cost.columns),
            f"{cost.encrypted_share:.1%}",
            f"{cost.blocks:,}",
            megabytes(cost.factors_bytes),
            megabytes(cost.cipher_up_bytes),
            megabytes(cost.up_bytes),
            megabytes(cost.projection_bytes),
            megabytes(cost.average_bytes),
            megabytes(cost.cipher_down_bytes),
            megabytes(cost.down_bytes),
        )
    return table


def seconds_table(found: Explanation) -> Sheet:
    """One line an agent, or several that are alike: seconds and memory of one round besides training."""
    own = sum(cost.measured for cost in found.agents)
    table = Sheet(
        "agent", "factors s>", "pack s>", "encrypt s>", "upload s>", "download s>", "decrypt s>", "refit s>",
        "other s>", "all s>", "RAM MB>",
        title="seconds and extra memory of one round, training and waiting left out; agents with figures of their own: "
        f"{own} of {len(found.agents)}",
    )  # fmt: skip
    for agents, cost in _costs(found):
        table.add(
            agents,
            _short(cost.canonical_s),
            _short(cost.pack_s),
            _short(cost.encrypt_s),
            _short(cost.upload_s),
            _short(cost.download_s),
            _short(cost.decrypt_s),
            _short(cost.refit_s),
            _short(cost.overhead_s),
            _short(cost.seconds),
            f"{cost.peak_ram_bytes / 1e6:.0f}",
        )
    return table


def aggregator_table(found: Explanation) -> Sheet:
    """One line: what a round costs the aggregator."""
    cost = found.aggregator
    table = Sheet(
        "aggregator", "basis s>", "projection s>", "average s>", "sum s>", "check s>", "CPU s>", "RAM MB>",
        "RAM limit MB>", "disk MB>", "kept MB>", "in MB>", "out MB>",
        title="a round at the aggregator: core seconds without gRPC; RAM limit is for any number of such agents",
    )  # fmt: skip
    table.add(
        "a round",
        _short(cost.basis_s),
        _short(cost.projection_s),
        _short(cost.average_s),
        _short(cost.sum_s),
        _short(cost.check_s),
        _short(cost.cpu_s),
        f"{cost.peak_ram_bytes / 1e6:.0f}",
        f"{cost.ram_ceiling_bytes / 1e6:.0f}",
        megabytes(cost.staged_bytes),
        megabytes(cost.kept_bytes),
        megabytes(cost.in_bytes),
        megabytes(cost.out_bytes),
    )
    return table


def verdict_lines(verdicts: Sequence[Verdict]) -> Group:
    """What settings give away: a line for agents with the same verdict, then its reasons, worst first.

    Reasons that hold for everybody come last, once.
    """
    groups = _grouped([(verdict.agent, replace(verdict, agent="")) for verdict in verdicts])
    common = [one for one in verdicts[0].remarks if all(one in found.remarks for _, found in groups)] if groups else []
    lines: list[Text] = []
    for agents, verdict in groups:
        lines.append(Text.assemble((names(agents), "bold"), ": ", (verdict.level.value, STYLES[verdict.level])))
        lines += _remarks([one for one in verdict.remarks if one not in common or len(groups) == 1])
    if common and len(groups) > 1:
        lines += [Text("all agents:", style="bold"), *_remarks(common)]
    return Group(*lines)


def _remarks(remarks: Sequence[Remark]) -> list[Text]:
    order = list(Level)
    return [_line(remark) for remark in sorted(remarks, key=lambda one: -order.index(one.level))]


def _line(remark: Remark) -> Text:
    style = STYLES[remark.level]
    return Text.assemble("  ", (remark.level.value, style), f" ({remark.basis.value}): {remark.text}")


def _assurances(found: Explanation) -> RenderableType:
    """Errors, security, rates."""
    precision, security, rates = found.precision, found.security, found.rates
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    entries = {
        "error, usual": f"{precision.typical:.1e} of the norm of the averaged update",
        "error, bound": f"an entry is off by at most {precision.bound:.1e} x E, E being the mean norm of the agents' "
        "updates" + (f", and {precision.cipher_bound:.1e} from decryption" if precision.cipher_bound else ""),
        "dense tensors": f"off by at most {precision.dense_tensor_bound:.1e}" if found.dense_values else "none",
        "security": f"{security.bits} bits, classical: ring dimension {security.ring_dimension}, modulus "
        f"{security.modulus_bits} bits (the standard lists them up to {security.standard_bits} bits); updates and sums "
        f"must stay below {security.largest_value:g}",
        "rates": f"where an agent reported none: encrypt {rates.encrypt_values_per_s * rates.cores / 1e6:.1f} million "
        f"values/s, decrypt {rates.decrypt_values_per_s * rates.cores / 1e6:.1f}, upload "
        f"{rates.upload_bytes_per_s / 1e6:.2f} MB/s, download {rates.download_bytes_per_s / 1e6:.2f} MB/s",
        "leakage": "by the attacks of docs/privacy.md:",
    }
    for name, text in entries.items():
        table.add_row(Text(name), Text(text))
    return table


def _costs(found: Explanation) -> list[tuple[str, AgentCost]]:
    """Costs of agents, those together that differ in nothing but the name."""
    return [
        (names(agents, most=3), cost)
        for agents, cost in _grouped([(one.agent, replace(one, agent="")) for one in found.agents])
    ]


def _grouped(pairs: Sequence[tuple[str, Alike]]) -> list[tuple[list[str], Alike]]:
    """Names by equal values, in the order of the first."""
    groups: dict[Alike, list[str]] = {}
    for name, value in pairs:
        groups.setdefault(value, []).append(name)
    return [(found, value) for value, found in groups.items()]


def _short(duration: float) -> str:
    """Seconds with the digits that mean something."""
    return f"{duration:.3f}" if duration < 1 else f"{duration:.1f}"

"""The report of a run: one section a scenario, each a function so that docs/privacy.md takes the same tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from bench.audit.scenarios import LEFT_ATTACKERS, RIGHT_ATTACKERS
from bench.machine import machine_sentence
from bench.records import Record, choose, cross, markdown, mean, percent, spread, values

ATTACKERS: Final = (*LEFT_ATTACKERS, *RIGHT_ATTACKERS)
FIRST_ATTACKERS: Final = (LEFT_ATTACKERS[0], *RIGHT_ATTACKERS)
"""Before the first round B is 0, for everybody to know."""


def render(result: Mapping[str, Any]) -> str:
    """The whole report."""
    records = result["records"]
    sections = [
        "# Privacy audit",
        f"Texts: {result['stamp']['corpus']} ({result['stamp']['texts']:,}). "
        f"{machine_sentence(result['machine'])} "
        f"Measured in {sum(result['seconds'].values()):.0f} s. Repeats use other texts and orders; cells give their "
        "range.",
        "Recall: tokens brought back, framing tokens not counted, out of 2,048 candidates and those that occur. "
        "Leakage: recall less what the same attack finds of as many texts that the agent never had. Published check: "
        "only candidates within a relative distance of 0.01 count.",
        "## Budgets\n\nRank 64, two texts, 53 different inputs, one plain gradient step, value projection of the first "
        "layer.",
        "Recall by the published check:\n\n" + budgets(records["budgets"], "recall_below_threshold"),
        "Recall when the nearest candidates are taken:\n\n" + budgets(records["budgets"], "recall"),
        "ROUGE-2 when the nearest candidates are taken:\n\n" + budgets(records["budgets"], "rouge2"),
        single_column(records["budgets"]),
        "## Ranks and batches\n\nOne plain gradient step, every column plain. Leakage in a first round (B = 0):",
        batches(records["batches"], "first", "leakage"),
        "Leakage in a later round:\n\n" + batches(records["batches"], "later", "leakage"),
        "ROUGE-1 in a first round:\n\n" + batches(records["batches"], "first", "rouge1"),
        "ROUGE-2 in a first round:\n\n" + batches(records["batches"], "first", "rouge2"),
        "## The product's training\n\nAdamW with dropout as agents train, every column plain, first round. Leakage:",
        trainings(records["trainings"], "leakage"),
        "ROUGE-1:\n\n" + trainings(records["trainings"], "rouge1"),
        "Recall by the published check:\n\n" + trainings(records["trainings"], "recall_below_threshold"),
        "## Default settings\n\n480 texts, rank 8, 16 texts a step, 30 steps. Leakage with its standard error:",
        defaults(records["defaults"]),
        "Recall by the published check:\n\n" + defaults_below(records["defaults"]),
        "## The secret order\n\n" + orders(records["orders"]),
        "## Decoders\n\nRandom weights, one plain gradient step, every column plain. Leakage:",
        decoders(records["decoders"]),
        "## Membership\n\n" + membership(records["membership"]),
    ]
    return "\n\n".join(sections) + "\n"


def budgets(records: Sequence[Record], key: str) -> str:
    """Over budgets, one column an attacker."""
    columns = (
        "gradient of A, zeroed", "gradient of A, dropped", "order and start known, zeroed",
        "order and start known, dropped", "order and start known, Gram", "order known, dropped", "order unknown",
    )  # fmt: skip
    measured = [record for record in records if "budget" in record]
    return cross(measured, lambda record: record["budget"], columns, key, "encrypted")


def single_column(records: Sequence[Record]) -> str:
    """The reconstruction of a lone hidden column."""
    errors = [record["largest_error"] for record in records if "largest_error" in record]
    return (
        "With one encrypted column a module, the Gram matrix gave that column up to its sign in every module, to "
        f"within {max(errors):.0e}."
    )


def batches(records: Sequence[Record], start: str, key: str) -> str:
    """Over ranks and batches."""
    return cross(
        choose(records, start=start),
        lambda record: f"rank {record['rank']}, {_texts(record)}",
        FIRST_ATTACKERS if start == "first" else ATTACKERS,
        key,
        "agent",
    )


def trainings(records: Sequence[Record], key: str) -> str:
    """Over numbers of texts, steps and ranks."""
    return cross(
        records,
        lambda record: (
            f"{record['texts']} text{'s' * (record['texts'] > 1)}, {record['batch']} a step, {record['steps']} step"
            f"{'s' * (record['steps'] > 1)}, rank {record['rank']}"
        ),
        FIRST_ATTACKERS,
        key,
        "agent",
    )


def defaults(records: Sequence[Record]) -> str:
    """Over budgets, with errors."""

    def cell(found: Sequence[Record], key: str) -> str:
        return (
            " / ".join(f"{100 * record[key]:.1f} ± {100 * record['error']:.1f}" for record in found) + " %"
            if found
            else "-"
        )

    return cross(records, lambda record: record["budget"], ATTACKERS, "leakage", "encrypted (rounds 1 / 2)", cell)


def defaults_below(records: Sequence[Record]) -> str:
    """Over budgets, by the published check."""
    return cross(records, lambda record: record["budget"], ATTACKERS, "recall_below_threshold", "encrypted")


def orders(records: Sequence[Record]) -> str:
    """What attacks on the wire order achieve."""
    token = choose(records, attacker="known opening token")
    keys = list(dict.fromkeys((r["rank"], r["texts"], r["tokens"], r["view"]) for r in token))
    rows = []
    for rank, texts, tokens, view in sorted(keys, key=lambda key: key[3], reverse=True):
        found = choose(token, rank=rank, texts=texts, tokens=tokens, view=view)
        dimensions = "/".join(str(value) for value in values(found, "dimensions"))
        placed, recall = spread(found, "columns_placed"), spread(found, "recall")
        rows.append([view, str(rank), f"{texts} of {tokens // texts} tokens", dimensions, placed, recall])
    first = markdown(
        ["in hand", "rank", "texts", "dimensions of the span", "columns placed", "recall on our wire after that"], rows
    )
    statistic = choose(records, attacker="statistics of the updates")
    second = markdown(
        ["rounds", "columns linked to the round before", "columns placed by statistics"],
        [
            [str(record["rounds"]), percent(record["columns_linked"]), percent(record["columns_placed"])]
            for record in statistic
        ],
    )
    ideal = percent(mean(choose(records, attacker="statistics of the inputs themselves"), "columns_placed"))
    return (
        "By the vector of the token that opens every text (one plain gradient step, every column plain):\n\n"
        f"{first}\n\n"
        f"By statistics against public texts of the same kind (rank 64, 16 texts a round):\n\n{second}\n\n"
        "With the second moments of the private inputs themselves, which no round shows, the same matching places "
        f"{ideal}."
    )


def decoders(records: Sequence[Record]) -> str:
    """Over architectures and batches."""
    return cross(
        records,
        lambda record: f"{record['model']}, rank {record['rank']}, {_texts(record)}, {record['start']} round",
        ATTACKERS,
        "leakage",
        "agent",
    )


def membership(records: Sequence[Record]) -> str:
    """AUC of the loss threshold."""
    rows = []
    for key in dict.fromkeys((r["texts"], r["batch"], r["steps"], r["rank"], r["passes"]) for r in records):
        found = [r for r in records if (r["texts"], r["batch"], r["steps"], r["rank"], r["passes"]) == key]
        cells = [f"{choose(found, attacker=name)[0]['auc']:.2f}" for name in values(records, "attacker")]
        rows.append([f"{key[0]} texts, {key[1]} a step, {key[2]} steps, rank {key[3]}", f"{key[4]:.1f}", *cells])
    table = markdown(["agent", "passes over its texts", *values(records, "attacker")], rows)
    return f"AUC of a loss threshold after one round (0.5 is guessing):\n\n{table}"


def _texts(record: Record) -> str:
    length = record["tokens"] // record["texts"]
    return f"{record['texts']} text{'s' * (record['texts'] > 1)} of {length} tokens"

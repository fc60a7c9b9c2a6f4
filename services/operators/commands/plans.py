"""`shelora plan`: explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from services.operators.commands.frame import (
    JsonOption,
    ProfileOption,
    guarded,
    make_group,
    perform,
    show,
    wants_json,
)
from services.operators.domain import Federation, RegisteredAgent, Round
from services.operators.leakage import DEFAULT_BATCH, DEFAULT_EXAMPLES, DEFAULT_STEPS
from services.operators.plan_tables import explanation_tables
from services.operators.planning import (
    PAYLOAD_LIMIT_BYTES,
    Explanation,
    Rates,
    Terms,
    explain,
    explain_registered,
    imagine,
    imagined_parameters,
    parse_budgets,
    parse_ranks,
    parse_shapes,
    present_terms,
    require_safe,
    shapes_of,
    terms_of,
)
from services.operators.session import Session
from shelora.errors import SheLoraError
from shelora.he.parameters import CkksParameters
from shelora.plan import ModelShapes, Negotiation, Packing

app = make_group("plan", "What a plan costs, how exact and secure it is, what it gives away.")

RanksOption = Annotated[str | None, typer.Option(help="LoRA ranks of agents to imagine, for example 4,8,16,32.")]
BudgetsOption = Annotated[
    str | None, typer.Option(help="Their budgets, repeated over the ranks, for example full,25%,5%,auto.")
]
AgentsOption = Annotated[
    int | None, typer.Option(min=1, help="How many of them; ranks and budgets are repeated. Default: one a rank.")
]
ShapesOption = Annotated[
    str | None,
    typer.Option(metavar="FILE|TEXT", help="What is trained: a JSON file, or for example 104*3200x3200,dense*2048."),
]
CapOption = Annotated[int | None, typer.Option(min=0, max=4096, help="Most basis rows; 0: 4 x largest rank.")]
PackingOption = Annotated[
    Packing | None, typer.Option(help="How ciphertexts are packed; without it as the federation does, else exact.")
]
NegotiationOption = Annotated[
    Negotiation | None, typer.Option(help="How the encrypted columns are agreed; without it as the federation does.")
]
RingOption = Annotated[
    int | None, typer.Option(help="HE parameters to imagine; without it the federation's, else the usual ones.")
]
BitsOption = Annotated[int | None, typer.Option(help="As --ring-dimension.")]
TextsOption = Annotated[
    int, typer.Option(min=1, help="Local texts of an imagined agent; registered agents say theirs.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Texts a step, for the verdict.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Steps a round, for the verdict.")]
EncryptRateOption = Annotated[
    float | None, typer.Option(min=1, help="Values an agent encrypts per second, for budget auto and the seconds.")
]
UploadRateOption = Annotated[float | None, typer.Option(min=1, help="Bytes an agent uploads per second.")]
DownloadRateOption = Annotated[float | None, typer.Option(min=1, help="Bytes an agent downloads per second.")]
LimitOption = Annotated[
    int, typer.Option(min=1, help="Longest upload in bytes; limits.max_payload_bytes of the aggregator.")
]
AllowUnsafe = Annotated[
    bool, typer.Option("--allow-unsafe", help="Go on with settings under which the measured attacks find something.")
]


@dataclass(frozen=True)
class Look:
    """A federation as it is."""

    federation: Federation
    agents: Sequence[RegisteredAgent]
    rounds: Sequence[Round]

    def explain(self, imagined: Imagined | None, wishes: Wishes, rates: Rates, *, measured: bool) -> Explanation:
        """The plan of its registered agents, by figures of their own if wanted; or that of others on its model."""
        if imagined is not None:
            return imagined.explain(shapes_of(self.federation), wishes.on(terms_of(self.federation.spec)), rates)
        terms = present_terms(self.federation)
        rounds = self.rounds if measured else ()
        return explain_registered(self.federation, self.agents, rounds, wishes.on(terms), rates=rates)


@dataclass(frozen=True)
class Imagined:
    """Agents that were typed."""

    ranks: tuple[int, ...]
    budgets: tuple[str, ...]
    texts: int

    def explain(self, shapes: ModelShapes, terms: Terms, rates: Rates) -> Explanation:
        """Their plan for a model."""
        agents = imagine(shapes, self.ranks, self.budgets, terms, rates=rates, examples=self.texts)
        return explain(shapes, agents, terms, rates=rates)


@dataclass(frozen=True)
class Wishes:
    """Terms that were typed in place of the federation's; None keeps them."""

    cap: int | None
    packing: Packing | None
    negotiation: Negotiation | None
    ring: tuple[int | None, int | None, int | None]
    payload_limit_bytes: int
    batch_size: int
    steps: int

    def on(self, known: Terms) -> Terms:
        """The terms to plan with."""
        return replace(
            known,
            cap=known.cap if self.cap is None else self.cap,
            packing=self.packing or known.packing,
            negotiation=self.negotiation or known.negotiation,
            parameters=self._parameters(known.parameters),
            payload_limit_bytes=self.payload_limit_bytes,
            batch_size=self.batch_size,
            steps=self.steps,
        )

    def _parameters(self, known: CkksParameters) -> CkksParameters:
        dimension, modulus, scale = self.ring
        if dimension is modulus is scale is None:
            return known
        return imagined_parameters(
            dimension or known.ring_dimension, modulus or known.modulus_bits, scale or known.scale_bits
        )


@app.callback()
def group() -> None:
    """Keep `explain` a command of its own."""


@app.command("explain")
def explain_plan(
    context: typer.Context,
    ranks: RanksOption = None,
    budgets: BudgetsOption = None,
    agents: AgentsOption = None,
    model_shapes: ShapesOption = None,
    basis_cap: CapOption = None,
    packing: PackingOption = None,
    negotiation: NegotiationOption = None,
    ring_dimension: RingOption = None,
    modulus_bits: BitsOption = None,
    scale_bits: BitsOption = None,
    texts: TextsOption = DEFAULT_EXAMPLES,
    batch_size: BatchOption = DEFAULT_BATCH,
    steps: StepsOption = DEFAULT_STEPS,
    encrypt_rate: EncryptRateOption = None,
    upload_rate: UploadRateOption = None,
    download_rate: DownloadRateOption = None,
    payload_limit: LimitOption = PAYLOAD_LIMIT_BYTES,
    allow_unsafe: AllowUnsafe = False,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Say what a round costs each agent and the aggregator, how exact and secure it is, and what it gives away.

    Without options: the plan in force with its registered agents. With --ranks (and --budgets): agents to imagine, on
    the federation's model or on --model-shapes; the latter needs no profile and no running service. Settings that
    cannot work are refused, unsafe ones are shown and then refused unless --allow-unsafe is given.
    """
    as_json = wants_json(context, json)
    imagined, shapes = _typed(ranks, budgets, agents, model_shapes, texts)
    wishes = Wishes(
        basis_cap, packing, negotiation, (ring_dimension, modulus_bits, scale_bits), payload_limit, batch_size, steps
    )
    rates, typed = _rates(encrypt_rate, upload_rate, download_rate), any((encrypt_rate, upload_rate, download_rate))
    if imagined is not None and shapes is not None:
        found = guarded(lambda: imagined.explain(shapes, wishes.on(Terms()), rates), as_json)
    else:
        look = perform(context, profile, json, _look)
        found = guarded(lambda: look.explain(imagined, wishes, rates, measured=not typed), as_json)
    show(found, explanation_tables(found), as_json)
    if not allow_unsafe:
        guarded(lambda: require_safe(found.verdicts), as_json)


def _typed(
    ranks: str | None, budgets: str | None, agents: int | None, model_shapes: str | None, texts: int
) -> tuple[Imagined | None, ModelShapes | None]:
    """Agents and model, each as far as typed; what cannot be read is wrong usage."""
    if ranks is None:
        if budgets is not None or model_shapes is not None or agents is not None:
            raise typer.BadParameter(
                "expected --ranks together with --agents, --budgets or --model-shapes", param_hint="--ranks"
            )
        return None, None
    try:
        rank_list, budget_list = parse_ranks(ranks), parse_budgets(budgets or "full")
        shapes = parse_shapes(model_shapes) if model_shapes is not None else None
    except SheLoraError as error:
        raise typer.BadParameter(str(error)) from error
    count = agents if agents is not None else len(rank_list)
    repeated = tuple(rank_list[index % len(rank_list)] for index in range(count))
    return Imagined(repeated, tuple(budget_list), texts), shapes


def _rates(encrypt: float | None, upload: float | None, download: float | None) -> Rates:
    """The usual speeds, but for those that were typed."""
    usual = Rates()
    return replace(
        usual,
        encrypt_values_per_s=encrypt or usual.encrypt_values_per_s,
        upload_bytes_per_s=upload or usual.upload_bytes_per_s,
        download_bytes_per_s=download or usual.download_bytes_per_s,
    )


async def _look(session: Session) -> Look:
    name, federations = session.profile.federation, session.federations
    return Look(await federations.get(name), await federations.agents(name), await federations.rounds(name))

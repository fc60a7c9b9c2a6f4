"""What a plan costs, how exact it is, how secure, what it gives away; settings that cannot work are refused."""

from services.operators.planning.aggregator import AggregatorCost
from services.operators.planning.costs import AgentCost
from services.operators.planning.explanation import Explanation, explain
from services.operators.planning.limits import check_terms
from services.operators.planning.precision import Basis, Precision
from services.operators.planning.rates import Rates, measured_rates
from services.operators.planning.registered import (
    Preflight,
    explain_registered,
    preflight,
    present_terms,
    shapes_of,
    terms_of,
    unsafe_registered,
)
from services.operators.planning.security import USUAL_PARAMETERS, Security, imagined_parameters
from services.operators.planning.shapes import parse_budgets, parse_ranks, parse_shapes
from services.operators.planning.terms import PAYLOAD_LIMIT_BYTES, Participant, Terms, imagine
from services.operators.planning.verdict import require_safe, unsafe_among, verdicts_of

__all__ = [
    "PAYLOAD_LIMIT_BYTES",
    "USUAL_PARAMETERS",
    "AgentCost",
    "AggregatorCost",
    "Basis",
    "Explanation",
    "Participant",
    "Precision",
    "Preflight",
    "Rates",
    "Security",
    "Terms",
    "check_terms",
    "explain",
    "explain_registered",
    "imagine",
    "imagined_parameters",
    "measured_rates",
    "parse_budgets",
    "parse_ranks",
    "parse_shapes",
    "preflight",
    "present_terms",
    "require_safe",
    "shapes_of",
    "terms_of",
    "unsafe_among",
    "unsafe_registered",
    "verdicts_of",
]

"""Wire messages that several services share, to domain values and back. Nothing else knows both sides.

Everything that comes from the wire is checked by the domain types' own rules; violations are InvalidPlan,
InvalidConfiguration or DigestMismatch.
"""

from __future__ import annotations

from functools import lru_cache

from shelora.errors import DigestMismatch, InvalidPlan
from shelora.he.parameters import CkksParameters
from shelora.plan import DenseShape, ModelShapes, ModuleShape, Negotiation, Packing, Plan
from shelora.v1 import aggregator_pb2, types_pb2

_NEGOTIATION_TO_WIRE = {
    Negotiation.NONE: aggregator_pb2.NEGOTIATION_NONE,
    Negotiation.ENCRYPTED: aggregator_pb2.NEGOTIATION_ENCRYPTED,
    Negotiation.OPE: aggregator_pb2.NEGOTIATION_OPE,
}
_PACKING_TO_WIRE = {Packing.EXACT: aggregator_pb2.PACKING_EXACT, Packing.DENSE: aggregator_pb2.PACKING_DENSE}


def parameters_to_proto(parameters: CkksParameters) -> types_pb2.HeParameters:
    """CKKS parameters with their digest."""
    return types_pb2.HeParameters(
        ring_dimension=parameters.ring_dimension,
        modulus=parameters.modulus,
        modulus_bits=parameters.modulus_bits,
        scale_bits=parameters.scale_bits,
        depth=parameters.depth,
        security_bits=parameters.security_bits,
        digest=parameters.digest(),
    )


def parameters_from_proto(message: types_pb2.HeParameters) -> CkksParameters:
    """CKKS parameters.

    Raises:
        InvalidConfiguration: impossible values.
        DigestMismatch: the sender computes another digest over the same fields.
    """
    parameters = CkksParameters(
        ring_dimension=message.ring_dimension,
        modulus=message.modulus,
        modulus_bits=message.modulus_bits,
        scale_bits=message.scale_bits,
        depth=message.depth,
        security_bits=message.security_bits,
    )
    _check_digest("CKKS parameters", parameters.digest(), message.digest)
    return parameters


def shapes_to_proto(shapes: ModelShapes) -> types_pb2.ModelShapes:
    """Trained modules and tensors in order."""
    return types_pb2.ModelShapes(
        modules=[
            types_pb2.ModuleShape(name=module.name, out_features=module.out_features, in_features=module.in_features)
            for module in shapes.modules
        ],
        dense=[types_pb2.DenseShape(name=tensor.name, shape=tensor.shape) for tensor in shapes.dense],
    )


def shapes_from_proto(message: types_pb2.ModelShapes) -> ModelShapes:
    """Trained modules and tensors in order.

    Raises:
        InvalidPlan: impossible shapes or names.
    """
    return ModelShapes(
        tuple(ModuleShape(module.name, module.out_features, module.in_features) for module in message.modules),
        tuple(DenseShape(tensor.name, tuple(tensor.shape)) for tensor in message.dense),
    )


def negotiation_to_proto(negotiation: Negotiation) -> aggregator_pb2.Negotiation.ValueType:
    """How the encryption subset is agreed."""
    return _NEGOTIATION_TO_WIRE[negotiation]


def negotiation_from_proto(value: int) -> Negotiation:
    """How the encryption subset is agreed; unspecified means the default, ENCRYPTED.

    Raises:
        InvalidPlan: a value this version does not know.
    """
    if value == aggregator_pb2.NEGOTIATION_UNSPECIFIED:
        return Negotiation.ENCRYPTED
    for domain, wire in _NEGOTIATION_TO_WIRE.items():
        if wire == value:
            return domain
    raise InvalidPlan(f"negotiation: expected 1 to {len(_NEGOTIATION_TO_WIRE)}, got {value}")


def packing_to_proto(packing: Packing) -> aggregator_pb2.Packing.ValueType:
    """How values become the real numbers of a ciphertext."""
    return _PACKING_TO_WIRE[packing]


def packing_from_proto(value: int) -> Packing:
    """How values become the real numbers of a ciphertext; unspecified means the default, EXACT.

    Raises:
        InvalidPlan: a value this version does not know.
    """
    if value == aggregator_pb2.PACKING_UNSPECIFIED:
        return Packing.EXACT
    for domain, wire in _PACKING_TO_WIRE.items():
        if wire == value:
            return domain
    raise InvalidPlan(f"packing: expected 1 to {len(_PACKING_TO_WIRE)}, got {value}")


@lru_cache(maxsize=64)
def plan_to_proto(plan: Plan, negotiated_by: int = 0) -> aggregator_pb2.Plan:
    """A plan with its digest; `negotiated_by` counts the agents behind the priorities.

    The same message for the same plan, since every agent gets it in every phase: to be copied, not changed.
    """
    return aggregator_pb2.Plan(
        federation=plan.federation,
        version=plan.version,
        epoch=plan.epoch,
        shapes=shapes_to_proto(plan.shapes),
        basis_cap=plan.cap,
        negotiation=negotiation_to_proto(plan.negotiation),
        levels=[aggregator_pb2.ColumnLevels(columns=columns) for columns in plan.levels],
        parameters_digest=plan.parameters_digest,
        values_per_block=plan.values_per_block,
        digest=plan.digest(),
        negotiated_by=negotiated_by,
        packing=packing_to_proto(plan.packing),
    )


def plan_from_proto(message: aggregator_pb2.Plan) -> Plan:
    """A plan.

    Raises:
        InvalidPlan: it contradicts itself.
        DigestMismatch: the sender computes another digest over the same fields.
    """
    plan = Plan(
        federation=message.federation,
        version=message.version,
        epoch=message.epoch,
        shapes=shapes_from_proto(message.shapes),
        cap=message.basis_cap,
        negotiation=negotiation_from_proto(message.negotiation),
        levels=tuple(tuple(level.columns) for level in message.levels),
        parameters_digest=message.parameters_digest,
        values_per_block=message.values_per_block,
        packing=packing_from_proto(message.packing),
    )
    _check_digest("plan", plan.digest(), message.digest)
    return plan


def _check_digest(what: str, derived: bytes, received: bytes) -> None:
    if derived != received:
        raise DigestMismatch(
            f"{what}: derived digest {derived.hex()[:16]}, the sender says {received.hex()[:16] or 'none'}",
            hint="both sides must run the same version of shelora",
        )

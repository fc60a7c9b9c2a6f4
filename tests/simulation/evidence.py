"""What a published round proves: who is in the sums, how often, and with which weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.numpy

from services.aggregator.domain import PayloadKind
from simulation.devices import PARAMETERS, SHAPES, Device, digits

TOLERANCE = 2e-5
"""float32 factors, projections and plain columns of size about 1."""


def check_sum(data: bytes, devices: Sequence[Device], counted: Sequence[Device], number: int) -> None:
    """The published ciphertext is the sum modulo q of what the counted agents sent, each once."""
    residues = np.frombuffer(data, dtype="<u8").reshape(-1, 2, PARAMETERS.ring_dimension)
    expected = np.zeros(residues.shape, dtype=np.uint64)
    for device in counted:
        term = np.frombuffer(device.payloads[PayloadKind.CIPHER, number].data, dtype="<u8")
        term = term.reshape(-1, *residues.shape[1:])
        expected[: len(term)] += term
    assert digits(int(residues[0, 0, 0])) == [int(device in counted) for device in devices], (
        "the digits tell who was counted and how often"
    )
    np.testing.assert_array_equal(residues, expected % np.uint64(PARAMETERS.modulus))


def check_average(data: bytes, counted: Sequence[Device], weights: Mapping[str, float], number: int) -> None:
    """Basis times plain part is the weighted sum of the counted agents' updates over their plain columns."""
    tensors = safetensors.numpy.load(data)
    for index, module in enumerate(SHAPES.modules):
        least = min(device.columns[index] for device in counted)
        plain = np.zeros((module.out_features, module.in_features))
        for device in counted:
            left, right = (matrix.astype(np.float64) for matrix in device.update(number)[index])
            right[:, : device.columns[index]] = 0.0
            plain += weights[device.name] * left @ right
        got = tensors[f"{index}.basis"].astype(np.float64) @ tensors[f"{index}.plain"]
        np.testing.assert_allclose(got, plain[:, least:], atol=TOLERANCE)

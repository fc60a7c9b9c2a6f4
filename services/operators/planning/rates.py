"""How fast machines are: what predicted seconds rest on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from services.operators.domain import Round
from shelora.errors import InvalidConfiguration
from shelora.he.parameters import CkksParameters
from shelora.plan import HeRate
from shelora.rounds.phases import RoundPhase

_HALF_SPEED: Final = 64
"""Decompositions of so many columns run at half the speed of large ones."""


@dataclass(frozen=True)
class Rates:
    """Speeds of one machine. The defaults were measured on one core of a shared 2-core x86-64 machine.

    Attributes:
        encrypt_values_per_s: real numbers encoded and encrypted, one core.
        decrypt_values_per_s: real numbers decrypted, one core.
        upload_bytes_per_s, download_bytes_per_s: the link; the defaults are 10 Mbit/s and not measured.
        decompose_flops_per_s: floating-point operations of large singular value decompositions, one core.
        multiply_flops_per_s: of matrix products, one core.
        memory_values_per_s: float64 numbers brought into another order, one core.
        digest_bytes_per_s: bytes read, digested and added to a sum or compared, one core.
        call_s: fixed cost of one module in one step.
        file_s: fixed cost of one payload in one step of the aggregator.
        step_s: fixed cost of one step of an agent: requests, and files that are written and flushed.
        cores: that encrypt and decrypt at once; everything else is computed on one.
        measured: whether an agent's own figures are in it.

    Raises:
        InvalidConfiguration: a rate that is not a finite number above 0.
    """

    encrypt_values_per_s: float = 3.6e6
    decrypt_values_per_s: float = 9.3e6
    upload_bytes_per_s: float = 1.25e6
    download_bytes_per_s: float = 1.25e6
    decompose_flops_per_s: float = 2e10
    multiply_flops_per_s: float = 5e10
    memory_values_per_s: float = 2.5e8
    digest_bytes_per_s: float = 2e9
    call_s: float = 1e-4
    file_s: float = 5e-4
    step_s: float = 0.04
    cores: int = 1
    measured: bool = False

    def __post_init__(self) -> None:
        """Check every rate."""
        for name, rate in vars(self).items():
            if name != "measured" and not 0 < rate < math.inf:
                raise InvalidConfiguration(f"rates: expected {name} > 0 and finite, got {rate}")

    @property
    def he(self) -> HeRate:
        """What the budget `auto` goes by."""
        return HeRate(self.encrypt_values_per_s * self.cores, self.upload_bytes_per_s)

    def encrypt_s(self, values: int) -> float:
        """Seconds to encrypt so many real numbers."""
        return values / (self.encrypt_values_per_s * self.cores)

    def decrypt_s(self, values: int) -> float:
        """Seconds to decrypt so many real numbers."""
        return values / (self.decrypt_values_per_s * self.cores)

    def svd_s(self, rows: int, columns: int) -> float:
        """Seconds of a thin singular value decomposition: 6 q p^2 + 8 p^3 operations, p being the smaller side."""
        p, q = sorted((rows, columns))
        return (6 * q * p * p + 8 * p**3) * (p + _HALF_SPEED) / max(p, 1) / self.decompose_flops_per_s

    def qr_s(self, rows: int, columns: int) -> float:
        """Seconds of a tall thin QR decomposition and the product that follows: 6 m r^2 operations at half speed."""
        return 12 * rows * columns**2 / self.decompose_flops_per_s

    def product_s(self, rows: int, inner: int, columns: int) -> float:
        """Seconds of a matrix product."""
        return 2 * rows * inner * columns / self.multiply_flops_per_s

    def move_s(self, values: float) -> float:
        """Seconds to bring so many numbers into another order or type."""
        return values / self.memory_values_per_s

    def digest_s(self, size_bytes: float) -> float:
        """Seconds to read and digest so many bytes."""
        return size_bytes / self.digest_bytes_per_s


def measured_rates(rounds: Sequence[Round], parameters: CkksParameters, otherwise: Rates) -> dict[str, Rates]:
    """Rates that agents measured themselves in their newest published round, by agent; the rest is as it was.

    Args:
        rounds: rounds with the figures that agents reported, oldest first.
        parameters: HE parameters of the federation.
        otherwise: for what was not measured.
    """
    found: dict[str, Rates] = {}
    for one in rounds:
        if one.phase is not RoundPhase.PUBLISHED:
            continue
        for member in one.members:
            known = found.get(member.agent, otherwise)
            speeds = _speeds(member.metrics, member.cipher_bytes, parameters)
            if speeds:
                # Agents report all their cores together.
                speeds = {"encrypt_values_per_s": known.encrypt_values_per_s * known.cores} | speeds
                speeds = {"decrypt_values_per_s": known.decrypt_values_per_s * known.cores} | speeds
                found[member.agent] = replace(known, cores=1, measured=True, **speeds)
    return found


def _speeds(figures: Mapping[str, float], cipher_bytes: int, parameters: CkksParameters) -> dict[str, float]:
    values_per_byte = parameters.values_per_block / parameters.block_bytes
    down = figures.get("cipher_bytes_down", 0.0)
    amounts = {
        "encrypt_values_per_s": (cipher_bytes * values_per_byte, "seconds_he_encrypt"),
        "decrypt_values_per_s": (down * values_per_byte, "seconds_he_decrypt"),
        "upload_bytes_per_s": (float(cipher_bytes), "seconds_cipher_upload"),
        "download_bytes_per_s": (down + figures.get("average_bytes_down", 0.0), "seconds_download"),
    }
    return {
        name: amount / figures[seconds]
        for name, (amount, seconds) in amounts.items()
        if amount > 0 and math.isfinite(amount) and 0 < figures.get(seconds, 0.0) < math.inf
    }

"""Ciphertexts that are looked at while they come, and what of them is read again in the end."""

from __future__ import annotations

import numpy as np
import pytest

from services.aggregator.domain import ExpectedPayload, PayloadKind
from services.aggregator.payloads import UploadChecks
from services.aggregator.residue_sums import ArrivingResidues
from shelora.errors import ResidueOutOfRange, SizeMismatch
from support.updates import PARAMETERS, make_plan

COLUMNS = (10, 6)
CIPHER = ExpectedPayload(PayloadKind.CIPHER, make_plan([COLUMNS, (40, 25)]), PARAMETERS, columns=COLUMNS, blocks=3)


def bytes_of(*residues):
    return np.array(residues, dtype="<u8").tobytes()


def test_residues_are_looked_at_while_they_come():
    arriving = ArrivingResidues(PARAMETERS.modulus)
    arriving.add(0, bytes_of(1, PARAMETERS.modulus - 1))
    arriving.add(16, bytes_of(0))
    assert arriving.good_bytes == 24


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (16, bytes_of(1, PARAMETERS.modulus)),
        (16, bytes_of(1)[:5]),
        (24, bytes_of(1)),
    ],
    ids=["not below the modulus", "cut through a residue", "bytes missed"],
)
def test_from_where_something_is_wrong_the_file_is_read(offset, data):
    arriving = ArrivingResidues(PARAMETERS.modulus)
    arriving.add(0, bytes_of(1, 2))
    arriving.add(offset, data)
    assert arriving.good_bytes == 16
    arriving.add(offset + len(data), bytes_of(3))
    assert arriving.good_bytes == 16


def test_offset_zero_begins_again():
    arriving = ArrivingResidues(PARAMETERS.modulus)
    arriving.add(0, bytes_of(1, 2))
    arriving.add(0, bytes_of(PARAMETERS.modulus))
    assert arriving.good_bytes == 0
    arriving.add(0, bytes_of(1))
    assert arriving.good_bytes == 8


async def test_a_file_is_checked_from_where_its_bytes_were_not_looked_at(tmp_path, pool):
    checks, path = UploadChecks(pool), tmp_path / "cipher"
    blocks = np.zeros(CIPHER.blocks * PARAMETERS.block_bytes // 8, dtype="<u8")
    blocks[-1] = PARAMETERS.modulus
    path.write_bytes(blocks.tobytes())
    arriving = checks.arriving(CIPHER)
    arriving.add(0, blocks[:-8].tobytes())
    assert arriving.good_bytes == blocks.nbytes - 64
    with pytest.raises(ResidueOutOfRange, match=f"block {CIPHER.blocks - 1}, polynomial 1"):
        await checks.check(path, CIPHER, arriving.good_bytes)
    path.write_bytes(blocks[:-8].tobytes())
    with pytest.raises(SizeMismatch):
        await checks.check(path, CIPHER, arriving.good_bytes)


async def test_a_ciphertext_that_was_looked_at_whole_is_not_read_again(tmp_path, pool):
    checks, path = UploadChecks(pool), tmp_path / "cipher"
    size = CIPHER.blocks * PARAMETERS.block_bytes
    path.write_bytes(b"\xff" * size)  # whoever reads it refuses it
    assert await checks.check(path, CIPHER, size) == size
    with pytest.raises(ResidueOutOfRange):
        await checks.check(path, CIPHER, size - 8)
    path.write_bytes(bytes(size - 8))
    with pytest.raises(SizeMismatch):
        await checks.check(path, CIPHER, size)

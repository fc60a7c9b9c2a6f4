from __future__ import annotations

import random

import pytest

from services.common.digests import digest_of
from services.common.seals import PIECE_BYTES, Sealing, SealKey, measure

DATA = random.Random(0).randbytes(PIECE_BYTES * 5 // 2)


def sealed(*cuts: bytes) -> Sealing:
    sealing = Sealing(SealKey())
    for cut in cuts:
        sealing.add(cut)
    return sealing


def tags(seal, data: bytes) -> list[bytes]:
    return [seal.tag(index, data[index * PIECE_BYTES :][:PIECE_BYTES]) for index in range(seal.pieces)]


@pytest.mark.parametrize("first", [0, PIECE_BYTES, 2 * PIECE_BYTES, len(DATA)])
def test_a_seal_holds_for_the_same_bytes_in_whole_pieces(first):
    sealing = sealed(*(cut for cut in (DATA[:first], DATA[first:]) if cut))
    assert (sealing.size_bytes, sealing.digest()) == (len(DATA), digest_of(DATA))
    seal = sealing.seal()
    assert seal is not None
    assert seal.pieces == 3
    assert seal.holds(tags(seal, DATA))


@pytest.mark.parametrize("position", [0, PIECE_BYTES - 1, PIECE_BYTES, len(DATA) - 1])
def test_a_seal_does_not_hold_for_another_byte(position):
    seal = sealed(DATA).seal()
    assert seal is not None
    other = bytearray(DATA)
    other[position] ^= 1
    assert not seal.holds(tags(seal, bytes(other)))


def test_a_seal_does_not_hold_for_exchanged_or_missing_pieces():
    seal = sealed(DATA).seal()
    assert seal is not None
    exchanged = DATA[PIECE_BYTES : 2 * PIECE_BYTES] + DATA[:PIECE_BYTES] + DATA[2 * PIECE_BYTES :]
    assert not seal.holds(tags(seal, exchanged))
    assert not seal.holds(tags(seal, DATA)[:-1])


def test_other_cuts_give_a_digest_but_no_seal():
    sealing = sealed(DATA[:5], DATA[5:])
    assert sealing.digest() == digest_of(DATA)
    assert sealing.seal() is None


def test_nothing_has_a_seal_too():
    seal = sealed().seal()
    assert seal is not None
    assert seal.holds([])


def test_a_file_is_measured_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(DATA * 2)
    sealing = measure(path, SealKey())
    assert sealing.digest() == digest_of(DATA * 2)
    seal = sealing.seal()
    assert seal is not None
    assert seal.holds(tags(seal, DATA * 2))


def test_a_key_says_nothing_of_itself():
    assert repr(SealKey()) == "SealKey(<redacted>)"

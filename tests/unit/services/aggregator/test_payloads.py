from __future__ import annotations

import contextlib
import json
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from services.aggregator import residue_sums, tensors
from services.aggregator.domain import ExpectedPayload, PayloadKind
from services.aggregator.payload_tensors import factors_specs
from services.aggregator.payloads import MAX_LEFT_VALUE, UploadChecks, check_payload
from shelora.errors import (
    MalformedInput,
    MalformedPayload,
    NonFiniteValue,
    RankMismatch,
    ResidueOutOfRange,
    ShapeMismatch,
    SizeMismatch,
    ValueOutOfRange,
)
from shelora.plan import ModelShapes, ModuleShape, Negotiation
from support.updates import PARAMETERS, SHAPES, Contribution, make_plan, to_residues

COLUMNS = (10, 6)
RANK = 4
PLAN = make_plan([COLUMNS, (40, 25)])
FACTORS = ExpectedPayload(PayloadKind.FACTORS, PLAN, PARAMETERS, rank=RANK, columns=COLUMNS)
OPE_PLAN = make_plan([COLUMNS, (40, 25)], negotiation=Negotiation.OPE)
VOTES = ExpectedPayload(PayloadKind.VOTES, OPE_PLAN, PARAMETERS, columns=COLUMNS)
CIPHER = ExpectedPayload(PayloadKind.CIPHER, PLAN, PARAMETERS, columns=COLUMNS, blocks=3)


def good_factors():
    contribution = Contribution.random(np.random.default_rng(1), "agent-1", RANK, COLUMNS, 10)
    return safetensors.numpy.load(contribution.factors(PLAN))


def good_votes():
    rng = np.random.default_rng(2)
    found = {}
    for index, (module, count) in enumerate(zip(SHAPES.modules, COLUMNS, strict=True)):
        found[f"{index}.token"] = rng.permutation(module.in_features)[:count].astype(np.int64)
        found[f"{index}.score"] = rng.integers(0, 2**40, count)
    return found


def assemble(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def check(tmp_path, data, expected):
    path = tmp_path / "payload"
    path.write_bytes(data)
    check_payload(path, expected)


def saved(**changes):
    return safetensors.numpy.save(
        {**good_factors(), **{key.replace("_", "."): value for key, value in changes.items()}}
    )


def test_good_payloads_pass(tmp_path):
    check(tmp_path, saved(), FACTORS)
    check(tmp_path, safetensors.numpy.save(good_votes()), VOTES)
    check(tmp_path, to_residues(np.ones(3 * PARAMETERS.ring_dimension)), CIPHER)


def test_extreme_but_valid_factors_pass(tmp_path):
    left = np.full((24, RANK), MAX_LEFT_VALUE, dtype=np.float32)
    right = np.zeros((RANK, 30), dtype=np.float32)
    right[:, 3] = 1.0005
    check(tmp_path, saved(**{"0_left": left, "0_right": right}), FACTORS)


def test_full_budget_has_no_right_columns(tmp_path):
    contribution = Contribution.random(np.random.default_rng(1), "agent-1", RANK, (40, 25), 10)
    expected = ExpectedPayload(PayloadKind.FACTORS, PLAN, PARAMETERS, rank=RANK, columns=(40, 25))
    check(tmp_path, contribution.factors(PLAN), expected)


def test_metadata_is_allowed_inside_the_header_bound(tmp_path):
    check(tmp_path, safetensors.numpy.save(good_factors(), metadata={"by": "agent"}), FACTORS)
    with pytest.raises(MalformedPayload, match="expected a header of 2 to"):
        check(tmp_path, safetensors.numpy.save(good_factors(), metadata={"by": "x" * 70_000}), FACTORS)


def tensor(name, change):
    values = good_factors()[name].copy()
    change(values)
    return {name.replace(".", "_"): values}


def set_first(value):
    def change(values):
        values.flat[0] = value

    return change


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (lambda: saved(**tensor("0.left", set_first(np.nan))), NonFiniteValue, "0.left: expected finite values"),
        (lambda: saved(**tensor("1.left", set_first(np.inf))), NonFiniteValue, "1.left"),
        (lambda: saved(**tensor("1.right", set_first(-np.inf))), NonFiniteValue, "1.right"),
        (lambda: saved(**tensor("0.left", set_first(2.0**21))), ValueOutOfRange, "0.left: expected values of at most"),
        (lambda: saved(**tensor("0.left", set_first(-(2.0**21)))), ValueOutOfRange, "2.09"),
        (lambda: saved(**tensor("0.right", set_first(-1.01))), ValueOutOfRange, "0.right"),
        (lambda: saved(**tensor("0.right", lambda right: right.fill(0.9))), ValueOutOfRange, "rows of a length"),
        (lambda: saved(**{"0_left": np.zeros((24, 5), np.float32)}), RankMismatch, r"expected shape \[24, 4\]"),
        (lambda: saved(**{"0_right": np.zeros((3, 30), np.float32)}), RankMismatch, r"got \[3, 30\]"),
        (lambda: saved(**{"0_left": np.zeros((23, 4), np.float32)}), ShapeMismatch, "got"),
        (lambda: saved(**{"0_right": np.zeros((4, 31), np.float32)}), ShapeMismatch, "got"),
        (lambda: saved(**{"0_left": np.zeros(96, np.float32)}), ShapeMismatch, "got"),
        (lambda: saved(**{"0_left": np.zeros((24, 4), np.float64)}), MalformedPayload, "dtype F32, got F64"),
        (lambda: saved(**{"2_left": np.zeros((24, 4), np.float32)}), MalformedPayload, "not in the plan '2.left'"),
        (lambda: saved()[:-4], SizeMismatch, "by its header"),
        (lambda: saved() + b"\0", SizeMismatch, "by its header"),
        (lambda: b"", MalformedPayload, "header"),
        (lambda: b"\xff" * 8, MalformedPayload, "header"),
        (lambda: b"\xff" * 400, MalformedPayload, "header"),
        (lambda: assemble(b"[1]"), MalformedPayload, "JSON object as header, got a list"),
        (lambda: assemble(b"{}"), MalformedPayload, "missing '0.left', '0.right', '1.left' and 1 more"),
        (lambda: assemble(b"{nope"), MalformedPayload, "JSON header"),
        (lambda: assemble(b"\xff\xfe{}"), MalformedPayload, "JSON header"),
        (lambda: assemble(b'{"a":1,"a":2}'), MalformedPayload, "JSON header"),
        (lambda: assemble(b'{"a":' + b"9" * 50_000 + b"}"), MalformedPayload, "JSON header"),
        (lambda: assemble(b'{"a":NaN}'), MalformedPayload, "JSON header"),
        (lambda: assemble(b'{"a":1e9}'), MalformedPayload, "JSON header"),
        (lambda: assemble(b"[" * 60_000), MalformedPayload, "JSON header"),
        (lambda: assemble(dict.fromkeys(good_factors(), 7)), MalformedPayload, "another entry"),
    ],
)
def test_bad_factors_are_refused(tmp_path, data, error, text):
    with pytest.raises(error, match=text) as caught:
        check(tmp_path, data(), FACTORS)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data_offsets": [0, 4]}, "expected offsets that span 384 bytes"),
        ({"data_offsets": [384, 0]}, "offsets"),
        ({"data_offsets": [-8, 376]}, "offsets"),
        ({"data_offsets": [0]}, "offsets"),
        ({"data_offsets": [True, 385]}, "offsets"),
        ({"data_offsets": {"begin": 0}}, "offsets"),
        ({"data_offsets": [16, 400]}, "side by side"),
        ({"dtype": "F16"}, "dtype"),
        ({"dtype": 4}, "dtype"),
        ({"shape": [24, "4"]}, "shape"),
        ({"shape": None}, "shape"),
        ({"shape": [24, 4, 10**18]}, "shape"),
        ({"extra": 1}, "another entry"),
    ],
)
def test_bad_entries_are_refused(tmp_path, changes, text):
    good = saved()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    header["0.left"] = {**header["0.left"], **changes}

    with pytest.raises(MalformedInput, match=text):
        check(tmp_path, assemble(header, good[8 + length :]), FACTORS)


def test_overlapping_tensors_are_refused(tmp_path):
    good = saved()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    header["1.left"]["data_offsets"] = [0, 256]

    with pytest.raises(MalformedPayload, match="gaps or overlaps"):
        check(tmp_path, assemble(header, good[8 + length :]), FACTORS)


def changed_votes(name, values):
    return safetensors.numpy.save({**good_votes(), name: np.array(values)})


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (lambda: changed_votes("1.token", [0, 1, 2, 3, 4, 25]), ValueOutOfRange, "expected numbers from 0 to 24"),
        (lambda: changed_votes("1.token", [0, 1, 2, 3, 4, -1]), ValueOutOfRange, "got -1 to 4"),
        (lambda: changed_votes("1.token", [0, 1, 2, 3, 4, 4]), MalformedPayload, "different tokens"),
        (lambda: changed_votes("1.score", [0, 1, 2, 3, 4, 2**40]), ValueOutOfRange, "1.score"),
        (lambda: changed_votes("1.score", [0, 1, 2, 3, 4, -(2**63)]), ValueOutOfRange, "1.score"),
        (lambda: changed_votes("1.token", [0, 1, 2]), ShapeMismatch, r"expected shape \[6\]"),
        (lambda: changed_votes("1.token", np.arange(6, dtype=np.int32)), MalformedPayload, "I64, got I32"),
        (lambda: changed_votes("dense", [1]), MalformedPayload, "not in the plan 'dense'"),
    ],
)
def test_bad_votes_are_refused(tmp_path, data, error, text):
    with pytest.raises(error, match=text):
        check(tmp_path, data(), VOTES)


def test_votes_for_more_columns_than_there_are_cannot_be_expected(tmp_path):
    with pytest.raises(ShapeMismatch, match="0 to 40 columns, got 41"):
        check(tmp_path, b"", ExpectedPayload(PayloadKind.VOTES, OPE_PLAN, PARAMETERS, columns=(41, 6)))


@pytest.mark.parametrize("kind", [PayloadKind.CIPHER, PayloadKind.SENSITIVITY])
@pytest.mark.parametrize("change", [-1, 1, -PARAMETERS.block_bytes, PARAMETERS.block_bytes])
def test_ciphertext_of_another_size_is_refused(tmp_path, kind, change):
    expected = ExpectedPayload(kind, PLAN, PARAMETERS, blocks=3)
    with pytest.raises(SizeMismatch, match="expected 3 blocks of 32768 bytes"):
        check(tmp_path, bytes(3 * PARAMETERS.block_bytes + change), expected)


@pytest.mark.parametrize("residue", [PARAMETERS.modulus, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 2047, 2048, 3 * 4096 - 1])
def test_residues_beyond_the_modulus_are_refused(tmp_path, monkeypatch, residue, position):
    monkeypatch.setattr(residue_sums, "READ_BYTES", 2 * PARAMETERS.block_bytes)
    blocks = np.zeros(3 * 2 * PARAMETERS.ring_dimension, dtype=np.uint64)
    blocks[position] = residue
    with pytest.raises(ResidueOutOfRange):
        check(tmp_path, blocks.tobytes(), CIPHER)
    blocks[position] = PARAMETERS.modulus - 1
    check(tmp_path, blocks.tobytes(), CIPHER)


@pytest.mark.parametrize("kind", [PayloadKind.PROJECTION, PayloadKind.AVERAGE])
def test_kinds_that_are_made_here_cannot_be_uploaded(tmp_path, pool, kind):
    expected = ExpectedPayload(kind, PLAN, PARAMETERS)
    with pytest.raises(MalformedPayload, match="can only be fetched"):
        check(tmp_path, b"", expected)
    with pytest.raises(MalformedPayload):
        UploadChecks(pool).size_limit_bytes(expected)


async def test_service_port_checks_files_and_bounds_sizes(tmp_path, pool):
    checks = UploadChecks(pool)
    factors = tmp_path / "factors"
    factors.write_bytes(saved())

    assert await checks.check(factors, FACTORS) == len(saved())
    with pytest.raises(SizeMismatch):
        await checks.check(factors, CIPHER)

    raw = 4 * (4 * (24 + 30) + 4 * (16 + 19))
    assert len(saved()) <= checks.size_limit_bytes(FACTORS) == raw + 8 + tensors.header_limit_bytes(4)
    assert checks.size_limit_bytes(VOTES) == 8 * 32 + 8 + tensors.header_limit_bytes(4)
    assert checks.size_limit_bytes(CIPHER) == 3 * PARAMETERS.block_bytes


async def test_factors_are_read_whole_in_the_end(pool):
    arriving = UploadChecks(pool).arriving(FACTORS)
    arriving.add(0, saved())
    assert arriving.good_bytes == 0


def test_pieces_cover_tensors_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE_VALUES", 50)
    path = tmp_path / "payload"
    values = np.arange(30 * 20, dtype=np.float32).reshape(30, 20)
    path.write_bytes(safetensors.numpy.save({"a": values, "b": np.arange(120), "empty": values[:0]}))
    specs = [
        tensors.TensorSpec("a", tensors.FLOAT32, (30, 20)),
        tensors.TensorSpec("b", tensors.INT64, (120,)),
        tensors.TensorSpec("empty", tensors.FLOAT32, (0, 20)),
    ]
    offsets = tensors.locate(path, specs).tolist()

    with path.open("rb") as file:
        matrix, vector, empty = (
            list(tensors.read_pieces(file, spec, offset)) for spec, offset in zip(specs, offsets, strict=True)
        )
    assert [piece.shape for piece in matrix] == [(2, 20)] * 15
    np.testing.assert_array_equal(np.concatenate(matrix), values)
    assert [len(piece) for piece in vector] == [50, 50, 20]
    np.testing.assert_array_equal(np.concatenate(vector), np.arange(120))
    assert empty == []


def test_faults_are_found_in_every_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE_VALUES", 8)
    for name, values in good_factors().items():
        for position in (0, values.size // 2, values.size - 1):
            broken = values.copy()
            broken.flat[position] = np.nan
            with pytest.raises(NonFiniteValue, match=name):
                check(tmp_path, safetensors.numpy.save({**good_factors(), name: broken}), FACTORS)


def test_memory_does_not_grow_with_the_payload(tmp_path):
    shapes = ModelShapes((ModuleShape("wide", 200_000, 200_000),), ())
    plan = make_plan([(0,)], shapes=shapes, negotiation=Negotiation.NONE)
    expected = ExpectedPayload(PayloadKind.FACTORS, plan, PARAMETERS, rank=64, columns=(0,))
    path = tmp_path / "payload"
    specs = factors_specs(plan, 64, (0,))
    with path.open("wb") as file:
        tensors.write_header(file, specs)
        file.truncate(file.tell() + sum(spec.size_bytes for spec in specs))
    assert path.stat().st_size > 100e6

    tracemalloc.start()
    try:
        check_payload(path, expected)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 24e6


@given(st.binary(max_size=400))
def test_random_bytes_never_pass_and_never_break_the_checks(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(data)
    for expected in (FACTORS, VOTES, CIPHER):
        with pytest.raises(MalformedInput):
            check_payload(path, expected)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from([*good_factors(), "__metadata__", "x"]), json_values, max_size=5),
    st.integers(0, 80),
)
def test_random_headers_never_pass_and_never_break_the_checks(tmp_path_factory, entries, extra):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(assemble(entries, bytes(extra)))
    with pytest.raises(MalformedInput):
        check_payload(path, FACTORS)


@given(st.integers(0, 500), st.integers(0, 255))
def test_one_changed_byte_never_breaks_the_checks(tmp_path_factory, position, value):
    data = bytearray(saved())
    data[position] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(data)
    with contextlib.suppress(MalformedInput):
        check_payload(path, FACTORS)


def test_own_files_are_readable_by_safetensors(tmp_path):
    specs = factors_specs(PLAN, RANK, COLUMNS)
    path = tmp_path / "own"
    wanted = good_factors()
    with path.open("wb") as file:
        tensors.write_header(file, specs)
        for spec in specs:
            tensors.write_tensor(file, spec, wanted[spec.name].astype(np.float64))
    found = safetensors.numpy.load(path.read_bytes())
    assert found.keys() == wanted.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, wanted[name])
    with path.open("wb") as file, pytest.raises(ShapeMismatch):
        tensors.write_tensor(file, specs[0], np.zeros((2, 2)))

from __future__ import annotations

import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.errors import (
    DigestMismatch,
    InternalFault,
    InvalidConfiguration,
    NonFiniteValue,
    ResidueOutOfRange,
    ShapeMismatch,
    SizeMismatch,
    ValueOutOfRange,
)
from shelora.he import add_residues, sum_residues
from shelora.he.secret import CkksContext, Decryptor, Encryptor, KeyPair, measure_encrypt_rate

N = 4096


def random_values(seed: int, count: int, limit: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-limit, limit, count)


class TestRoundTrip:
    @settings(max_examples=15, deadline=None)
    @given(count=st.integers(0, 3 * N + 1), limit=st.sampled_from([1e-6, 1.0, 255.9]), seed=st.integers(0, 2**32))
    def test_values_come_back(
        self, encryptor: Encryptor, decryptor: Decryptor, count: int, limit: float, seed: int
    ) -> None:
        values = random_values(seed, count, limit)
        blocks = encryptor.encrypt(values)
        assert blocks.shape == (-(-count // N), 2, N)
        opened = decryptor.decrypt(blocks, count)
        assert opened.shape == (count,)
        assert np.max(np.abs(opened - values), initial=0.0) <= encryptor.parameters.error_bound()

    def test_padding_is_zero(self, encryptor: Encryptor, decryptor: Decryptor) -> None:
        opened = decryptor.decrypt(encryptor.encrypt(np.ones(10)), N)
        assert np.max(np.abs(opened[10:])) <= encryptor.parameters.error_bound()

    def test_edge_of_the_range_has_room(self, encryptor: Encryptor, decryptor: Decryptor) -> None:
        edge = encryptor.parameters.max_abs_value - 1e-9
        signs = np.sign(random_values(5, N))
        patterns = np.concatenate([np.full(N, edge), np.tile([edge, -edge], N // 2), edge * signs])
        opened = decryptor.decrypt(encryptor.encrypt(patterns), 3 * N)
        assert np.max(np.abs(opened - patterns)) <= encryptor.parameters.error_bound()

    def test_noise_is_what_the_parameters_say(self, encryptor: Encryptor, decryptor: Decryptor) -> None:
        opened = decryptor.decrypt(encryptor.encrypt(np.zeros(20 * N)), 20 * N)
        assert float(np.std(opened)) == pytest.approx(encryptor.parameters.noise_deviation(), rel=0.05)

    def test_single_precision_and_strided_input(self, encryptor: Encryptor, decryptor: Decryptor) -> None:
        values = random_values(1, 2 * N).astype(np.float32)
        for given_values in (values, values[::2], values[::-1]):
            opened = decryptor.decrypt(encryptor.encrypt(given_values), given_values.size)
            assert np.max(np.abs(opened - given_values)) <= encryptor.parameters.error_bound()

    def test_caller_owned_output_and_progress(self, encryptor: Encryptor, decryptor: Decryptor) -> None:
        values = random_values(2, 70 * N)
        out = np.zeros((70, 2, N), dtype=np.uint64)
        encrypted: list[int] = []
        decrypted: list[int] = []
        encryptor.encrypt_into(values, out, encrypted.append)
        opened = decryptor.decrypt(out, values.size, decrypted.append)
        assert np.max(np.abs(opened - values)) <= encryptor.parameters.error_bound()
        for reported in (encrypted, decrypted):
            assert reported == sorted(reported)
            assert reported[-1] == 70

    def test_both_keep_their_parameters(self, encryptor: Encryptor, decryptor: Decryptor) -> None:
        assert encryptor.parameters == decryptor.parameters
        assert encryptor.threads == 2


class TestSums:
    def test_300_terms_equal_the_library_bit_for_bit(
        self, context: CkksContext, keys: KeyPair, encryptor: Encryptor, decryptor: Decryptor
    ) -> None:
        terms, library = 300, context.library
        values = random_values(7, terms * N, 0.8)
        blocks = encryptor.encrypt(values)
        total = blocks[:1].copy()
        reference = library.load_ciphertext(context.template.splice(blocks[0]))
        for term in blocks[1:]:
            add_residues(total, term[None], context.parameters.modulus)
            reference = library.add(reference, library.load_ciphertext(context.template.splice(term)))
        serialized = library.serialize(reference)
        assert total[0, 0].tobytes() in serialized
        assert total[0, 1].tobytes() in serialized
        opened = decryptor.decrypt(total, N)
        by_library = library.decrypt(context.load_secret_key(keys.secret), reference)
        np.testing.assert_array_equal(opened, by_library.view(np.float64))
        error = np.max(np.abs(opened - values.reshape(terms, N).sum(axis=0)))
        assert error <= context.parameters.error_bound(terms) < 1e-8

    def test_prefixes_add_up(self, encryptor: Encryptor, decryptor: Decryptor) -> None:
        vectors = [random_values(seed, size) for seed, size in ((1, 3 * N), (2, N), (3, 2 * N - 7))]
        total = sum_residues([encryptor.encrypt(vector) for vector in vectors], encryptor.parameters.modulus)
        expected = np.zeros(3 * N)
        for vector in vectors:
            expected[: vector.size] += vector
        opened = decryptor.decrypt(total, 3 * N)
        assert np.max(np.abs(opened - expected)) <= encryptor.parameters.error_bound(3)


class TestThreads:
    def test_threads_share_one_context_and_never_repeat_randomness(
        self, context: CkksContext, keys: KeyPair, decryptor: Decryptor
    ) -> None:
        def encrypt(seed: int) -> tuple[float, set[bytes]]:
            values = random_values(0, 20 * N)
            with Encryptor(context, keys.public, threads=2) as own:
                blocks = own.encrypt(values)
            error = float(np.max(np.abs(decryptor.decrypt(blocks, values.size) - values)))
            return error, {hashlib.sha256(polynomial.tobytes()).digest() for polynomial in blocks.reshape(-1, N)}

        with ThreadPoolExecutor(4) as executor:
            results = list(executor.map(encrypt, range(4)))
        assert max(error for error, _ in results) <= context.parameters.error_bound()
        assert len(set.union(*(digests for _, digests in results))) == 4 * 20 * 2

    def test_closed_objects_refuse_work(self, context: CkksContext, keys: KeyPair) -> None:
        with Encryptor(context, keys.public, threads=1) as encryptor:
            blocks = encryptor.encrypt(np.zeros(3))
        encryptor.close()
        with pytest.raises(InternalFault, match="closed"):
            encryptor.encrypt(np.zeros(3))
        with Decryptor(context, keys.public, keys.secret, threads=1) as decryptor:
            decryptor.decrypt(blocks, 3)
        decryptor.close()
        with pytest.raises(InternalFault, match="closed"):
            decryptor.decrypt(blocks, 3)

    def test_thread_bounds(self, context: CkksContext, keys: KeyPair) -> None:
        with pytest.raises(InvalidConfiguration, match="HE threads"):
            Encryptor(context, keys.public, threads=0)
        with pytest.raises(InvalidConfiguration, match="HE threads"):
            Decryptor(context, keys.public, keys.secret, threads=0)

    def test_rate_counts_all_threads(self, encryptor: Encryptor) -> None:
        ticks = itertools.count(0.0, 0.25)
        assert measure_encrypt_rate(encryptor, lambda: next(ticks)) == 2 * 16 * N / 0.25
        assert measure_encrypt_rate(encryptor, lambda: 1.0) > 0.0


class TestRefusedValues:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_non_finite(self, encryptor: Encryptor, bad: float) -> None:
        values = np.zeros(N + 10)
        values[N + 3] = bad
        out = np.zeros((2, 2, N), dtype=np.uint64)
        with pytest.raises(NonFiniteValue, match=f"value {N + 3} ") as caught:
            encryptor.encrypt_into(values, out)
        assert caught.value.context == {"position": str(N + 3)}
        assert not out.any()

    @pytest.mark.parametrize("bad", [256.0, -256.0, 1e300, 271828.125])
    def test_out_of_range_names_the_place_and_keeps_the_value(self, encryptor: Encryptor, bad: float) -> None:
        values = np.zeros(9)
        values[4] = bad
        with pytest.raises(ValueOutOfRange, match=r"value 4 .* below 256") as caught:
            encryptor.encrypt(values)
        assert "271828" not in str(caught.value)

    @pytest.mark.parametrize(
        "values", [np.zeros((2, 3)), np.array(1.0), np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.complex128)]
    )
    def test_other_arrays(self, encryptor: Encryptor, values: np.ndarray) -> None:
        with pytest.raises(ShapeMismatch, match="a vector of floats"):
            encryptor.encrypt(values)

    @pytest.mark.parametrize("kind", ["short", "long", "signed", "strided", "read-only"])
    def test_other_outputs(self, encryptor: Encryptor, kind: str) -> None:
        outputs: dict[str, np.ndarray] = {
            "short": np.zeros((1, 2, N), dtype=np.uint64),
            "long": np.zeros((3, 2, N), dtype=np.uint64),
            "signed": np.zeros((2, 2, N), dtype=np.int64),
            "strided": np.zeros((4, 2, N), dtype=np.uint64)[::2],
            "read-only": np.zeros((2, 2, N), dtype=np.uint64),
        }
        out = outputs[kind]
        out.flags.writeable = kind != "read-only"
        with pytest.raises(ShapeMismatch, match="encryption output"):
            encryptor.encrypt_into(np.zeros(N + 1), out)


class TestRefusedBlocks:
    def test_keys_of_different_pairs(self, context: CkksContext, keys: KeyPair) -> None:
        with pytest.raises(DigestMismatch, match="different pairs"):
            Decryptor(context, context.generate_keys().public, keys.secret, threads=1)

    def test_blocks_of_another_epoch(self, context: CkksContext, decryptor: Decryptor) -> None:
        with Encryptor(context, context.generate_keys().public, threads=1) as stranger:
            blocks = stranger.encrypt(np.zeros(N))
        with pytest.raises(ValueOutOfRange, match="decrypted block 0: expected absolute values below 256"):
            decryptor.decrypt(blocks, N)

    @pytest.mark.parametrize("count", [0, N, 2 * N + 1, 10**9])
    def test_wrong_count(self, decryptor: Decryptor, count: int) -> None:
        with pytest.raises(SizeMismatch, match=f"for {count} values, got 2"):
            decryptor.decrypt(np.zeros((2, 2, N), dtype=np.uint64), count)

    def test_negative_count(self, decryptor: Decryptor) -> None:
        with pytest.raises(ValueOutOfRange):
            decryptor.decrypt(np.zeros((0, 2, N), dtype=np.uint64), -1)

    def test_wrong_shape(self, decryptor: Decryptor) -> None:
        with pytest.raises(ShapeMismatch):
            decryptor.decrypt(np.zeros((1, 2, N - 1), dtype=np.uint64), N)

    def test_residues_not_below_the_modulus(self, decryptor: Decryptor) -> None:
        blocks = np.zeros((2, 2, N), dtype=np.uint64)
        blocks[1, 1, 17] = decryptor.parameters.modulus
        with pytest.raises(ResidueOutOfRange, match="block 1, polynomial 1, position 17"):
            decryptor.decrypt(blocks, 2 * N)

    @settings(max_examples=60, deadline=None)
    @given(
        changes=st.lists(
            st.tuples(st.integers(0, 1), st.integers(0, N - 1), st.integers(0, 1152921504606830592)),
            min_size=1,
            max_size=8,
        )
    )
    def test_changed_residues_open_to_noise_or_are_refused(
        self, encryptor: Encryptor, decryptor: Decryptor, changes: list[tuple[int, int, int]]
    ) -> None:
        blocks = encryptor.encrypt(np.zeros(N))
        for polynomial, position, value in changes:
            blocks[0, polynomial, position] = value
        try:
            opened = decryptor.decrypt(blocks, N)
        except ValueOutOfRange:
            return
        assert np.all(np.abs(opened) < decryptor.parameters.max_abs_value)

    @pytest.mark.parametrize("fill", ["zeros", "largest", "random", "swapped"])
    def test_extreme_residues_never_crash(self, encryptor: Encryptor, decryptor: Decryptor, fill: str) -> None:
        modulus = decryptor.parameters.modulus
        blocks = {
            "zeros": np.zeros((1, 2, N), dtype=np.uint64),
            "largest": np.full((1, 2, N), modulus - 1, dtype=np.uint64),
            "random": np.random.default_rng(1).integers(0, modulus, (1, 2, N), dtype=np.uint64),
            "swapped": encryptor.encrypt(np.zeros(N))[:, ::-1].copy(),
        }[fill]
        if fill in ("zeros", "largest"):
            assert np.all(np.abs(decryptor.decrypt(blocks, N)) < 1e-6)
        else:
            with pytest.raises(ValueOutOfRange):
                decryptor.decrypt(blocks, N)

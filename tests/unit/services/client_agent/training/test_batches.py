from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.client_agent.training.batches import Sequences, by_length, collate, count_steps, draw_batches, tokenize
from services.client_agent.training.data import Row
from services.client_agent.training.model import LoadedModel
from shelora.errors import InvalidConfiguration
from support.tiny_models import make_tokenizer


def make_sequences(lengths: list[int]) -> Sequences:
    tokens = tuple(np.arange(1, length + 1, dtype=np.int32) for length in lengths)
    return Sequences(tokens, np.arange(len(lengths), dtype=np.int64), 0)


def make_loaded(*, encoder: bool, max_tokens: int = 6, vocabulary: int = 64) -> LoadedModel:
    tokenizer = make_tokenizer(encoder=encoder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    network = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(num_embeddings=vocabulary))
    return LoadedModel(network, tokenizer, Path(), frozenset(), max_tokens, b"", b"")


def test_batches_are_padded_to_their_own_longest_row():
    batch = collate(make_sequences([2, 5, 3]), [2, 0], torch.device("cpu"))
    assert batch.tokens.tolist() == [[1, 2, 3], [1, 2, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [2, 0]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_texts_are_cut_and_labelled():
    rows = [Row("the cat", "b", "r1"), Row("the dog runs fast and sleeps not", "a", "r2")]
    sequences = tokenize(rows, make_loaded(encoder=True), ("a", "b"), "sequence-classification")
    assert [len(tokens) for tokens in sequences.tokens] == [4, 6]
    assert sequences.tokens[1][-1] == 3
    assert sequences.labels.tolist() == [1, 0]
    assert len(tokenize([], make_loaded(encoder=True), ("a", "b"), "sequence-classification")) == 0


def test_causal_texts_end_with_the_end_token_unless_cut():
    rows = [Row("the cat", None, "r1"), Row("the dog runs fast and sleeps not", None, "r2")]
    sequences = tokenize(rows, make_loaded(encoder=False), (), "causal-lm")
    assert [tokens.tolist()[-1] == 4 for tokens in sequences.tokens] == [True, False]
    assert sequences.labels.tolist() == [-1, -1]


def test_a_text_without_tokens_is_named():
    loaded = make_loaded(encoder=False)
    loaded.tokenizer.eos_token = None
    with pytest.raises(InvalidConfiguration, match="file, line 3: expected a text of at least 2 tokens, got 1"):
        tokenize([Row("cat", None, "file, line 3")], loaded, (), "causal-lm")


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(InvalidConfiguration, match="line 1: expected tokens below 6, the model's vocabulary, got 7"):
        tokenize(
            [Row("cat", "a", "line 1")], make_loaded(encoder=True, vocabulary=6), ("a", "b"), "sequence-classification"
        )


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 200))
def test_evaluation_batches_cover_everything_within_the_budget(lengths: list[int], budget: int):
    batches = by_length(make_sequences(lengths), budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    assert [lengths[index] for batch in batches for index in batch] == sorted(lengths)


labelled = st.lists(st.integers(0, 3), min_size=1, max_size=50).map(lambda found: np.asarray(found, dtype=np.int64))


@given(labelled, st.integers(1, 20), st.integers(1, 30), st.integers(0, 2**40), st.floats(0, 1))
def test_batches_pass_evenly_over_the_rows_of_each_label(
    labels: Any, batch_size: int, steps: int, seed: int, balance: float
):
    batches = draw_batches(labels, batch_size, steps, seed, balance)
    assert len(batches) == steps
    assert {len(batch) for batch in batches} == {min(batch_size, len(labels))}
    drawn = np.concatenate(batches)
    times = np.bincount(drawn, minlength=len(labels))
    present, counts = np.unique(labels, return_counts=True)
    shares = counts ** (1.0 - balance) / (counts ** (1.0 - balance)).sum()
    for label, share in zip(present, shares, strict=True):
        mine = times[labels == label]
        assert mine.max() - mine.min() <= 1
        assert abs(mine.sum() - share * len(drawn)) <= 1
    again = np.concatenate(draw_batches(labels, batch_size, steps, seed, balance))
    np.testing.assert_array_equal(drawn, again)


def test_other_seeds_give_other_batches():
    labels = np.zeros(100, dtype=np.int64)
    one, other = (np.concatenate(draw_batches(labels, 10, 10, seed)) for seed in (1, 2))
    assert sorted(one) == sorted(other) == list(range(100))
    assert not np.array_equal(one, other)


def test_steps_and_epochs():
    assert count_steps(100, 16, None, None, 30) == 30
    assert count_steps(100, 16, 7, None, 30) == 7
    assert count_steps(100, 16, None, 2.0, 30) == 13
    assert count_steps(3, 16, None, 1.0, 30) == 1
    assert count_steps(100, 16, None, 0.001, 30) == 1

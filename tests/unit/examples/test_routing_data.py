"""The routing data set: what its README promises, and that the generator still makes these bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from examples.data import generate

DATA_DIR = Path(generate.__file__).parent
SPLITS = {"routing_train.jsonl": 300, "routing_test.jsonl": 72}


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA_DIR / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("name", "per_intent"), SPLITS.items())
def test_split_is_balanced(name, per_intent):
    counts = Counter(row["label"] for row in read(name))
    assert counts == dict.fromkeys(generate.INTENTS, per_intent)


@pytest.mark.parametrize("name", SPLITS)
def test_lines_hold_text_and_label_only(name):
    for row in read(name):
        assert list(row) == ["text", "label"]
        assert row["text"] == row["text"].strip()
        assert generate.MIN_WORDS <= len(row["text"].split()) <= generate.MAX_WORDS
        assert not set("[]{}|") & set(row["text"])


def test_no_text_occurs_twice():
    marks = Counter(generate.fingerprint(row["text"]) for name in SPLITS for row in read(name))
    assert [mark for mark, count in marks.items() if count > 1] == []


def test_labels_are_not_sorted():
    for name, per_intent in SPLITS.items():
        assert len({row["label"] for row in read(name)[:per_intent]}) == len(generate.INTENTS)


def test_heldout_frames_occur_in_test_only():
    train, test = generate.build()
    heldout = {e.frame for e in test if e.heldout}
    assert heldout
    assert heldout.isdisjoint(e.frame for e in train)
    for label in generate.INTENTS:
        shares = Counter(e.heldout for e in test if e.label == label)
        assert shares == {True: 36, False: 36}


def test_nearly_all_train_frames_of_the_banks_are_used():
    train, _ = generate.build()
    used = {e.frame for e in train}
    for label in generate.INTENTS:
        bank = json.loads((DATA_DIR / "phrases" / f"{label}.json").read_text(encoding="utf-8"))
        frames = {frame for scene in bank["scenes"] for frame in scene["frames"]} | set(bank["terse"])
        assert len(frames & used) >= 0.9 * len(frames)


def test_another_seed_gives_other_texts():
    train, _ = generate.build(seed=generate.SEED + 1)
    assert generate.render(train) != (DATA_DIR / "routing_train.jsonl").read_bytes()


def test_generator_reproduces_the_committed_files(tmp_path):
    script = DATA_DIR / "generate.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True, cwd=tmp_path, timeout=60)
    for name in SPLITS:
        assert (tmp_path / name).read_bytes() == (DATA_DIR / name).read_bytes()

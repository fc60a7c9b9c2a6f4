"""Write routing_train.jsonl and routing_test.jsonl from the phrase banks in phrases/.

The same seed gives the same bytes. Run it from anywhere: ``python examples/data/generate.py``.

Grammar of the phrase banks: ``[a|b|]`` picks one alternative, ``{slot}`` picks a value of that slot once per message.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20250
TRAIN_PER_INTENT = 300
TEST_PER_INTENT = 72
HELDOUT_SHARE = 0.5
MIN_WORDS, MAX_WORDS = 4, 45
INTENTS = ("billing", "delivery", "account_access", "technical_fault", "cancellation", "product_question")
DATA_DIR = Path(__file__).resolve().parent

TERSE_SHARE = 0.14
OPENER_SHARE = 0.42
CONTEXT_SHARE = 0.13
ASIDE_SHARE = 0.32
ASK_SHARE = 0.36
CLOSER_SHARE = 0.3
CONTRACTION_SHARE = 0.45
CHATTY_SHARE = 0.15
TYPO_SHARE = 0.14

CONTRACTIONS = (
    (r"\b(I|we) have (?=been|not|now|already|tried|never|waited|found|changed|typed|had|paid|restarted)", r"\1've "),
    (r"\bI am (?=not|a|an|in|on|moving|writing|waiting|looking|leaving|locked|usually)\b", "I'm "),
    (r"\bI would like\b", "I'd like"),
    (r"\bI will\b", "I'll"),
    (r"\b([Dd]o|[Dd]oes|[Dd]id|[Ii]s|[Ww]as|[Aa]re|[Hh]as|[Ww]ould|[Cc]ould) not\b", r"\1n't"),
    (r"\b([Cc]an)not\b", r"\1't"),
    (r"\b([Ww])ill not\b", r"\1on't"),
)
CHATTY = {
    "please": "pls",
    "you": "u",
    "your": "ur",
    "thanks": "thx",
    "tomorrow": "tmrw",
    "because": "cos",
    "weekend": "wknd",
    "and": "&",
}
NEIGHBOUR_KEYS = dict(zip("aeiounrtslmdc", "sropimtydknfv", strict=True))


@dataclass(frozen=True)
class Example:
    """One message; ``heldout`` says that its main sentence belongs to the frames kept out of the training split."""

    text: str
    label: str
    frame: str
    heldout: bool


class Writer:
    """Expands phrases into messages with one random stream and the shared phrase bank."""

    def __init__(self, rng: random.Random, shared: dict[str, Any]) -> None:
        self._rng = rng
        self._shared = shared

    def _chance(self, share: float) -> bool:
        return self._rng.random() < share

    def _pick(self, options: list[str]) -> str:
        return options[int(self._rng.random() * len(options))]

    def _expand(self, phrase: str, slots: dict[str, list[str]], bound: dict[str, str]) -> str:
        phrase = re.sub(r"\[([^\[\]]*)\]", lambda m: self._pick(m[1].split("|")), phrase)

        def fill(match: re.Match[str]) -> str:
            name = match[1]
            if name not in bound:
                value = str(10000 + int(self._rng.random() * 90000)) if name == "num" else self._pick(slots[name])
                bound[name] = value
            return bound[name]

        phrase = re.sub(r"\{(\w+)\}", fill, phrase)
        phrase = re.sub(r"\s+([,.?!:])", r"\1", re.sub(r"\s+", " ", phrase)).strip()
        return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", phrase)

    def _compose(self, scene: dict[str, Any], frame: str, slots: dict[str, list[str]]) -> str:
        bound: dict[str, str] = {}
        core = self._expand(frame, slots, bound)
        sentences: list[str] = []
        if self._chance(CONTEXT_SHARE):
            sentences.append(self._expand(self._pick(self._shared["contexts"]), slots, {}))
        if self._chance(ASIDE_SHARE):
            aside = self._expand(self._pick(scene["asides"]), slots, bound)
            layout = self._rng.random()
            if layout < 0.4 and " but " not in core:
                sentences.append(f"{aside}, but {core}")
            elif layout < 0.6:
                sentences += [aside, core]
            else:
                sentences += [core, aside]
        else:
            sentences.append(core)
        if self._chance(ASK_SHARE):
            sentences.append(self._expand(self._pick(scene["asks"]), slots, bound))
        if self._chance(CLOSER_SHARE):
            sentences.append(self._expand(self._pick(self._shared["closers"]), slots, bound))
        opener = self._pick(self._shared["openers"]) + " " if self._chance(OPENER_SHARE) else ""
        return opener + self._join(sentences, capital_first=not opener)

    def _join(self, sentences: list[str], *, capital_first: bool) -> str:
        parts = [s if s[-1] in ".?!" else s + "." for s in sentences]
        text = re.sub(r"([.?!] )([a-z])", lambda m: m[1] + m[2].upper(), " ".join(parts))
        return text[0].upper() + text[1:] if capital_first else text

    def _roughen(self, text: str) -> str:
        if self._chance(CONTRACTION_SHARE):
            for pattern, short in CONTRACTIONS:
                text = re.sub(pattern, short, text)
        if self._chance(CHATTY_SHARE):
            text = text.lower().replace("'", "")
            if self._chance(0.5):
                text = re.sub(r"\w+", lambda m: CHATTY.get(m[0], m[0]), text)
            if self._chance(0.6):
                text = text.rstrip(".")
        elif self._chance(0.1):
            text = text.rstrip(".")
        elif self._chance(0.04):
            text = re.sub(r"[.?]$", lambda m: "!!" if m[0] == "." else "??", text)
        if self._chance(TYPO_SHARE):
            for _ in range(1 + self._chance(0.3)):
                text = self._misspell(text)
        return text

    def _misspell(self, text: str) -> str:
        words = list(re.finditer(r"\b[A-Za-z]{5,}\b", text))
        if not words:
            return text
        word = words[int(self._rng.random() * len(words))]
        at = word.start() + 1 + int(self._rng.random() * (len(word[0]) - 2))
        letter = text[at]
        kind = self._rng.random()
        if kind < 0.4:
            return text[:at] + text[at + 1] + letter + text[at + 2 :]
        if kind < 0.7:
            return text[:at] + text[at + 1 :]
        if kind < 0.85:
            return text[:at] + letter + text[at:]
        return text[:at] + NEIGHBOUR_KEYS.get(letter, letter) + text[at + 1 :]

    def write_message(self, bank: dict[str, Any], *, heldout: bool) -> tuple[str, str]:
        """Write one message of an intent. Returns: (text, frame), the frame from the held-out ones if asked."""
        slots: dict[str, list[str]] = {**self._shared["slots"], **bank.get("slots", {})}
        if self._chance(TERSE_SHARE):
            frame = self._pick(bank["terse_heldout" if heldout else "terse"])
            text = self._expand(frame, slots, {})
            if self._chance(0.6):
                text = text[0].upper() + text[1:]
            return self._roughen(text), frame
        scenes = bank["scenes"]
        scene = scenes[int(self._rng.random() * len(scenes))]
        frame = self._pick(scene["heldout" if heldout else "frames"])
        return self._roughen(self._compose(scene, frame, slots)), frame


def _load_bank(name: str) -> dict[str, Any]:
    bank: dict[str, Any] = json.loads((DATA_DIR / "phrases" / f"{name}.json").read_text(encoding="utf-8"))
    return bank


def fingerprint(text: str) -> str:
    """Letters and digits only, lower-cased: two texts with the same fingerprint count as duplicates."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def _shuffle(examples: list[Example], rng: random.Random) -> None:
    for i in range(len(examples) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        examples[i], examples[j] = examples[j], examples[i]


def build(seed: int = SEED) -> tuple[list[Example], list[Example]]:
    """Build both splits. Returns: (train, test), balanced, shuffled, free of duplicates within and across."""
    rng = random.Random(seed)
    writer = Writer(rng, _load_bank("shared"))
    seen: set[str] = set()
    train: list[Example] = []
    test: list[Example] = []

    def add(split: list[Example], label: str, count: int, *, heldout: bool) -> None:
        bank = _load_bank(label)
        wanted = len(split) + count
        while len(split) < wanted:
            text, frame = writer.write_message(bank, heldout=heldout)
            mark = fingerprint(text)
            if mark in seen or not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
                continue
            seen.add(mark)
            split.append(Example(text, label, frame, heldout))

    heldout_count = round(TEST_PER_INTENT * HELDOUT_SHARE)
    for label in INTENTS:
        add(train, label, TRAIN_PER_INTENT, heldout=False)
        add(test, label, TEST_PER_INTENT - heldout_count, heldout=False)
        add(test, label, heldout_count, heldout=True)
    _shuffle(train, rng)
    _shuffle(test, rng)
    return train, test


def render(examples: list[Example]) -> bytes:
    """Render one JSON object a line, UTF-8, newline at the end."""
    lines = (json.dumps({"text": e.text, "label": e.label}, ensure_ascii=False) + "\n" for e in examples)
    return "".join(lines).encode("utf-8")


def main() -> None:
    """Write both files into --out, by default next to this script."""
    parser = argparse.ArgumentParser(description="Write the routing data set.")
    parser.add_argument("--out", type=Path, default=DATA_DIR, help="folder for the two .jsonl files")
    out: Path = parser.parse_args().out
    train, test = build()
    (out / "routing_train.jsonl").write_bytes(render(train))
    (out / "routing_test.jsonl").write_bytes(render(test))


if __name__ == "__main__":
    main()

"""The demonstration's data, dealt out to its agents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from services.operators.demo.folder import DemoFolder
from services.operators.demo.options import DemoOptions
from services.operators.demo.reader import Example, read_examples, sort_labels, write_examples
from services.operators.demo.split import HELD_OUT, count_labels, hold_out, split
from shelora.errors import InvalidConfiguration


@dataclass(frozen=True)
class Shares:
    """The data as it was dealt out: per agent its rows, and one test set for all."""

    labels: tuple[str, ...]
    train: Mapping[str, tuple[Example, ...]]
    test: tuple[Example, ...]

    def counts(self, name: str) -> dict[str, int]:
        """Rows of each label that an agent has."""
        mine = [example.label for example in self.train[name]]
        return dict(zip(self.labels, count_labels(mine, range(len(mine)), self.labels), strict=True))

    def write(self, folder: DemoFolder) -> None:
        """Write one file an agent, and the test file."""
        for name, examples in self.train.items():
            write_examples(folder.data / f"{name}.jsonl", examples)
        write_examples(folder.data / "test.jsonl", self.test)


def deal(options: DemoOptions) -> Shares:
    """Read the data and split it unevenly; the same seed gives the same split.

    Raises:
        InvalidConfiguration: data that cannot be used.
    """
    rng = np.random.default_rng(options.seed)
    rows = read_examples(options.data, options.text_field, options.label_field)
    if options.test is not None:
        test = read_examples(options.test, options.text_field, options.label_field)
    else:
        kept, held = hold_out([row.label for row in rows], HELD_OUT, rng)
        rows, test = [rows[index] for index in kept], [rows[index] for index in held]
    labels = sort_labels(rows)
    unseen = sorted({row.label for row in test} - set(labels))
    if unseen:
        raise InvalidConfiguration(
            f"test data: expected only labels of the training data ({', '.join(labels[:20])}), "
            f"got also {', '.join(unseen[:20])}",
            hint="use the same labels in both files",
        )
    parts = split([row.label for row in rows], options.agents, options.concentration, rng)
    train = {name: tuple(rows[index] for index in part) for name, part in zip(options.names, parts, strict=True)}
    return Shares(labels, train, tuple(test))

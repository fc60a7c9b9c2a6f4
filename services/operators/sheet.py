"""Tables that stay readable on a narrow terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_FRAME_CHARACTERS: Final = 3
"""Padding on both sides of a column, and its line."""


class Sheet:
    """A table of texts that are taken as they are, never as markup.

    Where the columns do not fit beside each other they are cut into several tables, one below the other, each with the
    first column. A column whose name ends in ">" holds figures: it is set to the right and never broken.

    Args:
        columns: names of the columns.
        title: above the table.
    """

    def __init__(self, *columns: str, title: str = "") -> None:
        self._columns = columns
        self._title = title
        self.rows: list[tuple[Text, ...]] = []

    def add(self, *cells: str | Text) -> None:
        """Add a row, one cell a column."""
        if len(cells) != len(self._columns):
            raise ValueError(f"row: expected {len(self._columns)} cells, got {len(cells)}")
        self.rows.append(tuple(Text(cell) if isinstance(cell, str) else cell for cell in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, or the tables it is cut into."""
        if self._title:
            yield Text(self._title, style="italic")
        for group in self._groups(options.max_width):
            yield self._table(group)

    def _groups(self, width: int) -> list[list[int]]:
        """Indices of the columns of each table."""
        widths = [self._least_width(index) + _FRAME_CHARACTERS for index in range(len(self._columns))]
        groups, used = [[0]], widths[0] + 1
        for index in range(1, len(widths)):
            if used + widths[index] > width and len(groups[-1]) > 1:
                groups.append([0])
                used = widths[0] + 1
            groups[-1].append(index)
            used += widths[index]
        return groups

    def _least_width(self, index: int) -> int:
        """Figures need their whole width, texts that of their longest word."""
        head = max(len(word) for word in self._columns[index].removesuffix(">").split() or [""])
        if self._is_figures(index):
            return max([head, *(row[index].cell_len for row in self.rows)])
        return max([head, *(Text(word).cell_len for row in self.rows for word in row[index].plain.split())])

    def _is_figures(self, index: int) -> bool:
        return self._columns[index].endswith(">")

    def _table(self, group: Sequence[int]) -> Table:
        table = Table(header_style="bold")
        for index in group:
            name = self._columns[index].removesuffix(">")
            if self._is_figures(index):
                table.add_column(Text(name.replace(" ", "\n")), justify="right", no_wrap=True)
            else:
                table.add_column(Text(name), overflow="fold")
        for row in self.rows:
            table.add_row(*(row[index] for index in group))
        return table

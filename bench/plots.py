"""Plots as PNG and SVG, alike for every measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Draw: TypeAlias = Callable[[Any], None]
"""Draws one plot into matplotlib axes."""


def draw_all(draws: Mapping[str, Draw], folder: Path, suffixes: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw plots and save them.

    Args:
        draws: what draws each, by file name without ending.
        folder: where to.
        suffixes: formats.

    Returns:
        The files written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "shelora", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, draw in draws.items():
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        draw(axes)
        for suffix in suffixes:
            path = folder / f"{name}.{suffix}"
            figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
        pyplot.close(figure)
    return written

"""Pages of the documentation with sections that measurements write."""

from __future__ import annotations

import re
from collections.abc import Mapping


def fill(page: str, generated: Mapping[str, str], prefix: str = "") -> str:
    """A page with its generated sections replaced.

    Args:
        page: text with sections between `<!-- generated: NAME -->` and `<!-- end -->`.
        generated: new text by section name.
        prefix: only sections whose names begin with it are this measurement's; others stay.

    Raises:
        ValueError: the page lacks a section, or has one that nothing generates.
    """
    marked = [name for name in re.findall(r"<!-- generated: (\w+) -->", page) if name.startswith(prefix)]
    if sorted(marked) != sorted(generated):
        raise ValueError(f"expected one marked section for each of {sorted(generated)}, got {sorted(marked)}")
    for name, text in generated.items():
        begin, end = f"<!-- generated: {name} -->", "<!-- end -->"
        head, _, rest = page.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise ValueError(f"section {name}: expected {end} after it")
        page = f"{head}{begin}\n{text}\n{end}{tail}"
    return page

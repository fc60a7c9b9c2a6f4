"""Add up the JUnit files of the test suites: prints one line such as "412 passed, 0 failed, 1 skipped"."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def totals(folder: Path) -> tuple[int, int, int]:
    """Return how many tests passed, failed and were skipped according to the files in a folder."""
    ran = failed = skipped = 0
    for path in sorted(folder.glob("*.xml")):
        for suite in ElementTree.parse(path).iter("testsuite"):  # noqa: S314 (written by our own test run)
            ran += int(suite.get("tests", "0"))
            failed += int(suite.get("failures", "0")) + int(suite.get("errors", "0"))
            skipped += int(suite.get("skipped", "0"))
    return ran - failed - skipped, failed, skipped


if __name__ == "__main__":
    passed, failed, skipped = totals(Path(sys.argv[1]))
    sys.stdout.write(f"{passed} passed, {failed} failed, {skipped} skipped\n")

"""What is measured is what the image runs."""

from __future__ import annotations

import re
from pathlib import Path

from bench.aggregator.stage import IMAGE_SETTINGS

DOCKERFILE = Path(__file__).parents[4] / "deploy/docker/aggregator.Dockerfile"


def test_servers_are_measured_with_the_settings_of_the_image() -> None:
    set_there = dict(re.findall(r"\b([A-Z_]+)=(\S+)", DOCKERFILE.read_text(encoding="utf-8")))
    assert {name: set_there.get(name) for name in IMAGE_SETTINGS} == IMAGE_SETTINGS

"""The pictures and the figures of README.md are those of the measurements that are kept beside them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs/pictures"
DEMO, LOAD = (json.loads((PICTURES / name).read_text(encoding="utf-8")) for name in ("demo.json", "load.json"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def draw() -> dict[str, Any]:
    """The names of the script that draws."""
    return runpy.run_path(str(PICTURES / "draw.py"))


def test_pictures_are_up_to_date(draw: dict[str, Any]) -> None:
    """The files are what `python docs/pictures/draw.py` writes, and they are valid XML."""
    for name, drawn in {"effect.svg": draw["effect"](DEMO, LOAD), "path.svg": draw["path"]()}.items():
        ElementTree.fromstring(drawn)
        assert (PICTURES / name).read_text(encoding="utf-8") == drawn, (
            f"run python docs/pictures/draw.py: {name} is old"
        )


def test_the_load_chart_shows_the_table_of_the_results() -> None:
    """Each point is a row of docs/results/performance.md."""
    table = (ROOT / "docs/results/performance.md").read_text(encoding="utf-8")
    for events, p50, p99 in zip(LOAD["events_per_second"], LOAD["p50_ms"], LOAD["p99_ms"], strict=True):
        assert f"| {events:,} | {p50:.1f} ms | {p99:.1f} ms |" in table


def test_the_readme_states_the_recall_that_was_measured() -> None:
    """The three figures of the first claim are those of the run in the picture."""
    for reader in ("fresh", "daily", "once", "popular"):
        assert f"{DEMO['result'][f'recall10_{reader}']:.3f}" in README


def test_the_printed_output_is_of_the_same_run() -> None:
    """Rows of the picture are in the output that README.md shows."""
    for value in [*DEMO["report"]["rows"].values(), *list(DEMO["live"]["rows"].values())[:3]]:
        assert value in README

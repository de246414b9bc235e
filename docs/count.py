"""Print the numbers that open docs/explanation/testing.md: `python docs/count.py`."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from infra.chaos.checks.violations import Kind
from infra.chaos.faults.catalogue import CATALOGUE, pairs
from infra.field_cases.rows import ROWS
from tests.integration import broken_worker, test_cold_starts
from tests.integration.changelogs import SHAPES
from tests.simulation import test_mutations
from tests.simulation.test_simulation import REGRESSIONS

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Print one line per number."""
    tests = tests_by_folder()
    print(f"{tests.total():>7,}  tests: {', '.join(f'{count:,} {name}' for name, count in tests.most_common())}")
    for name, number in counts().items():
        print(f"{number:>7,}  {name}")


def counts() -> dict[str, int]:
    """Return the numbers that do not need the tests to be collected, by what they count."""
    return {
        "mutations of the product that the simulation must find": len(test_mutations.MUTATIONS),
        "mutations of a real worker that the checker must find": len(broken_worker.BROKEN),
        "kinds of trouble that a real worker must survive": len(broken_worker.TROUBLE),
        "regressions kept as histories": len(REGRESSIONS),
        "faults of the chaos runs": len(CATALOGUE),
        "pairs of faults of the chaos runs": len(pairs(brokers=3)),
        "cases from the field": len(ROWS),
        "kinds of violations that the checker reports": len(Kind),
        "cold starts over all shapes of changelog": test_cold_starts.STARTS * len(SHAPES),
    }


def tests_by_folder() -> Counter[str]:
    """Return the number of collected tests by folder of tests/; doctests have a folder of their own."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [line.split("::")[0] for line in listed if "::" in line]
    return Counter(path.split("/")[1] if path.startswith("tests/") else "doctests" for path in paths)


if __name__ == "__main__":
    main()

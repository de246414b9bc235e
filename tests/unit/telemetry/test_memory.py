"""The process keeps the memory that it frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from streams.telemetry.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(200):
        a, b = np.ones(100_000), np.ones(60_000)
        c = a.copy()
        del a, b, c
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    keep_freed_memory()
faults()
print(faults())
"""


def faults(mode: str) -> int:
    """Return the page faults of a fresh process that creates and drops arrays."""
    return int(subprocess.run([sys.executable, "-c", FAULTS, mode], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is glibc's")
def test_temporaries_do_not_fault_their_pages_in_again() -> None:
    """Temporary arrays cost page faults by default, and none once freed memory is kept."""
    assert faults("kept") < 100 < faults("default")

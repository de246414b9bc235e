"""Many histories from one seed, and the shortest form of the first that breaks a law."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from infra.harness.simulation.history import History, random_history, shrink
from infra.harness.simulation.world import Digest, run_history

STEPS = 60


def histories(seed: int, runs: int) -> Iterator[History]:
    """The histories of a seed; the n-th does not depend on how many there are."""
    return (random_history(Random(f"{seed}/{run}"), STEPS) for run in range(runs))


def failure(history: History, digest: Digest | None = None) -> Exception | None:
    """What a history breaks, None when it breaks nothing. Any exception counts: no input stops a worker."""
    try:
        run_history(history, digest)
    except Exception as error:
        return error
    return None


def shortest(history: History) -> History:
    """The shortest history that fails in the same way."""
    kind = type(failure(history))
    return shrink(history, lambda shorter: type(failure(shorter)) is kind)


def as_source(history: History) -> str:
    """A history as Python, ready to become a regression test."""
    steps = "".join(f"    {step},\n" for step in history.steps)
    return f"{history.policy}\n[\n{steps}]"

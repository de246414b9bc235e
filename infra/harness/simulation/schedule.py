"""Many histories from one seed, and the shortest form of the first that violates an invariant."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields
from random import Random

from infra.harness.simulation.history import History, random_history, shrink
from infra.harness.simulation.simulation import Digest, run_history

STEPS = 60


def histories(seed: int, runs: int) -> Iterator[History]:
    """Return the histories of a seed."""
    return (history_of(seed, run) for run in range(runs))


def history_of(seed: int, number: int) -> History:
    """Return one history of a seed."""
    return random_history(Random(f"{seed}/{number}"), STEPS)


def failure(history: History, digest: Digest | None = None) -> Exception | None:
    """Return the violation of a history, None without one; any exception counts, because no input may stop a worker."""
    try:
        run_history(history, digest)
    except Exception as error:
        return error
    return None


def outcome(seed: int, number: int) -> tuple[str | None, bytes]:
    """Return the violation of one history of a seed, None without one, and the digest of its event log."""
    digest = hashlib.sha256()
    error = failure(history_of(seed, number), digest)
    return None if error is None else repr(error), digest.digest()


def shortest(history: History) -> History:
    """Return the shortest history that fails in the same way."""
    kind = type(failure(history))
    return shrink(history, lambda shorter: type(failure(shorter)) is kind)


def as_source(history: History) -> str:
    """Return a history as Python source, ready to become a regression test."""
    steps = "".join(f"    {step},\n" for step in history.steps)
    rest = {each.name: getattr(history, each.name) for each in fields(history) if each.name not in ("policy", "steps")}
    return f"{history.policy}\n[\n{steps}]\n{rest}"

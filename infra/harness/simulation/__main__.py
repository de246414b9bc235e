"""`python -m infra.harness.simulation --seed N --runs M`: run random histories with faults against the real core.

Neither a broker nor Faust is involved. After a violation, the shortest history that reproduces it is printed, and the
exit code is 1. The last line on standard output is
`{"bench":"simulate","seed":…,"histories":…,"violations":…,"digest":…}`.
"""

from __future__ import annotations

import hashlib
import json
import time
from random import SystemRandom
from typing import Annotated

import typer

from infra.harness.simulation.schedule import as_source, failure, histories, shortest

PROGRESS_EVERY_S = 10.0


def simulate(
    seed: Annotated[int | None, typer.Option(help="Root seed; drawn at random if absent, and printed.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Number of histories.")] = 1_000,
) -> None:
    """Check the invariants of the stream core under crashes, rebalances, torn checkpoints and bad input."""
    seed = SystemRandom().randrange(10**9) if seed is None else seed
    typer.echo(f"seed {seed}, {runs} histories")
    violations, done, reported, digest = 0, 0, time.monotonic(), hashlib.sha256()
    for done, history in enumerate(histories(seed, runs), 1):
        error_found = failure(history, digest)
        if error_found is not None:
            violations += 1
            typer.echo(f"history {done - 1} of seed {seed}: {error_found!r}\n{as_source(shortest(history))}")
            break
        if time.monotonic() - reported > PROGRESS_EVERY_S:
            typer.echo(f"{done} histories, no violation")
            reported = time.monotonic()
    summary = {
        "bench": "simulate",
        "seed": seed,
        "histories": done,
        "violations": violations,
        "digest": digest.hexdigest(),
    }
    typer.echo(json.dumps(summary, separators=(",", ":")))
    if violations:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(simulate)

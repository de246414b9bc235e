"""`python -m infra.harness.simulation --seed N --runs M`: run random histories with faults against the worker's parts.

Neither a broker nor Faust is involved. After a violation, the shortest history that reproduces it is printed, and the
exit code is 1. The last line on standard output is
`{"bench":"simulate","seed":…,"histories":…,"violations":…,"digest":…}`; the digest does not depend on the number of
processes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from random import SystemRandom
from typing import Annotated

import typer

from infra.harness.simulation.schedule import as_source, history_of, outcome, shortest

PROGRESS_EVERY_S = 10.0
HISTORIES_PER_CHUNK = 20


def simulate(
    seed: Annotated[int | None, typer.Option(help="Root seed; drawn at random if absent, and printed.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Number of histories.")] = 1_000,
    processes: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
) -> None:
    """Check the invariants of the worker under crashes, rebalances, failures of every transport and bad input."""
    seed = SystemRandom().randrange(10**9) if seed is None else seed
    typer.echo(f"seed {seed}, {runs} histories")
    violations, done, reported, digest = 0, 0, time.monotonic(), hashlib.sha256()
    for done, (error_found, digest_of_one) in enumerate(_outcomes(seed, runs, processes), 1):
        digest.update(digest_of_one)
        if error_found is not None:
            violations += 1
            typer.echo(f"history {done - 1} of seed {seed}: {error_found}")
            typer.echo(as_source(shortest(history_of(seed, done - 1))))
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


def _outcomes(seed: int, runs: int, processes: int) -> Iterator[tuple[str | None, bytes]]:
    """Yield the violation and the digest of each history, in order."""
    if processes == 1:
        yield from map(partial(outcome, seed), range(runs))
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(partial(outcome, seed), range(runs), chunksize=HISTORIES_PER_CHUNK)


if __name__ == "__main__":
    typer.run(simulate)

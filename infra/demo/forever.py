"""After the demo: keep a worker busy with generated actions of the present moment, for people who want to look."""

from __future__ import annotations

import asyncio
import time

from infra.datasets.event_log import event_log
from infra.datasets.generator import GeneratorPolicy, generate
from infra.datasets.replay import Pace, replay
from infra.demo.live import Screen
from infra.demo.next_steps import command
from infra.demo.run import Deployment
from infra.harness.worker_process import Process, running, stop_seconds
from streams.config.settings import Settings, variable

RATE = 200.0
"""Events per second."""
ROUND_S = 60
"""Seconds of events that are generated at once; event time runs with the clock."""
USERS = 2_000


def go_on(deployment: Deployment, screen: Screen) -> None:
    """Print where to look and keep a worker busy until Ctrl-C."""
    with running(deployment.worker()) as worker:
        for line in addresses(deployment.settings):
            screen.line(line)
        seed = 0
        try:
            while True:
                seed += 1
                asyncio.run(_round(deployment.settings, worker, seed))
        except KeyboardInterrupt:
            screen.line("stopping")
            worker.stop_in_order(stop_seconds(deployment.settings))


def addresses(settings: Settings) -> list[str]:
    """Return the addresses of everything that runs, and commands that show embeddings and features."""
    bootstrap, web, topics = settings.kafka.bootstrap_servers, settings.web, settings.topics
    tail = f"{command()} tail --bootstrap-servers {bootstrap}"
    features = f"{variable('topics.features')}={topics.features} {tail} --features"
    return [
        f"broker      {bootstrap}",
        f"metrics     http://{web.host}:{web.port}/metrics",
        f"embeddings  {variable('topics.embeddings')}={topics.embeddings} {tail}",
        *([f"features    {features}"] if topics.features in settings.output_topics else []),
        f"{RATE:,.0f} generated events per second until Ctrl-C",
    ]


async def _round(settings: Settings, worker: Process, seed: int) -> None:
    policy = GeneratorPolicy(
        users=USERS,
        events=int(RATE * ROUND_S),
        start_ms=time.time_ns() // 1_000_000,
        span_ms=ROUND_S * 1_000,
        action_gap_ms=2_000,
        late_ms_mean=3_000,
    )
    sending = asyncio.create_task(replay(event_log(generate(policy, seed)), settings, Pace(rate=RATE)))
    try:
        while not (await asyncio.wait([sending], timeout=1))[0]:
            worker.require()
        sending.result()
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)

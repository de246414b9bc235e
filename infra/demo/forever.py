"""After the demo: a worker kept busy with made actions of the present moment, for whoever wants to look."""

from __future__ import annotations

import asyncio

from infra.datasets.event_log import event_log
from infra.datasets.generator import GeneratorPolicy, generate
from infra.datasets.replay import Pace, replay
from infra.demo.live import Screen
from infra.demo.observer import now_ms
from infra.demo.run import Stage
from infra.demo.worker import WorkerProcess, worker_process
from streams.config.settings import Settings, variable

RATE = 200.0
"""Events a second."""
ROUND_S = 60
"""Made and sent at a time; event time runs with the clock."""
USERS = 2_000


def go_on(stage: Stage, screen: Screen) -> None:
    """Say where to look and keep a worker busy until Ctrl-C."""
    with worker_process(stage.values, stage.settings, stage.worker_log) as worker:
        for line in addresses(stage.settings):
            screen.line(line)
        seed = 0
        try:
            while True:
                seed += 1
                asyncio.run(_round(stage.settings, worker, seed))
        except KeyboardInterrupt:
            screen.line("stopping")
            worker.stop()


def addresses(settings: Settings) -> list[str]:
    """What runs where, and what to type to see it."""
    bootstrap, web, topic = settings.kafka.bootstrap_servers, settings.web, settings.topics.embeddings
    tail = f"{variable('topics.embeddings')}={topic} .venv/bin/streamformer tail --bootstrap-servers {bootstrap}"
    return [
        f"broker      {bootstrap}",
        f"metrics     http://{web.host}:{web.port}/metrics",
        f"embeddings  {tail}",
        f"{RATE:,.0f} made events a second until Ctrl-C",
    ]


async def _round(settings: Settings, worker: WorkerProcess, seed: int) -> None:
    policy = GeneratorPolicy(
        users=USERS,
        events=int(RATE * ROUND_S),
        start_ms=now_ms(),
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

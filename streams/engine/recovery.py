"""Faust's recovery, reduced to one rule: a partition is resumed when its restore has ended, and not before.

Faust ends a recovery by the offsets of messages it has seen. It never sees transaction markers, and a response from the
previous assignment can end the recovery too early. Here Faust restores nothing: after an assignment the flow is resumed
with every partition paused, and `streams.engine.partitions` resumes each partition once it has fenced the predecessor,
restored the state and proved where the restore ended. The order matters: resuming the flow clears Faust's queues, so it
must happen before any partition is fetched.

Private parts relied upon, held by tests/contract/test_faust_insides.py:
`faust.tables.recovery.Recovery`: tasks `_restart_recovery`, `_slurp_changelogs`, `_publish_stats`, attributes
`signal_recovery_start`, `completed`, `_generation_id`; `faust.tables.manager.TableManager`: `_recovery`,
`_update_channels`, `on_start`; `faust.App._fetcher`, `App.consumer_generation_id`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.types import TP
from mode import Service

OnAssigned = Callable[[frozenset[TP], int], Awaitable[None]]
"""Called with the active changelog partitions and the generation; returns at once and works on in tasks."""


class PausedRecovery(Recovery):
    """Resumes the flow with all partitions paused, and passes them on to be restored one by one."""

    on_assigned: OnAssigned

    async def on_rebalance(
        self, assigned: set[TP], revoked: set[TP], newly_assigned: set[TP], generation_id: int = 0
    ) -> None:
        """Start over with the newest assignment; ignore one that is already outdated."""
        if generation_id != self.app.consumer_generation_id:
            self.log.warning("assignment of generation %s is already outdated", generation_id)
            return
        self._generation_id = generation_id
        self.signal_recovery_start.set()

    @Service.task
    async def _restart_recovery(self) -> None:
        while not self.should_stop:
            if await self.wait_for_stopped(self.signal_recovery_start):
                return
            self.signal_recovery_start.clear()
            await self._resume(self._generation_id)

    async def _resume(self, generation_id: int) -> None:
        app, consumer = self.app, self.app.consumer
        await app.on_rebalance_complete.send()
        if app.consumer_generation_id != generation_id:
            return  # the next assignment has already been announced
        self.completed.set()
        app.flow_control.resume()
        consumer.resume_flow()
        await app._fetcher.maybe_start()
        self.tables.on_actives_ready()
        self.tables.on_standbys_ready()
        app.on_rebalance_end()
        actives = frozenset(tp for tp in app.assignor.assigned_actives() if tp.topic in self.tables.changelog_topics)
        await self.on_assigned(actives, generation_id)

    @Service.task
    async def _slurp_changelogs(self) -> None:
        """Do nothing: changelog partitions stay paused, so no message arrives."""

    @Service.task
    async def _publish_stats(self) -> None:
        """Do nothing: the restore itself reports its progress."""


class PausedTableManager(TableManager):
    """Faust's table manager with `PausedRecovery`, and without its sleep of one second at start."""

    on_assigned: OnAssigned
    _recovery: Recovery | None

    @property
    def recovery(self) -> Recovery:
        """The one recovery service, created at first use."""
        recovery: Recovery | None = self._recovery
        if recovery is None:
            recovery = self._recovery = PausedRecovery(self.app, self, beacon=self.beacon, loop=self.loop)
            recovery.on_assigned = self.on_assigned
        return recovery

    async def on_start(self) -> None:
        """Start as Faust does, without its sleep."""
        await self._update_channels()
        await self.recovery.start()


def with_on_assigned(on_assigned: OnAssigned) -> type[Any]:
    """Return a class for Faust's setting `TableManager` that calls `on_assigned`."""
    return type("BoundTableManager", (PausedTableManager,), {"on_assigned": staticmethod(on_assigned)})

"""The link of one worker to the broker: its requests, which a history can hold, fail and cut."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.harness.simulation.broker import Broker
from streams.wire.embeddings import Message

OUTPUT, CHANGELOG, OTHER = "output", "changelog", "other"
"""Kinds of requests: sends outside of transactions, steps of transactions, and everything else."""


class Died(BaseException):
    """The worker has died; not an `Exception`, because a dead worker handles none."""


@dataclass(slots=True)
class Request:
    """A request on its way to the broker, or its answer on its way back."""

    kind: str
    apply: Callable[[], Any]
    answer: asyncio.Future[Any]
    topic: str = ""
    messages: Sequence[Message] = ()
    """Records that it carries."""
    is_applied: bool = False
    result: Any = None
    error: Exception | None = None


@dataclass(slots=True)
class Link:
    """The connection of one worker: its requests in order, of which some kinds are held."""

    broker: Broker
    held: frozenset[str] = frozenset()
    """Kinds of requests that wait until the history lets them through."""
    effects_left: int | None = None
    """Side effects until the worker dies; None if it does not."""
    is_dead: bool = False
    pending: dict[str, deque[Request]] = field(default_factory=lambda: {OUTPUT: deque(), CHANGELOG: deque()})
    on_death: Callable[[], None] = lambda: None
    on_acknowledged: Callable[[str, Sequence[Message]], None] = lambda topic, messages: None
    has_unknown: bool = False
    """True once a send was applied and yet reported as failed, so that it is repeated."""
    producers: set[int] = field(default_factory=set)
    """Numbers of the producers that were started over this link."""

    async def call(self, kind: str, apply: Callable[[], Any]) -> Any:
        """Send a request and return its answer."""
        return await self.send(kind, apply)

    def send(
        self, kind: str, apply: Callable[[], Any], topic: str = "", messages: Sequence[Message] = ()
    ) -> asyncio.Future[Any]:
        """Send a request; return its answer, which never comes once the worker is dead."""
        answer = asyncio.get_running_loop().create_future()
        if self._is_cut(kind):
            return answer
        request = Request(kind, apply, answer, topic, messages)
        if kind in self.held:
            self.pending[kind].append(request)
        else:
            self._apply(request)
            if kind == OTHER:
                self._answer(request)
            else:  # a sender that repeats what fails must not keep the loop from everything else
                answer.get_loop().call_soon(self._answer, request)
        return answer

    def effect(self) -> None:
        """Count a side effect of the local disk; raise if the worker does not live to see it."""
        if self._is_cut("store"):
            raise Died

    def deliver(self, kind: str, requests: int) -> None:
        """Let the broker perform the oldest held requests."""
        for request in [each for each in self.pending[kind] if not each.is_applied][:requests]:
            self._apply(request)

    def acknowledge(self, kind: str) -> None:
        """Let the answers of all performed requests arrive, in order."""
        pending = self.pending[kind]
        while pending and pending[0].is_applied:
            self._answer(pending.popleft())

    def fail(self, kind: str, error: Exception, *, is_applied: bool) -> None:
        """Fail the oldest held request, performed by the broker or not."""
        if self.pending[kind]:
            request = self.pending[kind].popleft()
            if is_applied and not request.is_applied:
                self._apply(request)
            self.has_unknown |= request.is_applied and request.error is None
            request.error, request.is_applied = request.error or error, True
            self._answer(request)

    def release(self) -> None:
        """Hold nothing any more."""
        self.held = frozenset()
        for kind, pending in self.pending.items():
            self.deliver(kind, len(pending))
            self.acknowledge(kind)

    def cut(self) -> None:
        """Let the worker die: nothing of it reaches the broker or its disk any more."""
        self.is_dead = True
        self.on_death()

    def _is_cut(self, kind: str) -> bool:
        if self.effects_left is not None and not self.is_dead and kind != OTHER:
            if not self.effects_left:
                self.cut()
            self.effects_left -= 1
        return self.is_dead

    def _apply(self, request: Request) -> None:
        request.is_applied = True
        try:
            request.result = request.apply()
        except Exception as error:
            request.error = error

    def _answer(self, request: Request) -> None:
        if request.answer.done():
            return
        if request.error is not None:
            request.answer.set_exception(request.error)
            request.answer.exception()  # nobody may be left who waits for it
        else:
            request.answer.set_result(request.result)
            self.on_acknowledged(request.topic, request.messages)

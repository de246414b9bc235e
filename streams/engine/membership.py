"""Membership in the consumer group: watched, and lost in one way only, by ending the process.

aiokafka keeps the membership in a task of its own. When that task ends, or when its error waits for a fetch that never
comes, nothing is reported: the worker sends no heartbeat, processes nothing, and stays up. `WatchedCoordinator` records
what the group's coordinator answers, and `Membership.problem` turns each way of losing the membership into one line.

Two workers under one instance id displace each other for ever in stock aiokafka: the displaced one joins again as a new
member, which displaces the other. Here it joins again under the member id that it had. The broker answers that another
member holds the instance id, or that it does not know the member because its session has ended; only then does the
worker join as a new one.

Faust's assignor asserts that a member's assignment names the member's own URL. A static member gets the assignment of
its predecessor, which may have been made on another host or by another version, so `Assignor` accepts another URL.

Private parts relied upon, held by tests/contract/test_faust_insides.py: `aiokafka.consumer.consumer.GroupCoordinator`
(`_send_req`, `reset_generation`, `_coordination_task`, `_coordination_routine`, `_pending_exception`,
`_group_instance_id`) and `faust.assignor.partition_assignor.PartitionAssignor` (`on_assignment`, `_url`).
"""

from __future__ import annotations

import logging
import re
import time
from typing import Any

from aiokafka import errors
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.protocol.group import JoinGroupRequest
from faust.assignor.client_assignment import ClientMetadata
from faust.assignor.partition_assignor import PartitionAssignor

logger = logging.getLogger(__name__)

ANOTHER_TOPIC = re.compile(r"unsubscribed topic.*topic=\\*'([^'\\]+)")
"""aiokafka's complaint about the assignment of a static member that had another topic before."""
SILENT_LOOKS = 10
"""Looks in a row that have to find the coordinator silent: a process that was stopped and goes on gets time to ask."""
FENCED_INSTANCE_ID = 82
"""Error code of the broker: another member has joined under this instance id. aiokafka has no class for it."""


class AnotherTopicFilter(logging.Filter):
    """Drops aiokafka's traceback about an assignment of another topic, which `Membership.problem` says in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged."""
        return not (record.exc_info and ANOTHER_TOPIC.search(str(record.exc_info[1])))


class WatchedCoordinator(GroupCoordinator):
    """aiokafka's group coordinator, which records answers and never displaces the member that displaced it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.is_displaced = False
        """Whether another member holds our instance id."""
        self.answered_at = time.monotonic()
        """When the group's coordinator last answered a request, by the monotonic clock."""
        self.member_id: str = JoinGroupRequest.UNKNOWN_MEMBER_ID
        self._is_unknown = False
        super().__init__(*args, **kwargs)

    async def _send_req(self, request: Any) -> Any:
        response = await super()._send_req(request)
        self.answered_at = time.monotonic()
        code = getattr(response, "error_code", 0)
        self.is_displaced |= code == FENCED_INSTANCE_ID
        if isinstance(request, JoinGroupRequest):
            self._is_unknown = code == errors.UnknownMemberIdError.errno
        return response

    def reset_generation(self) -> None:
        """Join again: under the same member id until the broker has answered that it does not know it."""
        member_id: str = self.member_id
        super().reset_generation()
        if self._group_instance_id is not None and not self._is_unknown:
            self.member_id = member_id

    def silence_s(self) -> float:
        """Return for how long the group's coordinator has not answered; 0 while it cannot be reached."""
        return 0.0 if self.coordinator_id is None else time.monotonic() - self.answered_at


class Assignor(PartitionAssignor):
    """Faust's assignor, which accepts an assignment that was made for this member under another URL."""

    def on_assignment(self, assignment: Any) -> None:
        """Accept an assignment; one whose parts contradict each other ends the worker (see `Membership`)."""
        url = ClientMetadata.loads(self._decompress(assignment.user_data)).url
        if url == str(self._url):
            super().on_assignment(assignment)
            return
        logger.info("the assignment was made for %s, under the same instance id: accepted by %s", url, self._url)
        self._accepted_url = url
        try:
            super().on_assignment(assignment)
        finally:
            self._accepted_url = None

    _accepted_url: str | None = None

    @property
    def _url(self) -> Any:
        return self._accepted_url or super()._url


class Membership:
    """The membership of one consumer in its group, judged once per second."""

    def __init__(self, instance_id: str, silence_max_s: float) -> None:
        self._instance_id, self._silence_max_s = instance_id, silence_max_s
        self._silent_looks = 0
        self.displaced: str | None = None
        """Why this worker must end although nothing is wrong with it: another one has its name."""
        self.problem: str | None = None
        """Why this worker is no longer a member of its group and will not become one."""

    def observe(self, consumer: Any) -> None:
        """Judge the membership now; `consumer` is aiokafka's, or None while it has not been created."""
        coordinator = getattr(consumer, "_coordinator", None)
        if not isinstance(coordinator, WatchedCoordinator):
            return
        if coordinator.is_displaced:
            self.displaced = (
                f"another worker has joined the group under the instance id {self._instance_id!r}: "
                "give each worker its own worker.instance_id"
            )
        self.problem = None if coordinator._closing.done() else self._problem(coordinator)

    def _problem(self, coordinator: WatchedCoordinator) -> str | None:
        if coordinator._coordination_task.done():
            if (foreign := _foreign_topic(coordinator)) is not None:
                return foreign
            return f"the task that keeps the group membership has ended: {_end_of(coordinator._coordination_task)}"
        if (error := coordinator._pending_exception) is not None:
            return f"the group membership is lost: {_text(error)}"
        silent_s = coordinator.silence_s()
        self._silent_looks = self._silent_looks + 1 if silent_s > self._silence_max_s else 0
        if self._silent_looks < SILENT_LOOKS:
            return None
        return f"the group's coordinator has not answered for {silent_s:.0f} s, though it can be reached"


def _foreign_topic(coordinator: WatchedCoordinator) -> str | None:
    """Return the ways on if the group gave this member a topic that its settings do not name; None otherwise.

    A static member gets its former assignment back, and aiokafka ends its task over a topic that is not subscribed.
    """
    task = coordinator._coordination_task
    error = None if task.cancelled() else task.exception()
    found = ANOTHER_TOPIC.search(str(error))
    if found is None:
        return None
    names = ", ".join(sorted(name for name in coordinator._subscription.topics if not name.endswith("-changelog")))
    return (
        f"the state of this application belongs to another log: source topic {names} instead of {found[1]}; "
        "`streamformer state adopt` keeps every sequence and begins at a chosen place of this topic, and a new app_id "
        "begins with empty state"
    )


def _end_of(task: Any) -> str:
    return "it was cancelled" if task.cancelled() else _text(task.exception())


def _text(error: BaseException | None) -> str:
    """Return the error, with the right that is missing where it is one of authorization."""
    if isinstance(error, errors.GroupAuthorizationFailedError):
        return f"no right to join the group {error}: grant READ on it"
    if isinstance(error, errors.TopicAuthorizationFailedError):
        return f"no right to read a topic: {error}: grant READ on it"
    return repr(error)

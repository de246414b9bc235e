"""One application under trial: its topics, its workers, perhaps of another checkout, and what can be seen of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import kafka
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError

from infra.field_cases.case import CaseFailed, expect
from infra.field_cases.records import Record, send
from infra.harness.deployment import Deployment
from infra.harness.history import LogRecord
from infra.harness.supervisor import Supervisor
from infra.harness.topic_reader import HistoryReader
from infra.harness.worker_process import sample
from infra.kafka.topics import ensure_topics
from streams.config.settings import Settings

READY_S = 60.0
SHOWN_S = 30.0
REFUSED_S = 45.0
TICK_S = 0.1
COMMAND_S = 60.0
ALTERED_WORKER = Path(__file__).with_name("altered_worker.py")


@dataclass(frozen=True, slots=True)
class Outcome:
    """End of a command."""

    code: int
    output: str
    """Standard output and standard error."""


@dataclass
class Site:
    """An application; its workers are killed at the end of the block."""

    deployment: Deployment
    tree: Path | None
    """Checkout that the workers and commands are run from; None means this one."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables added to the environment of workers and commands."""
    alteration: Sequence[str] = ()
    """Arguments of `altered_worker.py`; empty for an unaltered worker."""

    def __post_init__(self) -> None:
        home = {"PYTHONPATH": str(self.tree)} if self.tree else {}
        address = {"KAFKA_BOOTSTRAP_SERVERS": self.settings.kafka.bootstrap_servers}  # also an option of the commands
        self.environment = {**home, **address, **self.environment}
        self.supervisor = Supervisor(self.deployment, self._worker(), self.environment, self.tree)
        self.reader = HistoryReader(self.settings)

    def __enter__(self) -> Site:
        """Return the site."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Kill the workers and close the connections."""
        self.supervisor.close()
        self.reader.close()

    @property
    def settings(self) -> Settings:
        """Settings that all workers share."""
        return self.deployment.settings

    # -- what a stranger does

    def send(self, records: Sequence[Record], **options: Any) -> None:
        """Produce records to the input topic; `options` are those of aiokafka's producer."""
        send(self.settings, records, **options)

    def start(self, *numbers: int) -> None:
        """Start workers, by default number 0, and wait until each is ready."""
        for number in numbers or (0,):
            self.supervisor.start(number)
        for number in numbers or (0,):
            self.wait(partial(self.supervisor.is_ready, number), f"worker {number} is ready", READY_S)

    def stop(self, number: int = 0) -> None:
        """Terminate a worker in order and keep it down."""
        self.supervisor.retire(number)
        self.wait(lambda: self.supervisor.is_down(number), f"worker {number} has ended")
        self.supervisor.tick()

    def command(self, *arguments: str) -> Outcome:
        """Run `streamformer` with arguments and the settings of this application."""
        program = [sys.executable, "-m", "infra.cli", *arguments, "--config", str(self.deployment.config)]
        return self.shell(program)

    def shell(self, program: Sequence[str]) -> Outcome:
        """Run a program in the environment of the workers."""
        done = subprocess.run(
            list(program),
            env={**os.environ, **self.environment},
            cwd=self.tree,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        return Outcome(done.returncode, done.stdout + done.stderr)

    def alter(self, *alteration: str) -> None:
        """Start workers through `altered_worker.py` from now on, with these arguments."""
        self.supervisor.command = (sys.executable, str(ALTERED_WORKER), *alteration, "worker")

    def lose_disk(self, number: int = 0) -> None:
        """Kill a worker and delete its disk."""
        self.supervisor.hold(number)
        shutil.rmtree(self.deployment.data_dir(number), ignore_errors=True)

    def admin(self) -> closing[Any]:
        """Return an admin client as a context manager."""
        return closing(kafka.KafkaAdminClient(bootstrap_servers=self.settings.kafka.bootstrap_servers))

    def configure(self, topic: str, **configs: str) -> None:
        """Alter a topic; underscores stand for the dots in the names of its settings."""
        named = {name.replace("_", "."): value for name, value in configs.items()}
        with self.admin() as admin:
            admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, named)])

    def delete_records(self, topic: str, before: Mapping[int, int]) -> None:
        """Delete the records of each partition before an offset, as retention does."""
        with self.admin() as admin:
            admin.delete_records({kafka.TopicPartition(topic, number): offset for number, offset in before.items()})

    def recreate(self, *topics: str) -> None:
        """Delete topics and create them again, empty."""
        with self.admin() as admin:
            admin.delete_topics(list(topics))
            self.wait(lambda: not set(topics) & set(admin.list_topics()), "the topics are gone")
        self.reader.close()
        ensure_topics(self.settings)

    def expect_group_free(self) -> None:
        """Wait until the session of the last worker has ended, so that an operator may change the group."""
        with self.admin() as admin:
            group = self.settings.app_id
            self.wait(lambda: not admin.describe_groups([group])[group]["members"], "the group is empty")

    # -- what a stranger sees

    def wait(self, condition: Callable[[], object], what: str, within_s: float = SHOWN_S) -> float:
        """Let time pass until a condition holds, and return the seconds; raise `CaseFailed` if it does not in time."""
        begun_s = time.monotonic()
        while True:
            self.supervisor.tick()
            try:
                if condition():
                    return time.monotonic() - begun_s
            except (KafkaError, OSError):
                pass
            if time.monotonic() - begun_s > within_s:
                raise CaseFailed(f"not within {within_s:.0f} s: {what}{self._ends()}")
            time.sleep(TICK_S)

    def watch(self, seconds: float, look: Callable[[], None] = lambda: None) -> None:
        """Let time pass while workers that end are started again, and call `look` about five times per second."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.supervisor.tick()
            look()
            time.sleep(2 * TICK_S)

    def lengths(self) -> dict[str, int]:
        """Return the sequence length of each user's newest embedding; forgotten users have 0."""
        newest: dict[str, int] = {}
        for each in self.reader.read_all(self.settings.topics.embeddings):
            headers = dict(each.headers)
            newest[(each.key or b"").decode()] = 0 if each.value is None else int(headers["sequence-length"])
        return newest

    def wait_lengths(self, wanted: Mapping[str, int], within_s: float = SHOWN_S) -> float:
        """Wait until the newest embedding of each user contains the wanted number of actions; return the seconds."""
        found: dict[str, int] = {}

        def reached() -> bool:
            found.update(self.lengths())
            return all(found.get(user) == length for user, length in wanted.items())

        try:
            return self.wait(reached, "", within_s)
        except CaseFailed:
            wrong = {user: found.get(user) for user, length in wanted.items() if found.get(user) != length}
            shown = ", ".join(f"{user}: {length}" for user, length in list(wrong.items())[:3])
            raise CaseFailed(
                f"{len(wrong)} of {len(wanted)} users have no embedding of all their actions after "
                f"{within_s:.0f} s ({shown}){self._ends()}"
            ) from None

    def dead_letters(self) -> list[LogRecord]:
        """Return all dead letters."""
        return self.reader.read_all(self.settings.topics.dead_letter)

    def reasons(self) -> list[str]:
        """Return the reason of each dead letter."""
        return [dict(each.headers)["error-reason"].decode() for each in self.dead_letters()]

    def metric(self, name: str, labels: str = "", number: int = 0) -> float:
        """Return a metric of a worker, summed over its labels; `streamformer_` is put before the name."""
        return sample(self.supervisor.page(number, "/metrics")[1], f"streamformer_{name}", labels)

    def health(self, number: int = 0) -> tuple[int, int]:
        """Return the status of `/livez` and of `/readyz`."""
        return self.supervisor.page(number, "/livez")[0], self.supervisor.page(number, "/readyz")[0]

    def committed(self) -> int:
        """Return the sum of the committed offsets."""
        return sum(self.reader.committed().values())

    def refusal(self, number: int = 0, within_s: float = REFUSED_S) -> str:
        """Start a worker that has to refuse; return what it says, without a traceback."""
        before = len(self.supervisor.exits)
        self.supervisor.start_once(number)
        self.wait(lambda: len(self.supervisor.exits) > before, "the worker refuses", within_s)
        end = self.supervisor.exits[-1]
        expect(end.code > 0, f"the worker ended with {end.code} instead of a refusal")
        output = self.supervisor.output(number)
        expect("Traceback" not in output, f"a traceback: {end.last_line}")
        begin = max(output.rfind("error: "), output.rfind("CRITICAL"))
        return output[begin:] if begin >= 0 else end.last_line

    def expect_no_exit(self) -> None:
        """Raise `CaseFailed` if a worker has ended by itself."""
        self.supervisor.tick()
        bad = [each for each in self.supervisor.exits if not each.expected]
        expect(not bad, f"a worker has ended{self._ends()}")

    def _worker(self) -> Sequence[str]:
        if self.alteration:
            return (sys.executable, str(ALTERED_WORKER), *self.alteration, "worker")
        return (sys.executable, "-m", "infra.cli", "worker")

    def _ends(self) -> str:
        bad = [each for each in self.supervisor.exits if not each.expected]
        if not bad:
            return ""
        return f"; {len(bad)} unexpected exits, the last with {bad[-1].code}: {bad[-1].last_line[:200]}"

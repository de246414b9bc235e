"""The local broker is a real Kafka that survives kills on request and never outlives its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kafka
import pytest

from infra.kafka import broker as broker_module
from infra.kafka import node as node_module
from infra.kafka.address import BrokerFailed
from infra.kafka.broker import Broker, broker_or_external
from infra.kafka.node import HOST, BrokerOptions

pytestmark = pytest.mark.broker

PARENT = """
import sys, time
from infra.kafka.broker import Broker
with Broker.start() as broker:
    print(broker.pid, broker.folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """Yield a broker that the test may kill."""
    with Broker.start(BrokerOptions(folder=tmp_path)) as running:
        yield running


def test_acknowledged_record_survives_kill_and_restart(own_broker: Broker) -> None:
    """A record acknowledged before SIGKILL is read back after a restart on the same address."""
    address = own_broker.bootstrap_servers
    _create_topic(address, "kept")
    _produce(address, "kept", b"value")
    own_broker.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(_host_port(address), timeout=1)
    own_broker.restart()
    assert own_broker.bootstrap_servers == address
    assert _first_value(address, "kept") == b"value"


def test_stop_removes_data_and_is_idempotent(tmp_path: Path) -> None:
    """Stopping leaves no process and no file, and a second stop does nothing."""
    broker = Broker.start(BrokerOptions(folder=tmp_path))
    broker.stop()
    broker.stop()
    assert not broker_module._is_running(broker.pid)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_broker_does_not_outlive_its_parent(number: signal.Signals) -> None:
    """However the parent dies, the broker is gone and its folder removed soon after."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    assert broker_module._is_running(int(pid))
    parent.send_signal(number)
    parent.wait(30)
    _wait_until(lambda: not broker_module._is_running(int(pid)) and not Path(folder).exists())


def test_broker_dies_with_its_keeper(own_broker: Broker) -> None:
    """If the keeper itself is killed, the kernel kills the broker too."""
    os.kill(own_broker._process.pid, signal.SIGKILL)
    _wait_until(lambda: not broker_module._is_running(own_broker.pid))


def test_taken_port_is_one_clear_line() -> None:
    """A port in use is rejected with a line that names it, before anything is started."""
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BrokerFailed, match=f"port {port} is taken") as caught:
            Broker.start(BrokerOptions(port=port))
    assert "\n" not in str(caught.value)


def test_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    """A data folder that cannot be created is reported in one line, not as an OSError."""
    with pytest.raises(BrokerFailed, match="cannot create the broker's data folder"):
        Broker.start(BrokerOptions(folder=tmp_path / "missing"))


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the data folder cannot be written, the error names the reason and the folder is removed."""

    def no_space(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node_module, "server_properties", no_space)
    with pytest.raises(BrokerFailed, match="No space left on device"):
        Broker.start(BrokerOptions(folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_external_address_is_used(own_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """If KAFKA_BOOTSTRAP_SERVERS is set, that broker is used and none is started."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", own_broker.bootstrap_servers)
    with broker_or_external() as found:
        assert found.bootstrap_servers == own_broker.bootstrap_servers
        assert not isinstance(found, Broker)


def test_unreachable_external_broker_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address where no broker responds is named in one line."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    with (
        pytest.raises(BrokerFailed, match=r"no Kafka broker answers at 127\.0\.0\.1:1") as caught,
        broker_or_external(),
    ):
        pass
    assert "\n" not in str(caught.value)


def _create_topic(address: str, name: str) -> None:
    admin = kafka.KafkaAdminClient(bootstrap_servers=address)
    admin.create_topics({name: {"num_partitions": 1, "replication_factor": 1}})
    admin.close()


def _produce(address: str, topic: str, value: bytes) -> None:
    producer = kafka.KafkaProducer(bootstrap_servers=address, acks="all")
    producer.send(topic, value).get(timeout=20)
    producer.close()


def _first_value(address: str, topic: str) -> bytes:
    consumer = kafka.KafkaConsumer(
        topic, bootstrap_servers=address, auto_offset_reset="earliest", group_id=None, consumer_timeout_ms=20_000
    )
    value: bytes = next(consumer).value
    consumer.close()
    return value


def _host_port(address: str) -> tuple[str, int]:
    host, port = address.split(":")
    return host, int(port)


def _wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline_s, "still not so"
        time.sleep(0.1)

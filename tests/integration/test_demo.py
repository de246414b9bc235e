"""The demo in small, end to end, as a command: its output, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import kafka
import psutil
import pytest

from encoder.release import load_release
from infra.kafka.broker import Broker, ExternalBroker

pytestmark = [pytest.mark.broker, pytest.mark.slow]

EVENTS = 600
RECIPE = """
[encoder]
d_model = 16
heads = 2
kv_heads = 1
windows = [8, 8]
embedding_dim = 16
item_dim = 16
action_dim = 4
surface_dim = 2
sequence_length = 32
item_tower = "identity"

[data]
items_min = 1
batch_tokens = 2000

[budget]
tokens_max = 2000
"""
KEYS = {
    "bench", "machine", "events", "embeddings", "lost", "duplicated", "dead_letters", "freshness_p50_ms",
    "freshness_p99_ms", "events_per_second", "recall10_fresh", "recall10_daily", "recall10_once", "seconds",
    "features", "features_wrong",
}  # fmt: skip
DEADLINE_S = 90.0
DELETION_S = 10.0


@pytest.fixture
def demo(broker: Broker | ExternalBroker, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the command on the shared broker, with its temporary files under `tmp_path`."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "tmp").mkdir()
    surroundings = {"KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap_servers, "TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "infra.demo", "--generated", str(EVENTS), "--newer", "150", "--rate", "150"),
            *("--train-seconds", "2", "--recipe", str(tmp_path / "recipe.toml"), "--report-dir", str(tmp_path)),
            *("--release-dir", str(tmp_path / "release")),
        ],
        env={**os.environ, **surroundings},
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "progress").open("w"),
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _assert_nothing_is_left(broker: Broker | ExternalBroker, tmp_path: Path) -> None:
    """Fail unless topics, temporary files and processes are gone; the broker deletes topics after it has answered."""
    deadline_s = time.monotonic() + DELETION_S
    while (left := _left(broker, tmp_path)) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert left == []


def _left(broker: Broker | ExternalBroker, tmp_path: Path) -> list[str]:
    admin = kafka.KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    topics = [topic for topic in admin.list_topics() if topic.startswith("streamformer-demo-")]
    admin.close()
    files = [path.name for path in (tmp_path / "tmp").glob("streamformer*")]
    running = [str(process) for process in psutil.process_iter() if _is_of(process, str(tmp_path / "tmp"))]
    return [*topics, *files, *running]


def _is_of(process: psutil.Process, folder: str) -> bool:
    try:
        return process.environ().get("TMPDIR") == folder
    except psutil.Error:
        return False


def test_the_demo_counts_everything_and_leaves_nothing(
    demo: subprocess.Popen[str], broker: Broker | ExternalBroker, tmp_path: Path
) -> None:
    """The last line has every figure, nothing is lost or doubled, and only report and release are left."""
    output, _ = demo.communicate(timeout=DEADLINE_S)
    assert demo.returncode == 0, (tmp_path / "progress").read_text()
    figures = json.loads(output.splitlines()[-1])
    assert set(figures) >= KEYS
    assert figures["bench"] == "demo"
    assert figures["events"] == EVENTS
    assert (figures["lost"], figures["duplicated"], figures["dead_letters"]) == (0, 0, 0)
    assert figures["embeddings"] > 20
    assert figures["features"] > 20
    assert figures["features_wrong"] == 0
    report = (tmp_path / "report.txt").read_text()
    assert " users recomputed, 0 wrong" in report
    assert "actions_1d: " in report
    assert 0 < figures["freshness_p50_ms"] <= figures["freshness_p99_ms"]
    assert figures["parity_cosine_min"] >= 0.9999
    assert "The value of freshness" in (tmp_path / "report.txt").read_text()
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert load_release(tmp_path / "release").config.d_model == 16
    assert [line.split()[0] for line in _next_steps(output)] == [sys.executable, sys.executable, sys.executable]
    _assert_nothing_is_left(broker, tmp_path)


def _next_steps(output: str) -> list[str]:
    """Return the commands that the demo prints, as lines."""
    return [line.strip() for line in output.splitlines() if "-m infra.cli" in line]


def test_an_interrupted_demo_leaves_nothing(
    demo: subprocess.Popen[str], broker: Broker | ExternalBroker, tmp_path: Path
) -> None:
    """SIGTERM while the worker runs ends everything that was started: one line, exit code 130."""
    deadline_s = time.monotonic() + DEADLINE_S
    progress = tmp_path / "progress"
    while "streaming:" not in progress.read_text():
        assert demo.poll() is None, progress.read_text()
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    demo.send_signal(signal.SIGTERM)
    output, _ = demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert output == ""
    assert progress.read_text().splitlines()[-1] == "error: interrupted; nothing is left running"
    _assert_nothing_is_left(broker, tmp_path)

"""The quick forms of the stream benchmarks run to the end and print plausible figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infra.kafka.broker import Broker, ExternalBroker

QUICK_S = 120


@pytest.mark.broker
@pytest.mark.slow
def test_bench_ingest_ends_with_plausible_figures(
    broker: Broker | ExternalBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without baselines, the last line of the quick ingest benchmark has all keys, and plausible speeds."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", broker.bootstrap_servers)
    ended = subprocess.run(
        [sys.executable, "-m", "infra.bench.stream.ingest", "--quick", "--no-peers"],
        capture_output=True,
        text=True,
        timeout=QUICK_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["bench"] == "ingest"
    assert set(result["machine"]) == {"cpu", "cores", "amx", "avx512_bf16"}
    assert 5_000 < result["events_per_cpu_second"] < 5_000_000
    assert 5_000 < result["distinct_users_events_per_cpu_second"] < 5_000_000
    assert 32 < result["changelog_bytes_per_event"] < 600
    assert {result[f"ratio_{name}"] for name in ("bytewax", "quix", "faust", "kafka_streams")} == {None}


def test_bench_ingest_without_broker_fails_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no broker answers at the given address, the benchmark reports it in one line and exits with 1."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    ended = subprocess.run(
        [sys.executable, "-m", "infra.bench.stream.ingest", "--quick", "--no-peers"],
        capture_output=True,
        text=True,
        timeout=QUICK_S,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: no Kafka broker answers at 127.0.0.1:1")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.broker
@pytest.mark.slow
def test_bench_features_measures_every_worker(broker: Broker | ExternalBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick features benchmark reports each worker's rate and the overhead, and no last line."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", broker.bootstrap_servers)
    ended = subprocess.run(
        [sys.executable, "-m", "infra.bench.stream.features", "--quick", "--no-peers"],
        capture_output=True,
        text=True,
        timeout=QUICK_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    figures = r"round 1 of 1: worker-features [\d,]+, worker [\d,]+, worker-subset [\d,]+, worker-published [\d,]+"
    assert re.search(figures, ended.stderr)
    assert re.search(r"users published per CPU second: [1-9]", ended.stderr)
    stored = re.search(r"state of a user: ([\d,]+) bytes", ended.stderr)
    assert stored is not None
    assert 1_000 < int(stored[1].replace(",", "")) < 3_072


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_bench_freshness_serves_every_event(
    broker: Broker | ExternalBroker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without baselines, the quick freshness benchmark ends with all keys, every event served, and a plot."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", broker.bootstrap_servers)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    ended = subprocess.run(
        [sys.executable, "-m", "infra.bench.stream.freshness", "--quick", "--no-peers"],
        capture_output=True,
        text=True,
        timeout=390,
        check=False,
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["bench"] == "freshness"
    assert result["unserved"] == 0
    assert 0 < result["p50_ms"] <= result["p99_ms"]
    assert 0 < result["kill_p50_ms"] <= result["kill_p99_ms"]
    assert 1 < result["takeover_seconds"] < 60
    assert 500 < result["embeddings_per_cpu_second"] < 1_000_000
    assert result["ratio_faust"] is result["ratio_quix"] is None
    assert (tmp_path / "reports" / "freshness.png").stat().st_size > 10_000


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_bench_restore_ends_with_plausible_figures(
    broker: Broker | ExternalBroker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The last line of the quick restore benchmark has all keys, and a warm start is no slower than a cold one."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", broker.bootstrap_servers)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    ended = subprocess.run(
        [sys.executable, "-m", "infra.bench.stream.restore", "--quick"],
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
        cwd=tmp_path,  # the plot goes there
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert (result["bench"], result["users"]) == ("restore", 50_000)
    assert set(result["machine"]) == {"cpu", "cores", "amx", "avx512_bf16"}
    assert 0 < result["warm_restart_seconds"] < result["restore_seconds"] < 60
    assert 0 < result["restore_cpu_seconds"] < 60
    assert 100 < result["rss_mb_1m"] < 4_000
    assert 100 < result["rss_mb_5m"] < 4_000
    assert (tmp_path / "reports" / "restore-memory.png").stat().st_size > 10_000

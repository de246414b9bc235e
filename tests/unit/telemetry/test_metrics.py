"""The catalogue follows its own rules, and Prometheus reads from it what was recorded."""

from __future__ import annotations

import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import streams
from streams.errors import StreamformerError
from streams.telemetry.metrics import Counter, Gauge, Histogram, Kind, Metrics
from streams.telemetry.prometheus import HealthServer

UNITS = {"seconds", "bytes", "records", "users", "offset", "partitions", "entries", "stores", "info"}
LABELS = {"reason", "partition", "state", "version", "encoder_version", "dtype"}


@pytest.fixture
def metrics() -> Metrics:
    """Return a catalogue."""
    return Metrics()


@pytest.fixture
def health(metrics: Metrics) -> Iterator[dict[str, str | None]]:
    """Yield the answers of the checks by path, with the server's port."""
    wrong: dict[str, str | None] = {"/livez": None, "/readyz": None}
    server = HealthServer(
        metrics, host="127.0.0.1", port=0, livez=lambda: wrong["/livez"], readyz=lambda: wrong["/readyz"]
    )
    wrong["port"] = str(server.port)
    yield wrong
    server.close()


def get(health: dict[str, str | None], path: str) -> tuple[int, str]:
    """Return status and text of a page."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{health['port']}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_names_follow_the_conventions(metrics: Metrics) -> None:
    """Names are unique and have the prefix; a counter ends in `_total`, any other metric in a base unit."""
    names = [instrument.name for instrument in metrics]
    assert len(names) == len(set(names))
    for instrument in metrics:
        assert re.fullmatch(r"streamformer_[a-z_]+", instrument.name)
        assert instrument.name.endswith("_total") == (instrument.kind is Kind.COUNTER)
        assert instrument.kind is Kind.COUNTER or instrument.name.rsplit("_", 1)[1] in UNITS
        assert instrument.help.endswith(".")


def test_labels_come_from_a_known_set(metrics: Metrics) -> None:
    """No instrument has a label that could hold a user."""
    assert {label for instrument in metrics for label in instrument.labels} <= LABELS


def test_every_instrument_is_fed(metrics: Metrics) -> None:
    """Every instrument of the catalogue is counted, observed or set somewhere in the code."""
    files = [path for path in Path(streams.__file__).parent.rglob("*.py") if path.name != "metrics.py"]
    code = "\n".join(path.read_text() for path in files)
    assert [name for name in vars(metrics) if not re.search(rf"metrics\.{name}\b", code)] == []


def test_what_is_counted_is_served(metrics: Metrics, health: dict[str, str | None]) -> None:
    """Prometheus gets numbers, labels and buckets as they were recorded; unused counters start at zero."""
    metrics.events.inc(3)
    metrics.events.inc(4)
    metrics.rejected.inc(reason="not-json")
    metrics.consumer_lag.set(12, partition=3)
    metrics.freshness_seconds.observe_many(np.array([0.002, 0.003, 9_999.0, np.nan]))
    status, text = get(health, "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {(one.name, *one.labels.values()): one.value for family in families.values() for one in family.samples}
    assert status == 200
    assert samples["streamformer_events_total",] == 7
    assert samples["streamformer_refused_total", "not-json"] == 1
    assert samples["streamformer_fenced_total",] == 0
    assert samples["streamformer_consumer_lag_records", "3"] == 12
    assert samples["streamformer_freshness_seconds_bucket", "0.002"] == 1
    assert samples["streamformer_freshness_seconds_bucket", "0.005"] == 2
    assert samples["streamformer_freshness_seconds_bucket", "3600.0"] == 2
    assert samples["streamformer_freshness_seconds_bucket", "+Inf"] == 3
    assert samples["streamformer_freshness_seconds_count",] == 3
    assert samples["streamformer_freshness_seconds_sum",] == pytest.approx(9_999.005)
    assert set(families) == {instrument.name.removesuffix("_total") for instrument in metrics}


@given(st.lists(st.floats(-10, 10), max_size=50))
def test_a_histogram_counts_as_one_by_one(values: list[float]) -> None:
    """Observing a batch equals observing each of its values."""
    bounds = (-1.0, 0.0, 2.5)
    histogram = Histogram("h_seconds", "Help.", bounds=bounds)
    histogram.observe_many(np.array(values, np.float64))
    [held] = histogram.samples().values()
    obvious = [sum(value <= bound for value in values) for bound in (*bounds, np.inf)]
    assert held.counts.cumsum().tolist() == obvious
    assert held.total == pytest.approx(sum(values))


def test_labels_are_held_to_the_catalogue() -> None:
    """A missing, unknown or misspelt label is an error at once."""
    counter = Counter("c_total", "Help.", "reason")
    for labels in ({}, {"raison": "x"}, {"reason": "x", "user": "ann"}):
        with pytest.raises(ValueError, match="c_total"):
            counter.inc(1, **labels)


def test_a_counter_never_falls() -> None:
    """A negative amount is rejected."""
    with pytest.raises(ValueError, match="cannot fall"):
        Counter("c_total", "Help.").inc(-1)


def test_a_gauge_forgets_labels_that_went_away() -> None:
    """A removed partition is no longer reported."""
    gauge = Gauge("g_records", "Help.", "partition")
    gauge.set(5, partition=1)
    gauge.set(6, partition=2)
    gauge.remove(partition=1)
    gauge.remove(partition=7)
    assert gauge.samples() == {("2",): 6.0}


def test_threads_do_not_lose_counts() -> None:
    """Nothing is lost when four threads count at the same time."""
    counter = Counter("c_total", "Help.", "reason")

    def count() -> None:
        for _ in range(20_000):
            counter.inc(reason="x")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value(reason="x") == 80_000


def test_health_follows_its_checks(health: dict[str, str | None]) -> None:
    """A check that reports a problem returns 503 with its text, independently for each path."""
    assert get(health, "/livez") == (200, "ok\n")
    health["/readyz"] = "restoring 2 partitions"
    assert get(health, "/readyz") == (503, "restoring 2 partitions\n")
    assert get(health, "/livez?verbose") == (200, "ok\n")
    assert get(health, "/table")[0] == 404


def test_health_answers_while_a_client_hangs(health: dict[str, str | None]) -> None:
    """A client that connects and sends nothing delays no other client."""
    with socket.create_connection(("127.0.0.1", int(health["port"] or 0))):
        began = time.monotonic()
        assert get(health, "/livez")[0] == 200
        assert time.monotonic() - began < 2


def test_a_taken_port_is_reported_in_one_line(metrics: Metrics, health: dict[str, str | None]) -> None:
    """An address in use is an error that names the address and the setting."""
    port = int(health["port"] or 0)
    with pytest.raises(StreamformerError, match=rf"127.0.0.1:{port}.*web.port") as caught:
        HealthServer(metrics, host="127.0.0.1", port=port, livez=lambda: None, readyz=lambda: None)
    assert "\n" not in str(caught.value)


def test_gauges_of_partitions_that_have_gone_disappear() -> None:
    """After `keep_partitions`, every gauge with the label partition alone reports only the given ones."""
    metrics = Metrics()
    by_partition = [each for each in metrics if isinstance(each, Gauge) and each.labels == ("partition",)]
    assert {metrics.consumer_lag, metrics.processed_offset, metrics.committed_offset} <= set(by_partition)
    metrics.hot_users.set(5)
    for gauge in by_partition:
        for partition in range(12):
            gauge.set(7, partition=partition)
    metrics.keep_partitions({1, 11})
    assert {frozenset(gauge.samples()) for gauge in by_partition} == {frozenset([("1",), ("11",)])}
    assert metrics.hot_users.value() == 5

"""The catalogue of metrics: every figure that a worker reports is one attribute of `Metrics`.

Instruments hold their own numbers and know no monitoring system; `prometheus.py` serves them. They are updated
once a batch, from any thread. Labels come from closed sets or are partition numbers, never user ids.
docs/reference/metrics.md is made from this module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from encoder.arrays import I64

Label = str | int
Labels = tuple[str, ...]
"""Values of an instrument's labels, in their order."""


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a histogram holds of one set of labels: `counts[i]` observations at or below bound i, the last above all."""

    counts: I64
    total: float


class Instrument:
    """One metric: `name` with its unit last, one line of `help`, the names of its labels."""

    kind: Kind

    def __init__(self, name: str, help_: str, *labels: str) -> None:
        self.name, self.help, self.labels = name, help_, labels
        self._lock = Lock()

    def _values(self, given: Mapping[str, Label]) -> Labels:
        if given.keys() != set(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, not {tuple(given)}")
        return tuple(str(given[label]) for label in self.labels)


class _Number(Instrument):
    def __init__(self, name: str, help_: str, *labels: str) -> None:
        super().__init__(name, help_, *labels)
        self._numbers: dict[Labels, float] = {} if labels else {(): 0.0}

    def value(self, **labels: Label) -> float:
        """The present number; 0 for labels that were never touched."""
        return self._numbers.get(self._values(labels), 0.0)

    def samples(self) -> dict[Labels, float]:
        """A copy of all numbers, by label values."""
        with self._lock:
            return dict(self._numbers)


class Counter(_Number):
    """Only rises."""

    kind = Kind.COUNTER

    def inc(self, amount: float = 1, **labels: Label) -> None:
        if amount < 0:
            raise ValueError(f"{self.name} cannot fall by {-amount}")
        values = self._values(labels)
        with self._lock:
            self._numbers[values] = self._numbers.get(values, 0.0) + amount


class Gauge(_Number):
    """A number as it stands."""

    kind = Kind.GAUGE

    def set(self, value: float, **labels: Label) -> None:
        values = self._values(labels)
        with self._lock:
            self._numbers[values] = float(value)

    def remove(self, **labels: Label) -> None:
        """Report these labels no longer: the partition has gone to another worker."""
        values = self._values(labels)
        with self._lock:
            self._numbers.pop(values, None)


class Histogram(Instrument):
    """Observations counted by `bounds`, ascending upper limits."""

    kind = Kind.HISTOGRAM

    def __init__(self, name: str, help_: str, *labels: str, bounds: tuple[float, ...]) -> None:
        super().__init__(name, help_, *labels)
        self.bounds = bounds
        self._edges = np.array(bounds, np.float64)
        self._held: dict[Labels, Distribution] = {} if labels else {(): self._empty()}

    def observe(self, value: float, **labels: Label) -> None:
        self.observe_many(np.array([value], np.float64), **labels)

    def observe_many(self, values: npt.NDArray[Any], **labels: Label) -> None:
        """Count a whole batch of observations; NaN is not counted."""
        known = values[~np.isnan(values)]
        counts = np.bincount(np.searchsorted(self._edges, known, side="left"), minlength=len(self.bounds) + 1)
        total, of = float(known.sum()), self._values(labels)
        with self._lock:
            held = self._held.get(of) or self._empty()
            self._held[of] = Distribution(held.counts + counts, held.total + total)

    def samples(self) -> dict[Labels, Distribution]:
        """All distributions, by label values."""
        with self._lock:
            return dict(self._held)

    def _empty(self) -> Distribution:
        return Distribution(np.zeros(len(self.bounds) + 1, np.int64), 0.0)


LATENCY_BOUNDS_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
"""Around the objectives of freshness: p50 10 ms, p99 50 ms, 500 ms through a fault."""
WORK_BOUNDS_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
RESTORE_BOUNDS_SECONDS = (0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
BATCH_BOUNDS_USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """One worker's instruments."""

    def __init__(self) -> None:
        self._ingestion()
        self._encoding()
        self._publishing()
        self._partitions()
        self.info = Gauge(
            "streamformer_info", "Always 1; its labels say what runs.", "version", "encoder_version", "dtype"
        )

    def _ingestion(self) -> None:
        self.events = Counter("streamformer_events_total", "Records read from the action topic, good or bad.")
        self.rejected = Counter(
            "streamformer_refused_total", "Records sent to the dead-letter topic, by reason.", "reason"
        )
        self.duplicates = Counter("streamformer_duplicates_total", "Events ignored because they were applied before.")
        self.late_inserted = Counter(
            "streamformer_late_inserted_total", "Late events put where they belong in their sequence."
        )
        self.late_dropped = Counter(
            "streamformer_late_dropped_total", "Late events older than everything kept in a full sequence."
        )
        self.forgotten_dropped = Counter(
            "streamformer_forgotten_dropped_total", "Events of a forgotten user from before the user was forgotten."
        )
        self.tombstones = Counter("streamformer_tombstones_total", "Users forgotten on request.")
        self.position_holes = Counter(
            "streamformer_position_holes_total", "Batches sought back because records before them were missing."
        )
        self.events_expired = Counter(
            "streamformer_events_expired_total", "Records that retention deleted before they were read: lost."
        )
        self.consumer_lag = Gauge(
            "streamformer_consumer_lag_records", "Records in the action topic not yet processed.", "partition"
        )
        self.processed_offset = Gauge(
            "streamformer_processed_offset", "Offset behind the last processed record.", "partition"
        )
        self.committed_offset = Gauge(
            "streamformer_committed_offset", "Offset committed by the last checkpoint.", "partition"
        )
        self.hot_users = Gauge("streamformer_hot_users", "Users whose sequences are in memory.")
        self.corrupt_users = Counter(
            "streamformer_corrupt_users_total", "Users whose stored state failed its checksum: quarantined."
        )

    def _encoding(self) -> None:
        self.triggers = Counter("streamformer_triggers_total", "Users found due, by reason.", "reason")
        self.queue_users = Gauge("streamformer_queue_users", "Users waiting in the encode queue.")
        self.shed = Counter(
            "streamformer_shed_total", "Due users left out for want of room, by reason; they stay due.", "reason"
        )
        self.encode_batches = Counter("streamformer_encode_batches_total", "Batches that the encoder ran.")
        self.encoded_users = Counter("streamformer_encoded_users_total", "Embeddings computed.")
        self.encode_seconds = Histogram(
            "streamformer_encode_seconds", "Time of the encoder for one batch.", bounds=WORK_BOUNDS_SECONDS
        )
        self.encode_batch_users = Histogram(
            "streamformer_encode_batch_users", "Users in one batch of the encoder.", bounds=BATCH_BOUNDS_USERS
        )
        self.encode_failures = Counter("streamformer_encode_failures_total", "Attempts of the encoder that failed.")
        self.cache_hits = Counter(
            "streamformer_cache_hits_total", "Embeddings computed from cached keys and values alone."
        )
        self.cache_prefills = Counter(
            "streamformer_cache_prefills_total", "Embeddings for which a sequence was computed from its start."
        )

    def _publishing(self) -> None:
        self.embeddings_published = Counter(
            "streamformer_embeddings_published_total", "Embeddings acknowledged by the output topic."
        )
        self.publish_failures = Counter(
            "streamformer_publish_failures_total", "Embeddings that could not be published and are encoded again."
        )
        self.freshness_seconds = Histogram(
            "streamformer_freshness_seconds",
            "Publish time minus event time of the newest action inside.",
            bounds=LATENCY_BOUNDS_SECONDS,
        )

    def _partitions(self) -> None:
        self.checkpoint_seconds = Histogram(
            "streamformer_checkpoint_seconds", "Time of one partition's checkpoint.", bounds=WORK_BOUNDS_SECONDS
        )
        self.checkpoint_failures = Counter(
            "streamformer_checkpoint_failures_total", "Checkpoints that were aborted and are made again."
        )
        self.changelog_records = Counter("streamformer_changelog_records_total", "Records written to the changelog.")
        self.changelog_bytes = Counter("streamformer_changelog_bytes_total", "Keys and values in the changelog.")
        self.partitions = Gauge("streamformer_partitions", "Partitions of this worker, by state.", "state")
        self.restored_records = Counter("streamformer_restored_records_total", "Changelog records restored.")
        self.restore_remaining = Gauge(
            "streamformer_restore_remaining_records", "Changelog records still to be restored.", "partition"
        )
        self.restore_seconds = Histogram(
            "streamformer_restore_seconds",
            "Time from fencing a partition to its first event.",
            bounds=RESTORE_BOUNDS_SECONDS,
        )
        self.fenced = Counter(
            "streamformer_fenced_total", "Partitions lost because another worker fenced this one at the broker."
        )

    def __iter__(self) -> Iterator[Counter | Gauge | Histogram]:
        """Every instrument, in the order of the catalogue."""
        return iter(vars(self).values())

    def keep_partitions(self, mine: Collection[int]) -> None:
        """Report no gauges of other partitions than `mine`: the workers that have them now do."""
        for gauge in self:
            if isinstance(gauge, Gauge) and gauge.labels == ("partition",):
                for (number,) in gauge.samples():
                    if int(number) not in mine:
                        gauge.remove(partition=number)

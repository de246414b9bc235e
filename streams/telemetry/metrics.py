"""The catalogue of metrics: every figure that a worker reports is one attribute of `Metrics`.

Instruments hold their own numbers and do not depend on a monitoring system; `prometheus.py` serves them. They are
updated once per batch, from any thread. Labels come from closed sets or are partition numbers, never user ids.
docs/reference/metrics.md is generated from this module.
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
"""Values of an instrument's labels, in the order of their names."""


class Kind(StrEnum):
    """Kind of an instrument, by Prometheus' names."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Distribution:
    """Observations of a histogram with one set of labels.

    `counts[i]` is the number of observations above bound i - 1 and at or below bound i; the last count has no bound.
    """

    counts: I64
    total: float


class Instrument:
    """A metric: its `name` with the unit last, one line of `help`, and the names of its labels."""

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
        """Return the present number; 0 for labels that were never used."""
        return self._numbers.get(self._values(labels), 0.0)

    def samples(self) -> dict[Labels, float]:
        """Return a copy of all numbers, by label values."""
        with self._lock:
            return dict(self._numbers)


class Counter(_Number):
    """A number that only increases."""

    kind = Kind.COUNTER

    def inc(self, amount: float = 1, **labels: Label) -> None:
        """Add `amount`, which must not be negative."""
        if amount < 0:
            raise ValueError(f"{self.name} cannot fall by {-amount}")
        values = self._values(labels)
        with self._lock:
            self._numbers[values] = self._numbers.get(values, 0.0) + amount


class Gauge(_Number):
    """A number that rises and falls."""

    kind = Kind.GAUGE

    def set(self, value: float, **labels: Label) -> None:
        """Replace the number."""
        values = self._values(labels)
        with self._lock:
            self._numbers[values] = float(value)

    def remove(self, **labels: Label) -> None:
        """Stop reporting these labels, because the partition belongs to another worker now."""
        values = self._values(labels)
        with self._lock:
            self._numbers.pop(values, None)


class Histogram(Instrument):
    """Counts of observations by `bounds`, which are ascending upper limits."""

    kind = Kind.HISTOGRAM

    def __init__(self, name: str, help_: str, *labels: str, bounds: tuple[float, ...]) -> None:
        super().__init__(name, help_, *labels)
        self.bounds = bounds
        self._edges = np.array(bounds, np.float64)
        self._held: dict[Labels, Distribution] = {} if labels else {(): self._empty()}

    def observe(self, value: float, **labels: Label) -> None:
        """Count one observation."""
        self.observe_many(np.array([value], np.float64), **labels)

    def observe_many(self, values: npt.NDArray[Any], **labels: Label) -> None:
        """Count a batch of observations, except those that are NaN."""
        known = values[~np.isnan(values)]
        counts = np.bincount(np.searchsorted(self._edges, known, side="left"), minlength=len(self.bounds) + 1)
        total, of = float(known.sum()), self._values(labels)
        with self._lock:
            held = self._held.get(of) or self._empty()
            self._held[of] = Distribution(held.counts + counts, held.total + total)

    def samples(self) -> dict[Labels, Distribution]:
        """Return all distributions, by label values."""
        with self._lock:
            return dict(self._held)

    def _empty(self) -> Distribution:
        return Distribution(np.zeros(len(self.bounds) + 1, np.int64), 0.0)


LATENCY_BOUNDS_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
"""Bounds around the objectives of freshness: p50 10 ms, p99 50 ms, 500 ms during a fault."""
SKEW_BOUNDS_SECONDS = (0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 3600.0, 86400.0)
WORK_BOUNDS_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
RESTORE_BOUNDS_SECONDS = (0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
BATCH_BOUNDS_USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """All instruments of one worker."""

    def __init__(self) -> None:
        self._ingestion()
        self._positions()
        self._users()
        self._encoding()
        self._publishing()
        self._times()
        self._partitions()
        self.info = Gauge(
            "streamformer_info",
            "Constant 1; the labels hold the versions that this worker runs.",
            "version",
            "encoder_version",
            "dtype",
        )

    def _ingestion(self) -> None:
        self.events = Counter("streamformer_events_total", "Records read from the action topic, valid or not.")
        self.rejected = Counter(
            "streamformer_refused_total", "Records sent to the dead-letter topic, by reason.", "reason"
        )
        self.duplicates = Counter(
            "streamformer_duplicates_total", "Events ignored because they had been applied before."
        )
        self.late_inserted = Counter(
            "streamformer_late_inserted_total", "Late events inserted at their place in the sequence."
        )
        self.late_dropped = Counter(
            "streamformer_late_dropped_total",
            "Late events dropped because they are older than every action of a full sequence.",
        )
        self.forgotten_dropped = Counter(
            "streamformer_forgotten_dropped_total",
            "Events dropped because their user was forgotten after they had happened.",
        )
        self.tombstones = Counter("streamformer_tombstones_total", "Requests to forget a user that were carried out.")
        self.users_expired = Counter(
            "streamformer_users_expired_total", "Users forgotten because they had no action for state.user_ttl_ms."
        )
        self.tombstones_unmatched = Counter(
            "streamformer_tombstones_unmatched_total", "Requests to forget a user of whom no action was known."
        )

    def _positions(self) -> None:
        self.position_gaps = Counter(
            "streamformer_position_holes_total",
            "Batches read again after a seek because records before them were missing.",
        )
        self.events_expired = Counter(
            "streamformer_events_expired_total", "Records lost because retention deleted them before they were read."
        )
        self.offsets_rewound = Counter(
            "streamformer_offsets_rewound_total",
            "Partitions whose committed offset was before their state; they continue at the state.",
        )
        self.corrupt_records_skipped = Counter(
            "streamformer_corrupt_records_skipped_total",
            "Offsets of damaged record batches that were skipped, because kafka.skip_corrupt_batches is set.",
        )
        self.consumer_lag = Gauge(
            "streamformer_consumer_lag_records",
            "Offsets of the action topic up to the last stable one that are not yet processed.",
            "partition",
        )
        self.open_transaction_records = Gauge(
            "streamformer_open_transaction_records",
            "Offsets of the action topic that cannot be read yet, because a producer's transaction is open.",
            "partition",
        )
        self.processed_offset = Gauge(
            "streamformer_processed_offset", "Offset after the last processed record.", "partition"
        )
        self.committed_offset = Gauge(
            "streamformer_committed_offset", "Offset committed by the last checkpoint.", "partition"
        )

    def _users(self) -> None:
        self.hot_users = Gauge("streamformer_hot_users", "Users whose sequences are in memory.")
        self.hot_limit_users = Gauge(
            "streamformer_hot_limit_users",
            "Maximum of streamformer_hot_users: the sum of the partitions' shares of state.hot_users_worker_max.",
        )
        self.deadline_entries = Gauge(
            "streamformer_deadline_entries", "Entries of pending deadlines in memory: at most two per user, hot or not."
        )
        self.corrupt_users = Counter(
            "streamformer_corrupt_users_total", "Users quarantined because their stored state is corrupt."
        )

    def _encoding(self) -> None:
        self.triggers = Counter("streamformer_triggers_total", "Users found due, by reason.", "reason")
        self.queue_users = Gauge("streamformer_queue_users", "Users waiting in the encode queue.")
        self.shed = Counter(
            "streamformer_shed_total", "Due users that a full queue did not take, by reason; they stay due.", "reason"
        )
        self.promoted = Counter(
            "streamformer_promoted_total",
            "Waiting users moved up in the encode queue, by the more valuable reason for which they became due.",
            "reason",
        )
        self.encode_batches = Counter("streamformer_encode_batches_total", "Batches encoded.")
        self.encoded_users = Counter("streamformer_encoded_users_total", "Embeddings computed.")
        self.encode_seconds = Histogram(
            "streamformer_encode_seconds", "Time to encode one batch.", bounds=WORK_BOUNDS_SECONDS
        )
        self.encode_batch_users = Histogram(
            "streamformer_encode_batch_users", "Number of users per encoded batch.", bounds=BATCH_BOUNDS_USERS
        )
        self.encode_failures = Counter("streamformer_encode_failures_total", "Attempts to encode a batch that failed.")
        self.unencodable = Counter(
            "streamformer_unencodable_users_total",
            "Users that the encoder could not embed, or embedded as NaN; they are dead-lettered and tried again later.",
        )
        self.cache_hits = Counter(
            "streamformer_cache_hits_total", "Embeddings computed from cached keys and values alone."
        )
        self.cache_prefills = Counter(
            "streamformer_cache_prefills_total", "Embeddings for which the whole sequence was computed."
        )

    def _publishing(self) -> None:
        self.embeddings_published = Counter(
            "streamformer_embeddings_published_total", "Embeddings acknowledged by the output topic."
        )
        self.publish_failures = Counter(
            "streamformer_publish_failures_total",
            "Embeddings and features that were not acknowledged; their users are published again.",
        )
        self.features_published = Counter(
            "streamformer_features_published_total", "Users whose features were acknowledged by their topic."
        )
        self.features_refreshed = Counter(
            "streamformer_features_refreshed_total",
            "Users whose features were published again because a value changed without an event.",
        )
        self.features_incomplete = Counter(
            "streamformer_features_incomplete_total",
            "Published users with a feature that has not seen its whole window.",
        )
        self.features_rebuilt = Counter(
            "streamformer_features_rebuilt_total",
            "Users loaded whose features were computed again, at least in part, from their kept actions.",
        )
        self.features_damaged = Counter(
            "streamformer_features_damaged_total",
            "Users loaded whose stored features could not be read, although their checksum was right.",
        )
        self.unacknowledged_seconds = Gauge(
            "streamformer_output_unacknowledged_seconds",
            "Age of the oldest output of a partition that the broker has not acknowledged; failures count as one wait.",
            "partition",
        )
        self.output_producers = Counter(
            "streamformer_output_producers_total", "Producers started for outputs; after the first ones, replacements."
        )
        self.dead_letters_shortened = Counter(
            "streamformer_dead_letters_shortened_total", "Dead letters sent without a value that was too large."
        )
        self.holds = Counter(
            "streamformer_holds_total",
            "Times that a partition was not read for a while: its dead letters or users in memory were at a limit.",
        )

    def _times(self) -> None:
        """Freshness and its two parts: what the path takes, and what producers and their clocks add."""
        self.freshness_seconds = Histogram(
            "streamformer_freshness_seconds",
            "Publish time minus event time of the newest action in the embedding; 0 if that time is in the future.",
            bounds=LATENCY_BOUNDS_SECONDS,
        )
        self.freshness_clamped = Counter(
            "streamformer_freshness_clamped_total",
            "Embeddings whose newest action has a time in the future, so that their freshness was counted as 0.",
        )
        self.latency_seconds = Histogram(
            "streamformer_latency_seconds",
            "Publish time minus arrival time of the last event in the embedding, unless the user left memory since.",
            bounds=LATENCY_BOUNDS_SECONDS,
        )
        self.skew_behind_seconds = Histogram(
            "streamformer_skew_behind_seconds",
            "Arrival time minus event time of applied events that happened before they arrived.",
            bounds=SKEW_BOUNDS_SECONDS,
        )
        self.skew_ahead_seconds = Histogram(
            "streamformer_skew_ahead_seconds",
            "Event time minus arrival time of applied events that claim to happen after they arrived.",
            bounds=SKEW_BOUNDS_SECONDS,
        )

    def _partitions(self) -> None:
        self.checkpoint_seconds = Histogram(
            "streamformer_checkpoint_seconds",
            "Time to write one checkpoint of one partition.",
            bounds=WORK_BOUNDS_SECONDS,
        )
        self.checkpoint_failures = Counter(
            "streamformer_checkpoint_failures_total", "Checkpoints that were aborted and will be repeated."
        )
        self.checkpoints_put_off = Counter(
            "streamformer_checkpoints_put_off_total",
            "Checkpoints put off because dead letters or tombstones were not acknowledged in time.",
        )
        self.changelog_records = Counter("streamformer_changelog_records_total", "Records written to the changelog.")
        self.changelog_bytes = Counter(
            "streamformer_changelog_bytes_total", "Bytes of keys and values written to the changelog."
        )
        self.partitions = Gauge(
            "streamformer_partitions",
            "Partitions assigned to this worker, by state: ready, restoring or halted.",
            "state",
        )
        self.halts = Counter(
            "streamformer_halts_total",
            "Times that a partition was halted: it could not go on while others could.",
        )
        self.stores_rebuilt = Counter(
            "streamformer_stores_rebuilt_total",
            "Local databases deleted and rebuilt because they are damaged or belong to another changelog.",
        )
        self.former_stores = Gauge(
            "streamformer_former_stores",
            "Local databases of partitions that other workers have now; deleted after state.former_store_ttl_ms.",
        )
        self.former_stores_deleted = Counter(
            "streamformer_former_stores_deleted_total",
            "Local databases deleted because their partition moved to another worker long enough ago.",
        )
        self.outputs_noted = Counter(
            "streamformer_outputs_noted_total",
            "Published users without state that were noted on disk while a partition was acquired, so that a replay "
            "does not publish them again.",
        )
        self.restored_records = Counter("streamformer_restored_records_total", "Changelog records read by restores.")
        self.restore_remaining = Gauge(
            "streamformer_restore_remaining_records", "Changelog offsets left to restore.", "partition"
        )
        self.restore_seconds = Histogram(
            "streamformer_restore_seconds",
            "Time from the start of acquiring a partition until it is ready.",
            bounds=RESTORE_BOUNDS_SECONDS,
        )
        self.fenced = Counter(
            "streamformer_fenced_total", "Partitions lost because another worker fenced this worker at the broker."
        )

    def __iter__(self) -> Iterator[Counter | Gauge | Histogram]:
        """Yield every instrument, in the order of the catalogue."""
        return iter(vars(self).values())

    def keep_partitions(self, mine: Collection[int]) -> None:
        """Remove the gauges of all partitions except `mine`; the workers that own the others report them."""
        for gauge in self:
            if isinstance(gauge, Gauge) and gauge.labels == ("partition",):
                for (number,) in gauge.samples():
                    if int(number) not in mine:
                        gauge.remove(partition=number)

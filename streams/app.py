"""Composition: one worker's parts, built from its settings and plugged together.

Everything that Faust and aiokafka do differently here is set in this file: `install_overrides` replaces classes and
names inside the libraries, and `_faust_app` passes our table, table manager and transport to the Faust app.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faust
from faust.types import TP
from rocksdict import Cache
from yarl import URL

from encoder import inference
from encoder.inference import EncoderRuntime
from streams.config.settings import Settings
from streams.core.features.partition import FeatureConfig
from streams.core.features.schema import value_bytes_max
from streams.core.layout import StateLimits
from streams.core.policy import TriggerPolicy, parse_policy
from streams.encoding.no_encoder import NoEncoder
from streams.encoding.queue import EncodeQueuePolicy
from streams.engine.compat import STORE_URL, install_overrides
from streams.engine.dead_letters import size_of
from streams.engine.delivery import BatchTransport
from streams.engine.former_stores import FormerStores
from streams.engine.membership import Assignor
from streams.engine.outputs import OutputsConfig
from streams.engine.partition_host import PartitionsConfig
from streams.engine.recovery import with_on_assigned
from streams.engine.table import TABLE_NAME, SequenceTable
from streams.engine.topic_limits import TopicLimits
from streams.engine.topic_watch import TopicWatch
from streams.errors import SettingsError
from streams.expiry import Expiry
from streams.features import load_features
from streams.ingest import InFlightLimits
from streams.parts import PartsConfig, WorkerParts
from streams.storage.codec import largest_value
from streams.storage.identity import layout_of
from streams.storage.store import PartitionStore
from streams.telemetry.metrics import Metrics
from streams.wire.actions import DecodeLimits
from streams.wire.embeddings import EmbeddingCodec, largest_embedding
from streams.wire.features import largest_features

STREAM_BUFFER_FETCHES = 4
"""Fetches, not events: one Faust message holds everything that a fetch returned."""
REQUEST_TIMEOUT_MIN_S = 90.0
REBALANCE_TIMEOUT_S = 60.0
"""Time that all members have to join again during a rebalance."""
MAX_POLL_INTERVAL_S = 10 * 365 * 86_400.0
"""Effectively no limit. aiokafka leaves the group, and never joins again, when nothing was fetched for so long. That is
normal for a spare worker and for a long restore; the watchdog is what detects a stall."""


def now_ms() -> int:
    """Return processing time."""
    return time.time_ns() // 1_000_000


class WorkerApp(WorkerParts):
    """The parts of one worker, with Faust, RocksDB and the encoder of the settings."""

    def __init__(self, settings: Settings, *, abort: Callable[[str], None]) -> None:
        install_overrides()
        self.settings = settings
        self._block_cache = Cache(settings.checkpoint.store_cache_bytes)
        config = _parts_config(settings)
        super().__init__(config, load_encoder(settings, config.features), Metrics(), now_ms=now_ms, abort=abort)
        topics = settings.topics
        watched = (topics.actions, settings.changelog_topic, *settings.output_topics, topics.dead_letter)
        self.topic_watch = TopicWatch(self.partitions, self.partitions.cluster, watched, topics.partitions)
        self.former_stores = FormerStores(
            settings.data_dir,
            settings.changelog_topic,
            self.partitions,
            self.metrics,
            ttl_ms=settings.state.former_store_ttl_ms,
            now_ms=now_ms,
        )
        self.expiry = Expiry(self.ingest, self.partitions, settings.state.user_ttl_ms, now_ms)
        self.faust = self._faust_app()
        self.metrics.info.set(
            1, version=version("streamformer"), encoder_version=self.runtime.version, dtype=self.runtime.dtype
        )

    # -- Faust

    def _faust_app(self) -> Any:
        settings = self.settings
        faust_dir = settings.data_dir / "faust"
        faust_dir.mkdir(parents=True, exist_ok=True)
        urls = [URL(f"kafka://{server.strip()}") for server in settings.kafka.bootstrap_servers.split(",")]
        app = faust.App(
            settings.app_id,
            broker=urls,
            datadir=str(faust_dir),
            store=STORE_URL,  # read-only; the checkpoints of `Partitions` write
            PartitionAssignor=Assignor,  # accepts an assignment made under another URL
            Table=SequenceTable,  # starts and stops `Partitions`
            TableManager=with_on_assigned(self.partitions.on_assigned),  # restores nothing itself
            **_faust_options(settings),
        )
        app.transport = BatchTransport(  # one message per fetch instead of one per record
            urls,
            app,
            batched_topics=frozenset({settings.topics.actions}),
            fetch_max_wait_ms=settings.kafka.fetch_max_wait_ms,
            skip_corrupt_batches=settings.kafka.skip_corrupt_batches,
        )
        app.partitions = self.partitions
        self.partitions.app = app
        app.Table(TABLE_NAME, partitions=settings.topics.partitions, key_type=bytes, value_type=bytes)
        source = app.topic(settings.topics.actions, key_type=bytes, value_type=bytes, value_serializer="raw")
        app.agent(source, name="ingest")(self._ingest_stream)
        app.on_partitions_revoked.connect(self._on_partitions_revoked)
        return app

    async def _ingest_stream(self, stream: Any) -> None:
        async for batches in stream:
            await self.on_batches(batches)

    async def _on_partitions_revoked(self, app: Any, revoked: set[TP], **kwargs: Any) -> None:
        await self.partitions.revoke_all()
        gc.collect()  # revoked partitions are held by cycles, which the collector would not visit for a long time

    def open_store(self, path: Path) -> PartitionStore:
        """Open a local database; all databases of the worker share one block cache."""
        return PartitionStore.open(path, cache=self._block_cache)

    def destroy_store(self, path: Path) -> None:
        """Delete a local database."""
        PartitionStore.destroy(path)

    def largest_records(self) -> dict[str, int]:
        """Return the size of the largest record that this worker may write to each topic, as far as that is bounded."""
        settings = self.settings
        id_bytes = 4 * settings.decode.id_chars_max  # UTF-8 takes at most four bytes per character
        largest = {settings.changelog_topic: size_of((bytes(id_bytes), bytes(largest_value(self._config.state)), []))}
        if self.runtime.version:
            codec = EmbeddingCodec(settings.output.codec)
            embedding = largest_embedding(id_bytes, self.runtime.embedding_dim, self.runtime.version, codec)
            largest[settings.topics.embeddings] = size_of(embedding)
        if (features := self._config.features) is not None:
            feature_set = features.feature_set
            value_bytes = value_bytes_max(feature_set, *features.attributes.longest_texts())
            names = [each.name for each in feature_set.features]
            largest[settings.topics.features] = size_of(largest_features(id_bytes, names, value_bytes))
        return largest


def load_encoder(settings: Settings, features: FeatureConfig | None = None) -> EncoderRuntime:
    """Load the release; one thread, because more cores are used by more workers. Raises `SettingsError`.

    A worker that computes features needs none.
    """
    encoder = settings.encoder
    if encoder.release_dir is None and features is not None:
        return NoEncoder()
    if encoder.release_dir is None:
        remedy = "create a release with `streamformer train` or `make demo`"
        raise SettingsError([f"encoder.release_dir: the worker needs a release; {remedy}"])
    if importlib.util.find_spec("torch") is None:
        remedy = "run pip install 'streamformer[worker]', or leave it out to publish features only"
        raise SettingsError([f"encoder.release_dir: an encoder needs torch, which is not installed; {remedy}"])
    runtime = inference.load_runtime(  # imports torch, which a worker without an encoder does without
        encoder.release_dir,
        kind=encoder.runtime,
        cache_bytes_max=encoder.cache_bytes_max,
        threads=1,
        dtype=encoder.dtype,
    )
    _check_sequence_length(settings.state.sequence_length, runtime)
    return runtime


def _check_sequence_length(kept: int, runtime: EncoderRuntime) -> None:
    """Raise `SettingsError` when the state keeps fewer actions than the release looks back."""
    if kept < runtime.actions_needed:
        raise SettingsError(
            [
                f"state.sequence_length: the state keeps {kept} actions per user, but release {runtime.version} looks "
                f"back {runtime.actions_needed}, so embeddings would depend on what is cached; set it to at least "
                f"{runtime.actions_needed} with a new app_id, or use a release with smaller windows"
            ]
        )


def _trigger_policy(settings: Settings) -> TriggerPolicy:
    """Return the policy of the settings; without a file every action is a trigger."""
    path = settings.triggers.policy_file
    return TriggerPolicy() if path is None else parse_policy(path.read_text())


def _state_limits(settings: Settings) -> StateLimits:
    state = settings.state
    return StateLimits(
        sequence_length=state.sequence_length,
        chunk_length=state.chunk_length,
        hot_users_max=state.hot_users_max,
        wake_users_max=min(state.wake_users_max, state.hot_users_max),
        user_ttl_ms=state.user_ttl_ms,
        counts_too_old=settings.features.definitions_file is not None,
    )


def _outputs_config(settings: Settings, client: Mapping[str, Any]) -> OutputsConfig:
    topics, written = settings.topics, settings.output_topics
    return OutputsConfig(
        embeddings_topic=topics.embeddings if topics.embeddings in written else "",
        features_topic=topics.features if topics.features in written else "",
        dead_letter_topic=settings.topics.dead_letter,
        codec=EmbeddingCodec(settings.output.codec),
        client=client,
        request_timeout_ms=settings.output.request_timeout_ms,
    )


def _parts_config(settings: Settings) -> PartsConfig:
    client, output, features = settings.kafka.client_options(), settings.output, load_features(settings)
    limits = _topic_limits(settings, client)
    return PartsConfig(
        policy=_trigger_policy(settings),
        state=_state_limits(settings),
        hot_users_worker_max=_hot_users_worker_max(settings, features),
        decode=DecodeLimits(**settings.decode.model_dump(), with_values=features is not None),
        queue=EncodeQueuePolicy(**settings.queue.model_dump()),
        outputs=_outputs_config(settings, client),
        partitions=_partitions_config(settings, client, limits),
        checkpoint_events_max=settings.checkpoint.events_max,
        in_flight_max=InFlightLimits(output.dead_letters_max, output.dead_letter_bytes_max),
        features=features,
    )


def _hot_users_worker_max(settings: Settings, features: FeatureConfig | None) -> int:
    """Return how many users of all partitions may be in memory, by number and by the memory of their features."""
    users_max = settings.state.hot_users_worker_max
    if features is None:
        return users_max
    row_bytes = features.row_bytes()
    affordable = settings.features.memory_bytes_max // row_bytes
    if affordable < settings.topics.partitions:
        raise SettingsError(
            [
                f"features.memory_bytes_max: the features of one user take {row_bytes} bytes in memory, so "
                f"{settings.features.memory_bytes_max} are not enough for a user in each of "
                f"{settings.topics.partitions} partitions; raise it, or lower the caps of the definitions"
            ]
        )
    return min(users_max, affordable)


def _topic_limits(settings: Settings, client: Mapping[str, Any]) -> TopicLimits:
    topics = settings.topics
    written = *settings.output_topics, topics.dead_letter, settings.changelog_topic
    return TopicLimits(client, written, partitions=topics.partitions)


def _partitions_config(settings: Settings, client: Mapping[str, Any], limits: TopicLimits) -> PartitionsConfig:
    return PartitionsConfig(
        app_id=settings.app_id,
        source_topic=settings.topics.actions,
        source_partitions=settings.topics.partitions,
        changelog_topic=settings.changelog_topic,
        client=client,
        data_dir=settings.data_dir,
        checkpoint_interval_ms=settings.checkpoint.interval_ms,
        transaction_timeout_ms=settings.kafka.transaction_timeout_ms,
        session_timeout_ms=settings.kafka.session_timeout_ms,
        layout=layout_of(_state_limits(settings)),
        limits=limits,
        restores_max=settings.checkpoint.restores_max,
    )


def _faust_options(settings: Settings) -> dict[str, Any]:
    """Return the plain options of the Faust app: security, consumer group, sizes and timeouts."""
    kafka = settings.kafka
    session_timeout_s = kafka.session_timeout_ms / 1000
    return {
        "broker_credentials": _faust_credentials(settings),
        "topic_partitions": settings.topics.partitions,
        "topic_allow_declare": False,
        "topic_disable_leader": True,
        "web_enabled": False,
        "stream_buffer_maxsize": STREAM_BUFFER_FETCHES,
        "consumer_auto_offset_reset": "earliest",
        "consumer_group_instance_id": settings.worker.instance_id,
        "consumer_max_fetch_size": kafka.fetch_bytes_max,
        "broker_max_poll_records": kafka.poll_records_max,
        "broker_session_timeout": session_timeout_s,
        "broker_heartbeat_interval": kafka.heartbeat_interval_ms / 1000,
        "broker_rebalance_timeout": REBALANCE_TIMEOUT_S,
        "broker_max_poll_interval": MAX_POLL_INTERVAL_S,
        # Assignments name the URL of their member. The default is made of the host's name, which changes when a
        # container is created again; a static member is one and the same wherever it runs.
        "canonical_url": URL.build(scheme="http", host="worker", path=f"/{settings.worker.instance_id}"),
        "broker_request_timeout": max(REQUEST_TIMEOUT_MIN_S, session_timeout_s + 5),
    }


def _faust_credentials(settings: Settings) -> Any:
    """Translate Kafka's security settings for Faust; None for a plaintext connection."""
    kafka, options = settings.kafka, settings.kafka.client_options()
    context = options.get("ssl_context")
    if kafka.security_protocol.startswith("SASL"):
        return faust.SASLCredentials(
            mechanism=kafka.sasl_mechanism,
            username=kafka.sasl_username,
            password=kafka.sasl_password.get_secret_value(),
            ssl_context=context,
        )
    return faust.SSLCredentials(context=context) if context is not None else None

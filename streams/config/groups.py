"""The groups of settings: each key with its bounds, its default and its description; `settings.py` combines them."""

from __future__ import annotations

import re
import socket
import ssl
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FilePath, SecretStr, model_validator

from streams.errors import SettingsError

Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")]
Port = Annotated[int, Field(ge=0, le=65_535)]


def _servers(text: str) -> str:
    for server in text.split(","):
        if not re.fullmatch(r"\s*(\[[0-9a-fA-F:]+\]|[^\s:/]+):\d{1,5}\s*", server):
            raise ValueError(f"{server!r} is not host:port; separate several by commas")
    return text


class Group(BaseModel):
    """Base of every group: frozen, unknown keys are rejected, and the string under a key is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class KafkaSettings(Group):
    """Connection to Kafka, and how much is fetched at once."""

    bootstrap_servers: Annotated[str, AfterValidator(_servers)] = "127.0.0.1:9092"
    """Addresses of brokers, `host:port`, separated by commas."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """Encryption and authentication, by Kafka's names."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    """SASL mechanism; used only with a SASL protocol."""
    sasl_username: str = ""
    """User name; required with a SASL protocol."""
    sasl_password: SecretStr = SecretStr("")
    """Password; required with a SASL protocol."""
    ssl_ca_file: FilePath | None = None
    """PEM file of trusted certificates; default: those of the operating system."""
    ssl_cert_file: FilePath | None = None
    """PEM file of the client's certificate, if the broker requires one."""
    ssl_key_file: FilePath | None = None
    """PEM file of the private key of `ssl_cert_file`."""
    ssl_key_password: SecretStr = SecretStr("")
    """Password of the private key."""
    ssl_check_hostname: bool = True
    """Require that the broker's certificate names its host."""
    poll_records_max: Positive = 4_000
    """Maximum number of records per fetch, over all partitions."""
    fetch_bytes_max: Positive = 4_194_304
    """Maximum number of bytes per fetch and partition."""
    fetch_max_wait_ms: Positive = 20
    """Time that the broker may delay the response to a fetch while there is nothing to read. A partition that was still
    being processed when the fetch was sent waits for the next one, so this delay adds to freshness."""
    skip_corrupt_batches: bool = False
    """Skip record batches of the action topic that are damaged (checksum, length, compressed content), and count their
    offsets as lost. By default the partition halts at such a batch."""
    session_timeout_ms: Positive = 10_000
    """Time without a heartbeat after which the group assigns this worker's partitions to others."""
    heartbeat_interval_ms: Positive = 2_000
    """Interval between heartbeats; at most a third of `session_timeout_ms`."""
    transaction_timeout_ms: Positive = 30_000
    """Time after which the broker aborts the transaction of a worker that stopped responding during a checkpoint."""

    @model_validator(mode="after")
    def _check_combinations(self) -> KafkaSettings:
        if self.security_protocol.startswith("SASL") and not (self.sasl_username and self.has_password()):
            raise ValueError(f"{self.security_protocol} needs sasl_username and sasl_password")
        if (self.ssl_cert_file is None) != (self.ssl_key_file is None):
            raise ValueError("ssl_cert_file and ssl_key_file must be set together")
        if self.heartbeat_interval_ms * 3 > self.session_timeout_ms:
            raise ValueError("heartbeat_interval_ms must be at most a third of session_timeout_ms")
        return self

    def has_password(self) -> bool:
        """Return whether a SASL password is set."""
        return bool(self.sasl_password.get_secret_value())

    def client_options(self) -> dict[str, Any]:
        """Return servers and security as keyword arguments for clients of both aiokafka and kafka-python.

        Raises `SettingsError` when a certificate cannot be read.
        """
        options: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap_servers,
            "security_protocol": self.security_protocol,
        }
        if self.security_protocol.endswith("SSL"):
            options["ssl_context"] = self._ssl_context()
        if self.security_protocol.startswith("SASL"):
            options["sasl_mechanism"] = self.sasl_mechanism
            options["sasl_plain_username"] = self.sasl_username
            options["sasl_plain_password"] = self.sasl_password.get_secret_value()
        return options

    def _ssl_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ssl_ca_file)
            context.check_hostname = self.ssl_check_hostname
            if self.ssl_cert_file is not None:
                password = self.ssl_key_password.get_secret_value()
                context.load_cert_chain(self.ssl_cert_file, self.ssl_key_file, lambda: password)
        except (ssl.SSLError, OSError) as error:
            raise SettingsError([f"kafka.ssl_*: a certificate or key cannot be read: {error}"]) from None
        return context


class TopicsSettings(Group):
    """Topics that are read and written."""

    actions: Name = "user-actions"
    """Input topic: actions, keyed by user."""
    embeddings: Name = "user-embeddings"
    """Output topic: the newest embedding of each user; compacted."""
    features: Name = "user-features"
    """Output topic: the newest features of each user; compacted. It is needed where features are computed."""
    dead_letter: Name = "user-actions.dead-letter"
    """Output topic: rejected records, with the reason in a header."""
    partitions: Positive = 4
    """Number of partitions of every topic. It can never change: a user has the same partition in all of them."""


class WorkerSettings(Group):
    """The worker process."""

    instance_id: Name = Field(default_factory=socket.gethostname)
    """Name of this worker in its consumer group (static membership): after a restart under the same name it keeps its
    partitions. Each worker on a machine needs its own name."""
    watchdog_timeout_ms: Positive = 30_000
    """Time without progress, while there is something to read, after which the worker is not live and exits."""
    shutdown_timeout_ms: Positive = 20_000
    """Time that a worker has, once told to stop, to finish work in flight and write its last checkpoint."""


class StateSettings(Group):
    """Sequences of the users, per partition unless stated otherwise."""

    sequence_length: Positive = 256
    """Number of actions kept per user; at least what the release looks back, which a start checks. It cannot change
    while the state exists."""
    chunk_length: Positive = 16
    """Number of actions stored per record; divides `sequence_length` and cannot change while the state exists."""
    hot_users_max: Positive = 65_536
    """Maximum number of users per partition in memory; the others are on disk."""
    hot_users_worker_max: Positive = 262_144
    """Maximum number of users per worker in memory, in equal shares per assigned partition: a partition that comes
    from another worker makes the shares smaller, not the sum larger. `hot_users_max` still bounds each share."""
    wake_users_max: Positive = 10_000
    """Maximum number of users whose timers fire in one step."""
    user_ttl_ms: Annotated[int, Field(ge=0)] = 0
    """Time without an action, by event time, after which a user is forgotten as by a deletion: its sequence is deleted,
    and a tombstone is published. 0 keeps users for ever. It may be changed at any time."""
    former_store_ttl_ms: Annotated[int, Field(ge=0)] = 604_800_000
    """Time after which the local database of a partition that has moved to another worker is deleted; until then the
    partition continues from it if it returns. 0 deletes it as soon as the partition has moved. Databases of another
    app_id are left alone."""


class CheckpointSettings(Group):
    """Durability of the state, and its restore."""

    interval_ms: Positive = 1_000
    """Interval between checkpoints: how long after an event its offset is committed, at most."""
    events_max: Positive = 200_000
    """Number of events since the last checkpoint of a partition that starts the next one at once."""
    restores_max: Positive = 2
    """Maximum number of partitions restored at the same time."""
    store_cache_bytes: Positive = 67_108_864
    """Size of the block cache that all local databases of a worker share."""


class DecodeSettings(Group):
    """Limits of an action; a record beyond one of them becomes a dead letter."""

    value_bytes_max: Positive = 65_536
    """Maximum size of a record's value, in bytes."""
    id_chars_max: Positive = 256
    """Maximum length of a user, item or event id, in characters."""
    name_chars_max: Positive = 64
    """Maximum length of an action type or surface, in characters."""
    timestamp_ahead_max_ms: Annotated[int, Field(ge=0)] = 600_000
    """Maximum by which event time may be ahead of the worker's clock."""
    timestamp_min_ms: Annotated[int, Field(ge=0)] = 315_532_800_000
    """Oldest accepted event time (the year 1980). It is above any current time in seconds, so a producer that sends
    seconds instead of milliseconds is noticed."""
    check_partition: bool = True
    """Reject records whose key belongs to another partition by murmur2, since their user would have two histories."""
    deletion_ce_type: str = ""
    """The `ce_type` of CloudEvents without data that forget their user. Every other CloudEvent without data becomes a
    dead letter."""


class TriggersSettings(Group):
    """Conditions under which a user is due for a new embedding."""

    policy_file: FilePath | None = None
    """TOML file with the trigger policy; without it every action is a trigger."""


class FeaturesSettings(Group):
    """The features that the worker computes; see docs/guides/features.md."""

    definitions_file: FilePath | None = None
    """TOML file with the definitions; without it no features are computed."""
    attributes_file: FilePath | None = None
    """CSV, JSON lines or Parquet file with the item attributes that the definitions use."""
    refresh: Literal["never", "active", "always"] = "never"
    """Whether a user is published again when a value changes without an event: never, only while the newest action is
    at most `refresh_active_ms` old, or always."""
    refresh_every_ms: Positive = 60_000
    """Least time between two such publications of a user."""
    refresh_active_ms: Positive = 604_800_000
    """Age of a user's newest action up to which it counts as active."""
    memory_bytes_max: Positive = 1_073_741_824
    """Memory of the feature state of users in memory, per worker. It bounds how many users are in memory, as
    `state.hot_users_worker_max` does; the others are on disk."""


class EncoderSettings(Group):
    """The encoder that the worker runs."""

    release_dir: Path | None = None
    """Folder of the release. Without one the worker computes features only; without definitions too it does not
    start."""
    runtime: Literal["incremental", "full"] = "incremental"
    """`incremental` reuses the keys and values of actions encoded before; `full` recomputes the whole sequence for each
    embedding."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the matrix products; `auto` measures at start which one is faster."""
    cache_bytes_max: Positive = 1_073_741_824
    """Size of the cache of keys and values of hot users."""


class QueueSettings(Group):
    """The queue of users that are due."""

    users_max: Positive = 100_000
    """Maximum number of waiting users. At the limit ingestion pauses; users beyond it are shed, lowest priority first,
    and stay due."""
    batch_users_max: Positive = 4_096
    """Maximum number of users per batch, however fast the encoder is."""
    batch_ms: Annotated[float, Field(gt=0, le=1_000)] = 50.0
    """Time that the encoder may take per batch; the number of users follows from it. The event loop is blocked while a
    batch is encoded, for at most this time."""
    wait_ms: Annotated[float, Field(ge=0, le=10_000)] = 0.0
    """Time to wait for more users after the first one of a batch; 0 encodes at once those that are waiting."""
    publishing_max: Positive = 8
    """Maximum number of published batches that are not yet acknowledged."""
    attempts_max: Positive = 3
    """Number of attempts to encode a batch of which nothing can be encoded, before its users are put off."""
    retry_backoff_ms: Positive = 200
    """Time between two attempts."""
    stuck_after_ms: Positive = 5_000
    """Time after which a batch that the encoder has not finished makes the worker unready."""


class OutputSettings(Group):
    """Format and delivery of what is published."""

    codec: Literal["float32", "float16", "json"] = "float32"
    """Encoding of the vectors in record values."""
    request_timeout_ms: Positive = 10_000
    """Time that an embedding may wait for the broker's acknowledgement before its user is encoded again."""
    unready_after_ms: Positive = 5_000
    """Time without an acknowledgement of a partition's outputs after which the worker is not ready."""
    dead_letters_max: Positive = 10_000
    """Maximum number of dead letters that a worker has in flight, in equal shares per partition. At the limit the
    partition is not read until some are acknowledged; a fetch that was already read may exceed it."""
    dead_letter_bytes_max: Positive = 33_554_432
    """Maximum size of the dead letters that a worker has in flight, likewise."""


class WebSettings(Group):
    """HTTP server of the worker: `/metrics`, `/livez` and `/readyz`."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 accepts connections from other machines."""
    port: Port = 9_464
    """Port to listen on; 0 picks a free one."""

"""The groups of settings: each key with its bounds, its default and what it means. `settings.py` gathers them."""

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
    """What the groups share: frozen, typos refused, the text under a key is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class KafkaSettings(Group):
    """How to reach Kafka, and how much is fetched at once."""

    bootstrap_servers: Annotated[str, AfterValidator(_servers)] = "127.0.0.1:9092"
    """Addresses `host:port`, separated by commas."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """Encryption and authentication, in Kafka's words."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    """Read with a SASL protocol only."""
    sasl_username: str = ""
    """Needed with a SASL protocol."""
    sasl_password: SecretStr = SecretStr("")
    """Needed with a SASL protocol."""
    ssl_ca_file: FilePath | None = None
    """PEM certificates to trust; the system's where absent."""
    ssl_cert_file: FilePath | None = None
    """The client's PEM certificate, where the broker asks for one."""
    ssl_key_file: FilePath | None = None
    """Its private key."""
    ssl_key_password: SecretStr = SecretStr("")
    """Of the private key."""
    ssl_check_hostname: bool = True
    """Whether the broker's certificate must name its host."""
    poll_records_max: Positive = 4_000
    """Records fetched from all partitions at once."""
    fetch_bytes_max: Positive = 4_194_304
    """Bytes fetched from one partition at once."""
    fetch_max_wait_ms: Positive = 20
    """How long the broker may hold a fetch back while there is nothing to read. A partition that was being consumed
    when the fetch was sent has to wait for its end, so this bounds freshness."""
    session_timeout_ms: Positive = 10_000
    """Silence after which the group gives this worker's partitions to others."""
    heartbeat_interval_ms: Positive = 2_000
    """At most a third of `session_timeout_ms`."""
    transaction_timeout_ms: Positive = 30_000
    """After which the broker aborts the transaction of a worker that fell silent inside a checkpoint."""

    @model_validator(mode="after")
    def _fits(self) -> KafkaSettings:
        if self.security_protocol.startswith("SASL") and not (self.sasl_username and self.has_password()):
            raise ValueError(f"{self.security_protocol} needs sasl_username and sasl_password")
        if (self.ssl_cert_file is None) != (self.ssl_key_file is None):
            raise ValueError("ssl_cert_file and ssl_key_file belong together")
        if self.heartbeat_interval_ms * 3 > self.session_timeout_ms:
            raise ValueError("heartbeat_interval_ms must be at most a third of session_timeout_ms")
        return self

    def has_password(self) -> bool:
        return bool(self.sasl_password.get_secret_value())

    def client_options(self) -> dict[str, Any]:
        """Servers and security as the keyword arguments that aiokafka's and kafka-python's clients both take.

        Raises `SettingsError` where the certificates cannot be read.
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
    """Which topics are read and written."""

    actions: Name = "user-actions"
    """Read: actions keyed by user."""
    embeddings: Name = "user-embeddings"
    """Written: the newest embedding of each user; compacted."""
    dead_letter: Name = "user-actions.dead-letter"
    """Written: refused records with their reason."""
    partitions: Positive = 4
    """Of each topic; they hold the same users by partition, so it is one number and fixed for life."""


class WorkerSettings(Group):
    """One worker process."""

    instance_id: Name = Field(default_factory=socket.gethostname)
    """Names this worker in its group (static membership): a restart under the same name moves no partition. Give each
    worker of a machine its own."""
    watchdog_timeout_ms: Positive = 30_000
    """Without progress while there is something to read, for this long, the worker is not live and exits."""
    shutdown_timeout_ms: Positive = 20_000
    """How long a stopped worker may take to finish what is in flight and to checkpoint."""


class StateSettings(Group):
    """Sequence state of one partition."""

    sequence_length: Positive = 256
    """Actions kept of a user; fixed for the life of the state."""
    chunk_length: Positive = 16
    """Actions rewritten together; divides `sequence_length`; fixed for the life of the state."""
    hot_users_max: Positive = 65_536
    """Users of a partition in memory; the others are on disk."""
    wake_users_max: Positive = 10_000
    """Users whose timers one wake-up may handle."""


class CheckpointSettings(Group):
    """When state becomes durable, and how it is restored."""

    interval_ms: Positive = 1_000
    """At most this long after an event its offset is committed."""
    events_max: Positive = 200_000
    """A partition with this many events since its last checkpoint makes one at once."""
    restores_max: Positive = 2
    """Partitions restored at the same time."""
    store_cache_bytes: Positive = 67_108_864
    """Block cache that the local databases of a worker share."""


class DecodeSettings(Group):
    """What an action may be at most; anything beyond is a dead letter."""

    value_bytes_max: Positive = 65_536
    """Bytes of a record's value."""
    id_chars_max: Positive = 256
    """Characters of a user, item or event id."""
    name_chars_max: Positive = 64
    """Characters of an action type or surface."""
    timestamp_ahead_max_ms: Annotated[int, Field(ge=0)] = 600_000
    """How far event time may be ahead of the clock."""
    timestamp_min_ms: Annotated[int, Field(ge=0)] = 315_532_800_000
    """The oldest event time (1980): above every present time in seconds, which is how those are noticed."""


class TriggersSettings(Group):
    """When a user is due."""

    policy_file: FilePath | None = None
    """TOML file with the trigger policy; without one every action is a trigger."""


class EncoderSettings(Group):
    """The encoder that the worker runs."""

    release_dir: Path | None = None
    """Folder of the release; needed by `streamformer worker`."""
    runtime: Literal["incremental", "full"] = "incremental"
    """`full` recomputes the whole sequence for each embedding."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the matrix products; `auto` measures at start."""
    cache_bytes_max: Positive = 1_073_741_824
    """Keys and values kept for hot users."""


class QueueSettings(Group):
    """The encode queue."""

    users_max: Positive = 100_000
    """Users waiting; ingestion pauses at this limit, and whoever comes beyond it is shed, lowest priority first."""
    batch_users_max: Positive = 4_096
    """Users encoded at once, however fast the encoder is."""
    batch_ms: Annotated[float, Field(gt=0, le=1_000)] = 50.0
    """How long the encoder may take at once; the number of users follows from that. The event loop stands still
    meanwhile, at most this long."""
    wait_ms: Annotated[float, Field(ge=0, le=10_000)] = 0.0
    """How long a batch may gather after its first user; 0 takes whoever is there."""
    publishing_max: Positive = 8
    """Batches of embeddings that may be unacknowledged at once."""
    attempts_max: Positive = 3
    """Attempts to encode a batch before its users are tried one by one."""
    retry_backoff_ms: Positive = 200
    """Between two attempts."""
    stuck_after_ms: Positive = 5_000
    """A batch that the encoder has not finished after this makes the worker unready."""


class OutputSettings(Group):
    """What is published."""

    codec: Literal["float32", "float16", "json"] = "float32"
    """How vectors are written."""
    request_timeout_ms: Positive = 10_000
    """How long an output may wait for the broker before its users are encoded again."""


class WebSettings(Group):
    """The worker's `/metrics`, `/livez` and `/readyz`."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: Port = 9_464
    """0 takes a free one."""

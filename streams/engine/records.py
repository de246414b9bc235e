"""The shape of a Kafka record as the rooms beside the engine see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class KafkaRecord(Protocol):
    """What aiokafka and kafka-python call a consumer record; only these attributes are read."""

    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def timestamp_type(self) -> int: ...

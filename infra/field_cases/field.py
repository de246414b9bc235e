"""What a case may use: a broker that others use too, brokers of its own, and applications of its own."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.field_cases.site import Site
from infra.harness.deployment import Overrides, deploy
from infra.kafka.broker import Broker
from infra.kafka.cluster import SIZE, Cluster
from infra.kafka.node import BrokerOptions


@dataclass
class Field:
    """Ground of one case; everything that it starts ends with it."""

    number: int
    servers: str
    """Addresses of the shared broker; a case must leave the broker as it is."""
    folder: Path
    tree: Path | None
    shared_cluster: Callable[[], Cluster]
    """Return three running brokers, which no other case uses at the same time."""
    _stack: ExitStack = field(default_factory=ExitStack)

    def site(
        self,
        overrides: Overrides | None = None,
        *,
        servers: str | None = None,
        environment: Mapping[str, str] | None = None,
        alteration: Sequence[str] = (),
        brokers: int = 1,
        name: str | None = None,
    ) -> Site:
        """Deploy an application and return it; its workers are not started."""
        name = name or f"field-{self.number}-{uuid.uuid4().hex[:8]}"
        deployment = deploy(self.folder / name, servers or self.servers, name, overrides, brokers=brokers)
        return self._stack.enter_context(Site(deployment, self.tree, environment or {}, alteration))

    def cluster(self) -> Cluster:
        """Return three running brokers."""
        return self.shared_cluster()

    def cluster_site(self, overrides: Overrides | None = None, **options: Any) -> Site:
        """Deploy an application on three brokers, with three replicas."""
        return self.site(overrides, servers=self.cluster().bootstrap_servers, brokers=SIZE, **options)

    def own_broker(self, options: BrokerOptions | None = None) -> Broker:
        """Start a broker for this case alone."""
        return self._stack.enter_context(Broker.start(options))

    def __enter__(self) -> Field:
        """Return the field."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop everything that the case has started."""
        self._stack.close()

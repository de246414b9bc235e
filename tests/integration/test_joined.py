"""The subscriber of features and the joined view on a real broker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from infra.harness.events import action, send
from infra.harness.run import Run
from infra.kafka.broker import Broker, ExternalBroker
from streams.errors import StreamformerError
from streams.subscriber import FeatureSubscriber, Joined, JoinedSubscriber, Tombstone
from streams.wire.features import FeatureBatch, encode_features
from streams.wire.headers import encode_tombstone
from tests.integration.test_features import USERS, deployed
from tests.integration.test_subscriber import Publisher, tail

pytestmark = pytest.mark.broker


class FeaturePublisher(Publisher):
    """Writes features as a worker does."""

    def compute(self, user: str, offset: int, as_of_ms: int = 1) -> None:
        """Write the features of a user."""
        one = np.array([offset])
        batch = FeatureBatch(
            [user.encode()],
            [b'{"n":%d}' % offset],
            one,
            one,
            np.array([as_of_ms]),
            np.array([as_of_ms + 1]),
            ["every_n"],
            [{}],
            [()],
            "set1",
            1_700_000_000_000,
        )
        for message in encode_features(batch):
            self.send(message)


@pytest.fixture
def publishers(broker: Broker | ExternalBroker, topic_prefix: str) -> Iterator[tuple[Publisher, FeaturePublisher]]:
    """Return publishers to two new topics: of embeddings and of features."""
    embeddings = Publisher(broker.bootstrap_servers, f"{topic_prefix}-embeddings")
    features = FeaturePublisher(broker.bootstrap_servers, f"{topic_prefix}-features")
    yield embeddings, features
    embeddings.close()
    features.close()


def test_both_topics_are_read_as_one(publishers: tuple[Publisher, FeaturePublisher]) -> None:
    """The table has every complete pair of all partitions; then pairs, refreshes and tombstones arrive as changes."""
    embeddings, features = publishers
    for number in range(20):
        features.compute(f"user-{number}", number)
        embeddings.embed(f"user-{number}", number)
    features.compute("user-3", 33)
    topics = (embeddings.topic, features.topic)
    with (
        FeatureSubscriber(features.bootstrap_servers, topic=features.topic, from_beginning=True) as alone,
        JoinedSubscriber(features.bootstrap_servers, topics=topics, from_beginning=True) as joined,
    ):
        wanted = {f"user-{number}": number for number in range(20)}
        assert {user: each.values["n"] for user, each in alone.table().items()} == wanted | {"user-3": 33}
        assert {user: pair.source_offset for user, pair in joined.table().items()} == wanted
        assert joined.unmatched == 1
        embeddings.embed("user-3", 33)
        changes = iter(joined)
        pair = next(changes)
        assert isinstance(pair, Joined)
        assert (pair.source_offset, pair.features.values) == (33, {"n": 33})
        features.compute("user-3", 33, as_of_ms=5)
        refreshed = next(changes)
        assert isinstance(refreshed, Joined)
        assert refreshed.features.metadata.as_of_ms == 5
        assert refreshed.embedding is pair.embedding
        for publisher in publishers:
            publisher.send(encode_tombstone(b"user-3", 40))
        assert next(changes) == Tombstone("user-3", 40)
        assert joined.get("user-3") is None
        assert (joined.malformed, joined.stale, joined.repeated) == (0, 0, 0)


def test_a_topic_that_does_not_exist_is_named(publishers: tuple[Publisher, FeaturePublisher]) -> None:
    """A reader of both topics names the one that is missing."""
    embeddings, _ = publishers
    with pytest.raises(StreamformerError, match="nowhere does not exist"):
        JoinedSubscriber(embeddings.bootstrap_servers, topics=(embeddings.topic, "nowhere"))


def test_tail_prints_features(publishers: tuple[Publisher, FeaturePublisher]) -> None:
    """`tail --features` prints a table per user, one JSON object per line with `--json`, and tombstones."""
    _, features = publishers
    features.compute("ann", 5)
    features.compute("bob", 6)
    features.send(encode_tombstone(b"ann", 7))

    def printed(*options: str) -> list[str]:
        process = tail(features, "--features", "--from-beginning", *options, topic="FEATURES")
        out, error = process.communicate(timeout=30)
        assert error == ""
        return out.splitlines()

    assert printed("--user", "ann", "--count", "2") == [
        "22:13:20.000  ann  every_n  offset 5  set set1  valid until 00:00:00.002",
        "  n  5",
        "ann  forgotten  offset 7",
    ]
    (line,) = printed("--user", "bob", "--count", "1", "--json")
    assert json.loads(line)["values"] == {"n": 6}


@pytest.mark.slow
def test_pairs_of_a_worker_are_complete(broker: Broker | ExternalBroker, topic_prefix: str, tmp_path: Path) -> None:
    """Every user's newest embedding and features of a real worker are of one offset: that of the user's last action."""
    with Run(deployed(tmp_path, broker.bootstrap_servers, topic_prefix)) as run:
        names = run.deployment.settings.topics
        topics = (names.embeddings, names.features)
        run.supervisor.scale(1)
        for number in range(6):
            send(run.deployment.settings, [action(user, number) for user in USERS])
            time.sleep(0.05)
        with JoinedSubscriber(broker.bootstrap_servers, topics=topics, from_beginning=True) as joined:

            def newest() -> dict[str, int]:
                joined.poll(200)
                pairs = {user: joined.get(user) for user in USERS}
                return {user: len(pair.features.values["latest"]) for user, pair in pairs.items() if pair}

            run.wait_until(lambda: newest() == dict.fromkeys(USERS, 3) and not joined.unmatched, 20)
            for user in USERS:
                pair = joined.get(user)
                assert pair is not None
                assert pair.embedding.metadata.event_time_ms == pair.features.metadata.event_time_ms
                assert pair.embedding.metadata.sequence_length == 6
            assert (joined.malformed, joined.evicted) == (0, 0)

"""Requests about topics, while a broker of the cluster is away."""

from __future__ import annotations

from pathlib import Path

import pytest
from kafka.errors import ClusterAuthorizationFailedError, KafkaConnectionError, KafkaError, NodeNotReadyError

from infra.errors import InfraError
from infra.kafka import topics
from streams.config.groups import EncoderSettings, FeaturesSettings
from streams.config.settings import Settings


def failing(*errors: KafkaError) -> list[KafkaError]:
    """Return errors that `answer` raises in turn before it answers."""
    return list(errors)


def answer(errors: list[KafkaError]) -> str:
    """Raise the next error, or answer when there is none left."""
    if errors:
        raise errors.pop(0)
    return "answered"


def test_a_broker_that_is_away_is_asked_about_again() -> None:
    """A connection that fails is no answer: the client finds another broker when it asks again."""
    errors = failing(KafkaConnectionError("111 ECONNREFUSED"), NodeNotReadyError("2"))
    assert topics._asked(answer, errors) == "answered"


def test_brokers_that_stay_away_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while the error says that no broker answers, and not that one has rejected anything."""
    monkeypatch.setattr(topics, "AWAY_S", 0.3)
    with pytest.raises(InfraError, match="no broker answers a request about topics"):
        topics._asked(answer, failing(*[KafkaConnectionError("111 ECONNREFUSED")] * 9))


def test_what_a_broker_rejects_is_not_asked_again() -> None:
    """An answer that is an error is reported at once."""
    errors = failing(ClusterAuthorizationFailedError("no right"), ClusterAuthorizationFailedError("no right"))
    with pytest.raises(InfraError, match="the broker rejected a request about topics"):
        topics._asked(answer, errors)
    assert len(errors) == 1


def test_a_missing_topic_is_reported_with_the_command_that_creates_it(tmp_path: Path) -> None:
    """With definitions, `topics create` alone would leave out the embeddings, so their remedy names the release."""
    (tmp_path / "features.toml").touch()
    encoder = EncoderSettings(release_dir=tmp_path / "my release")
    with_both = Settings(encoder=encoder, features=FeaturesSettings(definitions_file=tmp_path / "features.toml"))
    remedies = {topic.name: topics._differences(topic, None) for topic in topics.topics_of(with_both)}
    plain = "is missing: create it with `streamformer topics create`"
    assert remedies["user-embeddings"] == [f"user-embeddings {plain[:-1]} --release '{tmp_path}/my release'`"]
    assert remedies["user-features"] == [f"user-features {plain}"]
    (_, embeddings, *_) = topics.topics_of(Settings(encoder=encoder))
    assert topics._differences(embeddings, None) == [f"user-embeddings {plain}"]

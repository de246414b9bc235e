"""Each weakness of a topic is a finding with its remedy, and sound topics have none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infra.kafka.durability import TopicFacts, findings
from streams.config.settings import Settings

SETTINGS = Settings()
CONFIGS = {
    "min.insync.replicas": "2",
    "unclean.leader.election.enable": "false",
    "retention.ms": "604800000",
    "retention.bytes": "-1",
    "max.message.bytes": "1048588",
    "min.cleanable.dirty.ratio": "0.5",
}
ACTIONS, DEAD = SETTINGS.topics.actions, SETTINGS.topics.dead_letter
NAMES = (ACTIONS, SETTINGS.topics.embeddings, DEAD, SETTINGS.changelog_topic, "__transaction_state")
SOUND = {name: TopicFacts(name, 4, 3, CONFIGS) for name in NAMES}
SOUND[DEAD] = replace(SOUND[DEAD], configs={**CONFIGS, "max.message.bytes": str(64 << 20)})


def test_sound_topics_have_no_finding() -> None:
    """Three replicas of which two are in sync, clean elections, a week of retention: nothing is weak."""
    assert findings(SETTINGS, SOUND).lines() == []


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        (ACTIONS, {"min.insync.replicas": "1"}, "has min.insync.replicas=1"),
        (ACTIONS, {"min.insync.replicas": "4"}, "above the number of replicas"),
        ("__transaction_state", {"min.insync.replicas": "1"}, "__transaction_state has min.insync.replicas=1"),
        (ACTIONS, {"unclean.leader.election.enable": "true"}, "unclean.leader.election.enable=true"),
        (ACTIONS, {"retention.ms": "3600000"}, "keeps events for 1 h"),
        (ACTIONS, {"retention.bytes": "1000000"}, "retention.bytes=1000000"),
        (DEAD, {"max.message.bytes": "1000"}, f"{DEAD} accepts 1000 bytes"),
        (SETTINGS.changelog_topic, {"min.cleanable.dirty.ratio": "0.99"}, "nearly never compacted"),
    ],
)
def test_each_weakness_is_one_finding(name: str, change: dict[str, str], text: str) -> None:
    """One weak setting of one topic is one line that names the topic, the setting and the remedy."""
    facts = {**SOUND, name: replace(SOUND[name], configs={**SOUND[name].configs, **change})}
    (line,) = findings(SETTINGS, facts).lines()
    assert line.startswith('too weak for "nothing is lost": ')
    assert name in line
    assert text in line


def test_times_of_producers_are_named_and_no_error() -> None:
    """A source topic with the producers' times is one line, and no error for `topics verify --strict`."""
    configs = {**CONFIGS, "message.timestamp.type": "CreateTime"}
    found = findings(SETTINGS, {**SOUND, ACTIONS: replace(SOUND[ACTIONS], configs=configs)})
    (line,) = found.lines()
    assert line.startswith(f"less exact: {ACTIONS} has message.timestamp.type=CreateTime")
    assert found.count == 0
    configs["message.timestamp.type"] = "LogAppendTime"
    assert findings(SETTINGS, {**SOUND, ACTIONS: replace(SOUND[ACTIONS], configs=configs)}).lines() == []


def test_single_replicas_are_one_line_for_all_topics() -> None:
    """Topics of one replica are named together, and without a complaint about their in-sync replicas."""
    facts = {
        name: replace(one, replicas=1, configs={**one.configs, "min.insync.replicas": "1"})
        for name, one in SOUND.items()
    }
    (line,) = findings(SETTINGS, facts).weak
    assert line.startswith(f"{', '.join(NAMES)} have one replica")


def test_what_cannot_be_read_is_assumed_and_said() -> None:
    """Without the right to read settings nothing is called weak on their account; one line names the right."""
    facts = {name: replace(one, configs={}) for name, one in SOUND.items()}
    (line,) = findings(SETTINGS, facts).lines()
    assert line.startswith("not verified: no right to read the settings of ")
    assert "DESCRIBE_CONFIGS" in line

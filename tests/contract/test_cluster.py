"""What a real broker reports about its cluster and topics."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

import kafka
import pytest
from kafka.admin import NewTopic

from streams.engine.cluster import Cluster, ClusterView

pytestmark = pytest.mark.broker


def view(broker: Any, *topics: str) -> ClusterView:
    """Return the cluster with these topics."""
    return asyncio.run(Cluster({"bootstrap_servers": broker.bootstrap_servers}).view(topics))


def test_a_topic_created_again_has_another_id(broker: Any, topic_prefix: str) -> None:
    """Cluster id and topic id are the same in every view, until the topic is deleted and created again."""
    admin = kafka.KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    admin.create_topics([NewTopic(topic_prefix, 3, 1)], wait_for_metadata=True)
    before, again = view(broker, topic_prefix, "absent"), view(broker, topic_prefix)
    assert before == again
    assert len(before.cluster_id) >= 16
    assert set(before.topics) == {topic_prefix}
    assert (len(before.topics[topic_prefix].id), before.topics[topic_prefix].partitions) == (22, 3)
    admin.delete_topics([topic_prefix])
    while topic_prefix in admin.list_topics():
        time.sleep(0.1)
    admin.create_topics([NewTopic(topic_prefix, 3, 1)], wait_for_metadata=True)
    admin.close()
    after = view(broker, topic_prefix)
    assert after.cluster_id == before.cluster_id
    assert after.topics[topic_prefix].id != before.topics[topic_prefix].id


def test_the_id_is_that_of_kafkas_tools(broker: Any, topic_prefix: str) -> None:
    """An id is URL-safe base64 of the UUID without padding, and is not empty."""
    admin = kafka.KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    admin.create_topics([NewTopic(topic_prefix, 1, 1)], wait_for_metadata=True)
    (described,) = admin.describe_topics([topic_prefix])
    admin.close()
    found = view(broker, topic_prefix).topics[topic_prefix].id
    assert not set(found) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
    assert str(described["topic_id"]).replace("-", "") == base64.urlsafe_b64decode(found + "==").hex()

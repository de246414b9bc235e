"""Bytewax as in its documentation: a dataflow with a stateful step, Kafka as input and output, a recovery store.

A stateful logic of our own keeps the state. The ready-made `stateful_map` would make a deep copy of every touched state
for each snapshot, which alone would cost more than everything else. Environment: BROKER, TOPIC, OUTPUT, EVERY_N, KEPT.
"""

import os
from collections import deque

import bytewax.operators as op
import orjson
from bytewax.connectors.kafka import KafkaSinkMessage
from bytewax.connectors.kafka import operators as kop
from bytewax.dataflow import Dataflow
from bytewax.operators import StatefulLogic

KEPT, EVERY_N = int(os.environ["KEPT"]), int(os.environ["EVERY_N"])
BROKERS = [os.environ["BROKER"]]


class Sequence(StatefulLogic):
    """The count and the last actions of one user."""

    def __init__(self, resumed):
        self.count, kept = resumed or (0, ())
        self.kept = deque(kept, maxlen=KEPT)

    def on_item(self, row):
        """Keep an action; return the count if the trigger fires."""
        self.count += 1
        self.kept.append(row)
        return ((self.count,) if self.count % EVERY_N == 0 else ()), StatefulLogic.RETAIN

    def snapshot(self):
        """Return the state for the recovery store."""
        return self.count, tuple(self.kept)


def decode(message):
    """Return (user, kept fields) of a message."""
    action = orjson.loads(message.value)
    return action["user_id"], (action["item_id"], action["action"], action["timestamp_ms"])


def encode(keyed_count):
    """Return the message of a user whose trigger has fired."""
    user, count = keyed_count
    return KafkaSinkMessage(user.encode(), str(count).encode())


flow = Dataflow("sequences")
actions = kop.input("actions", flow, brokers=BROKERS, topics=[os.environ["TOPIC"]])
keyed = op.map("decode", actions.oks, decode)
due = op.stateful("keep", keyed, Sequence)
kop.output("due", op.map("encode", due, encode), brokers=BROKERS, topic=os.environ["OUTPUT"])

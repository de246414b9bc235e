"""The library for consumers of embeddings and features.

    with EmbeddingSubscriber("127.0.0.1:9092", from_beginning=True) as subscriber:
        newest = subscriber.table()           # user id -> Embedding, as of now
        for change in subscriber:             # then every change as it arrives
            if isinstance(change, Tombstone):
                newest.pop(change.user, None)
            else:
                newest[change.user] = change

`FeatureSubscriber` is the same for features, and `JoinedSubscriber` yields both of a user, as of one source offset.

The topics are delivered at least once. For each user, a subscriber drops and counts changes that are older than, or
equal to, one already seen. The topics are compacted, so a reader that starts at the beginning gets every user's newest
record and needs no committed position. Records that cannot be decoded are counted and skipped.
"""

from streams.subscriber.embeddings import EmbeddingSubscriber
from streams.subscriber.features import FeatureSubscriber
from streams.subscriber.freshest import Change, FeatureChange, Freshest, FreshestFeatures
from streams.subscriber.joined import Joined, JoinedChange, JoinedSubscriber
from streams.subscriber.reader import DamagedTopic
from streams.wire.embeddings import Embedding, EmbeddingMetadata, MalformedEmbedding
from streams.wire.features import FeatureMetadata, MalformedFeatures, UserFeatures
from streams.wire.headers import Tombstone

__all__ = [
    "Change",
    "DamagedTopic",
    "Embedding",
    "EmbeddingMetadata",
    "EmbeddingSubscriber",
    "FeatureChange",
    "FeatureMetadata",
    "FeatureSubscriber",
    "Freshest",
    "FreshestFeatures",
    "Joined",
    "JoinedChange",
    "JoinedSubscriber",
    "MalformedEmbedding",
    "MalformedFeatures",
    "Tombstone",
    "UserFeatures",
]

"""Encoders of user action sequences: features, models, training, evaluation, inference. Nothing here knows Kafka."""

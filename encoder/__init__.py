"""Encoders of user action sequences: features, models, training, evaluation and inference, without any Kafka code."""

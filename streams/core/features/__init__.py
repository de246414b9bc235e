"""Streaming features: values per user over sliding windows, exact with late events, in bounded space. Pure."""

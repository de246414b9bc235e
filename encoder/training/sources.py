"""The vocabularies and the item vectors of a recipe."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np

from encoder.actions.columns import item_key
from encoder.data.log import LogParts
from encoder.features import Vocabularies
from encoder.items import FixedItems, ItemError, ItemVectors, TextItems, TrainedItems, read_vectors, texts_by_key
from encoder.training.recipe import ItemConfig, Recipe


def make_items(log: LogParts, recipe: Recipe) -> tuple[Vocabularies, ItemVectors]:
    """Return the vocabularies and the initial item vectors of a training. Raises `ItemError`.

    Items with a vector or a text from a file are known without any action; others need `data.items_min` actions.
    """
    vocabularies = log.vocabularies(items_min=recipe.data.items_min)
    if recipe.items.source == "file":
        keys, vectors = read_vectors(Path(recipe.items.path))
        if vectors.shape[1] != recipe.encoder.item_dim:
            raise ItemError(f"item vectors have {vectors.shape[1]} columns: set encoder.item_dim to that number")
        return replace(vocabularies, item_keys=keys), FixedItems(vectors)
    if recipe.items.source == "text":
        texts = read_texts(recipe.items)
        named = np.array([item_key(item) for item in texts], np.uint64)
        vocabularies = replace(vocabularies, item_keys=np.union1d(vocabularies.item_keys, named))
        return vocabularies, TextItems(texts_by_key(texts, vocabularies.item_keys), recipe.encoder.item_dim)
    return vocabularies, TrainedItems(len(vocabularies.item_keys), recipe.encoder.item_dim)


def read_texts(config: ItemConfig) -> dict[str, str]:
    """Return item id -> text from a CSV file, joining the named columns with spaces. Raises `ItemError`."""
    path = Path(config.path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {row[config.id_column]: " ".join(row[name] or "" for name in config.text_columns) for row in rows}
    except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
        raise ItemError(f"item texts cannot be read: {path} ({error}); check the path and the columns") from error

"""Item attributes: what is known of each item, by the key that actions carry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from encoder.actions.columns import item_key
from encoder.arrays import I64
from streams.errors import CannotStart


class AttributesError(CannotStart):
    """The item attributes cannot be used."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What is known of each item: one value per attribute, and the id behind its key."""

    keys: I64
    """[I] keys of the items, ascending."""
    ids: tuple[str, ...]
    """[I] ids of the items."""
    codes: Mapping[str, I64]
    """Per attribute [I]: index of the item's value in `names`, -1 where it has none."""
    names: Mapping[str, tuple[str, ...]]
    """Per attribute: its values, sorted."""
    version: str = ""

    @classmethod
    def of(cls, table: Mapping[str, Mapping[str, str]], version: str = "") -> Attributes:
        """Return the attributes of items, given as value by attribute by item."""
        attributes = {attribute for values in table.values() for attribute in values}
        columns = {attribute: [values.get(attribute) for values in table.values()] for attribute in attributes}
        return cls.of_columns(list(table), columns, version)

    @classmethod
    def of_columns(
        cls, items: Sequence[str], columns: Mapping[str, Sequence[str | None]], version: str = ""
    ) -> Attributes:
        """Return the attributes of different items [I]; a column [I] holds one attribute's values, None for no value.

        Raises `AttributesError` if two values of an attribute have one hash.
        """
        keys = np.array([item_key(item) for item in items], np.uint64).astype(np.int64)
        order = np.argsort(keys)
        names, codes = {}, {}
        for attribute, column in sorted(columns.items()):
            known = names[attribute] = tuple(sorted({value for value in column if value is not None}))
            if len({_name_hash(name) for name in known}) < len(known):
                raise AttributesError(
                    "two values of an item attribute have one hash",
                    attribute,
                    "rename one of them in the attribute file",
                )
            code_of: dict[str | None, int] = {name: code for code, name in enumerate(known)}
            codes[attribute] = np.array([code_of.get(value, -1) for value in column], np.int64)[order]
        return cls(keys[order], tuple(items[place] for place in order.tolist()), codes, names, version)

    def name_hashes(self) -> dict[str, I64]:
        """Return, per attribute, the 32-bit hash of each value by its code; what is stored refers to values by it."""
        return {
            attribute: np.array([_name_hash(name) for name in names], np.int64)
            for attribute, names in self.names.items()
        }

    def longest_texts(self) -> tuple[dict[str, int], int]:
        """Return the bytes of the longest value of each attribute, and of the longest item id, as JSON."""
        names = {each: max((len(json_text(name)) for name in known), default=0) for each, known in self.names.items()}
        key = len('"89eb52baa21651ff"')  # of an item that is not known
        return names, max([key, *(len(json_text(item)) for item in self.ids)])

    def places(self, items: I64) -> I64:
        """Return the index of each item, -1 for one that is not known."""
        if not len(self.keys):
            return np.full(len(items), -1)
        places = np.minimum(np.searchsorted(self.keys, items), len(self.keys) - 1)
        return np.where(self.keys[places] == items, places, -1)


def _name_hash(name: str) -> int:
    """Return 32 bits by which stored state refers to a value of an attribute."""
    return item_key(name) >> 32


def json_text(text: str) -> bytes:
    """Return a JSON string.

    >>> json_text("shoes").decode()
    '"shoes"'
    """
    return json.dumps(text, ensure_ascii=False).encode()

"""What the compiled library makes of an event: which filters let it pass, and its values of the item attributes.

The library reads the actions themselves; the tables here are built once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from encoder.actions.columns import name_code
from encoder.arrays import Bool
from streams.core.features.attributes import Attributes
from streams.core.features.definitions import Filter
from streams.core.features.structures import ConditionStructure, FilterStructure, Items, SelectionStructure

CODES = 65_536
"""Codes of action types and of surfaces."""


class Selection:
    """The filters and grouping attributes of a feature set as tables, and the structure that points to them."""

    def __init__(self, filters: Sequence[Filter], groups: Sequence[str], attributes: Attributes, items: Items) -> None:
        self._attributes, self._items = attributes, items
        self._tables: list[object] = []
        """What the structures point to."""
        self._filters = (FilterStructure * len(filters))(*map(self._filter, filters))
        self._groups = (ctypes.c_void_p * len(groups))(*map(self._codes, groups))
        self.structure = SelectionStructure(
            len(filters),
            len(groups),
            ctypes.addressof(self._filters),
            ctypes.addressof(self._groups),
            ctypes.addressof(items.structure),
        )

    def _filter(self, chosen: Filter) -> FilterStructure:
        conditions = (ConditionStructure * len(chosen.where))(
            *(ConditionStructure(self._codes(name), self._wanted(name, values)) for name, values in chosen.where)
        )
        self._tables.append(conditions)
        actions, surfaces = self._named(chosen.actions), self._named(chosen.surfaces)
        return FilterStructure(actions, surfaces, ctypes.addressof(conditions), len(conditions))

    def _named(self, names: Sequence[str]) -> int | None:
        """Return the table of which codes count, None if all do."""
        if not names:
            return None
        table = np.zeros(CODES, np.bool_)
        table[[name_code(name) for name in names]] = True
        return self._kept(table)

    def _codes(self, attribute: str) -> int | None:
        """Return the code of each item, None where the attribute is not known any more."""
        codes = self._attributes.codes.get(attribute)
        return None if codes is None else self._kept(np.ascontiguousarray(codes))

    def _wanted(self, attribute: str, values: Sequence[str]) -> int:
        """Return the table of which codes of an attribute count."""
        names = np.array(self._attributes.names.get(attribute, ()), object)
        table: Bool = np.isin(names, values)
        return self._kept(table)

    def _kept(self, table: np.ndarray) -> int:
        """Keep a table for as long as this lives, and return its address."""
        self._tables.append(table)
        return int(table.ctypes.data)

"""Feature definitions: what each feature counts, over which window; read from TOML, validated whole, hashed.

    [[feature]]
    name = "buys_7d"
    kind = "count"              # see `Kind`
    actions = ["buy"]           # filters, all optional: action types, surfaces, and values of item attributes
    surfaces = ["home"]
    where = { category = ["shoes", "bags"] }
    window = "7d"               # 5 min to 90 d, a whole number of hops

A windowed value as of `t` covers the events from `begin_ms(t)` up to `t`, exclusive. The window begins at a hop
boundary, so that a ring of one aggregate per hop (a *tile*) is enough to compute it exactly:

    hop 1 d, window 7 d         |  1 |  2 |  3 |  4 |  5 |  6 |  7 |  8 . t
                                ^ begin: t - 7 d, rounded down to a hop: at least 7 d, less than 8 d

After the tiles of Chronon (Airbnb), whose windows are rounded in the same way.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from xxhash import xxh3_64_hexdigest

from streams.errors import CannotStart, RebuildsPartition

SECOND_MS, MINUTE_MS, HOUR_MS, DAY_MS = 1_000, 60_000, 3_600_000, 86_400_000
UNITS_MS = {"s": SECOND_MS, "m": MINUTE_MS, "min": MINUTE_MS, "h": HOUR_MS, "d": DAY_MS}
HOPS_MS = ((12 * HOUR_MS, 5 * MINUTE_MS), (4 * DAY_MS, HOUR_MS), (90 * DAY_MS, DAY_MS))
"""Longest window, and the hop of windows up to it."""
WINDOW_MIN_MS, WINDOW_MAX_MS = 5 * MINUTE_MS, 90 * DAY_MS
HALF_LIFE_MAX_MS, GAP_MAX_MS = 365 * DAY_MS, DAY_MS
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
DURATION = re.compile(r"(\d{1,6})\s*([a-z]+)")
FEATURES_MAX = 200
K_MAX, CAP_MAX = 100, 1_024
CAP = 64
"""Ids that a user's `distinct`, `top_k` or `decayed_affinity` keeps, unless the definition says otherwise."""


class Kind(StrEnum):
    """What a feature computes from the events that its filters let through."""

    COUNT = "count"
    SUM = "sum"
    MEAN = "mean"
    MIN = "min"
    MAX = "max"
    DISTINCT = "distinct"
    LAST_K = "last_k"
    SECONDS_SINCE = "seconds_since"
    SESSION_LENGTH = "session_length"
    SESSION_DEPTH = "session_depth"
    TOP_K = "top_k"
    DECAYED_AFFINITY = "decayed_affinity"


FILTERS = frozenset({"actions", "surfaces", "where"})
REQUIRED: Mapping[Kind, frozenset[str]] = {
    Kind.COUNT: frozenset({"window"}),
    Kind.SUM: frozenset({"window", "of"}),
    Kind.MEAN: frozenset({"window", "of"}),
    Kind.MIN: frozenset({"window", "of"}),
    Kind.MAX: frozenset({"window", "of"}),
    Kind.DISTINCT: frozenset({"window", "of"}),
    Kind.LAST_K: frozenset({"k"}),
    Kind.SECONDS_SINCE: frozenset(),
    Kind.SESSION_LENGTH: frozenset({"gap"}),
    Kind.SESSION_DEPTH: frozenset({"gap"}),
    Kind.TOP_K: frozenset({"window", "group", "k"}),
    Kind.DECAYED_AFFINITY: frozenset({"half_life", "group", "k"}),
}
"""Keys that each kind needs beside `name`, `kind` and filters."""
OPTIONAL: Mapping[Kind, frozenset[str]] = {
    Kind.DISTINCT: frozenset({"cap"}),
    Kind.TOP_K: frozenset({"cap"}),
    Kind.DECAYED_AFFINITY: frozenset({"cap"}),
}
NUMBERS, IDS = ("duration", "value"), ("item", "surface")
"""What `of` may name: numbers of an action, and its ids."""


class DefinitionsError(CannotStart):
    """The feature definitions are not valid; `problems` lists every problem with the path of its key."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("feature definitions are not valid: " + "; ".join(problems))


class DamagedDefinitions(RebuildsPartition):
    """Stored feature definitions are not what was written."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events count; an empty part lets every event through, and all parts must."""

    actions: tuple[str, ...] = ()
    surfaces: tuple[str, ...] = ()
    where: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Item attributes and the values that count, sorted."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature. Durations are in ms and 0 where the kind has none."""

    name: str
    kind: Kind
    filter: Filter = field(default_factory=Filter)
    of: str = ""
    """Number or id of the action that is aggregated."""
    group: str = ""
    """Item attribute whose values are ranked."""
    window_ms: int = 0
    half_life_ms: int = 0
    gap_ms: int = 0
    """Time without an event after which a session is over."""
    k: int = 0
    cap: int = CAP

    @property
    def hop_ms(self) -> int:
        """Length of a tile, 0 for a kind without a window."""
        return next((hop for longest, hop in HOPS_MS if self.window_ms <= longest), 0) if self.window_ms else 0

    @property
    def tiles(self) -> int:
        """Number of tiles that a window can touch: those it covers, and one for the part before `t`."""
        return self.window_ms // self.hop_ms + 1 if self.window_ms else 0

    def begin_ms(self, as_of_ms: int) -> int:
        """Return the event time at which the window as of `as_of_ms` begins.

        >>> week = Feature("buys", Kind.COUNT, window_ms=7 * DAY_MS)
        >>> week.begin_ms(100 * DAY_MS + HOUR_MS) == 93 * DAY_MS
        True
        """
        return (as_of_ms - self.window_ms) // self.hop_ms * self.hop_ms

    @property
    def key(self) -> str:
        """Text that is equal for two features exactly if they keep the same state; the name is not part of it."""
        return json.dumps({**asdict(self), "name": ""}, sort_keys=True)


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """All features of a worker, sorted by name."""

    features: tuple[Feature, ...]
    attributes: str = ""
    """Version of the item attributes, which is part of `version` because values depend on them."""

    @property
    def version(self) -> str:
        """Hash of every definition, which records and state carry."""
        return xxh3_64_hexdigest(self.as_json().encode())

    def as_json(self) -> str:
        """Return the definitions as one line of text, which `from_json` reads."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> FeatureSet:
        """Return the definitions that `as_json` wrote; raise `DamagedDefinitions` if they cannot be read."""
        try:
            found = json.loads(text)
            return cls(tuple(_stored(each) for each in found["features"]), str(found["attributes"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedDefinitions("stored feature definitions cannot be read", f"{error!r}") from error

    @property
    def longest_ms(self) -> int:
        """Length of the longest window, hop included: events older than that change nothing."""
        return max((each.window_ms + each.hop_ms for each in self.features), default=0)


def _stored(found: dict[str, Any]) -> Feature:
    """Return a feature from its stored form."""
    kept = found["filter"]
    where = tuple((str(name), tuple(map(str, values))) for name, values in kept["where"])
    chosen = Filter(tuple(map(str, kept["actions"])), tuple(map(str, kept["surfaces"])), where)
    feature = Feature(**{**found, "kind": Kind(found["kind"]), "filter": chosen})
    texts, numbers = (
        (feature.name, feature.of, feature.group),
        (feature.window_ms, feature.half_life_ms, feature.gap_ms),
    )
    if not all(type(each) is str for each in texts) or not all(
        type(each) is int for each in (*numbers, feature.k, feature.cap)
    ):
        raise TypeError(f"a key of {feature.name!r} has the wrong type")
    return feature


def parse_features(toml_text: str, attributes: Mapping[str, object] | None = None, version: str = "") -> FeatureSet:
    """Read every `[[feature]]` table; raise `DefinitionsError` with every problem at once.

    `attributes` holds the item attributes by name, None where there is no attribute file; `version` is its version.
    """
    try:
        document = tomllib.loads(toml_text)
    except tomllib.TOMLDecodeError as error:
        raise DefinitionsError([f"not TOML: {error}"]) from error
    problems = [f"{key}: unknown; features are written as [[feature]] tables" for key in document if key != "feature"]
    tables = document.get("feature", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise DefinitionsError([*problems, "feature: write each feature below [[feature]], with two brackets"])
    if not tables:
        problems.append("feature: there is none")
    if len(tables) > FEATURES_MAX:
        problems.append(f"feature: {len(tables)} of them; at most {FEATURES_MAX} are computed")
    features = [_Reader(f"feature[{at}]", table, problems, attributes).read() for at, table in enumerate(tables)]
    first: dict[str, int] = {}
    for index, each in enumerate(features):
        if each.name and first.setdefault(each.name, index) != index:
            problems.append(f"feature[{index}].name: {each.name!r} is the name of feature[{first[each.name]}] too")
    if problems:
        raise DefinitionsError(problems)
    return FeatureSet(tuple(sorted(features, key=lambda each: each.name)), version)


class _Reader:
    """Reads one table, and adds what is wrong with it to `problems`."""

    def __init__(
        self, path: str, table: Mapping[str, Any], problems: list[str], attributes: Mapping[str, object] | None
    ) -> None:
        self._path, self._table, self._problems, self._attributes = path, table, problems, attributes

    def read(self) -> Feature:
        """Return the feature; what could not be read has its default, and a problem."""
        name = self._table.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            self._complain("name", f"must be lower-case letters, digits and _, at most 64, not {name!r}")
            name = ""
        kind = self._kind()
        if kind is None:
            return Feature(name, Kind.COUNT)
        self._check_keys(kind)
        return Feature(
            name,
            kind,
            self._filter(),
            self._of(kind),
            self._attribute("group", self._table["group"]) if "group" in self._table else "",
            self._window(),
            self._duration("half_life", SECOND_MS, HALF_LIFE_MAX_MS),
            self._duration("gap", SECOND_MS, GAP_MAX_MS),
            self._whole("k", 1, K_MAX, 0),
            self._whole("cap", max(1, self._whole("k", 1, K_MAX, 0, quiet=True)), CAP_MAX, CAP),
        )

    def _complain(self, key: str, text: str) -> None:
        self._problems.append(f"{self._path}.{key}: {text}")

    def _kind(self) -> Kind | None:
        found = self._table.get("kind")
        if isinstance(found, str) and found in list(Kind):
            return Kind(found)
        self._complain("kind", f"must be one of {', '.join(Kind)}, not {found!r}")
        return None

    def _check_keys(self, kind: Kind) -> None:
        known = {"name", "kind"} | FILTERS | REQUIRED[kind] | OPTIONAL.get(kind, frozenset())
        for key in self._table:
            if key not in known:
                self._complain(key, f"{kind} does not take it; it takes {', '.join(sorted(known))}")
        for key in sorted(REQUIRED[kind] - self._table.keys()):
            self._complain(key, f"{kind} needs it")

    def _filter(self) -> Filter:
        where = self._table.get("where", {})
        if not isinstance(where, dict):
            self._complain("where", f"must be a table of attributes and values, not {where!r}")
            where = {}
        return Filter(
            self._names("actions"),
            self._names("surfaces"),
            tuple(
                (self._attribute(f"where.{attribute}", attribute), self._list(f"where.{attribute}", values))
                for attribute, values in sorted(where.items())
            ),
        )

    def _names(self, key: str) -> tuple[str, ...]:
        return self._list(key, self._table[key]) if key in self._table else ()

    def _list(self, key: str, values: object) -> tuple[str, ...]:
        if isinstance(values, list) and values and all(isinstance(each, str) and each for each in values):
            return tuple(sorted(set(values)))
        self._complain(key, f"must be a list of names, at least one, not {values!r}")
        return ()

    def _of(self, kind: Kind) -> str:
        if "of" not in REQUIRED[kind] or "of" not in self._table:
            return ""
        allowed = IDS if kind is Kind.DISTINCT else NUMBERS
        found = self._table["of"]
        if found in allowed:
            return str(found)
        self._complain("of", f"must be {' or '.join(allowed)} for {kind}, not {found!r}")
        return ""

    def _attribute(self, key: str, name: object) -> str:
        if self._attributes is None:
            self._complain(key, f"{name!r} needs an item attribute file: set features.attributes_file")
        elif name not in self._attributes:
            known = ", ".join(sorted(self._attributes)) or "none"
            self._complain(key, f"{name!r} is not among the item attributes; known are {known}")
        return name if isinstance(name, str) else ""

    def _window(self) -> int:
        window_ms = self._duration("window", WINDOW_MIN_MS, WINDOW_MAX_MS)
        hop_ms = Feature("", Kind.COUNT, window_ms=window_ms).hop_ms
        if hop_ms and window_ms % hop_ms:
            text = f"must be a whole number of {shown(hop_ms)}, the hop of windows of that length"
            self._complain("window", f"{text}, not {self._table['window']!r}")
        return window_ms

    def _duration(self, key: str, least_ms: int, most_ms: int) -> int:
        if key not in self._table:
            return 0
        found = self._table[key]
        match = DURATION.fullmatch(found) if isinstance(found, str) else None
        if match is None or match[2] not in UNITS_MS:
            self._complain(key, f'must be a number with a unit ({", ".join(UNITS_MS)}), such as "7d", not {found!r}')
            return 0
        duration_ms = int(match[1]) * UNITS_MS[match[2]]
        if least_ms <= duration_ms <= most_ms:
            return duration_ms
        self._complain(key, f"must be from {shown(least_ms)} to {shown(most_ms)}, not {found!r}")
        return 0

    def _whole(self, key: str, least: int, most: int, default: int, *, quiet: bool = False) -> int:
        found = self._table.get(key, default)
        is_whole = isinstance(found, int) and not isinstance(found, bool)
        if key not in self._table or (is_whole and least <= found <= most):
            return int(found)
        if not quiet:
            self._complain(key, f"must be a whole number from {least} to {most}, not {found!r}")
        return default


def shown(duration_ms: int) -> str:
    """Return a duration in the largest unit that divides it.

    >>> shown(90 * DAY_MS), shown(300_000), shown(1_000)
    ('90d', '5m', '1s')
    """
    units: Iterator[tuple[int, str]] = ((length, unit) for unit, length in reversed(UNITS_MS.items()) if unit != "min")
    return next(f"{duration_ms // length}{unit}" for length, unit in units if duration_ms % length == 0)

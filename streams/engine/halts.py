"""Halted partitions: why each one cannot go on while others can, and when it is tried again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

RETRY_FIRST_S, RETRY_MAX_S = 0.5, 5.0


@dataclass(slots=True)
class Halts(Mapping[int, str]):
    """The reason of each halted partition, by number; it also counts failures in a row."""

    _reasons: dict[int, str] = field(default_factory=dict)
    _refused: set[int] = field(default_factory=set)
    _failures: Counter[int] = field(default_factory=Counter)

    def __getitem__(self, number: int) -> str:
        """Return why the partition is halted."""
        return self._reasons[number]

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of halted partitions."""
        return iter(self._reasons)

    def __len__(self) -> int:
        return len(self._reasons)

    def copy(self) -> dict[int, str]:
        """Return the present reasons; any thread may call this."""
        return dict(self._reasons)

    def begin(self, number: int, reason: str, *, refused: bool = False) -> bool:
        """Halt a partition; return whether the reason is new. `refused` means that only an operator can change it."""
        is_new = self._reasons.get(number) != reason
        self._reasons[number] = reason
        if refused:
            self._refused.add(number)
        return is_new

    def end(self, number: int) -> bool:
        """End the halt of a partition; return whether it was halted."""
        self._refused.discard(number)
        return self._reasons.pop(number, None) is not None

    def refuse_all(self, assigned: frozenset[int]) -> bool:
        """Return whether only an operator can make any of the assigned partitions go on."""
        return bool(assigned) and self._refused >= assigned

    def next_retry_s(self, number: int) -> float:
        """Count a failure of the partition; return the time to wait before the next attempt."""
        self._failures[number] += 1
        return min(RETRY_FIRST_S * 2.0 ** min(self._failures[number] - 1, 10), RETRY_MAX_S)

    def note_progress(self, number: int) -> None:
        """Record that the partition has moved, so that its next failure counts as the first."""
        self._failures.pop(number, None)

    def clear(self) -> None:
        """Forget everything, because a new assignment begins."""
        self._reasons.clear()
        self._refused.clear()
        self._failures.clear()

"""A case as data: its number, its title, what it needs, and the function that plays and judges it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infra.field_cases.field import Field

Numbers = Mapping[str, float | int | str]
"""What a case has measured, by name."""
Play = Callable[["Field"], Numbers]


class CaseFailed(AssertionError):
    """The system did not do what the row demands; the text says what happened instead."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the list."""

    number: int
    title: str
    play: Play
    is_quick: bool
    """True if the case is part of `make test`."""
    workers: int
    """Largest number of workers at a time."""
    brokers: int
    """Size of the cluster that the case needs: 1 or 3."""


@dataclass(frozen=True, slots=True)
class Result:
    """Outcome of one case."""

    case: Case
    seconds: float
    numbers: Numbers
    failure: str
    """Reason of the failure in one line; empty if the case passed."""


CASES: dict[int, Case] = {}
"""Cases by number; `case` adds to it."""


def case(number: int, title: str, *, quick: bool = False, workers: int = 1, brokers: int = 1) -> Callable[[Play], Play]:
    """Register the decorated function as the case of a row."""

    def register(play: Play) -> Play:
        if number in CASES:
            raise ValueError(f"two cases have the number {number}")
        CASES[number] = Case(number, title, play, quick, workers, brokers)
        return play

    return register


def expect(condition: object, text: str) -> None:
    """Raise `CaseFailed` with `text` unless the condition is true."""
    if not condition:
        raise CaseFailed(text)

"""Every error that the project raises for people to read derives from one root, which the command line catches."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from encoder.errors import StreamformerError
from streams.errors import CannotStart, HaltsPartition, LosesPartition, RebuildsPartition, StopsWorker

ROOT = Path(__file__).parents[3]
INTERNAL = {
    "streams.wire.actions": "the decoder's own signal for a rejected record; it becomes a dead letter",
    "streams.wire.deletions": "the decoder's own signal for a deletion that is unclear; it becomes a dead letter",
    "streams.config.settings": "collected into the one SettingsError that lists every problem",
    "infra.harness.model": "the oracle's own signal for a rejected record, which shares no code with the worker",
    "infra.field_cases.case": "a failed case, which the report of the field cases names",
    "infra.harness.run": "a failed assertion of the test that runs a deployment; it shows the worker's log",
    "infra.harness.simulation.checks": "a violation found, caught by the simulator",
    "infra.harness.simulation.link": "a simulated process that died, caught by the simulator",
    "infra.harness.simulation.clock": "a simulated process that spins, caught by the simulator",
}
"""Modules with exceptions that are signals within their package and never reach the command line."""


PROGRAMS = "infra/bench/baselines"
"""Other libraries' workers, which read their environment while they are imported; none of them is our code path."""
OURS = {"stream.py", "processes.py"}
"""The modules of that folder that start those programs."""


def exception_classes() -> Iterator[type[BaseException]]:
    """Yield every exception class that a module of the three packages defines."""
    for package in ("streams", "encoder", "infra"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
            is_program = path.parent == ROOT / PROGRAMS and path.name not in OURS
            if not is_program and any(each.bases for each in classes):
                yield from _defined(module, [each.name for each in classes])


def _defined(module: str, names: list[str]) -> Iterator[type[BaseException]]:
    loaded = importlib.import_module(module)
    for name in names:
        defined = getattr(loaded, name, None)
        if isinstance(defined, type) and issubclass(defined, BaseException):
            yield defined


CLASSES = list(exception_classes())


@pytest.mark.parametrize("defined", CLASSES, ids=lambda defined: f"{defined.__module__}.{defined.__name__}")
def test_an_error_derives_from_the_root_or_is_a_listed_signal(defined: type[BaseException]) -> None:
    """A class outside the tree is in a module that the list of internal signals names, and the other way round."""
    assert issubclass(defined, StreamformerError) != (defined.__module__ in INTERNAL)


def test_every_module_on_the_list_defines_a_signal() -> None:
    """The list of internal signals names no module that has none."""
    assert {defined.__module__ for defined in CLASSES} >= set(INTERNAL)


def test_errors_of_the_worker_have_exactly_one_consequence() -> None:
    """No error asks for two consequences at once."""
    consequences = CannotStart, StopsWorker, HaltsPartition, LosesPartition, RebuildsPartition
    for defined in CLASSES:
        assert sum(issubclass(defined, consequence) for consequence in consequences) <= 1, defined


def test_text_is_one_line() -> None:
    """The parts of an error are joined in one line, even if the detail has several."""
    error = StreamformerError("cannot read the log", "no such file:\n  a.csv", "check the path")
    assert str(error) == "cannot read the log: no such file: a.csv; check the path"
    assert str(StreamformerError("the log is empty", remedy="name another")) == "the log is empty; name another"

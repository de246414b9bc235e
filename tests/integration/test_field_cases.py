"""The quick half of the cases from the field, on the broker of this run; `make field-cases` runs all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.field_cases.case import CASES
from infra.field_cases.field import Field
from infra.field_cases.rows import ROWS
from infra.field_cases.runner import run_case
from infra.kafka.cluster import Cluster

pytestmark = [pytest.mark.broker, pytest.mark.slow]
QUICK = [CASES[number] for number in ROWS if CASES[number].is_quick]


def no_cluster() -> Cluster:
    """Fail, because no quick case needs three brokers."""
    raise AssertionError("a quick case asks for three brokers")


@pytest.mark.parametrize("case", QUICK, ids=[f"{case.number}" for case in QUICK])
def test_a_case_from_the_field_passes(case: Any, broker: Any, tmp_path: Path) -> None:
    """What the row of the case reports about a neighbouring system does not happen here."""
    result = run_case(case, Field(case.number, broker.bootstrap_servers, tmp_path, None, no_cluster))
    assert not result.failure, f"{case.number}, {case.title}: {result.failure}"

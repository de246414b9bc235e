"""All cases: importing this module registers them."""

from __future__ import annotations

from infra.field_cases import life, limits, logs, outputs, poison
from infra.field_cases.case import CASES

MODULES = (poison, logs, outputs, life, limits)
ROWS = tuple(sorted(CASES))
"""Numbers of all cases."""

"""All cases: importing this module registers them."""

from __future__ import annotations

from infra.field_cases import life, poison
from infra.field_cases.case import CASES

MODULES = (poison, life)
ROWS = tuple(sorted(CASES))
"""Numbers of all cases."""

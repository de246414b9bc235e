"""The pages about contracts, settings and metrics say what the code says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from streams.config.settings import keys
from streams.core.policy import Reason
from streams.wire.actions import RejectReason
from streams.wire.embeddings import EmbeddingBatch, EmbeddingCodec, encode_embeddings
from tests.unit.wire.test_embeddings import ONE

DOCS = Path(__file__).parents[2] / "docs"
CONTRACTS = (DOCS / "reference" / "contracts.md").read_text(encoding="utf-8")


def test_generated_pages_are_up_to_date() -> None:
    """The generated pages of docs/reference are what `python docs/generate.py` writes."""
    for name, content in runpy.run_path(str(DOCS / "generate.py"))["pages"]().items():
        assert (DOCS / name).read_text(encoding="utf-8") == content, f"run python docs/generate.py: {name} is old"


def test_the_contracts_name_every_reason_and_header() -> None:
    """Each reason for a refusal, each trigger's reason, each codec and each header has its place in the page."""
    assert isinstance(ONE, EmbeddingBatch)
    [(_, _, headers)] = encode_embeddings(ONE, EmbeddingCodec.FLOAT32)
    named = [*RejectReason, *EmbeddingCodec, *(reason.label for reason in Reason), *(name for name, _ in headers)]
    assert [name for name in named if f"`{name}`" not in CONTRACTS] == []


def test_the_contracts_name_settings_that_exist() -> None:
    """A setting mentioned in the page is a key of the settings."""
    mentioned = set(re.findall(r"`((?:decode|output|kafka)\.[a-z_]+)`", CONTRACTS))
    assert mentioned
    assert mentioned <= set(keys())

"""The machine that a figure was measured on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The processor as the system names it, cores that may be used, and the instructions that decide speed."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(named.get("flags", "").split())
    return {
        "cpu": named.get("model name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "amx": "amx_tile" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
    }

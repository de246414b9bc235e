"""The plot of a worker's memory over time, for several numbers of users on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("#0b6e4f", "#e0a030")


def save_plot(series: Sequence[tuple[int, Sequence[float], Sequence[float]]], folder: Path) -> Path:
    """Draw (users on disk, seconds, resident MB) into `folder`/restore-memory.png and return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (users, seconds, rss_mb), colour in zip(series, COLOURS, strict=True):
        axes.plot(seconds, rss_mb, color=colour, label=f"{users:,} users on disk")
    axes.set(xlabel="seconds of events of random users", ylabel="resident memory of the worker, MB", ylim=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("The hot set bounds memory", loc="left")
    axes.legend(frameon=False)
    path = folder / "restore-memory.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path

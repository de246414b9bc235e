"""The plot of freshness against load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from encoder.arrays import F64

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {50: "#0b6e4f", 90: "#4a90a4", 99: "#e0a030"}


def save_plot(steps: Sequence[tuple[float, F64]], saturation: float, folder: Path) -> Path:
    """Draw percentiles of `steps` (events/s, freshness in ms) into `folder`/freshness.png and return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rates = [rate for rate, _ in steps]
    for percent, colour in COLOURS.items():
        values = [np.percentile(ms, percent) if len(ms) else np.nan for _, ms in steps]
        axes.plot(rates, values, "o-", color=colour, label=f"p{percent}")
    axes.axvline(saturation, color="#9aa0a6", linestyle="--", label="saturation: most events with one embedding each")
    axes.set(
        xlabel="events per second, every one a trigger", ylabel="event sent to embedding received, ms", yscale="log"
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("Freshness against load", loc="left")
    axes.legend(frameon=False)
    path = folder / "freshness.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path

"""The plot of the demo: freshness over the replay, and Recall@10 of each reader."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from infra.demo.readers import GROUPS
from infra.demo.report import READERS, freshness_percentiles
from infra.demo.run import Outcome

COLOURS = {"fresh": "#0b6e4f", "daily": "#e0a030", "once": "#9aa0a6", "popular": "#d3d6da"}


def save_plot(outcome: Outcome, path: Path) -> Path:
    """Write the plot to `path` (PNG) and return the path."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    _freshness(left, outcome)
    _recall(right, outcome)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _freshness(axes: plt.Axes, outcome: Outcome) -> None:
    """Draw p50 and p99 of each second of the replay."""
    streamed = outcome.streamed
    known = ~np.isnan(streamed.freshness_ms)
    values = streamed.freshness_ms[known]
    second = np.floor(streamed.embeddings.at_s[known] - streamed.began_at_s)
    seconds = np.unique(second)
    p50, _, p99 = freshness_percentiles(outcome)
    for percentile, overall, colour in ((99, p99, COLOURS["daily"]), (50, p50, COLOURS["fresh"])):
        line = [max(1.0, float(np.percentile(values[second == one], percentile))) for one in seconds]
        axes.plot(seconds, line, color=colour, label=f"p{percentile}, overall {overall:,.0f} ms")
    axes.set(xlabel="seconds since the replay began", ylabel="event sent to embedding received, ms", yscale="log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("")
    axes.set_title("Freshness", loc="left")
    axes.legend(frameon=False)


def _recall(axes: plt.Axes, outcome: Outcome) -> None:
    """Draw a cluster of bars for each group of actions that occurs."""
    recalls, width = outcome.recalls, 0.2
    groups = [group for group in GROUPS if recalls.actions[group]]
    for i, reader in enumerate(READERS):
        heights = [recalls.recall[reader][group] for group in groups]
        bars = axes.bar(np.arange(len(groups)) + (i - 1.5) * width, heights, width, color=COLOURS[reader], label=reader)
        axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.set_xticks(
        np.arange(len(groups)), [f"{GROUPS[group]}\n{recalls.actions[group]:,} actions" for group in groups]
    )
    axes.margins(y=0.25)
    axes.set_title("Recall@10 by age of the embedding", loc="left")
    axes.legend(frameon=False, ncols=len(READERS), loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)

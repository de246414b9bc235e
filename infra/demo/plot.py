"""The demo's picture: freshness over the replay, and what each embedding of a user found."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from infra.demo.readers import GROUPS
from infra.demo.report import READERS
from infra.demo.run import Outcome

COLOURS = {"fresh": "#0b6e4f", "daily": "#e0a030", "once": "#9aa0a6", "popular": "#d3d6da"}


def save_plot(outcome: Outcome, path: Path) -> Path:
    """Write the picture to `path` (PNG); returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    _freshness(left, outcome)
    _recall(right, outcome)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _freshness(axes: plt.Axes, outcome: Outcome) -> None:
    """p50 and p99 of each second."""
    freshness_ms = outcome.streamed.freshness_ms
    known = freshness_ms >= 0
    values, at_ms = freshness_ms[known], outcome.streamed.seen.received_at_ms[known]
    if not len(values):
        return
    second = (at_ms - at_ms[0]) // 1_000
    for percentile, colour in ((99, COLOURS["daily"]), (50, COLOURS["fresh"])):
        line = [np.percentile(values[second == one], percentile) for one in np.unique(second)]
        axes.plot(np.unique(second), line, color=colour, label=f"p{percentile}")
    axes.set(xlabel="seconds of the replay", ylabel="milliseconds, produced to received", yscale="log")
    axes.set_title("freshness", loc="left")
    axes.legend(frameon=False)


def _recall(axes: plt.Axes, outcome: Outcome) -> None:
    recalls, width = outcome.recalls, 0.2
    for i, reader in enumerate(READERS):
        heights = [recalls.recall[reader][group] for group in GROUPS]
        axes.bar(np.arange(len(GROUPS)) + (i - 1.5) * width, heights, width, color=COLOURS[reader], label=reader)
    axes.set_xticks(np.arange(len(GROUPS)), [f"{group}\n{recalls.actions[group]:,} actions" for group in GROUPS])
    axes.set_title("Recall@10 by how old the embedding is", loc="left")
    axes.legend(frameon=False)

"""Draws docs/streamformer.svg, the picture of the README: `python docs/picture.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

INK, FRESH, QUIET = "#22303c", "#0b6e4f", "#eef1f4"
BOXES = {
    "user acts": (0.2, 2.2, 1.5),
    "user-actions": (2.2, 2.2, 1.7),
    "sequence\nRocksDB": (4.6, 2.2, 1.7),
    "trigger": (6.9, 2.2, 1.4),
    "encoder\none token": (8.9, 2.2, 1.6),
    "user-embeddings": (11.1, 2.2, 2.0),
    "changelog + offset\none transaction": (4.3, 0.3, 2.3),
}
ARROWS = (
    ("user acts", "user-actions", ""),
    ("user-actions", "sequence\nRocksDB", "record\nbatches"),
    ("sequence\nRocksDB", "trigger", ""),
    ("trigger", "encoder\none token", ""),
    ("encoder\none token", "user-embeddings", ""),
)


def draw(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(13.4, 3.4))
    axes.set(xlim=(0, 13.4), ylim=(0, 3.6))
    axes.axis("off")
    for name, (left, bottom, width) in BOXES.items():
        is_topic = name.startswith("user-")
        box = FancyBboxPatch(
            (left, bottom),
            width,
            0.9,
            boxstyle="round,pad=0.05",
            facecolor="white" if is_topic else QUIET,
            edgecolor=INK,
        )
        axes.add_patch(box)
        axes.text(left + width / 2, bottom + 0.45, name, ha="center", va="center", fontsize=11, color=INK)
    for begin, end, label in ARROWS:
        x0, x1 = BOXES[begin][0] + BOXES[begin][2] + 0.07, BOXES[end][0] - 0.07
        axes.annotate("", (x1, 2.65), (x0, 2.65), arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.4})
        axes.text((x0 + x1) / 2, 2.78, label, ha="center", fontsize=8, color=INK)
    axes.annotate("", (5.45, 1.27), (5.45, 2.12), arrowprops={"arrowstyle": "<->", "color": INK, "lw": 1.4})
    axes.text(5.6, 1.62, "checkpoint, restore", fontsize=9, color=INK)
    axes.text(9.0, 1.3, "milliseconds after the action, exact through crashes", fontsize=11, color=FRESH)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("streamformer.svg"))

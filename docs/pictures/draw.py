"""Draw the pictures of the README from files of measured figures: `python docs/pictures/draw.py`.

`load.json` holds the table of docs/results/performance.md, `demo.json` what one run of `make demo` printed. The colours
follow the reader's light or dark theme; a renderer without themes draws the light one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STYLE = """
  text { font-family: -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif; fill: #1f2933; }
  .card { fill: #ffffff; stroke: #d5dbe1; } .title { font-size: 15px; font-weight: 600; }
  .small { font-size: 12px; } .quiet { fill: #616e7c; } .grid { stroke: #e4e9ee; } .axis { stroke: #9aa5b1; }
  .fresh { fill: #0b7a55; } .fresh-line { stroke: #0b7a55; } .slow { fill: #b45309; } .slow-line { stroke: #b45309; }
  .bar { fill: #b8c4ce; } .line { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
  .box { fill: #f1f4f7; stroke: #9aa5b1; } .topic { fill: #ffffff; stroke: #0b7a55; } .arrow { stroke: #616e7c; }
  .mono { font-family: ui-monospace, 'SF Mono', Menlo, 'DejaVu Sans Mono', monospace; font-size: 13px; }
  .screen { fill: #11181f; stroke: #2b3843; } .mono.name { fill: #7cd4b2; font-weight: 600; }
  .mono.value { fill: #e6edf3; } .mono.dim { fill: #8b98a5; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .card { fill: #151b22; stroke: #303b46; } .quiet { fill: #9aa7b3; }
    .grid { stroke: #26303a; } .axis { stroke: #566370; } .fresh { fill: #4fc79a; } .fresh-line { stroke: #4fc79a; }
    .slow { fill: #f0a04b; } .slow-line { stroke: #f0a04b; } .bar { fill: #4a5865; }
    .box { fill: #1f2830; stroke: #566370; } .topic { fill: #151b22; stroke: #4fc79a; } .arrow { stroke: #9aa7b3; }
  }
"""
READERS = {
    "recall10_fresh": "after each action",
    "recall10_daily": "last midnight",
    "recall10_once": "once, at the start",
    "recall10_popular": "no embedding: popular",
}


def main() -> None:
    """Write effect.svg and path.svg beside this file."""
    demo, load = (json.loads((HERE / name).read_text(encoding="utf-8")) for name in ("demo.json", "load.json"))
    (HERE / "effect.svg").write_text(effect(demo, load), encoding="utf-8")
    (HERE / "path.svg").write_text(path(), encoding="utf-8")


def effect(demo: Any, load: Any) -> str:
    """Return the picture of what the project achieves: the live table, freshness against load, recall by age."""
    parts = [*screen(demo, 10, 10, 980), *load_chart(load, 10, 200, 550), *age_chart(demo, 575, 200, 415)]
    return svg(1000, 530, "A run of make demo; freshness against load; recall by age of the embedding", parts)


def screen(demo: Any, left: float, top: float, width: float) -> Iterable[str]:
    """Yield a terminal: the demo's live table at one moment of the replay, and the lines of its report."""
    live, report = demo["live"], demo["report"]
    middle = left + 370
    yield rect(left, top, width, 178, "screen")
    yield text(left + 20, top + 28, "$ make demo", "mono value")
    yield text(middle - 30, top + 28, f"{live['at_s']:.0f} s after the start", "mono dim", anchor="end")
    yield text(middle + 20, top + 28, f"the report, after {report['at_s']} s", "mono dim")
    for x, gap, rows in ((left + 20, 100, live["rows"]), (middle + 20, 115, report["rows"])):
        for row, (name, value) in enumerate(rows.items()):
            yield text(x, top + 58 + 25 * row, name, "mono name")
            yield text(x + gap, top + 58 + 25 * row, value, "mono value")


def load_chart(load: Any, left: float, top: float, width: float) -> Iterable[str]:
    """Yield the chart of p50 and p99 freshness over events per second."""
    x0, x1, y0, y1 = left + 60, left + width - 65, top + 250, top + 72
    x_max, y_max = 70_000, 250
    yield from card(left, top, width, 320, "Freshness against load", "milliseconds from event to embedding")
    for ms in range(0, y_max + 1, 50):
        y = y0 - (y0 - y1) * ms / y_max
        yield line(x0, y, x1, y, "grid" if ms else "axis")
        yield text(x0 - 10, y + 4, str(ms), "small quiet", anchor="end")
    for events in range(0, x_max + 1, 10_000):
        yield text(x0 + (x1 - x0) * events / x_max, y0 + 20, f"{events // 1_000}k", "small quiet", anchor="middle")
    full = x0 + (x1 - x0) * load["saturation_events_per_second"] / x_max
    yield line(full, y0, full, y1 - 6, "axis", dashed=True)
    yield text(full - 6, y1 + 4, "saturation", "small quiet", anchor="end")
    for name, kind in (("p99", "slow"), ("p50", "fresh")):
        points = [
            (x0 + (x1 - x0) * events / x_max, y0 - (y0 - y1) * ms / y_max)
            for events, ms in zip(load["events_per_second"], load[f"{name}_ms"], strict=True)
        ]
        yield from curve(points, kind)
        yield text(points[-1][0] + 10, points[-1][1] + 4, name, f"small {kind}")
    yield text((x0 + x1) / 2, y0 + 40, "events per second; " + load["machine_short"], "small quiet", anchor="middle")
    yield text((x0 + x1) / 2, y0 + 57, load["setup_short"], "small quiet", anchor="middle")


def age_chart(demo: Any, left: float, top: float, width: float) -> Iterable[str]:
    """Yield the bars of Recall@10 by age of the embedding."""
    result = demo["result"]
    longest = max(result[key] for key in READERS)
    yield from card(left, top, width, 320, "Recall by age of the embedding", "Recall@10 over the replayed actions")
    x0, room = left + 165, width - 165 - 65
    for row, (key, name) in enumerate(READERS.items()):
        y = top + 78 + 44 * row
        yield text(x0 - 10, y + 19, name, "small", anchor="end")
        yield rect(x0, y, room * result[key] / longest, 28, "fresh" if key == "recall10_fresh" else "bar", radius=3)
        yield text(x0 + room * result[key] / longest + 8, y + 19, f"{result[key]:.3f}", "small")
    yield text(left + width / 2, top + 290, "MovieLens-1M, one run of make demo", "small quiet", anchor="middle")
    yield text(
        left + width / 2,
        top + 307,
        "Users rate many films per sitting, which favours the fresh one",
        "small quiet",
        anchor="middle",
    )


def path() -> str:
    """Return the picture of an action's way to an embedding."""
    boxes = {
        "user acts": (20, "box"),
        "user-actions": (170, "topic"),
        "sequence in RocksDB": (345, "box"),
        "trigger": (535, "box"),
        "encoder, one token": (660, "box"),
        "user-embeddings": (845, "topic"),
    }
    widths = {
        "user acts": 110,
        "user-actions": 130,
        "sequence in RocksDB": 150,
        "trigger": 85,
        "encoder, one token": 145,
    }
    parts = [rect(2, 2, 996, 176, "card"), text(20, 30, "From an action to an embedding", "title")]
    previous = 0.0
    for name, (left, kind) in boxes.items():
        width = widths.get(name, 135)
        if previous:
            parts += arrow(previous + 4, 76, left - 4, 76)
        parts += [rect(left, 54, width, 44, kind), text(left + width / 2, 81, name, "small", anchor="middle")]
        previous = left + width
    parts += [*arrow(420, 98, 420, 126, both=True), rect(290, 126, 260, 36, "box")]
    parts += [text(420, 149, "changelog and offset, one transaction", "small", anchor="middle")]
    parts += [text(980, 149, "milliseconds after the action, exact through crashes", "small fresh", anchor="end")]
    return svg(1000, 180, "From an action to an embedding", parts)


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """Return the document."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    body = "\n".join(f"  {part}" for part in parts)
    return f'{head} role="img">\n  <title>{escape(title)}</title>\n  <style>{STYLE}  </style>\n{body}\n</svg>\n'


def card(left: float, top: float, width: float, height: float, title: str, unit: str) -> Iterable[str]:
    """Yield a framed panel with its title and the unit of what it shows."""
    yield rect(left, top, width, height, "card")
    yield text(left + 20, top + 28, title, "title")
    yield text(left + 20, top + 47, unit, "small quiet")


def curve(points: Sequence[tuple[float, float]], kind: str) -> Iterable[str]:
    """Yield a line through the points, and a dot on each."""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield f'<polyline class="line {kind}-line" points="{joined}"/>'
    yield from (f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points)


def arrow(x0: float, y0: float, x1: float, y1: float, *, both: bool = False) -> Iterable[str]:
    """Yield a horizontal or vertical line with a head at its end, or at both ends."""
    yield line(x0, y0, x1, y1, "arrow")
    for x, y, back in ((x1, y1, -6), *([(x0, y0, 6)] if both else [])):
        dx, dy = (back, 4) if y0 == y1 else (4, back)
        corner = (x + dx, y - dy) if y0 == y1 else (x - dx, y + dy)
        yield line(x, y, *corner, "arrow")
        yield line(x, y, x + dx, y + dy, "arrow")


def rect(left: float, top: float, width: float, height: float, kind: str, radius: float = 8) -> str:
    """Return a rectangle with round corners."""
    return f'<rect class="{kind}" x="{left:g}" y="{top:g}" width="{width:.1f}" height="{height:g}" rx="{radius:g}"/>'


def line(x0: float, y0: float, x1: float, y1: float, kind: str, *, dashed: bool = False) -> str:
    """Return a straight line."""
    dash = ' stroke-dasharray="4 4"' if dashed else ""
    return f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"{dash}/>'


def text(x: float, y: float, content: str, kind: str, anchor: str = "start") -> str:
    """Return a line of text."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place} xml:space="preserve">{escape(content)}</text>'


if __name__ == "__main__":
    main()

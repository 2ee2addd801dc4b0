# SPDX-License-Identifier: LGPL-2.1-or-later
"""Series of measurements, and how they are told: JSON, tables, a plot."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and range of one series."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float]) -> Spread:
    """Return median, minimum and maximum of a series."""
    ordered = sorted(values)
    return Spread(
        median=statistics.median(ordered),
        low=ordered[0],
        high=ordered[-1],
        count=len(ordered),
    )


def number(value: float) -> str:
    """Format with three significant digits, as tables want it."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


@dataclass
class Table:
    """Rows by contender, columns by figure, each cell a series."""

    title: str
    note: str = ""
    cells: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def add(self, row: str, **figures: float | None) -> None:
        """Add one measurement of a row; None is a figure that is not known."""
        for name, value in figures.items():
            if value is not None:
                self.cells[row][name.replace("_", " ")].append(float(value))

    def median(self, row: str, figure: str) -> float:
        """Return the median of one cell."""
        return spread(self.cells[row][figure]).median

    def columns(self) -> list[str]:
        """Return the figures in the order in which they first came."""
        return list(dict.fromkeys(name for row in self.cells.values() for name in row))

    def markdown(self) -> str:
        """Return the table as Markdown: median (lowest to highest)."""
        columns = self.columns()
        lines = [f"### {self.title}", ""]
        if self.note:
            lines += [self.note, ""]
        lines.append("| | " + " | ".join(columns) + " |")
        lines.append("| --- |" + " ---: |" * len(columns))
        for row, cells in self.cells.items():
            texts = []
            for column in columns:
                if not cells.get(column):
                    texts.append("-")
                    continue
                s = spread(cells[column])
                text = number(s.median)
                if s.count > 1 and s.low != s.high:
                    text += f" ({number(s.low)}-{number(s.high)})"
                texts.append(text)
            lines.append(f"| {row} | " + " | ".join(texts) + " |")
        return "\n".join([*lines, ""])

    def document(self) -> dict[str, object]:
        """Return all series, for JSON."""
        return {
            "title": self.title,
            "note": self.note,
            "series": {row: dict(cells) for row, cells in self.cells.items()},
        }


def write(tables: list[Table], directory: Path) -> None:
    """Write results.json, tables.md and, where matplotlib is, plot.png."""
    directory.mkdir(parents=True, exist_ok=True)
    documents = [table.document() for table in tables]
    (directory / "results.json").write_text(json.dumps(documents, indent=1) + "\n")
    text = "\n".join(table.markdown() for table in tables)
    (directory / "tables.md").write_text(text)
    _plot([t for t in tables if "running s" in t.columns()], directory / "plot.png")


def _plot(tables: list[Table], path: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        return
    if not tables:
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    wanted = ["running s", "first reply s", "10000 keys s"]
    figure, axes = plt.subplots(
        len(tables), 1, figsize=(9, 1 + 2.6 * len(tables)), squeeze=False
    )
    for axis, table in zip(axes[:, 0], tables, strict=True):
        rows = list(table.cells)
        height = 0.8 / len(wanted)
        for i, column in enumerate(c for c in wanted if c in table.columns()):
            values = [
                table.median(row, column) if table.cells[row].get(column) else 0
                for row in rows
            ]
            places = [place + i * height for place in range(len(rows))]
            axis.barh(places, values, height=height, label=column)
        axis.set_yticks([place + height for place in range(len(rows))], rows)
        axis.invert_yaxis()
        axis.set_title(table.title, fontsize=9)
        axis.set_xlabel("seconds from QMP answering, median")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

# SPDX-License-Identifier: Apache-2.0
"""Pictures, drawn by matplotlib (the extra `plot`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot_trade_off(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Accuracy against tokens per cycle: a curve for each name, a point for each threshold, as a PNG.

    The first row of each curve is the lossless one, from which the bars, paired 95 % intervals of the drop, are
    measured. A threshold isn't printed where it is `None`, or would cover one that is. The file's "Description" is
    [`digest`] of what was drawn.

    Args:
        curves (`Mapping`): name to rows of `evaluation_summary`.
        path (`str` or `Path`): file to write.
    """
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and looks for a screen

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    labels = []
    for name, rows in curves.items():
        lossless, judged = rows[0], sorted(rows[1:], key=lambda row: row["tokens_per_cycle"])
        points = [lossless, *judged]
        x, y = [row["tokens_per_cycle"] for row in points], [100 * row["accuracy"] for row in points]
        # A drop's interval is one of the accuracy, too, once the lossless accuracy is taken as known.
        low, high = (
            [100 * (lossless["accuracy"] - row[side]) for row in judged] for side in ("drop_high", "drop_low")
        )
        (line,) = axes.plot(x, y, marker="o", label=name.replace("$", r"\$"))
        axes.vlines(x[1:], low, high, color=line.get_color(), alpha=0.35, linewidth=3)
        axes.plot(x[0], y[0], marker="*", markersize=14, color=line.get_color())
        axes.axhline(y[0], color=line.get_color(), linewidth=0.8, linestyle=":")
        for row, x_i, y_i in zip(judged, x[1:], y[1:]):
            if row["threshold"] is not None:
                text = f"{row['threshold']:.2g}"
                labels.append(axes.annotate(text, (x_i, y_i), (5, 5), textcoords="offset points", fontsize=8))
    axes.margins(x=0.08)
    axes.set_xlabel("tokens per cycle")
    axes.set_ylabel("accuracy, %")
    axes.set_title("star: lossless; numbers: thresholds; bars: 95 % of the paired drop", fontsize=10)
    axes.grid(alpha=0.25)
    # Below the axes: names of data sets are long.
    figure.legend(loc="outside lower center", ncols=1 if max(map(len, curves), default=0) > 24 else 4, fontsize=8)
    figure.draw_without_rendering()  # gives every label its place
    legible = []
    for label in labels:
        box = label.get_window_extent()
        label.set_visible(not any(box.overlaps(other) for other in legible))
        if label.get_visible():
            legible.append(box)
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None, "Description": digest(curves)})


def digest(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What tells whether a picture shows these numbers."""
    return hashlib.sha256(json.dumps(curves, sort_keys=True).encode()).hexdigest()

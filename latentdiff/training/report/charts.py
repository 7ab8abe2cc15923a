"""Line charts over the training steps, drawn by matplotlib where it is installed; and numbers in few digits."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

Points = Sequence[tuple[float, float]]

HINT = "The curves need matplotlib: pip install 'latentdiff[report]', then latentdiff report RUN; log.jsonl has the numbers."

# Okabe & Ito's palette, which colour-blind people can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")

# Text stays text; the same chart gives the same file.
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "latentdiff", "font.size": 9, "axes.titlesize": 10}
_MOST_DOTS = 60  # more would hide the line
_DIGITS = 4


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    logarithmic: bool = False,
    faint: Sequence[str] = (),
    mark: tuple[float, str] | None = None,
) -> str:
    """An SVG image of lines over the training steps, as a data: URL.

    Args:
        series: name -> points (step, value) in order; values that are not finite are left out.
        logarithmic: for values that are all above 0; otherwise linear.
        faint: names of series to draw thin and pale.
        mark: a step to draw a vertical line at, and what it is.

    Returns:
        "" if there is nothing to draw, or nothing to draw it with.
    """
    series = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series or not can_draw():
        return ""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = _figure(title, series, faint, mark)
        if logarithmic and min(value for points in series.values() for _, value in points) > 0:
            figure.axes[0].set_yscale("log")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(title: str, series: Mapping[str, Points], faint: Sequence[str], mark: tuple[float, str] | None) -> Any:
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    figure = Figure(figsize=(6.8, 3.0), layout="constrained")
    axes = figure.subplots()
    for number_, (name, points) in enumerate(series.items()):
        dots = "o" if len(points) <= _MOST_DOTS and name not in faint else ""
        pale = {"alpha": 0.35, "linewidth": 1.0} if name in faint else {"linewidth": 1.6}
        axes.plot(*zip(*points, strict=True), label=name, color=_COLOURS[number_ % len(_COLOURS)], marker=dots,
                  markersize=3, **pale)  # fmt: skip
    if mark:
        axes.axvline(mark[0], color="#555555", linewidth=1, linestyle="--")
        axes.annotate(mark[1], (mark[0], 1), (3, -9), xycoords=("data", "axes fraction"), textcoords="offset points")
    axes.set_title(title, loc="left", weight="bold")
    axes.set_xlabel("step")
    axes.grid(color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False)
    return figure


def smoothed(points: Points, half_life: float) -> list[tuple[float, float]]:
    """Exponential moving average over the steps, unbiased at the start; its weight halves after `half_life` steps."""
    result, total, weight, before = [], 0.0, 0.0, None
    for step, value in points:
        keep = 0.5 ** ((step - before) / half_life) if before is not None else 0.0
        total, weight, before = keep * total + value, keep * weight + 1, step
        result.append((step, total / weight))
    return result


def number(value: float) -> str:
    """A value in few digits: 0.1234, 1.23e-05, 12345."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}"
    return f"{value:.{_DIGITS}g}" if abs(value) < 1000 else f"{value:.0f}"

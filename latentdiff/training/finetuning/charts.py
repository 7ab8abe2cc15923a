"""Line charts as inline SVG: no library, no scripts, readable without a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle

Points = Sequence[tuple[float, float]]

# Okabe & Ito's palette, which colour-blind people can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")

_WIDTH, _HEIGHT = 680, 300  # of the whole picture, in SVG units
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 34, 40  # margins around the plot
_DIGITS = 4


@dataclass(frozen=True)
class Axis:
    """Maps values to places along the plot, linear or logarithmic, with round numbers to mark."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """At most about six round values within the range."""
        if self.logarithmic and self.high / self.low >= 10:
            return [
                10.0**n
                for n in range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            ]
        raw = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(raw))
        size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= raw * 0.999)
        first, last = math.ceil(self.low / size - 1e-9), math.floor(self.high / size + 1e-9)
        return [round(number * size, 12) for number in range(first, last + 1)]


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    logarithmic: bool = False,
    faint: Sequence[str] = (),
    mark: tuple[float, str] | None = None,
) -> str:
    """An SVG picture of lines over the training steps.

    Args:
        series: name -> points (step, value) in order; values that are not finite are left out.
        logarithmic: for values that are all above 0; otherwise linear.
        faint: names of series to draw thin and pale.
        mark: a step to draw a vertical line at, and what it is.

    Returns:
        "" if there is nothing to draw.
    """
    series = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    values = [value for points in series.values() for _, value in points]
    logarithmic = logarithmic and min(values) > 0
    x = Axis(*_widened([step for points in series.values() for step, _ in points]), _LEFT, _WIDTH - _RIGHT)
    y = Axis(*_range(values, logarithmic), _HEIGHT - _BOTTOM, _TOP, logarithmic)
    parts = [_grid(x, y)]
    for (name, points), colour in zip(series.items(), cycle(COLOURS), strict=False):
        parts.append(_line(points, x, y, name, colour, faint=name in faint))
    if mark:
        parts.append(_mark(x(mark[0]), mark[1]))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
        f'<text x="{_LEFT}" y="16" class="title">{escape(title)}</text>{"".join(parts)}{_legend(list(series))}</svg>'
    )


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


def _widened(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1, high + 1)


def _range(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if logarithmic:
        return low / 1.1, high * 1.1
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _grid(x: Axis, y: Axis) -> str:
    parts = []
    for value in y.ticks():
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="grid"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x.ticks():
        parts.append(f'<text x="{x(value):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">step</text>')
    return "".join(parts)


def _line(points: Points, x: Axis, y: Axis, name: str, colour: str, *, faint: bool) -> str:
    places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    dots = ""
    if len(points) <= 60 and not faint:  # more would hide the line
        dots = "".join(
            f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5" fill="{colour}">'
            f"<title>{escape(name)}, step {step:g}: {number(value)}</title></circle>"
            for step, value in points
        )
    strength = ' opacity="0.35" stroke-width="1"' if faint else ' stroke-width="1.6"'
    return f'<polyline points="{places}" fill="none" stroke="{colour}"{strength}/>{dots}'


def _mark(place: float, text: str) -> str:
    anchor = "end" if place > _WIDTH / 2 else "start"
    return (
        f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" class="mark"/>'
        f'<text x="{place + (-4 if anchor == "end" else 4):.1f}" y="{_TOP + 11}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    parts, left = [], _LEFT
    for name, colour in zip(names, cycle(COLOURS), strict=False):
        parts.append(f'<rect x="{left}" y="{_HEIGHT - 14}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{left + 14}" y="{_HEIGHT - 5}">{escape(name)}</text>')
        left += 24 + round(7 * len(name))
    return "".join(parts)

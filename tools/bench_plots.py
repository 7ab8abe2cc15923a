"""Images of the case growth of `bench.py` (needs matplotlib)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.bench_race import Result

# name of the file -> what stands on the axis below, and which results belong on it
PLOTS: dict[str, tuple[str, Callable[[dict[str, float]], bool]]] = {
    "growth-size": ("size", lambda at: bool(at["is_step"]) and at["batch"] == 1),
    "growth-batch": ("batch", lambda at: bool(at["is_step"])),
    "growth-steps": ("steps", lambda at: not at["is_step"]),
}
LABELS = {"size": "height and width in pixels", "batch": "images at once", "steps": "denoising steps"}


def plot_growth(results: Sequence[Result], folder: Path) -> None:
    """Draw time and peak memory against size, batch and steps into PNG files in `folder`."""
    from matplotlib.figure import Figure

    grown = [result for result in results if result.at]
    smallest = min((result.at["size"] for result in grown), default=0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (axis, belongs) in PLOTS.items():
        chosen = [
            result for result in grown if belongs(result.at) and (axis == "size" or result.at["size"] == smallest)
        ]
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        seconds, memory = figure.subplots(1, 2)
        for contender in dict.fromkeys(result.contender for result in chosen):
            own = sorted(
                (result for result in chosen if result.contender == contender), key=lambda result: result.at[axis]
            )
            places = [result.at[axis] for result in own]
            seconds.plot(places, [statistics.median(result.seconds) for result in own], "o-", label=contender)
            memory.plot(places, [max(result.peak_mb) / 1000 for result in own], "o-", label=contender)
        seconds.set(ylabel="seconds", xlabel=LABELS[axis], ylim=(0, None))
        memory.set(ylabel="peak memory in GB", xlabel=LABELS[axis], ylim=(0, None))
        seconds.legend()
        figure.savefig(folder / f"{name}.png", dpi=110)

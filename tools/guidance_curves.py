"""How truly images show their prompts, and how many of their pixels are clipped, by the kind of guidance and its scale.

    python tools/guidance_curves.py curves.json
    python tools/guidance_curves.py curves.json --plot guidance.png --table

Images are of the embedded model, judged by the embedded judge (`latentdiff evaluate`). Each kind has the same prompts and
seeds at each of its scales; what is in the file already is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from latentdiff import Pipeline  # noqa: E402
from latentdiff.evaluation.prompts import EvaluationPrompt, read_prompts  # noqa: E402
from latentdiff.evaluation.protocol import score_prompts  # noqa: E402
from latentdiff.files import atomic_path  # noqa: E402

SCALES = (5.0, 15.0, 2.0, 9.0)
OF_RENOISED = 12.5  # of cfg++, 0.6 is about 7.5 of cfg
KINDS: dict[str, dict[str, Any]] = {
    "cfg": {},
    "apg": {"guidance_kind": "apg"},
    "threshold": {"guidance_kind": "threshold"},
    "zero-star": {"guidance_kind": "zero-star"},
    "cfg++": {"guidance_kind": "cfg++"},
    "cfg, PAG 3": {"pag_scale": 3.0},
    "cfg, SEG 3": {"seg_scale": 3.0},
    "cfg, FreeU": {"freeu": (1.5, 1.6, 0.9, 0.2)},
}


def clipped(images: Sequence[Image.Image]) -> float:
    """The share of values that are 0 or 255."""
    values = np.stack([np.asarray(image) for image in images])
    return float(((values == 0) | (values == 255)).mean())


def measured(pipe: Pipeline, kind: str, scale: float, *, limit: int, steps: int) -> dict[str, Any]:
    """The scores of one kind at one scale."""
    made: list[Image.Image] = []

    def draw(prompt: Sequence[str], **options: Any) -> list[Image.Image]:
        return pipe(prompt, **{**options, **KINDS[kind]})

    def keep(prompt: EvaluationPrompt, images: Sequence[Image.Image]) -> None:
        made.extend(images)

    own = scale / OF_RENOISED if kind == "cfg++" else scale
    result = score_prompts(
        draw,
        read_prompts(limit=limit),
        seeds_per_prompt=1,
        steps=steps,
        guidance_scale=min(own, 1.0) if kind == "cfg++" else own,
        batch_size=6,
        progress=False,
        on_images=keep,
    )
    mean = result.mean
    tasks = {task: score.value for task, score in result.tasks.items()}
    background = result.background.value
    return {
        "kind": kind, "scale": scale, "images": len(made), "truth": mean.value, "low": mean.low, "high": mean.high,
        "background": background, "clipped": clipped(made), "tasks": tasks,
    }  # fmt: skip


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Two charts over the scale: truth and clipped values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, key, title in zip(
        axes, ("truth", "clipped"), ("images that show their prompt", "values that are clipped"), strict=True
    ):
        for number, kind in enumerate(KINDS):
            own = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["scale"])
            axis.plot(
                [row["scale"] for row in own], [row[key] for row in own], label=kind, marker="o", color=f"C{number}",
                linestyle="--" if kind.startswith("cfg,") else "-", linewidth=2.5 if kind == "cfg" else 1.2,
            )  # fmt: skip
        axis.set(title=title, xlabel="guidance scale (of cfg++: times 12.5)")
        axis.yaxis.set_major_formatter(lambda share, place: f"{share:.0%}")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Truth and clipped values by kind and scale, in Markdown."""
    scales = sorted({row["scale"] for row in rows})
    found = {(row["kind"], row["scale"]): row for row in rows}
    lines = ["| kind | " + " | ".join(f"{scale:g}" for scale in scales) + " |", "|---" * (len(scales) + 1) + "|"]
    for kind in KINDS:
        cells = [
            f"{row['truth']:.2f} ({row['clipped']:.0%})" if (row := found.get((kind, scale))) else "-"
            for scale in scales
        ]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON with what was measured, which grows")
    parser.add_argument("--limit", type=int, default=2, help="prompts of each of the six tasks")
    parser.add_argument(
        "--scales", type=float, nargs="+", default=SCALES, help="in the order in which they are measured"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what is in the file, and measure nothing")
    parser.add_argument("--table", action="store_true", help="print what is in the file, and measure nothing")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(asked.file.read_text()) if asked.file.exists() else []
    if asked.plot:
        plot(rows, asked.plot)
    if asked.table:
        print(table(rows))
    if asked.plot or asked.table:
        return
    pipe = Pipeline.load()
    for scale in asked.scales:
        for kind in KINDS:
            if any((row["kind"], row["scale"]) == (kind, scale) for row in rows):
                continue
            rows.append(measured(pipe, kind, scale, limit=asked.limit, steps=asked.steps))
            with atomic_path(asked.file) as temporary:
                temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()

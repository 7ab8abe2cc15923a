"""What the quick ways of sampling cost and what they keep, on the embedded model: the front that `--fast` is chosen
from.

    python tools/pareto.py --out runs/pareto                                 every candidate on a few prompts
    python tools/pareto.py --out runs/pareto --only NAME,NAME --limit 50 --seeds 2    some of them on all prompts
    python tools/pareto.py --out runs/pareto --table docs/pareto.md --plot docs/pareto.png    what has been measured so
    far

Each candidate makes the same images, from the same prompts and seeds, as the exact one: DDIM, 50 steps, guidance 5.
Of each image it is kept whether the judge of `latentdiff evaluate` finds in it what the prompt says, and how far it
is from the exact one. Work is counted, not timed: multiplications of the U-Net at the shape of Stable Diffusion 1.5, as
a share of 50 guided steps. What has been made is in `--out`, so a run goes on where another one stopped; several may
run with different --part.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.checkpoints.embedded import embedded_judge
from latentdiff.engines.deepcache import CacheSettings, DeepCache
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.prompts import EvaluationPrompt, read_prompts
from latentdiff.evaluation.protocol import SEEDS_APART, judged
from latentdiff.evaluation.statistics import bootstrap_interval
from latentdiff.files import atomic_path
from latentdiff.image import decibels
from latentdiff.networks.attention import use_attention_backend
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.unet import UNet
from latentdiff.pipeline import Pipeline
from latentdiff.request.options import FAST
from latentdiff.request.plan import Plan, Sampling

BATCH = 16
SD_TEXT = (1, 77, 768)

Options = dict[str, Any]


def name_of(options: Options) -> str:
    """A candidate's name: sampler-spacing-steps, then the guidance interval and the cache if there are any."""
    name = f"{options['sampler']}-{options.get('spacing', 'trailing')}-{options['steps']}"
    if interval := options.get("guidance_interval"):
        name += f"-guided-{interval[0]:g}-{interval[1]:g}"
    if (every := options.get("cache_interval", 1)) > 1:
        name += f"-cache-{every}-{options.get('cache_branch', 0)}"
        if (centre := options.get("cache_centre")) is not None:
            name += f"-{centre}"
    return name


EXACT: Options = {"sampler": "ddim", "steps": 50, "spacing": "trailing"}
WORK_LABEL = "U-Net work, share of 50 guided steps"
EVERYWHERE = 1000.0  # above any noise level


def survey() -> Iterator[Options]:
    """The candidates: solvers and spacings, then guidance intervals and caches on the better of those."""
    yield EXACT
    yield from ({"sampler": "ddim", "steps": steps, "spacing": "trailing"} for steps in (25, 15, 10))
    for sampler in ("dpmpp-2m", "unipc"):
        for spacing in ("trailing", "karras", "uniform-lambda", "ays"):
            yield from ({"sampler": sampler, "steps": steps, "spacing": spacing} for steps in (8, 10, 12, 15))
    for sampler, spacing, steps in (
        ("dpmpp-2m", "trailing", 12),
        ("dpmpp-2m", "trailing", 15),
        ("unipc", "trailing", 12),
    ):
        base = {"sampler": sampler, "steps": steps, "spacing": spacing}
        for low in (0.2, 0.4, 0.7, 1.0):
            yield {**base, "guidance_interval": (low, EVERYWHERE)}
    for steps, every, branch in ((50, 5, 0), (25, 2, 0), (25, 3, 0), (25, 3, 1), (15, 2, 0), (15, 2, 1)):
        sampler = "ddim" if steps == 50 else "dpmpp-2m"
        yield {
            "sampler": sampler,
            "steps": steps,
            "spacing": "trailing",
            "cache_interval": every,
            "cache_branch": branch,
        }


CANDIDATES = {name_of(options): options for options in survey()}


# How much is computed


def guided_steps(plan: Plan) -> list[bool]:
    """For each step, whether the unconditional half is computed."""
    return [plan.guidance.acts_at(level) for level in plan.levels[:-1]]


def work(plan: Plan) -> float:
    """Multiplications of the U-Net of Stable Diffusion 1.5 over those of 50 guided steps."""
    guided = guided_steps(plan)
    full = plan.cache.full_steps(plan.steps)
    total = 0.0
    for index, both in enumerate(guided):
        is_full = plan.cache.interval == 1 or index in full or both != guided[index - 1]
        total += (2 if both else 1) * (1.0 if is_full else share_between(plan.cache.branch))
    return total / 100


@cache
def share_between(branch: int) -> float:
    """What a step between costs in terms of a full one, counted at 512x512 pixels on shapes without numbers."""
    with torch.device("meta"):
        unet = UNet(UNetConfig()).eval()
        cached = DeepCache(unet, unet, CacheSettings(2, branch), 2)
        x, context = torch.empty(1, 4, 64, 64), torch.empty(SD_TEXT)
        counts = []
        with torch.no_grad(), use_attention_backend("plain"):
            for _ in range(2):
                with FlopCounterMode(display=False) as counter:
                    cached(x, 0.0, context)
                counts.append(counter.get_total_flops())
    return counts[1] / counts[0]


# Images and verdicts


@dataclass(frozen=True)
class Measured:
    """Of one candidate, by image: prompt and seed -> right or wrong, and the mean square error to the exact
    image."""

    right: dict[str, bool]
    error: dict[str, float]
    seconds: float  # of the processor, per image


class Bench:
    """Makes, judges and compares images of prompts; exact ones are kept in memory."""

    def __init__(self, prompts: Sequence[EvaluationPrompt], seeds: range) -> None:
        self.pipe = Pipeline.load(device="cpu")
        self.judge = Judge.load(embedded_judge())
        self.jobs = [(prompt, SEEDS_APART * prompt.number + offset) for prompt in prompts for offset in seeds]

    def keys(self) -> list[str]:
        return [str(seed) for _, seed in self.jobs]  # a seed belongs to one prompt

    def make(self, options: Options, images: Path) -> tuple[list[bool], np.ndarray, float]:
        """Verdicts, images (N, H, W, 3) and seconds per image; what is in the file `images` is not made again."""
        began = time.process_time()
        made = []
        for start in range(0, len(self.jobs), BATCH):
            jobs = self.jobs[start : start + BATCH]
            texts, seeds = [prompt.text for prompt, _ in jobs], [seed for _, seed in jobs]
            made += self.pipe(texts, seed=seeds, guidance_scale=5.0, batch_size=BATCH, progress=False, **options)
        seconds = (time.process_time() - began) / len(made)
        verdicts = [judged(prompt, seen).correct for (prompt, _), seen in zip(self.jobs, self.judge(made), strict=True)]
        arrays = np.stack([np.asarray(image) for image in made])
        with atomic_path(images) as temporary, temporary.open("wb") as file:
            np.save(file, arrays)
        return verdicts, arrays, seconds


def measure(bench: Bench, name: str, out: Path, part: str) -> None:
    """Make what one candidate lacks and write it down."""
    path = out / f"{name}.{part}.json"
    if path.exists():
        return
    exact = out / f"exact.{part}.npy"
    verdicts, arrays, seconds = bench.make(
        CANDIDATES[name], exact if name == name_of(EXACT) else out / f"last.{part}.npy"
    )
    differences = (arrays.astype(np.float32) - np.load(exact).astype(np.float32)) / 255
    keys = bench.keys()
    found = {
        "right": dict(zip(keys, verdicts, strict=True)),
        "error": dict(zip(keys, np.square(differences).mean(axis=(1, 2, 3)).tolist(), strict=True)),
        "seconds": seconds,
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(found), encoding="utf-8")
    right = sum(verdicts) / len(verdicts)
    print(f"{name}: {right:.3f} right, {psnr(found['error'].values()):.1f} dB, {seconds:.2f} s", flush=True)


def read(name: str, out: Path) -> Measured | None:
    """All parts of what was measured of a candidate."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob(f"{name}.*.json"))]
    if not found:
        return None
    right, error = ({key: value for one in found for key, value in one[field].items()} for field in ("right", "error"))
    return Measured(right, error, float(np.mean([one["seconds"] for one in found])))


def psnr(errors: Any) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; 100 for equal images."""
    return float(np.mean([decibels(max(error, 1e-10), peak=1.0) for error in errors]))


# The table


@dataclass(frozen=True)
class Row:
    name: str
    images: int
    work: float
    seconds: float
    right: float
    change: float  # of the share of right images, against the exact ones of the same prompts and seeds
    low: float
    high: float
    decibels: float
    errors: dict[str, float]  # mean square error of each image


def rows(out: Path) -> list[Row]:
    """One for each candidate that was measured, from the least work to the most."""
    exact = read(name_of(EXACT), out)
    schedule = Pipeline.load(device="cpu").schedule
    made = []
    for name, options in CANDIDATES.items():
        found = read(name, out)
        if found is None or exact is None:
            continue
        plan = Sampling(seed=0, guidance_scale=5.0, **options).plan("", schedule)
        shared = [key for key in found.right if key in exact.right]
        gains: dict[int, list[float]] = {}
        for key in shared:
            gains.setdefault(int(key) // SEEDS_APART, []).append(float(found.right[key]) - float(exact.right[key]))
        low, high = bootstrap_interval([[float(np.mean(values)) for values in gains.values()]])
        made.append(
            Row(
                name=name,
                images=len(shared),
                work=work(plan),
                seconds=found.seconds,
                right=float(np.mean([found.right[key] for key in shared])),
                change=float(np.mean([np.mean(values) for values in gains.values()])),
                low=low,
                high=high,
                decibels=psnr(found.error[key] for key in shared),
                errors={key: found.error[key] for key in shared},
            )
        )
    return sorted(made, key=lambda row: row.work)


def on_front(row: Row, others: Sequence[Row]) -> bool:
    """Whether no other costs at most as much and is at least as near to the exact images, of those that both made."""
    return not any(other is not row and other.work <= row.work and is_as_near(other, row) for other in others)


def is_as_near(row: Row, other: Row) -> bool:
    shared = row.errors.keys() & other.errors.keys()
    return bool(shared) and psnr(row.errors[key] for key in shared) >= psnr(other.errors[key] for key in shared)


def table(found: Sequence[Row]) -> str:
    """Markdown; candidates on the front are in bold."""
    lines = [
        "| candidate | U-Net work | core seconds | right | against exact (95 %) | PSNR to exact | images |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        name = f"**{row.name}**" if on_front(row, found) else row.name
        change = "" if row.name == name_of(EXACT) else f"{row.change:+.3f} ({row.low:+.3f} to {row.high:+.3f})"
        distance = "" if row.name == name_of(EXACT) else f"{row.decibels:.1f} dB"
        lines.append(
            f"| {name} | {row.work:.3f} | {row.seconds:.2f} | {row.right:.3f} | {change} | {distance} | {row.images} |"
        )
    return "\n".join(lines)


def plot(found: Sequence[Row], path: Path) -> None:
    """Distance and change of prompt truth against work, with the candidate that is the preset (needs matplotlib)."""
    from matplotlib.figure import Figure

    shown = [row for row in found if row.name != name_of(EXACT)]
    kinds = list(dict.fromkeys(kind_of(row.name) for row in shown))
    figure = Figure(figsize=(11, 4), layout="constrained")
    distance, truth = figure.subplots(1, 2)
    for index, kind in enumerate(kinds):
        own = [row for row in shown if kind_of(row.name) == kind]
        work, change = [row.work for row in own], [row.change for row in own]
        marker = {"marker": "osD^v<>PX*h"[index % 11], "linestyle": "", "color": f"C{index % 10}", "label": kind}
        distance.plot(work, [row.decibels for row in own], **marker)
        spread = [[row.change - row.low for row in own], [row.high - row.change for row in own]]
        truth.errorbar(work, change, spread, elinewidth=0.6, **marker)
    for row in (row for row in shown if row.name == name_of(FAST)):
        for axes, value in ((distance, row.decibels), (truth, row.change)):
            axes.annotate("--fast", (row.work, value), textcoords="offset points", xytext=(-14, 10))
    distance.set(xlabel=WORK_LABEL, ylabel="PSNR to the exact image, dB", xlim=(0, None))
    truth.set(xlabel=WORK_LABEL, ylabel="change of right images (95 %)", xlim=(0, None))
    truth.axhline(0.0, color="grey", linewidth=0.8)
    distance.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def kind_of(name: str) -> str:
    return "cache" if "-cache-" in name else "guidance interval" if "-guided-" in name else name.rsplit("-", 1)[0]


def part_of(prompts: list[EvaluationPrompt], part: str) -> list[EvaluationPrompt]:
    """Every n-th prompt, for part "i/n"."""
    index, count = map(int, part.split("/"))
    return prompts[index - 1 :: count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pareto"), help="for what is measured")
    parser.add_argument("--limit", type=int, default=8, help="prompts of each of the six tasks")
    parser.add_argument("--seeds", type=int, default=1, help="images of each prompt")
    parser.add_argument("--first-seed", type=int, default=0, help="to add images to those that there are")
    parser.add_argument("--only", help="names of candidates, with commas between")
    parser.add_argument("--part", default="1/1", help="i/n: only every n-th prompt")
    parser.add_argument("--table", type=Path, help="write the table of what has been measured, and measure nothing")
    parser.add_argument("--plot", type=Path, help="the same as an image")
    arguments = parser.parse_args()
    if not arguments.table and not arguments.plot:
        names = arguments.only.split(",") if arguments.only else list(CANDIDATES)
        arguments.out.mkdir(parents=True, exist_ok=True)
        seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        bench = Bench(part_of(read_prompts(limit=arguments.limit), arguments.part), seeds)
        part = f"{arguments.limit}x{seeds.start}-{seeds.stop}-{arguments.part.replace('/', 'of')}"
        for name in dict.fromkeys([name_of(EXACT), *names]):
            measure(bench, name, arguments.out, part)
        return
    found = rows(arguments.out)
    if arguments.plot:
        plot(found, arguments.plot)
    if arguments.table:
        arguments.table.write_text(table(found) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()

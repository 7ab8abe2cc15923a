"""Which decoder blocks plug-and-play features are to be taken from, found by trying each on rendered scenes.

    python tools/make_scenes.py data/scenes-test --count 2000 --split test --seed 1
    python tools/sweep_features.py data/scenes-test --count 20

For every residual block of the decoder its features are injected, with the queries and keys of every self-attention
from there on, while the colour of the object or of the background is changed. Of the blocks whose edits show hardly
more of the source's colours than edits without injection (at most a tenth more), that with the smallest structure
distance is the best one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from editing_measures import (
    EditCase,
    calibration,
    colour_likeness,
    mean_and_margin,
    read_cases,
    structure_distance,
    text_score,
)
from tqdm import tqdm

from latentdiff.checkpoints.embedded import embedded_judge
from latentdiff.errors import LatentDiffError
from latentdiff.evaluation.judge import Judge
from latentdiff.files import atomic_path
from latentdiff.networks.unet import UNet
from latentdiff.pipeline import Pipeline
from latentdiff.tasks import invert, translate
from latentdiff.tasks.features import PnPSpec, default_spec
from latentdiff.tasks.inversion import Inversion

LEAK = 1.1  # how many times the likeness of colours without injection is still no leak


@dataclass(frozen=True)
class Tried:
    """What one choice of blocks gives, mean over the cases."""

    block: str
    structure: list[float]
    likeness: list[float]
    right: list[bool]

    def row(self) -> str:
        """A line of the table."""
        thousandths = mean_and_margin([1000 * value for value in self.structure])
        return f"| {self.block} | {thousandths} | {np.mean(self.likeness):.3f} | {np.mean(self.right):.2f} |"


def blocks_of(unet: UNet) -> list[str]:
    """The decoder's residual blocks, in the order in which they are passed."""
    return [
        f"up_blocks.{up}.resnets.{index}"
        for up, level in enumerate(unet.up_blocks)
        for index in range(len(level.resnets))
    ]


def spec_from(unet: UNet, block: str, tau_f: float, tau_attn: float) -> PnPSpec:
    """Features of one block, and the self-attentions at or after it."""
    later = blocks_of(unet)[blocks_of(unet).index(block) :]
    known = dict(unet.named_modules())
    attentions = tuple(name for name in (place.replace("resnets", "attentions") for place in later) if name in known)
    return PnPSpec((block,), attentions, tau_f, tau_attn)


def tried(
    name: str,
    pipe: Pipeline,
    judge: Judge,
    cases: list[EditCase],
    inversions: list[Inversion],
    spec: PnPSpec,
    guidance: float,
) -> Tried:
    """Make all edits with one choice of blocks and measure them."""
    pairs = list(zip(cases, inversions, strict=True))
    made = [
        translate(pipe, inversion, case.target.text, spec=spec, guidance_scale=guidance, progress=False)[0]
        for case, inversion in tqdm(pairs, desc=name, leave=False)
    ]
    return Tried(
        name,
        [structure_distance(case.source, image) for case, image in zip(cases, made, strict=True)],
        [colour_likeness(case.source, image) for case, image in zip(cases, made, strict=True)],
        text_score(judge, made, cases),
    )


@click.command()
@click.argument("scenes", type=click.Path(path_type=Path))
@click.option("--model", help="As for `latentdiff generate`; without it, the embedded one.")
@click.option("--device", default="auto")
@click.option("--count", type=int, default=20, show_default=True, help="Scenes.")
@click.option("--steps", type=int, default=50, show_default=True)
@click.option("--guidance", type=float, default=5.0, show_default=True)
@click.option("--tau-features", "tau_f", type=float, default=0.8, show_default=True)
@click.option("--tau-attention", "tau_attn", type=float, default=0.5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write all values as JSON.")
def main(
    scenes: Path, model: str | None, device: str, count: int, steps: int, guidance: float, tau_f: float, tau_attn: float,
    out: Path | None,
) -> None:  # fmt: skip
    """Try every decoder block on SCENES and print a table."""
    cases = read_cases(scenes, count)
    pipe, judge = Pipeline.load(model, device=device), Judge.load(embedded_judge())
    inversions = [
        invert(pipe, case.source, prompt=case.source_prompt, steps=steps, measure=False, progress=False)
        for case in tqdm(cases, desc="inverting", leave=False)
    ]
    default = default_spec(pipe.unet.config, tau_f=tau_f, tau_attn=tau_attn)
    results = [tried("none", pipe, judge, cases, inversions, PnPSpec((), (), 0.0, 0.0), guidance)]
    for block in blocks_of(pipe.unet):
        results.append(
            tried(block, pipe, judge, cases, inversions, spec_from(pipe.unet, block, tau_f, tau_attn), guidance)
        )
    click.echo(
        f"{count} scenes, {steps} steps, guidance {guidance}, shares {tau_f} and {tau_attn}; smaller structure is nearer"
    )
    click.echo("\n| features of | structure x 1000 | colours shared | text right |\n|---|---|---|---|")
    click.echo("\n".join(one.row() for one in results))
    least = np.mean(results[0].likeness) * LEAK
    fit = [one for one in results[1:] if np.mean(one.likeness) <= least]
    if fit:
        best = min(fit, key=lambda one: float(np.mean(one.structure)))
        click.echo(f"\nbest without leaking colours: {best.block}; the default is {default.feature_blocks[0]}")
    else:
        click.echo(f"\nevery block leaks colours; the default is {default.feature_blocks[0]}")
    measured = calibration([case.source for case in cases])
    click.echo("\nthe structure distance on changes of known size, as a share of that of a random pair:")
    click.echo(", ".join(f"{name} {value:.3f}" for name, value in measured.items()))
    if out:
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except LatentDiffError as error:
        raise SystemExit(f"error: {error}") from error

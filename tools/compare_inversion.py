"""How well each inversion leads back to its image, and how well each way of editing keeps its layout: two tables.

    python tools/make_scenes.py data/scenes-test --count 2000 --split test --seed 1
    python tools/compare_inversion.py data/scenes-test --count 4 --skip null-text --skip edict --sheet sheet.png

The error of a reconstruction is measured on the latents, against those of the image, and in dB against the image,
with the VAE's own floor beside it. An edit changes the colour of a scene's object or background; the judge of
`latentdiff evaluate` says whether it did.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch
from editing_measures import (
    EditCase,
    colour_likeness,
    mean_and_margin,
    on_pivots,
    read_cases,
    structure_distance,
    text_score,
)
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff.checkpoints.embedded import embedded_judge
from latentdiff.diffusion.denoise import denoise
from latentdiff.diffusion.guidance import Guidance
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.samplers import ddim
from latentdiff.errors import LatentDiffError
from latentdiff.evaluation.judge import Judge
from latentdiff.image import contact_sheet, save_png, to_tensor
from latentdiff.pipeline import Pipeline
from latentdiff.tasks import image_to_image, invert, translate
from latentdiff.tasks.inversion import Inversion, reconstruct
from latentdiff.tasks.inversion.artefact import psnr
from latentdiff.tasks.inversion.run import walk_down, with_null_text

EDITS = ("features", "direct", "null-text", "negative-prompt", "edict", "ddim", "edit", "edit of the inversion")
EDIT_STRENGTH = 0.8  # of the last two, which are image_to_image

Wanted = Callable[[str], bool]  # whether the way of this name is measured


@dataclass
class Row:
    """The values of one way over all images."""

    latents: list[float] = field(default_factory=list)  # RMS, in standard deviations of the image's latents
    decibels: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ways:
    """The ways to invert one case and to sample back; each returns latents (1, C, h, w)."""

    pipe: Pipeline
    case: EditCase
    steps: int
    guidance: float

    def all(self) -> dict[str, Callable[[], Tensor]]:
        """By the name in the table, in the order of its lines."""
        w = f"{self.guidance:g}"
        return {
            "DDIM low": lambda: self.back(method="ddim-low"),
            "DDIM high": lambda: self.back(method="ddim-high"),
            "fixed point, 1 iteration": lambda: self.back(iterations=1),
            "fixed point, 3 iterations": lambda: self.back(iterations=3),
            f"fixed point, guidance {w}": lambda: self.guided(""),
            f"negative-prompt, guidance {w}": lambda: self.guided(self.case.source_prompt),
            f"null-text, guidance {w}": self.null_text,
            "EDICT, guidance 3": lambda: self.back(method="edict"),
            f"direct, guidance {w}": self.direct,
        }

    def inverted(self, **options: object) -> Inversion:
        return invert(
            self.pipe,
            self.case.source,
            prompt=self.case.source_prompt,
            steps=self.steps,
            measure=False,
            progress=False,
            **options,
        )

    def back(self, **options: object) -> Tensor:
        return reconstruct(self.pipe, self.inverted(**options))

    @torch.no_grad()
    def guided(self, avoided: str) -> Tensor:
        found = self.inverted()
        return walk_down(self.pipe, found, self.denoiser(found, avoided), 1)

    @torch.no_grad()
    def direct(self) -> Tensor:
        found = self.inverted()
        latents = found.latents.split(1)
        steps = denoise(
            self.denoiser(found, ""), latents[0], found.levels, ddim.step, after_step=on_pivots(found.levels, latents)
        )
        *_, last = steps
        return last.x

    def denoiser(self, found: Inversion, avoided: str) -> Denoiser:
        negative = self.pipe.encode([avoided])
        return self.pipe.denoiser(found.embeddings, negative, Guidance(scale=self.guidance), found.levels)

    def null_text(self) -> Tensor:
        return reconstruct(self.pipe, with_null_text(self.pipe, self.inverted(), self.guidance))


def reconstructions(
    pipe: Pipeline, cases: list[EditCase], steps: int, guidance: float, wanted: Wanted
) -> tuple[dict[str, Row], list[float]]:
    """All ways that are wanted on all images, and the VAE's floor in dB."""
    rows: dict[str, Row] = {}
    floor = []
    for case in tqdm(cases, desc="reconstructing", leave=False):
        pixels = to_tensor([case.source])
        latents = pipe.encode_images(pixels).mode()
        floor.append(psnr(pipe.decode(latents).cpu(), pixels))
        ways = Ways(pipe, case, steps, guidance).all()
        for name, way in ((name, ways[name]) for name in ways if wanted(name)):
            row, start = rows.setdefault(name, Row()), time.perf_counter()
            back = way()
            row.seconds.append(time.perf_counter() - start)
            row.latents.append(((back - latents).square().mean().sqrt() / latents.std()).item())
            row.decibels.append(psnr(pipe.decode(back).cpu(), pixels))
    return rows, floor


def print_reconstructions(pipe: Pipeline, cases: list[EditCase], steps: int, guidance: float, wanted: Wanted) -> None:
    """The first table."""
    rows, floor = reconstructions(pipe, cases, steps, guidance, wanted)
    about = "prompts that say what the scene shows, without guidance where none is named"
    click.echo(f"{len(cases)} scenes, {steps} steps, {about}\n")
    click.echo("| reconstruction | error of the latents | PSNR, dB | seconds |\n|---|---|---|---|")
    for name, row in rows.items():
        error, decibels = mean_and_margin(row.latents), mean_and_margin(row.decibels)
        click.echo(f"| {name} | {error} | {decibels} | {np.mean(row.seconds):.1f} |")
    click.echo(f"| the VAE alone | 0 | {mean_and_margin(floor)} | |\n")


def edits(
    pipe: Pipeline, cases: list[EditCase], steps: int, guidance: float, methods: list[str]
) -> dict[str, tuple[list[Image.Image], list[float]]]:
    """The images and the seconds, inversion included, of every method."""
    made: dict[str, tuple[list[Image.Image], list[float]]] = {method: ([], []) for method in methods}
    for case in tqdm(cases, desc="editing", leave=False):
        for method in methods:
            start = time.perf_counter()
            image = edited(pipe, case, method, steps, guidance)
            made[method][0].append(image)
            made[method][1].append(time.perf_counter() - start)
    return made


def edited(pipe: Pipeline, case: EditCase, method: str, steps: int, guidance: float) -> Image.Image:
    """The image that one method makes."""
    same = {"steps": steps, "progress": False}
    if not method.startswith("edit"):
        options = {} if method == "edict" else {"guidance_scale": guidance}  # its inversion has its own
        prompts = {"source_prompt": case.source_prompt, "method": method}
        return translate(pipe, case.source, case.target.text, **prompts, **same, **options)[0]
    source = case.source
    if method != "edit":
        source = invert(pipe, source, prompt=case.source_prompt, measure=False, **same)
    options = {"strength": EDIT_STRENGTH, "guidance_scale": guidance, "seed": 0}
    return image_to_image(pipe, source, case.target.text, **same, **options)[0]


@click.command()
@click.argument("scenes", type=click.Path(path_type=Path))
@click.option("--model", help="As for `latentdiff generate`; without it, the embedded one.")
@click.option("--device", default="auto")
@click.option("--count", type=int, default=16, show_default=True, help="Scenes.")
@click.option("--steps", type=int, default=50, show_default=True)
@click.option("--guidance", type=float, default=5.0, show_default=True)
@click.option("--only", default="", help="Reconstructions and edits whose names hold these words.")
@click.option(
    "--skip", multiple=True, metavar="WORDS", help="Leave out those whose names hold these words; repeatable."
)
@click.option("--sheet", type=click.Path(path_type=Path), help="Write images of the first scenes.")
def main(
    scenes: Path,
    model: str | None,
    device: str,
    count: int,
    steps: int,
    guidance: float,
    only: str,
    skip: tuple[str, ...],
    sheet: Path | None,
) -> None:
    """Compare inversions and edits on SCENES and print two tables."""

    def wanted(name: str) -> bool:
        return only in name and not any(words.lower() in name.lower() for words in skip)

    cases = read_cases(scenes, count)
    pipe, judge = Pipeline.load(model, device=device), Judge.load(embedded_judge())
    print_reconstructions(pipe, cases, steps, guidance, wanted)
    made = edits(pipe, cases, steps, guidance, [method for method in EDITS if wanted(method)])
    click.echo("| edit | structure x 1000 | colours shared | text right | seconds |\n|---|---|---|---|---|")
    for method, (images, seconds) in made.items():
        structure = [1000 * structure_distance(case.source, image) for case, image in zip(cases, images, strict=True)]
        likeness = [colour_likeness(case.source, image) for case, image in zip(cases, images, strict=True)]
        right = np.mean(text_score(judge, images, cases))
        click.echo(
            f"| {method} | {mean_and_margin(structure)} | {np.mean(likeness):.3f} | {right:.2f} | {np.mean(seconds):.1f} |"
        )
    start = time.perf_counter()
    pipe(cases[0].target.text, steps=steps, guidance_scale=guidance, progress=False)
    click.echo(f"\nplain guided generation of one image in {steps} steps: {time.perf_counter() - start:.1f} seconds")
    if sheet:
        save_png(_sheet(cases[:6], {method: images[:6] for method, (images, _) in made.items()}), sheet)


def _sheet(cases: list[EditCase], made: dict[str, list[Image.Image]]) -> Image.Image:
    """A row per scene: the source, then every method's edit."""
    images, captions = [], []
    for index, case in enumerate(cases):
        images += [case.source, *(made[method][index] for method in made)]
        captions += [f"to {case.target.text.removeprefix('a photo of ')}", *made]
    return contact_sheet(images, captions, columns=1 + len(made))


if __name__ == "__main__":
    try:
        main()
    except LatentDiffError as error:
        raise SystemExit(f"error: {error}") from error

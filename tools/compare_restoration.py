"""How well damaged scenes are restored, beside the classical way and the floor that the VAE sets: a table and images.

    pip install scikit-image
    python tools/make_scenes.py data/scenes-test --count 2000 --split test --seed 1
    python tools/compare_restoration.py data/scenes-test --count 16 --sheet restoration.png
    python tools/compare_restoration.py data/scenes-test --time 5         what each costs beside plain generation
    python tools/compare_restoration.py data/scenes-test --quick          a few scenes and steps, to see that it runs

PSNR in dB of colours in [-1, 1], higher is better. A sample of the posterior lies about 3 dB below the best estimate
even if all is perfect, the mean of 8 samples 0.5 dB; so it is the mean that is compared with classical estimates. "r /
noise" is how far a sample misses the measurement, in units of the measurement's noise; 1 is right. The VAE floor is
what encoding and decoding the undamaged scene leaves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import numpy as np
import scipy.ndimage
import torch
from editing_measures import mean_and_margin
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff.errors import DataError, LatentDiffError, MissingDependencyError
from latentdiff.image import as_rgb, contact_sheet, open_image, save_png, to_pil, to_tensor
from latentdiff.pipeline import Pipeline
from latentdiff.tasks import restore
from latentdiff.tasks.inversion.artefact import psnr
from latentdiff.tasks.restoration.operators import (
    Colourise,
    Deblur,
    Denoise,
    Inpaint,
    Operator,
    SuperResolution,
    gaussian_blur,
    motion_blur,
)
from latentdiff.tasks.restoration.task import Restoration

# (operator, measurement (1, c, h, w), truth, for those that may choose their best) -> an image (1, 3, H, W).
Classical = Callable[[Operator, Tensor, Tensor], Tensor]
MARGIN = 16  # pixels by which images are mirrored before they are filtered in the Fourier domain
ON_SHEET = 3  # scenes


@dataclass(frozen=True)
class Case:
    """A damage, the classical way to undo it, and what the mean of the samples has to reach."""

    name: str
    make: Callable[[int, int, int], Operator]  # (height, width, number of the scene)
    classical_name: str
    classical: Classical
    goal: str = ""  # "classical": no more than 0.2 dB below it; "input": 1 dB above the damaged image


@dataclass
class Row:
    """The values of one case over all scenes."""

    damaged: list[float] = field(default_factory=list)
    classical: list[float] = field(default_factory=list)
    sample: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def holes(height: int, width: int, number: int) -> Tensor:
    """Half of the pixels, at random."""
    return torch.rand(height, width, generator=torch.Generator().manual_seed(number)) < 0.5


def box(height: int, width: int, number: int) -> Tensor:
    """A square of a quarter of the image, at a place that depends on the scene."""
    missing = torch.zeros(height, width, dtype=torch.bool)
    top, left = (np.random.default_rng(number).integers(0, [height // 2 + 1, width // 2 + 1])).tolist()
    missing[top : top + height // 2, left : left + width // 2] = True
    return missing


def bicubic(operator: Operator, y: Tensor, truth: Tensor) -> Tensor:
    """Pillow's."""
    size = (truth.shape[-1], truth.shape[-2])
    channels = [np.asarray(Image.fromarray(channel.numpy()).resize(size, Image.Resampling.BICUBIC)) for channel in y[0]]
    return torch.from_numpy(np.stack(channels))[None]


def wiener(spectrum: np.ndarray) -> Classical:
    """The Wiener filter for the true kernel and noise and the median spectrum of other scenes."""

    def estimate(operator: Operator, y: Tensor, truth: Tensor) -> Tensor:
        kernel = operator.kernel.numpy()
        padded = np.pad(y[0].numpy(), ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)), mode="reflect")
        grid = np.zeros(padded.shape[1:])
        grid[: kernel.shape[0], : kernel.shape[1]] = kernel
        transfer = np.fft.fft2(np.roll(grid, (-operator.centre[0], -operator.centre[1]), (0, 1)))
        power = _resampled(spectrum, grid.shape)
        response = transfer.conj() * power / (np.abs(transfer) ** 2 * power + operator.noise_std**2)
        mean = padded.mean(axis=(1, 2), keepdims=True)
        clean = np.fft.ifft2(np.fft.fft2(padded - mean) * response).real + mean
        return torch.from_numpy(clean[:, MARGIN:-MARGIN, MARGIN:-MARGIN]).float()[None]

    return estimate


def median_spectrum(images: list[Image.Image]) -> np.ndarray:
    """Of the variance at each frequency, (H, W), per pixel."""
    spectra = []
    for image in images:
        values = to_tensor([image])[0].numpy()
        values = values - values.mean(axis=(1, 2), keepdims=True)
        spectra.append((np.abs(np.fft.fft2(values)) ** 2).mean(axis=0) / values[0].size)
    return np.median(spectra, axis=0)


def _resampled(spectrum: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows, columns = (np.abs(np.fft.fftfreq(side)) * old for side, old in zip(shape, spectrum.shape, strict=True))
    return scipy.ndimage.map_coordinates(spectrum, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="grid-wrap")


def filtered(operator: Operator, y: Tensor, truth: Tensor) -> Tensor:
    """The best, by the truth, of the 3x3 and 5x5 median and three Gaussian filters."""
    channels = y[0].numpy()
    tries = [scipy.ndimage.median_filter(channels, (1, side, side)) for side in (3, 5)]
    tries += [scipy.ndimage.gaussian_filter(channels, (0, std, std)) for std in (0.5, 0.8, 1.2)]
    return max((torch.from_numpy(found)[None] for found in tries), key=lambda found: psnr(found, truth))


def biharmonic(operator: Operator, y: Tensor, truth: Tensor) -> Tensor:
    """Scikit-image's fill."""
    try:
        from skimage.restoration import inpaint_biharmonic
    except ImportError as error:
        raise MissingDependencyError(
            "filling holes the classical way needs scikit-image: pip install scikit-image"
        ) from error
    missing = ~operator.known.numpy()
    filled = inpaint_biharmonic(y[0].permute(1, 2, 0).numpy(), missing, channel_axis=-1)
    return torch.from_numpy(filled).permute(2, 0, 1)[None].float()


def grey(operator: Operator, y: Tensor, truth: Tensor) -> Tensor:
    """No colour at all."""
    return y.expand(-1, 3, -1, -1)


def cases(spectrum: np.ndarray) -> list[Case]:
    """In the order of the table."""

    def blur(kernel: Tensor) -> Callable[[int, int, int], Operator]:
        return lambda height, width, number: Deblur(kernel, noise_std=0.02)

    def smaller(factor: int) -> Callable[[int, int, int], Operator]:
        return lambda height, width, number: SuperResolution(factor, noise_std=0.02)

    def noisy(std: float) -> Callable[[int, int, int], Operator]:
        return lambda height, width, number: Denoise(noise_std=std)

    def masked(mask: Callable[[int, int, int], Tensor]) -> Callable[[int, int, int], Operator]:
        return lambda height, width, number: Inpaint(mask(height, width, number))

    return [
        Case("super-resolution x2", smaller(2), "bicubic", bicubic, "classical"),
        Case("super-resolution x4", smaller(4), "bicubic", bicubic, "classical"),
        Case("Gaussian blur 1.5", blur(gaussian_blur(1.5)), "Wiener", wiener(spectrum), "input"),
        Case("motion blur 9:45", blur(motion_blur(9.0, 45.0)), "Wiener", wiener(spectrum), "input"),
        Case("noise 0.1", noisy(0.1), "median or Gaussian", filtered, "input"),
        Case("noise 0.3", noisy(0.3), "median or Gaussian", filtered, "input"),
        Case("half of the pixels", masked(holes), "biharmonic", biharmonic),
        Case("a quarter box", masked(box), "biharmonic", biharmonic),
        Case("colour", lambda height, width, number: Colourise(), "grey", grey),
    ]


@dataclass(frozen=True)
class Damaged:
    """One scene under one operator."""

    operator: Operator
    y: Tensor
    truth: Tensor

    @classmethod
    def of(cls, case: Case, truth: Tensor, number: int) -> Damaged:
        operator = case.make(*truth.shape[-2:], number)
        y = operator.apply(truth)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(number))
        return cls(operator, y + operator.noise_std * noise, truth)

    def shown(self) -> Tensor:
        """The measurement as an image (1, 3, H, W): repeated pixels where it is smaller, mid-grey where it is
        missing."""
        factor = self.truth.shape[-1] // self.y.shape[-1]
        return self.y.expand(-1, 3, -1, -1).repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)

    def psnr(self, image: Tensor) -> float:
        """Of what is missing, if anything is."""
        if not isinstance(self.operator, Inpaint):
            return psnr(image.clamp(-1, 1), self.truth)
        missing = ~self.operator.known
        return psnr(image.clamp(-1, 1)[..., missing], self.truth[..., missing])


@dataclass(frozen=True)
class Runner:
    """How everything is restored."""

    pipe: Pipeline
    samples: int
    steps: int | None

    def __call__(self, damaged: Damaged, number: int, **options: object) -> tuple[Restoration, float]:
        """The restoration, and the seconds that one sample took."""
        start = time.perf_counter()
        settings = {"samples": self.samples, "steps": self.steps, "seed": 1000 * number, "progress": False, **options}
        found = restore(self.pipe, damaged.y, damaged.operator, **settings)
        return found, (time.perf_counter() - start) / len(found.images)


def compare(
    runner: Runner, all_cases: list[Case], scenes: list[Image.Image], prompts: list[str]
) -> tuple[dict[str, Row], Image.Image]:
    """All cases on all scenes, and a sheet with a row per case and scene."""
    rows: dict[str, Row] = {case.name: Row() for case in all_cases}
    images, captions = [], []
    for case in all_cases:
        row = rows[case.name]
        for number, scene in enumerate(tqdm(scenes, desc=case.name, leave=False)):
            damaged = Damaged.of(case, to_tensor([scene]), number)
            found, seconds = runner(damaged, number, prompt=prompts[number])
            classical = case.classical(damaged.operator, damaged.y, damaged.truth)
            row.damaged.append(damaged.psnr(damaged.shown()))
            row.classical.append(damaged.psnr(classical))
            row.sample.append(damaged.psnr(to_tensor(found.images[:1])))
            row.mean.append(damaged.psnr(to_tensor([found.mean])))
            row.seconds.append(seconds)
            if found.noise_std:
                row.ratio += [residual / found.noise_std for residual in found.residuals]
            if number < ON_SHEET:
                spread = found.uncertainty_image() if runner.samples > 1 else Image.new("L", scene.size)
                images += [scene, *to_pil(torch.cat([damaged.shown(), classical])), found.images[0], found.mean]
                images.append(spread.convert("RGB"))
                captions += [
                    "scene",
                    case.name,
                    case.classical_name,
                    "a sample",
                    f"mean of {runner.samples}",
                    "uncertainty",
                ]
    return rows, contact_sheet(images, captions, columns=6)


def methods_table(runner: Runner, all_cases: list[Case], scenes: list[Image.Image], quick: bool) -> None:
    """One sample of every method, as the walk leaves it."""
    click.echo("\n| method | case | PSNR | r / noise | seconds |\n|---|---|---|---|---|")
    for case in (all_cases[1], all_cases[2]):
        for method in ("diffpir", "dps", "psld", "resample", "graikos"):
            steps = 10 if quick else None
            quality, ratio, seconds = [], [], []
            for number, scene in enumerate(scenes):
                damaged = Damaged.of(case, to_tensor([scene]), number)
                found, took = runner(damaged, number, method=method, steps=steps, samples=1, keep_measurement=False)
                quality.append(damaged.psnr(to_tensor(found.images)))
                ratio.append(found.residuals[0] / found.noise_std)
                seconds.append(took)
            values = f"{mean_and_margin(quality)} | {np.mean(ratio):.2f} | {np.mean(seconds):.1f}"
            click.echo(f"| {method} | {case.name} | {values} |")


def costs_table(pipe: Pipeline, all_cases: list[Case], scene: Image.Image, steps: int, rounds: int) -> None:
    """The processor time of one sample against that of plain guided generation in as many steps, one after the
    other."""

    def spent(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    ways: dict[str, Callable[[], object]] = {
        "plain generation": lambda: pipe("a cat", steps=steps, seed=0, progress=False)
    }
    for case in all_cases:
        damaged = Damaged.of(case, to_tensor([scene]), 0)
        options = {"steps": steps, "seed": 0, "progress": False}
        ways[case.name] = partial(restore, pipe, damaged.y, damaged.operator, **options)
    for work in ways.values():
        work()
    taken = {name: [] for name in ways}
    for _ in tqdm(range(rounds), desc="timing", leave=False):
        for name, work in ways.items():
            taken[name].append(spent(work))
    plain = np.array(taken["plain generation"])
    click.echo(f"{steps} steps, medians of {rounds} rounds, {torch.get_num_threads()} threads\n")
    click.echo("| work | processor seconds | times plain |\n|---|---|---|")
    for name, seconds in taken.items():
        click.echo(f"| {name} | {np.median(seconds):.2f} | {np.median(np.array(seconds) / plain):.2f} |")


def verdict(case: Case, row: Row) -> str:
    """Whether the mean reached its goal and the samples explain the measurement."""
    found = []
    if case.goal == "classical":
        found.append(np.mean(row.mean) >= np.mean(row.classical) - 0.2)
    elif case.goal == "input":
        found.append(np.mean(row.mean) >= np.mean(row.damaged) + 1.0)
    if row.ratio:
        found.append(0.7 <= np.mean(row.ratio) <= 1.3)
    return ("yes" if all(found) else "no") if found else ""


def read_scenes(folder: Path, count: int) -> tuple[list[Image.Image], list[str]]:
    """The first scenes of a folder that tools/make_scenes.py made, and their captions.

    Raises:
        DataError: there are too few.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise DataError(f"expected scenes in {folder}, found no metadata.jsonl; make them with tools/make_scenes.py")
    lines = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()[:count]]
    if len(lines) < count:
        raise DataError(f"expected {count} scenes in {folder}, found {len(lines)}")
    return [as_rgb(open_image(folder / line["file_name"])) for line in lines], [line["text"] for line in lines]


@click.command()
@click.argument("scenes", type=click.Path(path_type=Path))
@click.option("--model", help="As for `latentdiff generate`; without it, the embedded one.")
@click.option("--device", default="auto")
@click.option("--count", type=int, default=16, show_default=True, help="Scenes.")
@click.option("--samples", type=int, default=8, show_default=True, help="Of each scene.")
@click.option("--steps", type=int, default=50, show_default=True)
@click.option("--only", help="Cases whose names hold this word.")
@click.option("--captions", is_flag=True, help="Prompt with the scenes' captions; without, with nothing.")
@click.option("--methods", type=int, default=0, show_default=True, help="Also compare all methods, on so many scenes.")
@click.option("--time", "rounds", type=int, default=0, help="Only measure what a sample costs, in so many rounds.")
@click.option("--quick", is_flag=True, help="2 scenes, 2 samples and 10 steps.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write images of the first scenes.")
def main(
    scenes: Path, model: str | None, device: str, count: int, samples: int, steps: int, only: str | None, captions: bool,
    methods: int, rounds: int, quick: bool, sheet: Path | None,
) -> None:  # fmt: skip
    """Restore SCENES from known damage and print a table."""
    if quick:
        count, samples, steps = 2, 2, 10
    others = 32  # scenes that only the Wiener filter's spectrum is taken from
    found, texts = read_scenes(scenes, count + others)
    all_cases = cases(median_spectrum(found[count:]))
    images = found[:count]
    chosen = [case for case in all_cases if only is None or only in case.name]
    pipe = Pipeline.load(model, device=device)
    if rounds:
        costs_table(pipe, chosen, images[0], steps, rounds)
        return
    floor = [
        psnr(pipe.decode(pipe.encode_images(x).mode()).cpu().clamp(-1, 1), x) for x in map(to_tensor, zip(images))
    ]
    runner = Runner(pipe, samples, steps)
    prompts = texts if captions else [""] * count
    rows, drawn = compare(runner, chosen, images, prompts)
    asked, reach = "captions as prompts" if captions else "no prompt", mean_and_margin(floor)
    click.echo(f"{count} scenes, {steps} steps, {asked}; the VAE's floor is {reach} dB; holes count alone\n")
    click.echo(
        f"| damage | damaged | classical | a sample | mean of {samples} | r / noise | reached | seconds a sample |"
    )
    click.echo("|---|---|---|---|---|---|---|---|")
    for case in chosen:
        row = rows[case.name]
        ratio = f"{np.mean(row.ratio):.2f}" if row.ratio else "exact"
        values = [np.mean(row.damaged), np.mean(row.classical), np.mean(row.sample)]
        quality = "{:.2f} | {:.2f} ({}) | {:.2f}".format(*values[:2], case.classical_name, values[2])
        end = f"{mean_and_margin(row.mean)} | {ratio} | {verdict(case, row)} | {np.mean(row.seconds):.1f}"
        click.echo(f"| {case.name} | {quality} | {end} |")
    start = time.perf_counter()
    pipe("a cat", steps=steps, progress=False)
    click.echo(f"\nplain guided generation of one image in {steps} steps: {time.perf_counter() - start:.1f} seconds")
    if sheet:
        save_png(drawn, sheet)
    if methods or quick:
        methods_table(runner, all_cases, images[: methods or 2], quick)


if __name__ == "__main__":
    try:
        main()
    except LatentDiffError as error:
        raise SystemExit(f"error: {error}") from error

"""`latentdiff generate`: pictures of prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from latentdiff.cli import output
from latentdiff.cli.model import drawn_seed, loaded_model
from latentdiff.cli.options import (
    ANY_PATH,
    BATCH_SIZE,
    GUIDANCE_OPTIONS,
    HEIGHT,
    MODEL_OPTIONS,
    NEGATIVE,
    NO_METADATA,
    NUM_IMAGES,
    OUT,
    SAMPLER_OPTIONS,
    SEED,
    STEPS,
    WIDTH,
)
from latentdiff.errors import LatentDiffError, UsageError

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--prompts",
    "prompt_file",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Read prompts from FILE, one a line; - is stdin. Blank lines and lines that begin with # are skipped.",
)
@NEGATIVE
@NUM_IMAGES
@OUT
@click.option("--skip-existing", is_flag=True, help="Do not make pictures again that lie in the folder already.")
@SEED
@STEPS
@GUIDANCE_OPTIONS
@SAMPLER_OPTIONS
@WIDTH
@HEIGHT
@MODEL_OPTIONS
@BATCH_SIZE
@click.option("--sheet", type=ANY_PATH, metavar="FILE.png", help="Also write all pictures on one sheet with their prompts.")
@NO_METADATA
def generate(
    prompts: tuple[str, ...],
    prompt_file: Any,
    out: Path,
    seed: int | None,
    num_images: int,
    skip_existing: bool,
    no_metadata: bool,
    sheet: Path | None,
    **settings: Any,
) -> int:
    """Make pictures of one or more prompts and print where they lie."""
    texts = [*prompts, *_read_prompts(prompt_file)]
    if not texts:
        raise UsageError("expected a prompt, or a file of prompts with --prompts; found neither")
    if out.suffix == ".png" and len(texts) * num_images > 1:
        raise UsageError(f"expected a folder for {len(texts) * num_images} pictures, found --out {out}")
    for place in filter(None, (out, sheet)):
        output.check_writable(place)
    with loaded_model(settings) as pipe:
        first = drawn_seed(seed)
        seeds = [first + i for i in range(num_images)]
        job = _Job(pipe, out, seeds, settings, skip_existing=skip_existing, metadata=not no_metadata)
        code = job.run(texts)
    if sheet:
        job.write_sheet(sheet)
    return code


@dataclass(frozen=True)
class _Job:
    """Pictures of several prompts with the same settings."""

    pipe: Pipeline
    out: Path
    seeds: list[int]
    settings: dict[str, Any]
    skip_existing: bool
    metadata: bool
    done: list[tuple[Path, str]] = field(default_factory=list)  # pictures and their prompts, old ones too

    def run(self, prompts: list[str]) -> int:
        """Make all pictures; one failing prompt does not end the job. Returns the exit code."""
        failed = 0
        for prompt in prompts:
            try:
                self._make(prompt)
            except UsageError:
                raise  # the settings are the same for all prompts
            except (LatentDiffError, RuntimeError, OSError) as error:
                if len(prompts) == 1:
                    raise
                failed += 1
                click.echo(f"error: {prompt!r}: {' '.join(str(error).split())}", err=True)
        if failed:
            click.echo(f"error: {failed} of {len(prompts)} prompts failed", err=True)
        return 1 if failed else 0

    def _make(self, prompt: str) -> None:
        paths = {}
        for seed in self.seeds:
            path, is_there = output.picture_path(self.out, self._wanted(prompt, seed))
            self.done.append((path, prompt))
            if is_there and self.skip_existing:
                click.echo(f"{path} is there already", err=True)
            else:
                paths[seed] = path
        if not paths:
            return

        from latentdiff.image import save_png

        images = self.pipe(prompt, seed=list(paths), num_images=len(paths), **self.settings)
        for image, path in zip(images, paths.values(), strict=True):
            save_png(image, path, metadata=self.metadata)
            click.echo(path)

    def write_sheet(self, path: Path) -> None:
        """Lay out all pictures of the job that there are."""
        from latentdiff.image import contact_sheet, open_image, save_png

        done = [(open_image(picture), prompt) for picture, prompt in self.done if picture.exists()]
        if done:
            images, prompts = zip(*done, strict=True)
            save_png(contact_sheet(images, prompts), path)
            click.echo(path)

    def _wanted(self, prompt: str, seed: int) -> dict[str, Any]:
        """What the recipe of a picture would say, as far as it decides what the picture shows."""
        from latentdiff.request import with_defaults

        settings = with_defaults({name: value for name, value in self.settings.items() if name != "batch_size"})
        del settings["fast"]
        height, width = self.pipe.default_size
        silent = {"height": height, "width": width, "spacing": self.pipe.schedule.config.timestep_spacing}
        asked = {name: silent.get(name) if value is None else value for name, value in settings.items()}
        model = {
            "model_hash": self.pipe.model_hash,
            "ema": self.pipe.ema,
            "prediction_type": self.pipe.schedule.config.prediction_type,
            "loras": self.pipe.adaptations(),
        }
        return {"prompt": prompt, "seed": seed, **model, **asked}


def _read_prompts(file: TextIO | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise UsageError(f"expected prompts as UTF-8 text in {file.name}, found other bytes") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"expected prompts in {file.name}, one a line, found none")
    return prompts

"""Many images with the same settings: where each of them belongs, and making them, alone or among several
processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentdiff.cli import output
from latentdiff.cli.ranks import Ranks
from latentdiff.errors import LatentDiffError, UsageError, printable
from latentdiff.prompts.lines import Line
from latentdiff.prompts.syntax import read_prompt
from latentdiff.recipe import recorded_steering
from latentdiff.request.options import GENERATING, KEPT, OPTIONS, SAMPLING, SECOND_PASS, checked

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.pipeline import Pipeline


@dataclass(frozen=True)
class WantedImage:
    """One image that is wanted; `is_there` says whether it was made before."""

    prompt: str
    seed: int
    path: Path
    is_there: bool
    own: tuple[tuple[str, Any], ...] = ()  # options of this prompt alone


@dataclass(frozen=True)
class PromptsJob:
    """Images of several prompts.

    Attributes:
        settings: options of `Pipeline.__call__` for all images.
        skip_existing: do not make again what is there.
        writing: how the files are written.
        ranks: the processes that share the work. Each has the same plan.
        make: what makes images of a prompt with `settings`; None is the pipeline.
        facts: what recipes say besides.
    """

    pipe: Pipeline
    settings: dict[str, Any]
    skip_existing: bool = False
    writing: output.Writing = output.Writing()
    ranks: Ranks = Ranks()
    make: Callable[..., list[Image.Image]] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def plan(self, out: Path, lines: Sequence[Line], first: int, count: int) -> list[WantedImage]:
        """All images, prompt by prompt, each once and each in a file of its own.

        What other processes of the same job have written already does not change the plan.

        Args:
            first, count: seed of the first image and number of images of each prompt, where its line says no other.
        """
        images: dict[Path, WantedImage] = {}
        for line in dict.fromkeys(lines):
            own = checked(dict(line.options))
            start = own.pop("seed", first)
            for seed in range(start, start + own.pop("num_images", count)):
                wanted = self._wanted(line.prompt, seed, own)
                path, is_there = output.image_path(out, wanted, images, self.writing.ending)
                images[path] = WantedImage(line.prompt, seed, path, is_there, tuple(own.items()))
        return list(images.values())

    def run(self, images: Sequence[WantedImage]) -> int:
        """Make the share of this process; one failing prompt does not end the job. Returns the exit code."""
        calls = self.ranks.own(list(self._calls(images)))
        is_alone = len(calls) == 1 and self.ranks.count == 1
        failed = set()
        for call in calls:
            prompt = call[0].prompt
            if call is calls[-1]:
                self.pipe.residence.expect_no_more()
            try:
                self._make(call)
            except UsageError:
                raise  # the settings are the same for all prompts
            except (LatentDiffError, RuntimeError, OSError) as error:
                if is_alone:
                    raise
                failed.add(prompt)
                click.echo(f"error: {prompt!r}: {printable(' '.join(str(error).split()))}", err=True)
        if failed:
            count = len({image.prompt for image in images})
            click.echo(f"error: {len(failed)} of {count} prompts failed", err=True)
        return 1 if failed else 0

    def _calls(self, images: Sequence[WantedImage]) -> Iterator[list[WantedImage]]:
        """What one call of the pipeline makes: a prompt, or one batch of it where it is to be shared."""
        from latentdiff.request.plan import batches

        for _, of_prompt in groupby(images, key=lambda image: (image.prompt, image.own)):
            found = list(of_prompt)
            parts = [slice(None)] if self.ranks.count == 1 else batches(len(found), self.settings.get("batch_size"))
            yield from (found[part] for part in parts)

    def _make(self, wanted: Sequence[WantedImage]) -> None:
        missing = []
        for one in wanted:
            if one.is_there and self.skip_existing:
                click.echo(f"{one.path} is there already", err=True)
            else:
                missing.append(one)
        if not missing:
            return
        options = {
            "seed": [one.seed for one in missing],
            "num_images": len(missing),
            "progress": self.ranks.is_first,
        }
        images = (self.make or self.pipe)(missing[0].prompt, **options, **{**self.settings, **dict(missing[0].own)})
        for image, one in zip(images, missing, strict=True):
            self.writing.save(image, one.path)
            click.echo(one.path)

    def _wanted(self, prompt: str, seed: int, own: Mapping[str, Any]) -> dict[str, Any]:
        """What the recipe of an image would say, as far as it decides what the image shows."""
        from latentdiff.request.plan import Sampling
        from latentdiff.request.second_pass import SecondPass

        settings = {**self.settings, **own}
        settled = Sampling(**{name: value for name, value in settings.items() if name in SAMPLING})
        settled = settled.for_model(self.pipe.schedule)
        asked = {name: getattr(settled, name) for name in KEPT if name in SAMPLING}
        given = {name: settings.get(name) for name in GENERATING}
        asked |= {name: OPTIONS[name].default if value is None else value for name, value in given.items()}
        height, width = self.pipe.default_size
        asked |= {"height": settings.get("height") or height, "width": settings.get("width") or width}
        if second := SecondPass.taken_from({name: asked[name] for name in SECOND_PASS}):
            asked |= second.fields()
        tags = read_prompt(prompt, settled.prompt_syntax).loras
        own = [self.pipe.distilled.describe()] if settled.fast and self.pipe.distilled else []
        model = {
            "model_hash": self.pipe.model_hash,
            "ema": self.pipe.ema,
            "prediction_type": self.pipe.schedule.config.prediction_type,
            "loras": [*self.pipe.adaptations(), *self.pipe.offered.describe(tags), *own],
            **recorded_steering(settings),
        }
        return {**asked, **model, **self.facts, "prompt": prompt, "seed": seed}


def write_sheet(wanted: Sequence[WantedImage], path: Path, writing: output.Writing) -> None:
    """Lay out those of the images that there are, with their prompts."""
    from latentdiff.image import as_rgb, contact_sheet, open_image

    done = [(as_rgb(open_image(one.path)), one.prompt) for one in wanted if one.path.exists()]
    if done:
        images, prompts = zip(*done, strict=True)
        writing.save(contact_sheet(images, prompts), path)
        click.echo(path)

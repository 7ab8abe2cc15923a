"""`latentdiff generate`: images of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from latentdiff.cli import output
from latentdiff.cli.controls import STEERING_OPTIONS, take_steering
from latentdiff.cli.headings import FILES, Command, under
from latentdiff.cli.job import PromptsJob, write_sheet
from latentdiff.cli.model import drawn_seed, loaded_model
from latentdiff.cli.options import (
    ANY_PATH,
    GENERATE_OPTIONS,
    MODEL_OPTIONS,
    OUT,
    PREVIEW,
    PREVIEW_DECODER,
    PREVIEW_EVERY,
    WRITING,
)
from latentdiff.cli.places import check_there, model_there
from latentdiff.cli.previews import preview_file
from latentdiff.cli.ranks import joined
from latentdiff.cli.words import remark
from latentdiff.errors import UsageError
from latentdiff.prompts.lines import Line, read_lines
from latentdiff.prompts.notice import shortened
from latentdiff.prompts.wildcards import Wildcards
from latentdiff.request.calls import Settings
from latentdiff.request.infotext import SAMPLER_TITLES
from latentdiff.request.option import PromptOption, XLOption
from latentdiff.request.options import OPTIONS, SAMPLING, GenerateOptions, SizedOptions, check_second_pass, options_of

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline


REFINER = click.option(
    "--refiner",
    callback=model_there,
    metavar="MODEL",
    help="Let another model take the last steps, as the refiner of SDXL does.",
)
REFINER_SWITCH = click.option(
    "--refiner-switch",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.8,
    show_default=True,
    metavar="X",
    help="After which share of the noise schedule it takes over.",
)
SHEET = click.option("--sheet", type=ANY_PATH, metavar="FILE", help="Also write all images on one sheet with their prompts.")
WILDCARDS = click.option(
    "--wildcards",
    type=ANY_PATH,
    metavar="FOLDER",
    help="For each image, choose one of {a|b} in its prompt, and a line of FOLDER/name.txt for __name__.",
)
EXPLAIN = click.option(
    "--explain",
    is_flag=True,
    help="Make nothing; show what each prompt means: tokens, weights, chunks, stages, and what is cut or means nothing.",
)


@click.command(cls=Command)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--prompts",
    "prompt_file",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Read prompts from FILE, one per line; - is stdin. Blank lines and lines that begin with # are skipped. A line may "
    "end in options of its own, --n TEXT --w --h --d SEED --s STEPS --l GUIDANCE, or be written as "
    '--prompt "..." --steps 30.',
)
@OUT
@click.option("--skip-existing", is_flag=True, help="Do not make images that are in the folder already.")
@GENERATE_OPTIONS
@STEERING_OPTIONS
@MODEL_OPTIONS
@under(FILES, PREVIEW, PREVIEW_EVERY, PREVIEW_DECODER, SHEET)
@under(XLOption.heading, REFINER, REFINER_SWITCH)
@under(PromptOption.heading, WILDCARDS, EXPLAIN)
@WRITING
def generate(
    prompts: tuple[str, ...],
    prompt_file: Any,
    out: Path,
    seed: int | None,
    num_images: int,
    skip_existing: bool,
    sheet: Path | None,
    preview: Path | None,
    preview_every: int,
    preview_decoder: Path | None,
    refiner: str | None,
    refiner_switch: float,
    wildcards: Path | None,
    explain: bool,
    **settings: Any,
) -> int:
    """Make images of one or more prompts and print where they are.

    Started by accelerate launch or torchrun, the processes share the images, each on a GPU of its own where there are
    some.
    """
    lines = [*map(Line, prompts), *_read_prompts(prompt_file)]
    count = sum(dict(line.options).get("num_images", num_images) for line in lines)
    if not lines:
        raise UsageError("expected a prompt, or a file of prompts with --prompts; found neither")
    writing = output.Writing.taken_from(settings, out)
    output.check_count(out, count)
    if preview_decoder and not preview:
        raise UsageError("expected --preview FILE with --preview-decoder, which only previews use")
    if preview_decoder:
        check_there("tiny decoder", str(preview_decoder))
    take_steering(settings)
    check_second_pass(settings)
    if wildcards:
        Wildcards(wildcards)  # what is wrong with them is said before the model is loaded
    if explain:
        return _explain([line.prompt for line in lines], settings)
    output.check_apart({"--out": out, "--sheet": sheet, "--preview": preview})
    output.check_writable(out)
    for option, place in (("--sheet", sheet), ("--preview", preview)):
        if place:
            output.check_image_file(option, place)
    with joined() as ranks:
        if not ranks.can_talk and ranks.count > 1 and (seed is None or sheet):
            raise UsageError(
                "expected --seed and no --sheet, as the processes have no MASTER_ADDR and MASTER_PORT to agree by"
            )
        if ranks.is_first:
            remark(settings, [line.prompt for line in lines])
        settings["device"] = ranks.device(settings["device"])
        with loaded_model(settings) as pipe:
            first = ranks.agree(lambda: drawn_seed(seed))
            if preview and ranks.is_first:
                settings["callback"] = preview_file(pipe, preview, preview_every, preview_decoder)
            second = _refining(pipe, refiner, refiner_switch, settings) if refiner else {}
            job = PromptsJob(pipe, settings, skip_existing=skip_existing, writing=writing, ranks=ranks, **second)
            if wildcards:
                lines = _drawn(lines, wildcards, first, num_images)
            images = job.plan(out, lines, first, num_images)
            code = ranks.worst(job.run(images))
    if sheet and ranks.is_first:
        write_sheet(images, sheet, writing)
    return code


def _refining(pipe: Pipeline, refiner: str, switch: float, settings: dict[str, Any]) -> dict[str, Any]:
    """How a `PromptsJob` has the last steps taken by another model."""
    for name in options_of(GenerateOptions).keys() - options_of(SizedOptions).keys():
        if settings.pop(name, None) not in (None, OPTIONS[name].default):
            raise UsageError(f"--refiner does not go with {OPTIONS[name].flag(name)}; leave one of them out")
    from latentdiff.pipeline import Pipeline
    from latentdiff.tasks import refining

    low_memory = pipe.residence.low_memory
    other = Pipeline.load(refiner, device=str(pipe.device), precision=pipe.precision.name, low_memory=low_memory)
    pipe.residence.keep = other.residence.keep = False  # two models of this size
    source = {"refiner": {"file": other.name, "sha256": other.model_hash}}
    return {
        "make": partial(refining.refine, pipe, other, switch=switch),
        "facts": {"task": refining.TASK, "task_settings": {"switch": switch}, "sources": source},
    }


def _explain(prompts: Sequence[str], settings: dict[str, Any]) -> int:
    negative = settings["negative_prompt"]
    with loaded_model(settings) as pipe:
        options = Settings(**{name: value for name, value in settings.items() if name in SAMPLING})
        for text, is_negative in (*((prompt, False) for prompt in prompts), (negative, True)):
            if text or not is_negative:
                click.echo(f"{'negative: ' * is_negative}{shortened(text)}")
                found = pipe.explain(
                    text, prompt_syntax=options.prompt_syntax, steps=options.steps, negative=is_negative
                )
                click.echo(f"{found}\n")
    return 0


def _read_prompts(file: TextIO | None) -> list[Line]:
    if file is None:
        return []
    try:
        lines = read_lines(file, SAMPLER_TITLES)
    except UnicodeDecodeError as error:
        raise UsageError(f"expected prompts as UTF-8 text in {file.name}, found other bytes") from error
    if not lines:
        raise UsageError(f"expected prompts in {file.name}, one a line, found none")
    return lines


def _drawn(lines: Sequence[Line], folder: Path, first: int, count: int) -> list[Line]:
    """A line for each image, its prompt drawn with the image's seed."""
    wildcards, found = Wildcards(folder), []
    for line in lines:
        own = dict(line.options)
        start = own.pop("seed", first)
        for seed in range(start, start + own.pop("num_images", count)):
            options = {**own, "seed": seed, "num_images": 1}
            found.append(Line(wildcards.draw(line.prompt, seed), tuple(options.items())))
    return found

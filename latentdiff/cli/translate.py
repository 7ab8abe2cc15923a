"""`latentdiff translate`: make an image again under another prompt, keeping its layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from latentdiff.cli.headings import Command
from latentdiff.cli.model import loaded_model
from latentdiff.cli.options import (
    IMAGE_FILE,
    MODEL_OPTIONS,
    RESULT_OPTIONS,
    SIZE,
    flag,
    flags_of,
    within,
)
from latentdiff.cli.output import Writing, check_results, save_results, shown_source
from latentdiff.cli.words import remark
from latentdiff.errors import UsageError
from latentdiff.request.options import BlendName, TranslationName, WalkOptions
from latentdiff.request.task_options import INVERT, TRANSLATE

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline
    from latentdiff.tasks.features import PnPSpec

INVERSION_OPTIONS = ("spacing", "iterations", "width", "height")  # of images that are not inverted yet


@click.command(cls=Command)
@click.argument("image", type=IMAGE_FILE, metavar="IMAGE|INVERSION")
@click.argument("prompt")
@click.option(
    "--method",
    type=click.Choice(get_args(TranslationName)),
    default="features",
    show_default=True,
    help="What holds the result to the image; see below.",
)
@click.option("--source-prompt", default="", metavar="TEXT", help="What the image shows.  [default: nothing said]")
@flag("negative_prompt")
@click.option(
    "--negative-schedule",
    type=click.Choice(get_args(BlendName)),
    help="Fade from the empty to the negative prompt over the steps.  [default: the negative prompt throughout]",
)
@click.option("--negative-alpha", type=float, metavar="X", help="0 to 1: where the fading begins.  [default: 1]")
@flag("steps", default="50, or those of the inversion")
@flag("guidance_scale", default="5, or what the inversion was made for")
@flags_of(WalkOptions)
@click.option("--tau-features", "tau_f", type=float, metavar="X", help="0 to 1: share of the steps.  [default: 0.8]")
@click.option(
    "--tau-attention", "tau_attn", type=float, metavar="X", help="0 to 1: share of the steps.  [default: 0.5]"
)
@click.option(
    "--feature-block",
    "feature_blocks",
    multiple=True,
    metavar="NAME",
    help="Such as up_blocks.1.resnets.1; repeatable.",
)
@click.option(
    "--attention-block",
    "attn_blocks",
    multiple=True,
    metavar="NAME",
    help="Such as up_blocks.1.attentions.1; repeatable.",
)
@click.option("--iterations", type=int, metavar="N", help="Corrections of each step of the inversion.  [default: 1]")
@flag("spacing")
@SIZE
@MODEL_OPTIONS
@RESULT_OPTIONS
@within(INVERT | TRANSLATE)
def translate(
    image: Path,
    prompt: str,
    negative_schedule: str | None,
    negative_alpha: float | None,
    feature_blocks: tuple[str, ...],
    attn_blocks: tuple[str, ...],
    out: Path,
    compare: Path | None,
    **settings: Any,
) -> None:
    """Make IMAGE again as PROMPT says, keeping its layout. What `latentdiff invert` wrote serves as well as an image.

    \b
    features         its features and self-attention in the making of the new one
    direct           its self-attention only
    null-text        its noise, guided so that it would come back exactly; slow unless inverted so
    negative-prompt  its noise, guided away from --source-prompt
    edict            its noise, inverted exactly
    ddim             its noise and nothing else
    replay           everything: the image itself, as far as model and inversion keep it
    """
    writing = Writing.taken_from(settings, out)
    check_results(out, compare, 1)
    blend = {"schedule": negative_schedule, "alpha": negative_alpha}
    if negative_alpha is not None and negative_schedule is None:
        raise UsageError("--negative-alpha needs a --negative-schedule")
    remark(settings, [prompt, settings["source_prompt"]])
    from latentdiff.tasks import translate as translate_image
    from latentdiff.tasks.translation import NegativeBlend

    given = {name: settings.pop(name) for name in INVERSION_OPTIONS}
    with loaded_model(settings) as pipe:
        images = translate_image(
            pipe,
            image,
            prompt,
            negative_blend=NegativeBlend(**_given(blend)) if negative_schedule else None,
            spec=_specification(pipe, feature_blocks, attn_blocks),
            inversion=_given(given),
            **settings,
        )
        before = {"source": shown_source(pipe, image)} if compare else {}
    save_results(images, out, before, compare=compare, writing=writing)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _specification(pipe: Pipeline, feature_blocks: tuple[str, ...], attn_blocks: tuple[str, ...]) -> PnPSpec | None:
    """The default one with the blocks that were named; None if none was."""
    from latentdiff.tasks.features import default_spec

    named = {"feature_blocks": feature_blocks, "attn_blocks": attn_blocks}
    named = {name: blocks for name, blocks in named.items() if blocks}
    return replace(default_spec(pipe.unet.config), **named) if named else None

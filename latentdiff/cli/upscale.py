"""`latentdiff upscale`: make an image larger."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from latentdiff.cli.headings import Command
from latentdiff.cli.model import drawn_seed, loaded_model
from latentdiff.cli.options import IMAGE_FILE, OTHER_MODEL_OPTIONS, OUT, WRITING, flags_of
from latentdiff.cli.output import Writing, check_transparency, check_writable, free_path, is_file
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.files import is_hub_id
from latentdiff.request.options import SamplingOptions

OURS = ("image", "upscaler", "tile", "diffusion", "device", "out", "file_format", "quality", "no_metadata")


@click.command(cls=Command)
@click.argument("image", type=IMAGE_FILE)
@click.option(
    "--model",
    "upscaler",
    metavar="FILE|FOLDER|HUB_ID",
    required=True,
    help="An upscaler of the ESRGAN family, .safetensors or .pth, which says how many times larger; or the x4 upscaler of "
    "SD 2, a folder or file, which takes --prompt and the options of sampling.",
)
@click.option(
    "--tile",
    type=int,
    default=512,
    show_default=True,
    metavar="PIXELS",
    help="Side of what the upscaler sees at once, 128 or more: memory grows with it and not with the image.",
)
@click.option(
    "--diffusion",
    is_flag=False,
    flag_value="",
    metavar="[FOLDER|HUB_ID|FILE]",
    help="Let a text-to-image model go over the enlarged image, in windows; without a name, the one that comes with "
    "latentdiff. The options below are of this pass.",
)
@click.option("--prompt", metavar="TEXT", help="What the image shows.")
@click.option(
    "--noise-level",
    type=int,
    metavar="N",
    help="Of the x4 upscaler of SD 2: 0 to 350, how much noise it sees the image under; more invents more.  [default: 20]",
)
@click.option("--strength", type=float, metavar="X", help="0 to 1: how far the model goes.  [default: 0.3]")
@flags_of(SamplingOptions, without=("num_images",))
@OTHER_MODEL_OPTIONS
@OUT
@WRITING
def upscale(
    image: Path, upscaler: str, tile: int, diffusion: str | None, seed: int | None, out: Path, **settings: Any
) -> None:
    """Make IMAGE larger by a network that was trained for it."""
    writing = Writing.taken_from(settings, out)
    check_writable(out)
    if is_file(out) and out.exists():
        raise UsageError(f"{out} is there already; remove it or choose another name with --out")
    if not Path(upscaler).exists() and not is_hub_id(upscaler):
        raise CheckpointError(f"no upscaler at {upscaler}")
    check_transparency(out, writing, image)
    if not Path(upscaler).exists() or _is_diffusion(Path(upscaler)):
        return _by_diffusion(image, upscaler, seed, out, writing, settings)
    if settings.pop("noise_level") is not None:
        raise UsageError("expected no --noise-level with an upscaler of the ESRGAN family, which adds no noise")
    if diffusion is None:
        _check_nothing_said()
    from latentdiff.networks.upscaling.model import Upscaler
    from latentdiff.tasks.upscaling import upscale as enlarge

    loaded = Upscaler.load(upscaler, device=settings["device"])
    settings["model"] = diffusion or None
    with nullcontext() if diffusion is None else loaded_model(settings) as pipe:
        walk = {} if pipe is None else {**settings, "pipe": pipe, "seed": drawn_seed(seed)}
        result = enlarge(image, loaded, tile=tile, **walk)
    path = out if is_file(out) else free_path(out, f"{image.stem}-{loaded.factor}x", writing.ending)
    writing.save(result, path)
    click.echo(path)


def _is_diffusion(path: Path) -> bool:
    from latentdiff.checkpoints.upscalers import is_diffusion_model

    return is_diffusion_model(path)


def _by_diffusion(
    image: Path, model: str, seed: int | None, out: Path, writing: Writing, settings: dict[str, Any]
) -> None:
    """By a diffusion model that was trained to enlarge."""
    if said := next((flag for name, flag in _said() if name in ("tile", "diffusion", "strength")), None):
        raise UsageError(f"expected no {said} with a diffusion model, which has --window and --vae-tile; leave it out")
    from latentdiff.tasks.enlarging import enlarge

    settings = {name: value for name, value in settings.items() if name not in ("strength",)}
    prompt, settings["model"] = settings.pop("prompt") or "", model
    if settings["noise_level"] is None:
        del settings["noise_level"]
    with loaded_model(settings) as pipe:
        (result,) = enlarge(pipe, image, prompt, seed=drawn_seed(seed), **settings)
    path = out if is_file(out) else free_path(out, f"{image.stem}-4x", writing.ending)
    writing.save(result, path)
    click.echo(path)


def _said() -> list[tuple[str, str]]:
    """The names and flags of what the command line says."""
    context = click.get_current_context()
    given = [(str(parameter.name), parameter.opts[-1]) for parameter in context.command.params]
    return [one for one in given if context.get_parameter_source(one[0]) is click.core.ParameterSource.COMMANDLINE]


def _check_nothing_said() -> None:
    """Raise a UsageError if something is said to a model that there is not."""
    for name, flag in _said():
        if name not in OURS:
            raise UsageError(f"expected --diffusion with {flag}, which the upscaler has no use for")

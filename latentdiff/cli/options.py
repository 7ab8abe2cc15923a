"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import click

from latentdiff.cli import headings
from latentdiff.cli.headings import Decorator, together, under
from latentdiff.cli.loras import ALLOW_PARTIAL, EMBEDDINGS, LORA_DIR, LORAS
from latentdiff.cli.places import IMAGES, ImageFile, model_there
from latentdiff.files import IMAGE_FORMATS
from latentdiff.request.domains import ChoiceOrFile, Factor, Interval, Numbers, Pair, Real, Seeds, Texts, Whole
from latentdiff.request.option import SpeedOption
from latentdiff.request.option_texts import texts
from latentdiff.request.options import (
    OF_MODEL,
    OPTIONS,
    AttentionName,
    BackendName,
    GenerateOptions,
    PrecisionName,
    PredictionName,
    SamplingOptions,
    options_of,
)

ANY_PATH = click.Path(path_type=Path)
IMAGE_FILE = ImageFile()
MODEL = click.option(
    "--model",
    callback=model_there,
    metavar="FOLDER|HUB_ID|FILE",
    help="The model; without it, the one that comes with latentdiff.",
)
EMA = click.option("--ema", is_flag=True, help="Take the averaged weights of a .ckpt that holds both.")
PREDICTION_TYPE = click.option(
    "--prediction-type",
    type=click.Choice(get_args(PredictionName)),
    help="What the model predicts, if its file is wrong about it.",
)
ZERO_SNR = click.option(
    "--zero-terminal-snr",
    is_flag=True,
    help="Begin in pure noise, as models trained with zero terminal SNR need it, if its file does not say so.",
)
VAE = click.option(
    "--vae",
    callback=model_there,
    metavar="FILE|FOLDER",
    help="The VAE, in place of the model's own: a file, a folder, or a TAESD.",
)
TEXT_ENCODER = click.option(
    "--text-encoder",
    callback=model_there,
    metavar="FILE|FOLDER",
    help="The text encoder, in place of the model's own.",
)
BASE = click.option(
    "--base",
    callback=model_there,
    metavar="MODEL",
    help="The model to take parts from that the file of --model lacks.",
)
PARTS_FROM = together(VAE, TEXT_ENCODER, BASE)
DEVICE = click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:N or mps."
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(get_args(PrecisionName)),
    default="auto",
    show_default=True,
    help="Number format; auto is the fastest one that keeps the image, int8 is faster still on a CPU, most with "
    "--backend openvino, and approximate.",
)
BACKEND = click.option(
    "--backend",
    type=click.Choice(get_args(BackendName)),
    default="torch",
    show_default=True,
    help="What computes the networks: openvino suits CPUs, compile GPUs.",
)
COMPILE = click.option("--compile", "backend", flag_value="compile", help="Short for --backend compile.")
ATTENTION = click.option(
    "--attention", type=click.Choice(get_args(AttentionName)), help="Attention back end.  [default: auto]"
)
LOW_MEMORY = click.option(
    "--low-memory",
    is_flag=True,
    help="Pass the weights through memory block by block and decode large images in tiles: slower, the same image.",
)
OTHER_MODEL_OPTIONS = together(
    under(headings.MODEL, EMA, PREDICTION_TYPE, ZERO_SNR, PARTS_FROM),
    under(headings.ADAPTERS, LORAS, LORA_DIR, ALLOW_PARTIAL, EMBEDDINGS),
    under(SpeedOption.heading, DEVICE, PRECISION, BACKEND, COMPILE, ATTENTION, LOW_MEMORY),
)
MODEL_OPTIONS = together(MODEL, OTHER_MODEL_OPTIONS)  # see `loaded_model`


def flag(name: str, *, default: str | None = None) -> Decorator:
    """The flag of an option of generation, with its help and its default; `default` tells another one of the task."""
    option = OPTIONS[name]
    flag, text = option.flag(name), texts()[name].partition(" In Python")[0]
    if option.default is False and default is None:
        return under(option.heading or headings.FIRST, click.option(flag, name, is_flag=True, help=text))
    # What `fast` changes has to stay open, and so has what the model or the task decides.
    is_open = option.fast is not None or option.default is None or default is not None or name in OF_MODEL
    shown = default or option.unset or option.default
    made = click.option(
        flag,
        name,
        type=KINDS.get(type(option.domain)) or click.Choice(option.domain.names),
        nargs=2 if isinstance(option.domain, Interval | Pair) else 1,
        default=None if is_open else option.default,
        callback=_checked,
        metavar=getattr(option.domain, "metavar", None),
        help=f"{text}  [default: {shown}]" if shown != "" else text,
    )
    return under(option.heading or headings.FIRST, made)


def _checked(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Within the domain of its option, or a UsageError."""
    name = str(parameter.name)
    return None if value is None else OPTIONS[name].domain(name, value)


def within(domains: Mapping[str, Any]) -> Decorator:
    """Check what a task's command is given before it loads anything; see `request.task_options`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def call(**given: Any) -> Any:
            for name in domains.keys() & given.keys():
                if given[name] is not None:
                    given[name] = domains[name](name, given[name])
            return command(**given)

        return call

    return decorate


def flags_of(group: type, *, without: tuple[str, ...] = ()) -> Decorator:
    """The flags of a group of options, those first that people look for first."""
    names = dict.fromkeys((*FIRST, *options_of(group)))
    options = options_of(group)
    return together(*(flag(name) for name in names if name in options and name not in without + HIDDEN))


KINDS: dict[type, Any] = {
    Whole: int, Seeds: int, Real: float, Factor: str, Interval: float, Pair: int, Numbers: str, Texts: str, ChoiceOrFile: str,
}  # fmt: skip
FIRST = ("negative_prompt", "num_images", "seed", "steps", "guidance_scale", "sampler", "width", "height")
HIDDEN = tuple(name for name, option in OPTIONS.items() if option.flags == ())

OUT = click.option(
    "--out",
    type=ANY_PATH,
    callback=IMAGES,
    default="images",
    show_default=True,
    metavar="FOLDER|FILE",
    help="Where to write; a FILE ends in .png, .jpg, .webp or .avif. In a folder the file is named after prompt and seed. "
    "A file that holds another image is never overwritten: the new one gets a number.",
)
SIZE = together(
    *(
        click.option(f"--{side}", type=int, metavar="PIXELS", help=f"Bring the image to this {side} first.  [default: its own]")
        for side in ("width", "height")
    )
)
INVERT_MASK = click.option("--invert-mask", is_flag=True, help="Paint what the mask keeps, and keep what it paints.")
PREVIEW = click.option(
    "--preview", type=ANY_PATH, metavar="FILE", help="Keep writing a preview to FILE while an image is made."
)
PREVIEW_EVERY = click.option(
    "--preview-every",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    metavar="N",
    help="Steps from one preview to the next.",
)
PREVIEW_DECODER = click.option(
    "--preview-decoder",
    type=ANY_PATH,
    metavar="FILE",
    help="A taesd_decoder.safetensors, which previews at no cost.  [default: the model's VAE]",
)
NO_METADATA = click.option("--no-metadata", is_flag=True, help="Leave the recipe out of the file.")
FILE_FORMAT = click.option(
    "--format",
    "file_format",
    type=click.Choice([ending.removeprefix(".") for ending in IMAGE_FORMATS]),
    help="The format of files in a folder.  [default: png]",
)
QUALITY = click.option(
    "--quality",
    type=click.IntRange(1, 100),
    default=95,
    show_default=True,
    metavar="N",
    help="1 to 100, of .jpg, .webp and .avif; a .webp of 100 loses nothing.",
)
WRITING = under(headings.FILES, FILE_FORMAT, QUALITY, NO_METADATA)  # see `output.Writing`
COMPARE = click.option(
    "--compare", type=ANY_PATH, metavar="FILE", help="Also write what went in and what came out side by side."
)
SAMPLING_OPTIONS = flags_of(SamplingOptions)
GENERATE_OPTIONS = flags_of(GenerateOptions)
RESULT_OPTIONS = together(OUT, COMPARE, WRITING)  # see `output.save_results`

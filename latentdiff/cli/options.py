"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from latentdiff.cli.loras import LORAS
from latentdiff.diffusion.config import PREDICTION_TYPES
from latentdiff.names import ATTENTION_NAMES, BACKEND_NAMES, PRECISIONS, SAMPLER_NAMES, SPACING_NAMES

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator; help lists them in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


ANY_PATH = click.Path(path_type=Path)
MODEL = click.option(
    "--model", metavar="FOLDER|HUB_ID|FILE", help="The model; without it, the one that comes with latentdiff."
)
EMA = click.option("--ema", is_flag=True, help="Take the averaged weights of a .ckpt that holds both.")
PREDICTION_TYPE = click.option(
    "--prediction-type", type=click.Choice(PREDICTION_TYPES), help="What the model predicts, if its file says it wrong."
)
DEVICE = click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:N or mps."
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="auto",
    show_default=True,
    help="Number format; auto is the fastest one that keeps the picture, int8 is faster still on a CPU, most with "
    "--backend openvino, and approximate.",
)
BACKEND = click.option(
    "--backend",
    type=click.Choice(BACKEND_NAMES),
    default="torch",
    show_default=True,
    help="What computes the networks: openvino suits CPUs, compile GPUs.",
)
COMPILE = click.option("--compile", "backend", flag_value="compile", help="Short for --backend compile.")
ATTENTION = click.option("--attention", type=click.Choice(ATTENTION_NAMES), help="Attention back end.  [default: auto]")
LOW_MEMORY = click.option(
    "--low-memory",
    is_flag=True,
    help="Pass the weights through memory block by block and decode large pictures in tiles: slower, the same picture.",
)
MODEL_OPTIONS = together(
    MODEL, EMA, PREDICTION_TYPE, LORAS, DEVICE, PRECISION, BACKEND, COMPILE, ATTENTION, LOW_MEMORY
)  # see `loaded_model`

NEGATIVE = click.option(
    "--negative", "negative_prompt", default="", metavar="TEXT", help="What to avoid in the picture."
)
NUM_IMAGES = click.option(
    "-n",
    "num_images",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Pictures of each prompt.",
)
SEED = click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    metavar="N",
    help="Seed of a prompt's first picture; the next ones have seed + 1, ...  Drawn and printed if not given.",
)
STEPS = click.option("--steps", type=int, metavar="N", help="Denoising steps, 1 to 1000.  [default: 25]")
GUIDANCE = click.option(
    "--guidance",
    "guidance_scale",
    type=float,
    metavar="X",
    help="How strongly to follow the prompt; 1 is no guidance.  [default: 5.0]",
)
GUIDANCE_RESCALE = click.option(
    "--guidance-rescale",
    type=float,
    default=0.0,
    show_default=True,
    metavar="X",
    help="0 to 1: how far to undo the contrast that guidance adds.",
)
GUIDANCE_INTERVAL = click.option(
    "--guidance-interval",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="Guide only at these noise levels (sigma/alpha, 0 to about 15).  [default: all]",
)
SAMPLER = click.option("--sampler", type=click.Choice(SAMPLER_NAMES), help="How a step is taken.  [default: ddim]")
ETA = click.option(
    "--eta",
    type=float,
    default=0.0,
    show_default=True,
    metavar="X",
    help="0 to 1: share of fresh noise in ddim's steps.",
)
SPACING = click.option("--spacing", type=click.Choice(SPACING_NAMES), help="Of the timesteps.  [default: the model's]")
FAST = click.option(
    "--fast",
    is_flag=True,
    help="Nearly the same picture in a fraction of the time: 12 steps of dpmpp-2m, trailing, where these are not given.",
)
CACHE_INTERVAL = click.option(
    "--cache-interval",
    type=click.IntRange(1),
    metavar="N",
    help="Compute the deep layers of the U-Net at every Nth step only (DeepCache).  [default: 1, every step]",
)
CACHE_BRANCH = click.option(
    "--cache-branch",
    type=click.IntRange(0),
    metavar="N",
    help="How many more layers are always computed.  [default: 0]",
)
CACHE_CENTRE = click.option(
    "--cache-centre",
    type=click.IntRange(0),
    metavar="STEP",
    help="Compute them most often around this step, from 0.  [default: evenly]",
)
GUIDANCE_OPTIONS = together(GUIDANCE, GUIDANCE_RESCALE, GUIDANCE_INTERVAL)
SAMPLER_OPTIONS = together(FAST, SAMPLER, ETA, SPACING, CACHE_INTERVAL, CACHE_BRANCH, CACHE_CENTRE)
BATCH_SIZE = click.option(
    "--batch-size",
    type=click.IntRange(1),
    metavar="N",
    help="Pictures made at once: memory against speed; the pictures stay the same.  [default: 4]",
)

WIDTH = click.option("--width", type=int, metavar="PIXELS", help="A multiple of 8.  [default: that of the training]")
HEIGHT = click.option("--height", type=int, metavar="PIXELS", help="A multiple of 8.  [default: that of the training]")

OUT = click.option(
    "--out",
    type=ANY_PATH,
    default="pictures",
    show_default=True,
    metavar="FOLDER|FILE.png",
    help="Where to write. In a folder the file is named after prompt and seed. A file that holds another "
    "picture is never overwritten: the new one gets a number.",
)
PREVIEW = click.option(
    "--preview", type=ANY_PATH, metavar="FILE.png", help="Write what is expected there, while at work."
)
PREVIEW_EVERY = click.option(
    "--preview-every",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    metavar="N",
    help="Steps from preview to preview.",
)
PREVIEW_DECODER = click.option(
    "--preview-decoder",
    type=ANY_PATH,
    metavar="FILE",
    help="A taesd_decoder.safetensors, which previews at no cost.  [default: the model's VAE]",
)
NO_METADATA = click.option("--no-metadata", is_flag=True, help="Leave the recipe out of the file.")
COMPARE = click.option(
    "--compare", type=ANY_PATH, metavar="FILE.png", help="Also write what went in and what came out side by side."
)
# What every task that samples takes besides its own; the names are those of `request.Sampling`.
SAMPLING_OPTIONS = together(NEGATIVE, NUM_IMAGES, SEED, STEPS, GUIDANCE_OPTIONS, SAMPLER_OPTIONS, BATCH_SIZE)
RESULT_OPTIONS = together(OUT, COMPARE, NO_METADATA)  # see `output.save_results`

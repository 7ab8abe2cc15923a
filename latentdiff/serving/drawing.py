"""Making the images of a batch: the call of the pipeline or of a task that a `Draw` means."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from latentdiff.adapters.control.model import Control, ControlNet
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.errors import UsageError
from latentdiff.image import save_image
from latentdiff.networks.inputs import INSTRUCTIONS
from latentdiff.pipeline import Pipeline
from latentdiff.reading.colours import colours_of
from latentdiff.request.options import SAMPLING
from latentdiff.request.plan import Sampling
from latentdiff.request.second_pass import SecondPass
from latentdiff.request.sources import ImageInput, open_source, source_of
from latentdiff.serving.hints import fitted, hint, opened_image
from latentdiff.serving.models import Models
from latentdiff.serving.work import Draw, Following, Piece, Sent
from latentdiff.tasks.editing import begin_at, image_to_image
from latentdiff.tasks.inpainting import inpaint
from latentdiff.tasks.masks import read_mask

OF_SAMPLERS = {  # option -> whether a sampler has it
    "eta": lambda sampler: sampler.eta is not None,
    "s_noise": lambda sampler: sampler.scales_noise,
    "s_churn": lambda sampler: sampler.churns,
    "s_tmin": lambda sampler: sampler.churns,
    "s_tmax": lambda sampler: sampler.churns,
}


def drawn(
    pipe: Pipeline, pieces: Sequence[Piece], callback: Callable[[int, float, Tensor], Any], models: Models
) -> list[Image.Image]:
    """The images of pieces of one shape, each with its recipe in `info`.

    Args:
        models: where ControlNets and IP-Adapters are.

    Raises:
        LatentDiffError: as the pipeline and the tasks raise them.
    """
    draw = pieces[0].draw
    for name, path in draw.loras.items():
        pipe.offered.add(name, path)
    options = {
        **_options(pipe, draw),
        "seed": [piece.seed for piece in pieces],
        "batch_size": len(pieces),
        "progress": False,
        "callback": callback,
    }
    image = _image(draw)
    options |= _steering(pipe, draw, image, models)
    if image is None:
        return pipe(
            [piece.draw.prompt for piece in pieces],
            negative_prompt=[piece.draw.negative_prompt for piece in pieces],
            width=draw.width,
            height=draw.height,
            **options,
        )
    options |= {**draw.task, "num_images": len(pieces), "negative_prompt": draw.negative_prompt}
    if draw.mask is None:
        size = {} if draw.fit else {"width": draw.width, "height": draw.height}
        if draw.lenient and pipe.inputs != INSTRUCTIONS:  # the web UI sends it to all models
            options.pop("image_guidance_scale", None)
        return image_to_image(pipe, image, draw.prompt, **size, **options)
    mask, invert = _mask(draw.mask, draw)
    return inpaint(pipe, image, mask, draw.prompt, invert_mask=invert, **options)


def walk_length(pipe: Pipeline, draw: Draw) -> int:
    """How many steps the images of a request take, in all passes."""
    options = _options(pipe, draw)
    second = SecondPass.taken_from(options)
    plan = Sampling(**{name: value for name, value in options.items() if name in SAMPLING}).plan("", pipe.schedule)
    strength = draw.task.get("strength")
    if draw.image is None:
        return plan.steps + (second.plan(plan, pipe.schedule).steps if second else 0)
    return (plan if strength is None else begin_at(plan, strength)).steps * draw.task.get("repeats", 1)


def as_file(image: Image.Image, suffix: str, quality: int) -> bytes:
    """The image as the content of a file of that ending, with its recipe."""
    with tempfile.TemporaryDirectory(prefix="latentdiff-") as folder:
        path = Path(folder) / f"image{suffix}"
        save_image(image, path, quality=quality)
        return path.read_bytes()


def _options(pipe: Pipeline, draw: Draw) -> dict[str, Any]:
    options = dict(draw.options)
    if draw.lenient:
        sampler = SAMPLERS[
            options.get("sampler") or Sampling(fast=options.get("fast")).for_model(pipe.schedule).sampler
        ]
        lacking = [name for name, has in OF_SAMPLERS.items() if not has(sampler)]
        options = {name: value for name, value in options.items() if name not in lacking}
    return options


def _given(sent: Sent, name: str) -> ImageInput:
    """What was sent, as the file that recipes name where it has a name."""
    return source_of(sent.file, sent.name) if sent.name else opened_image(sent, name)


def _image(draw: Draw) -> ImageInput | None:
    """What it begins from, at the size that it is to have."""
    if draw.image is None or draw.fit is None:
        return draw.image and _given(draw.image, "the image")
    image = opened_image(draw.image, "the image")
    return fitted(image, draw.fit, (draw.width or image.width, draw.height or image.height))


def _mask(sent: Sent, draw: Draw) -> tuple[ImageInput, bool]:
    """A mask as `inpaint` takes it, and whether it is to be inverted."""
    if draw.fit is None and draw.mask_kind == "white":
        return _given(sent, "the mask"), draw.invert_mask
    image = opened_image(sent, "the mask")
    if draw.mask_kind == "transparent":
        alpha = colours_of(image, "the mask").alpha
        if alpha is None:
            raise UsageError("expected a mask with transparent parts, which are painted; found one without")
        mask = read_mask(alpha, "the mask", invert=not draw.invert_mask)
    else:
        mask = read_mask(image, "the mask", invert=draw.invert_mask)  # before it is padded with what is to be kept
    size = draw.width or mask.width, draw.height or mask.height
    return (mask if draw.fit is None else fitted(mask, draw.fit, size)), False


def _steering(pipe: Pipeline, draw: Draw, image: ImageInput | None, models: Models) -> dict[str, Any]:
    """The options `controls` and `image_prompts`, where there are some."""
    found: dict[str, Any] = {}
    if draw.image_prompts:
        found["image_prompts"] = [
            models.ip_adapter(one.adapter)(
                _given(one.image, "the image of an image prompt"), scale=one.scale, start=one.start, end=one.end
            )
            for one in draw.image_prompts
        ]
    if not draw.controls:
        return found
    height, width = pipe.default_size
    own = (width, height) if image is None else open_source(image).image.size
    size = draw.width or own[0], draw.height or own[1]
    found["controls"] = [_control(following, models.control(following.model), size) for following in draw.controls]
    return found


def _control(following: Following, network: ControlNet, size: tuple[int, int]) -> Control:
    options: dict[str, Any] = {name: getattr(following, name) for name in ("scale", "start", "end", "guess")}
    if following.fit is None:
        image = _given(following.image, "the image of a control")
        return network(image, prepare=following.prepare, mode=following.mode, **options)
    mode = following.mode or following.prepare  # which it may have to be told, as it does not prepare the hint
    return network(hint(following, size), mode=mode if network.modes else None, **options)

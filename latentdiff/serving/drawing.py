"""Making the images of a batch: the call of the pipeline or of a task that a `Draw` means."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.errors import UsageError
from latentdiff.image import as_rgb, save_image
from latentdiff.pipeline import Pipeline
from latentdiff.reading.images import opened
from latentdiff.request.options import SAMPLING
from latentdiff.request.plan import Sampling
from latentdiff.request.second_pass import SecondPass
from latentdiff.serving.work import Draw, Piece
from latentdiff.tasks.editing import begin_at, image_to_image
from latentdiff.tasks.inpainting import inpaint

OF_SAMPLERS = {  # option -> whether a sampler has it
    "eta": lambda sampler: sampler.eta is not None,
    "s_noise": lambda sampler: sampler.scales_noise,
    "s_churn": lambda sampler: sampler.churns,
    "s_tmin": lambda sampler: sampler.churns,
    "s_tmax": lambda sampler: sampler.churns,
}


def drawn(pipe: Pipeline, pieces: Sequence[Piece], callback: Callable[[int, float, Tensor], Any]) -> list[Image.Image]:
    """The images of pieces of one shape, each with its recipe in `info`.

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
    if draw.image is None:
        return pipe(
            [piece.draw.prompt for piece in pieces],
            negative_prompt=[piece.draw.negative_prompt for piece in pieces],
            width=draw.width,
            height=draw.height,
            **options,
        )
    options |= {**draw.task, "num_images": len(pieces), "negative_prompt": draw.negative_prompt}
    image = _fitted(_image(draw.image, "the image"), draw)
    if draw.mask is None:
        size = {} if draw.fit else {"width": draw.width, "height": draw.height}
        return image_to_image(pipe, image, draw.prompt, **size, **options)
    mask = _mask(_image(draw.mask, "the mask"), draw)
    return inpaint(pipe, image, mask, draw.prompt, **options)


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
        sampler = SAMPLERS[options.get("sampler") or Sampling().for_model(pipe.schedule).sampler]
        lacking = [name for name, has in OF_SAMPLERS.items() if not has(sampler)]
        options = {name: value for name, value in options.items() if name not in lacking}
    return options


def _image(file: bytes, name: str) -> Image.Image:
    with opened(file, name) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def _mask(mask: Image.Image, draw: Draw) -> Image.Image:
    """White where to paint, as the tasks take masks."""
    if draw.mask_kind == "transparent":
        if not mask.has_transparency_data:
            raise UsageError("expected a mask with transparent parts, which are painted; found one without")
        mask = ImageOps.invert(mask.convert("RGBA").getchannel("A"))
    if draw.invert_mask:
        mask = ImageOps.invert(mask.convert("L"))
    return _fitted(mask, draw)


def _fitted(image: Image.Image, draw: Draw) -> Image.Image:
    if draw.fit is None:
        return image
    size = draw.width or image.width, draw.height or image.height
    if image.size == size:
        return image
    image = image if image.mode in ("L", "RGB", "RGBA") else as_rgb(image)
    if draw.fit == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if draw.fit == "pad":
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS)
    return image.resize(size, Image.Resampling.LANCZOS)

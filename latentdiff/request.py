"""What a user asks the pipeline for, checked and spread out to one entry per picture."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from numbers import Integral

from torch import Tensor

from latentdiff.config import VAEConfig
from latentdiff.errors import UsageError
from latentdiff.guidance import Guidance
from latentdiff.prompt import as_list

DEFAULT_BATCH_SIZE = 4


def one_per_picture(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str], num_images: int
) -> tuple[list[str], list[str]]:
    """Prompts and negative prompts, one of each per picture, all pictures of a prompt in a row.

    Raises:
        UsageError: nothing to make, or the two do not pair up.
    """
    prompts, negatives = as_list(prompt), as_list(negative_prompt)
    if len(negatives) == 1:
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise UsageError(f"expected one negative prompt or {len(prompts)}, one for each prompt, found {len(negatives)}")
    if num_images < 1:
        raise UsageError(f"expected num_images of 1 or more, found {num_images}")
    return tuple([text for text in texts for _ in range(num_images)] for texts in (prompts, negatives))


def seed_of_each(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Seeds, one per picture: picture i has seed + i; a list is taken as it is, and None draws the first.

    Raises:
        UsageError: a list of another length.
    """
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, Integral):
        return [int(seed) + i for i in range(count)]
    if len(seed) != count:
        raise UsageError(f"expected one seed or {count}, one for each picture, found {len(seed)}")
    return [int(own) for own in seed]


def latent_shape(
    asked: tuple[int | None, int | None],
    trained: tuple[int, int],
    vae: VAEConfig,
    latents: Tensor | None,
    count: int,
) -> tuple[int, int, int]:
    """(C, h, w) of one picture's latents; sizes are (height, width) in pixels.

    What is asked for counts, else the size of the given `latents`, else that of the training.

    Raises:
        UsageError: a size that the VAE cannot make, or latents of another shape.
    """
    factor = vae.downscale
    given = (None, None) if latents is None else tuple(factor * side for side in latents.shape[-2:])
    size = [next(side for side in sides if side is not None) for sides in zip(asked, given, trained, strict=True)]
    for name, side in zip(("height", "width"), size, strict=True):
        if side <= 0 or side % factor:
            raise UsageError(f"expected a {name} that is a positive multiple of {factor}, found {side}")
    shape = (vae.latent_channels, size[0] // factor, size[1] // factor)
    if latents is not None and latents.shape != (count, *shape):
        raise UsageError(f"expected latents of shape {(count, *shape)}, found {tuple(latents.shape)}")
    return shape


def make_guidance(scale: float, rescale: float, interval: tuple[float, float] | None) -> Guidance:
    """The guidance; no interval is all noise levels.

    Raises:
        UsageError: a value outside its domain.
    """
    if interval is None:
        return Guidance(scale=scale, rescale=rescale)
    if not all(map(math.isfinite, interval)):
        raise UsageError(f"expected a guidance interval of two finite noise levels, found {interval}")
    return Guidance(scale=scale, rescale=rescale, interval=tuple(interval))


def batches(count: int, batch_size: int | None) -> list[slice]:
    """Cut `count` pictures into parts of at most `batch_size`.

    Raises:
        UsageError: a batch size below 1.
    """
    size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    if size < 1:
        raise UsageError(f"expected a batch size of 1 or more, found {size}")
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]

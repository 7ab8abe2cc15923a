"""Files of upscalers: the tensors of networks that enlarge images.

What is handed on are tensors by name: nothing of the file runs, and its numbers bound what is built of them.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from latentdiff.checkpoints.architecture import UNKNOWN, UPSCALER, WRAPPERS, identify
from latentdiff.checkpoints.files import read_tensors
from latentdiff.checkpoints.folder import INDEX
from latentdiff.checkpoints.modules import shapes_of
from latentdiff.errors import CheckpointError

_GAPS = 4  # numbers of a list that have no tensors, for each that has some


def read_upscaler(path: Path) -> dict[str, Tensor]:
    """Map the tensors of an upscaler, without what wraps them.

    Raises:
        CheckpointError: the file is none of weights, of something else that is known here, or has holes.
    """
    tensors = read_tensors(path).tensors
    identity = identify(shapes_of(tensors))
    if identity.family not in (UPSCALER, UNKNOWN):
        raise CheckpointError(f"expected an upscaler, as ESRGAN, in {path}, found a {identity.family}")
    for wrapper in WRAPPERS:
        tensors = {
            name.removeprefix(wrapper): own for name, own in tensors.items() if name.startswith(wrapper)
        } or tensors
    numbers = [int(number) for name in tensors for number in re.findall(r"(?<![^.])\d{1,9}(?![^.])", name)]
    if max(numbers, default=0) > _GAPS * len(tensors):
        raise CheckpointError(
            f"the {identity.family} in {path} has numbers with holes: it is damaged; download it again"
        )
    return tensors


def is_diffusion_model(path: Path) -> bool:
    """Whether a whole latent diffusion model lies there, not a network of the ESRGAN family."""
    if path.is_dir():
        return (path / INDEX).exists()
    return identify(shapes_of(read_tensors(path).tensors)).kind == "model"

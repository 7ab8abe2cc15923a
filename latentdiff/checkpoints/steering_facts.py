"""What is to be said of files that steer a model: for which family they are, and what they need."""

from __future__ import annotations

from pathlib import Path

from latentdiff.checkpoints.architecture import CONTROL, IMAGE_PROMPT, T2I, family_name
from latentdiff.checkpoints.control import read_control
from latentdiff.checkpoints.families import SD, XL
from latentdiff.checkpoints.ip_adapter import read_ip_adapter
from latentdiff.checkpoints.t2i_adapter import read_t2i_adapter
from latentdiff.errors import CheckpointError
from latentdiff.request.options import CONTROL_MODES

_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}  # by text width
_KINDS = {"plain": "IP-Adapter", "plus": "IP-Adapter Plus", "full": "full-face IP-Adapter"}


def facts_of(what: str, path: Path) -> tuple[str, list[str]]:
    """For which family the file of one of the kinds of `architecture` is, in words, and notes.

    Raises:
        CheckpointError, ConfigError: it cannot be read.
    """
    return {CONTROL: _of_control, IMAGE_PROMPT: _of_ip_adapter, T2I: _of_t2i_adapter}[what](path)


def _of_control(path: Path) -> tuple[str, list[str]]:
    control = read_control(path)
    unet = control.config.unet
    made_for = family_name(
        SD if unet.added_dim is None else XL,
        linear=unet.use_linear_projection,
        extra_channels=0,
        width=unet.block_out_channels[0],
        context=unet.cross_attention_dim,
    )
    notes = ["differences from the weights of a U-Net, which are added when it is used"] * control.is_difference
    notes += ["its outputs are averaged over the image"] * control.config.pools
    notes.append(f"in the names of {'diffusers' if control.prefix is None else 'the original code'}")
    if "hints" in control.metadata and "model" in control.metadata:
        notes.append(f"trained here beside {control.metadata['model']}, on hints: {control.metadata['hints']}")
    if control.config.modes:
        kinds = ", ".join(CONTROL_MODES[: control.config.modes])
        notes.append(f"takes several kinds of hints, one of which is named with it: {kinds}")
    return f"ControlNet for {made_for}", notes


def _of_ip_adapter(path: Path) -> tuple[str, list[str]]:
    config = read_ip_adapter(path).config
    made_for = _FAMILIES.get(config.width, f"a model of text width {config.width}")
    return f"{_KINDS[config.kind]} for {made_for}", [f"needs an image encoder of width {config.image_width}"]


def _of_t2i_adapter(path: Path) -> tuple[str, list[str]]:
    weights = read_t2i_adapter(path)
    if weights is None:
        raise CheckpointError(f"expected a {T2I} in {path}, found something else")
    config = weights.config
    made_for = _FAMILIES[2048] if config.is_for_xl else "Stable Diffusion 1.x or 2.x"
    size = "" if config.channels[0] == 320 else ", a size of its own"
    grey = ["sees the grey of a hint"] if config.in_channels == 1 else []
    return f"{'light ' * config.light}{T2I} for {made_for}{size}", grey

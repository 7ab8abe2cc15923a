"""What steers on a model: whether it fits, its networks in memory, and what it is on one walk."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from latentdiff.adapters.control.adapters import adapter_part, applied_adapter
from latentdiff.adapters.control.hints import hint_tensor
from latentdiff.adapters.control.image_prompts import ImagePrompt
from latentdiff.adapters.control.model import Control, ControlNet
from latentdiff.adapters.control.seen import applied_image_prompts, image_prompt_parts
from latentdiff.checkpoints.control import ControlWeights, empty_control, whole_weights
from latentdiff.checkpoints.modules import check_made_for
from latentdiff.checkpoints.t2i_adapter import T2IAdapterWeights
from latentdiff.diffusion.schedule import Level
from latentdiff.engines.fast_forms import use_fast_forms
from latentdiff.errors import UsageError
from latentdiff.model.memory.parts import Part
from latentdiff.model.memory.residence import Residence
from latentdiff.networks.conditioning import Applied
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.controlnet import AppliedControl, ControlNetwork, matched
from latentdiff.networks.rows import window_of
from latentdiff.networks.unet import UNet


class Steering:
    """Controls and image prompts of a call, on one model.

    Args:
        engine: the back end and the precision that are in use.

    Raises:
        CheckpointError: one was made for another model.
        UsageError: the engine does not compute them.
    """

    def __init__(
        self,
        controls: Sequence[Control],
        image_prompts: Sequence[ImagePrompt],
        residence: Residence,
        dtype: torch.dtype,
        engine: tuple[str, str],
    ) -> None:
        backend, precision = engine
        if controls and (backend != "torch" or precision == "int8"):
            raise UsageError(
                f"ControlNets need the back end torch and fp32, bf16 or fp16, found {backend} in {precision}"
            )
        if image_prompts and backend != "torch":
            raise UsageError(f"image prompts need the back end torch, found {backend}")
        self._residence, self._dtype = residence, dtype
        self._image_prompts = image_prompts
        self._adapters = [
            (one, one.model.weights) for one in controls if isinstance(one.model.weights, T2IAdapterWeights)
        ]
        self._controls = [one for one in controls if isinstance(one.model.weights, ControlWeights)]
        self.beside = control_parts(self._controls, residence, dtype)
        self.before = image_prompt_parts(image_prompts, residence, dtype)
        self.before += [adapter_part(weights, residence, dtype) for _, weights in self._adapters]

    def early(self, shape: Sequence[int], levels: Sequence[Level]) -> list[Applied]:
        """What image prompts and T2I-Adapters are on a walk of latents (..., h, w); before the U-Net is in use."""
        where = self._residence, self._dtype
        found: list[Applied] = [
            applied_adapter(control, weights, *where, shape, levels) for control, weights in self._adapters
        ]
        return [*found, *applied_image_prompts(self._image_prompts, *where, levels)]

    def controls(self, shape: Sequence[int], levels: Sequence[Level]) -> list[Applied]:
        """What ControlNets are on a walk of latents (..., h, w); they walk along."""
        return [*applied_controls(self._controls, self._residence, self._dtype, shape, levels)]


def control_parts(controls: Sequence[Control], residence: Residence, dtype: torch.dtype) -> list[Part]:
    """The networks of the controls beside a model, which need not be in memory yet; each is made once.

    Raises:
        CheckpointError: one was made for another model.
    """
    found: list[Part] = []
    for control in controls:
        weights = control.model.weights
        is_adapter = isinstance(weights, T2IAdapterWeights)
        found.append(
            adapter_part(weights, residence, dtype) if is_adapter else _part(control.model, weights, residence, dtype)
        )
    return found


@torch.no_grad()
def applied_controls(
    controls: Sequence[Control], residence: Residence, dtype: torch.dtype, shape: Sequence[int], levels: Sequence[Level]
) -> list[AppliedControl]:
    """What acts on one walk over `levels` of latents (..., h, w).

    Raises:
        CheckpointError: a control was made for another model.
        UsageError: its image is of other proportions than what is made.
    """
    factor = residence.module("vae").config.downscale
    height, width = shape[-2] * factor, shape[-1] * factor
    hints = [hint_tensor(control.image, control.mask, height, width, factor) for control in controls]
    applied = []
    for control, part, hint in zip(controls, control_parts(controls, residence, dtype), hints, strict=True):
        network = part.ready()
        window = window_of([level.t for level in levels[:-1]], control.start, control.end)
        mode = control.model.index_of(control.mode)
        embedded, told = network.embed_hint(hint.to(part.device, dtype), mode), network.embed_mode(mode)
        applied.append(AppliedControl(network, embedded, control.scale, control.guess, window, told))
    return applied


def _part(model: ControlNet, weights: ControlWeights, residence: Residence, dtype: torch.dtype) -> Part:
    check_fits(weights, residence.module("unet").config, residence.module("vae").config.downscale)
    if model not in residence.beside:
        unet = residence.parts["unet"]
        config = matched(weights.config, unet.module.config) if weights.guessed else weights.config
        base = unet.weights() if weights.is_difference else {}
        network = empty_control(config).to(dtype)
        residence.adopt(model, network, whole_weights(weights, base))
        if residence.device.type == "cpu":
            use_fast_forms(network)
    part = residence.beside[model]
    part.to(residence.device, dtype)
    return part


def network_for(weights: ControlWeights, unet: UNet) -> ControlNetwork:
    """The network of a ControlNet for a U-Net with its weights in memory, which it is trained beside; in float32."""
    network = empty_control(matched(weights.config, unet.config) if weights.guessed else weights.config)
    whole = whole_weights(weights, unet.state_dict())
    network.load_state_dict({name: tensor.float().clone() for name, tensor in whole.items()}, assign=True)
    return network


def check_fits(weights: ControlWeights, unet: UNetConfig, factor: int) -> None:
    """Refuse a ControlNet that was made for a U-Net of another shape.

    Args:
        factor: pixels for a latent.

    Raises:
        CheckpointError: it was.
    """
    own = weights.config
    facts = {
        "text width": (own.unet.cross_attention_dim, unet.cross_attention_dim),
        "widths": (own.unet.block_out_channels, unet.block_out_channels),
        "blocks in a level": (own.unet.layers_per_block, unet.layers_per_block),
        "latent channels": (own.unet.in_channels, unet.out_channels),
        "pooled text and sizes": (own.unet.added_dim, unet.added_dim),
        "pixels for a latent": (own.downscale, factor),
    }
    check_made_for("a ControlNet", weights.path, facts)

"""T2I-Adapters on a model: whether they fit it, and what they are on one walk."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from latentdiff.adapters.control.hints import hint_tensor
from latentdiff.adapters.control.model import Control
from latentdiff.checkpoints.modules import check_made_for
from latentdiff.checkpoints.t2i_adapter import T2IAdapterWeights, empty_t2i_adapter
from latentdiff.diffusion.schedule import Level
from latentdiff.model.memory.parts import Part
from latentdiff.model.memory.residence import Residence
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.device import finite_or_float32
from latentdiff.networks.rows import window_of
from latentdiff.networks.t2i_adapter import AppliedAdapter, T2IAdapterNetwork, places_of_maps


def adapter_part(weights: T2IAdapterWeights, residence: Residence, dtype: torch.dtype) -> Part:
    """The network of a T2I-Adapter beside a model, which need not be in memory yet; it is made once.

    Raises:
        CheckpointError: it was made for another model.
    """
    _check_fits(weights, residence.module("unet").config, residence.module("vae").config.downscale)
    if weights not in residence.beside:
        residence.adopt(weights, empty_t2i_adapter(weights.config).to(dtype), weights.tensors)
    part = residence.beside[weights]
    part.to(residence.device, dtype)
    return part


@torch.no_grad()
def applied_adapter(
    control: Control,
    weights: T2IAdapterWeights,
    residence: Residence,
    dtype: torch.dtype,
    shape: Sequence[int],
    levels: Sequence[Level],
) -> AppliedAdapter:
    """What acts on one walk over `levels` of latents (..., h, w). The memory of the network is given back: the hint is seen
    once.

    Raises:
        CheckpointError: it was made for another model.
        UsageError: the hint is of other proportions than what is made.
    """
    factor = residence.module("vae").config.downscale
    hint = hint_tensor(control.image, None, shape[-2] * factor, shape[-1] * factor, factor)
    part = adapter_part(weights, residence, dtype)
    network = part.ready()
    assert isinstance(network, T2IAdapterNetwork)
    maps: list[torch.Tensor] = []

    def compute(now: torch.dtype) -> torch.Tensor:
        maps[:] = network(hint.to(part.device, now))
        return torch.stack([one.sum() for one in maps])

    finite_or_float32("the T2I-Adapter", network, compute)
    part.give_back()
    places = places_of_maps(residence.module("unet").config, len(maps))
    scaled = {place: control.scale * one for place, one in zip(places, maps, strict=True)}
    window = window_of([level.t for level in levels[:-1]], control.start, control.end)
    return AppliedAdapter(scaled if control.scale else {}, window)


def _check_fits(weights: T2IAdapterWeights, unet: UNetConfig, factor: int) -> None:
    config, widths = weights.config, unet.block_out_channels
    # SDXL's has a map for the middle besides, and first maps of half the size.
    is_xl = unet.added_dim is not None
    facts = {
        "widths": (config.channels, (*widths, widths[-1]) if is_xl else widths),
        "pixels for the first map": (config.unshuffle, 2 * factor if is_xl else factor),
    }
    check_made_for("a T2I-Adapter", weights.path, facts)

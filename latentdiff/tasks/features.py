"""Plug-and-play diffusion features (Tumanyan et al. 2023): an image's own features, put into the making of another
one.

While the target is denoised under its prompt, the source is denoised beside it, on the latents that its inversion
stored. In the decoder of the U-Net the target takes, from the source, what the convolutions of a residual block give,
and the queries and keys of self-attentions: where things are and what belongs together. Its values, its cross-attention
to the prompt and its skips stay its own, and decide what things look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.guidance import Model
from latentdiff.diffusion.parameterization import Denoiser, Prediction
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import UsageError
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.layers import ResnetBlock, SpatialTransformer
from latentdiff.networks.taps import Tap, find_module
from latentdiff.networks.unet import UNet


@dataclass(frozen=True)
class PnPSpec:
    """What is taken from the source, and for how long.

    feature_blocks: residual blocks, such as "up_blocks.1.resnets.1", whose convolutions' output is taken.
    attn_blocks: spatial transformers, such as "up_blocks.1.attentions.1", whose self-attention's queries and keys are
        taken.
    tau_f, tau_attn: shares of the steps, from the noisiest on, in which they are: round(tau * steps) of them.

    Raises:
        UsageError: a share outside 0 to 1.
    """

    feature_blocks: tuple[str, ...]
    attn_blocks: tuple[str, ...]
    tau_f: float = 0.8
    tau_attn: float = 0.5

    def __post_init__(self) -> None:
        for name in ("tau_f", "tau_attn"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(
                    f"expected {name} in 0 to 1, the share of steps with injection, found {getattr(self, name)}"
                )

    def taps(self, unet: UNet, index: int, steps: int) -> list[str]:
        """The modules whose output is taken at step `index` of `steps`.

        Raises:
            UsageError: `unet` has no such blocks.
        """
        blocks = [(name, ResnetBlock) for name in self.feature_blocks if index < round(self.tau_f * steps)]
        blocks += [(name, SpatialTransformer) for name in self.attn_blocks if index < round(self.tau_attn * steps)]
        return [tap for name, kind in blocks for tap in _taps_of(unet, name, kind)]


def default_spec(config: UNetConfig, *, tau_f: float = 0.8, tau_attn: float = 0.5) -> PnPSpec:
    """The paper's blocks, carried over to a U-Net of any size.

    Features of the second decoder block at a quarter of the latents' resolution where the U-Net has four levels or
    more, and at half of it where it has fewer (found on the embedded model by tools/sweep_features.py: blocks before it
    hold little of the layout, blocks after it bring the source's colours along); queries and keys of every decoder
    self-attention from there on.
    """
    levels = len(config.block_out_channels)
    level, first = max(levels - (3 if levels >= 4 else 2), 0), 1
    has_attention = config.attention_levels[::-1]  # the decoder begins at the lowest resolution
    places = [(up, block) for up in range(level, levels) for block in range(config.layers_per_block + 1)]
    attentions = [place for place in places if place >= (level, first) and has_attention[place[0]]]
    return PnPSpec(
        (f"up_blocks.{level}.resnets.{first}",),
        tuple(f"up_blocks.{up}.attentions.{block}" for up, block in attentions),
        tau_f,
        tau_attn,
    )


def with_source_features(
    unet: UNet,
    model: Model,
    spec: PnPSpec,
    levels: Sequence[Level],
    latents: Sequence[Tensor],
    source_context: Any,
    source_of: Sequence[int] = (0,),
) -> Model:
    """`model` with the sources' features in the targets.

    Sources and targets go through the network as one batch, sources first and unguided; whatever the guidance doubles
    of the targets, each copy of target number n takes from source number `source_of[n]`. Where nothing is taken, the
    sources are left out. Cost: S rows more than `model`, at the steps with injection.

    Args:
        unet: the network inside `model`.
        model: (x, t, context) -> raw.
        levels, latents: of the sources' inversions, noisiest first; latents are (S, C, h, w) each.
        source_context: the sources' prompts, batch S, as `model` takes them.
        source_of: for each of the N targets; one entry serves for all.

    Raises:
        UsageError: `unet` has no such blocks.
    """
    steps = len(levels) - 1
    stage = {level.t: (spec.taps(unet, index, steps), latents[index]) for index, level in enumerate(levels[:-1])}
    spec.taps(unet, -1, steps)  # names that no step uses have to be right too
    rows = torch.as_tensor(source_of)

    def injected(x: Tensor, t: float, context: Any) -> Tensor:
        names, source = stage[t]
        if not names:
            return model(x, t, context)
        count = len(source)
        taken_from = rows.repeat(len(x) // len(rows)).to(x.device)

        def replace(name: str, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            return torch.cat([output[:count], output[taken_from]])

        join = getattr(type(context), "cat", torch.cat)
        with Tap(unet, names, output=replace):
            return model(torch.cat([source.to(x), x]), t, join([source_context, context]))[count:]

    return injected


def replay(source: Denoiser, levels: Sequence[Level], latents: Sequence[Tensor]) -> Denoiser:
    """A denoiser that says of any latents what `source` says of the stored ones: whatever was begun with, the source
    comes out.

    The limit of injection, where everything is taken. Injection as above does not reach it, however many blocks are
    taken: the encoder's skips and the cross-attention remain the target's. `source` has the batch of the targets.
    """
    stored = dict(zip(levels, latents, strict=True))  # (1, C, h, w) each

    def denoise(x: Tensor, level: Level) -> Prediction:
        return source(stored[level].to(x).expand_as(x), level)

    return denoise


def _taps_of(unet: UNet, name: str, kind: type[ResnetBlock] | type[SpatialTransformer]) -> list[str]:
    block = find_module(unet, name)
    if not isinstance(block, kind):
        raise UsageError(f"expected {name} to be a {kind.__name__} of the U-Net, found a {type(block).__name__}")
    if isinstance(block, ResnetBlock):
        return [f"{name}.conv2"]
    layers = range(len(block.transformer_blocks))
    return [f"{name}.transformer_blocks.{layer}.attn1.{part}" for layer in layers for part in ("to_q", "to_k")]

"""The U-Net with its text: what guidance and samplers see as a plain function that never gives NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from latentdiff.denoise import is_asynchronous
from latentdiff.device import finite_or_float32
from latentdiff.engines import Network
from latentdiff.guidance import Model
from latentdiff.layers.transformer import ProjectedContext
from latentdiff.schedule import Level
from latentdiff.unet import UNet

_AS_WIDE_AS_FLOAT32 = (torch.bfloat16, torch.float32)  # in their exponents


@dataclass(frozen=True)
class TextContext:
    """Prompts on their way through one U-Net, with the keys and values of its cross-attentions made once."""

    embeddings: Tensor  # (N, L, C), float32
    projected: ProjectedContext  # in the dtype of the U-Net
    dtype: torch.dtype

    @classmethod
    def of(cls, unet: UNet, embeddings: Tensor) -> Self:
        """The context for `unet` of text embeddings (N, L, C)."""
        dtype = next(unet.parameters()).dtype
        return cls(embeddings, unet.project_context(embeddings.to(dtype)), dtype)

    @classmethod
    def cat(cls, texts: Sequence[Self]) -> Self:
        """Join contexts of the same U-Net along the batch."""
        projected = ProjectedContext.cat([text.projected for text in texts])
        return cls(torch.cat([text.embeddings for text in texts]), projected, texts[0].dtype)

    def for_unet_in(self, dtype: torch.dtype) -> Tensor | ProjectedContext:
        """The projections; or the bare embeddings where the U-Net is in another dtype now than it was then."""
        return self.projected if dtype == self.dtype else self.embeddings.to(dtype)


def checked_model(network: Network, unet: UNet, levels: Sequence[Level], *, extra_channels: Tensor | None = None) -> Model:
    """The network as a function (x, t, TextContext) -> raw output that is finite, or an error that names the step.

    Args:
        network: what computes `unet`; `unet` itself, or what an engine made of it.
        unet: computes again, in float32, what overflows.
        extra_channels: (N, E, h, w), what an inpainting U-Net sees after the latents; the same for all parts of a guided batch.
    """
    names = {level.t: f"at step {number} of {len(levels) - 1}" for number, level in enumerate(levels[:-1], 1)}

    def model(x: Tensor, t: float, text: TextContext) -> Tensor:
        if extra_channels is not None:
            repeats = len(x) // len(extra_channels)
            x = torch.cat([x, extra_channels.to(x).repeat(repeats, 1, 1, 1)], dim=1)

        def compute(dtype: torch.dtype) -> Tensor:
            computes = network if dtype == text.dtype else unet
            return computes(x.to(dtype), t, text.for_unet_in(dtype))

        if is_asynchronous(x.device) and text.dtype in _AS_WIDE_AS_FLOAT32:
            return compute(next(unet.parameters()).dtype)  # float32 would overflow as well; the loop checks, and need not wait
        return finite_or_float32("the U-Net", unet, compute, where=names.get(t, f"at timestep {t:g}"))

    return model

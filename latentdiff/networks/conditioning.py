"""What steers a U-Net besides the latents and the level, in one value that guidance can join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from latentdiff.networks.layers.transformer import ProjectedContext
from latentdiff.networks.unet import UNet


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

"""What runs the networks. The plain modules do it by default; an engine is anything that can stand in for them.

A *network* is called as `UNet` is, a *decoder* as `VAE.decode` is, and both give what those give up to rounding. An engine
makes them of the plain modules, which stay as they are: training, taps, gradients and the repair in float32 use those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from latentdiff.layers.transformer import Context, ProjectedContext

# (x (N, C, h, w), t, text embeddings or what `UNet.project_context` made of them) -> raw prediction (N, C_out, h, w).
Network = Callable[[Tensor, Tensor | float, Context], Tensor]
Example = tuple[Tensor, float, ProjectedContext]  # what a network was called with


class Decoder(Protocol):
    """What `VAE.decode` is: latents to pictures."""

    def __call__(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Latents (N, C, h, w) -> pictures (N, 3, H, W), about in [-1, 1]."""
        ...

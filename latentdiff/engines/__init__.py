"""What runs the networks. The plain modules do it by default; an engine is anything that can stand in for them.

A *network* is called as `UNet` is, a *decoder* as `VAE.decode` is, and both give what those give up to rounding. An
engine makes them of the plain modules, which stay as they are: training, taps, gradients and the repair in float32 use
those.
"""

from __future__ import annotations

from torch import Tensor

from latentdiff.networks.layers.transformer import ProjectedContext

Example = tuple[Tensor, float, ProjectedContext]  # what a network was called with

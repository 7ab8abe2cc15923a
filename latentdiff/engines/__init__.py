"""What runs the networks. The plain modules do it by default; an engine is anything that can stand in for them.

backends        from the name of a back end and of a precision to the engine
fast_forms      the modules' forwards by faster routines on a CPU, chosen by the trials of `form_trials`
int8            the U-Net in 8 bits by torch
openvino        the networks by OpenVINO; in 8 bits by `openvino_int8`
compiled        the networks by torch.compile, on a GPU as one of `cuda_graphs`
deepcache       steps that reuse the deep layers of the step before
calibration     what a U-Net sees, for engines that fit their numbers to it
replacement     when an engine may stand in for a module, and when it has to be made again

A *network* is called as `UNet` is, a *decoder* as `VAE.decode` is, and both give what those give up to rounding. An
engine makes them of the plain modules, which stay as they are: training, taps, gradients and the repair in float32 use
those.
"""

from __future__ import annotations

from torch import Tensor

from latentdiff.networks.layers import ProjectedContext

Example = tuple[Tensor, float, ProjectedContext]  # what a network was called with

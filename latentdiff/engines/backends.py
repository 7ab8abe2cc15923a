"""From the name of a back end and of a precision to the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from latentdiff.engines import Example
from latentdiff.errors import UsageError
from latentdiff.networks.steering import Network
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE, LatentDecoder
from latentdiff.request.options import BackendName


def engines_for(
    backend: str, precision: str, unet: UNet, vae: VAE, examples: Callable[[], Sequence[Example]]
) -> tuple[Network, LatentDecoder]:
    """What computes `unet` and `vae.decode`.

    Args:
        backend: "torch" for the modules themselves, "openvino" or "compile".
        precision: "int8" rounds the U-Net to 8 bits, not with "compile"; all others are what the modules have.
        examples: gives what the U-Net sees while it makes images, for engines that need to know; called when they do.

    Raises:
        UsageError: there is no such back end, or it cannot compute these modules.
        MissingDependencyError: what it needs is not installed.
    """
    if backend not in get_args(BackendName):
        raise UsageError(f"expected a back end of {', '.join(get_args(BackendName))}, found {backend!r}")
    if precision == "int8" and backend == "compile":
        raise UsageError("--precision int8 goes with --backend torch or openvino, found compile; leave one of them out")
    if precision == "int8" and backend == "torch":
        from latentdiff.engines.int8 import Int8Network

        return Int8Network(unet), vae.decode
    if backend == "openvino":
        from latentdiff.engines.openvino import OpenVINODecoder, OpenVINONetwork
        from latentdiff.engines.openvino_int8 import OpenVINOInt8Network

        if precision == "int8":
            return OpenVINOInt8Network(unet, examples), OpenVINODecoder(vae)
        return OpenVINONetwork(unet), OpenVINODecoder(vae)
    if backend == "compile":
        from latentdiff.engines.compiled import CompiledDecoder, CompiledNetwork

        return CompiledNetwork(unet), CompiledDecoder(vae)
    return unet, vae.decode

"""The networks compiled by torch, block by block: repeated blocks share their translations, so little is compiled.

Compiling a whole U-Net takes minutes; its blocks are of four kinds in a few shapes. On a GPU, one CUDA graph of the
whole step then replaces the launches of all its kernels. What torch translated stays in the cache folder for the next
run.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.engines.cuda_graphs import GraphedFunction
from latentdiff.engines.replacement import forms_in_force, plain_steps_in, refuse_gradients, state_of
from latentdiff.errors import MissingDependencyError
from latentdiff.files import cache_folder
from latentdiff.networks.layers import (
    Context,
    Downsample,
    ProjectedContext,
    ResnetBlock,
    SpatialTransformer,
    Upsample,
    text_attentions,
)
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE

_NAME = "torch.compile"
MAX_TRANSLATIONS = 128  # of one kind of block: channels in and out, times the sizes and batches that occur


class CompiledNetwork:
    """A U-Net whose blocks torch has compiled, in one CUDA graph where it is on a GPU; called as the U-Net is.

    With a LoRA or another tap on the U-Net, the U-Net itself computes.

    Raises:
        MissingDependencyError: there is no compiler for the code that torch writes.
    """

    def __init__(self, unet: UNet) -> None:
        self._unet = unet
        self._layers = text_attentions(unet)
        self._regions = _Regions(unet)
        self._graph = GraphedFunction(self._compute)

    def __call__(self, x: Tensor, t: Tensor | float, context: Context) -> Tensor:
        """See `UNet.forward`."""
        refuse_gradients(_NAME, x, *([context] if isinstance(context, Tensor) else []))
        if plain_steps_in(self._unet, _NAME):
            return self._unet(x, t, context)
        projected = context if isinstance(context, ProjectedContext) else self._unet.project_context(context)
        told = [part.contiguous() for part in projected.tensors(self._layers)]
        times = torch.as_tensor(t, dtype=torch.float32).reshape(-1)
        return self._graph(state_of(self._unet), x, times, *told)

    def _compute(self, x: Tensor, t: Tensor, *told: Tensor) -> Tensor:
        context = ProjectedContext.of(self._layers, told)
        with self._regions.compiled():
            return self._unet(x, t, context)


class CompiledDecoder:
    """A VAE's decoder whose blocks torch has compiled; called as `VAE.decode` is. Tiles are left to the VAE."""

    def __init__(self, vae: VAE) -> None:
        self._vae = vae
        self._regions = _Regions(vae.decoder)
        self._graph = GraphedFunction(self._compute)

    def __call__(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """See `VAE.decode`."""
        refuse_gradients(_NAME, latents)
        if tile or plain_steps_in(self._vae, _NAME):
            return self._vae.decode(latents, tile=tile)
        return self._graph(state_of(self._vae), latents)

    def _compute(self, latents: Tensor) -> Tensor:
        with self._regions.compiled():
            return self._vae.decode(latents)


class _Regions:
    """The blocks of a network that are compiled, each kind by one function that all blocks of the kind go through."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._state: Hashable = None
        self._forms: dict[nn.Module, Callable[..., Tensor]] = {}

    def compiled(self) -> Any:
        """Compute with the compiled blocks inside the `with`."""
        if self._state != state_of(self._network):
            self._prepare()
        return forms_in_force(self._forms)

    def _prepare(self) -> None:
        device = next(self._network.parameters()).device.type
        check_compiler(device)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compile")))
        if device == "cuda":
            self._network.to(memory_format=torch.channels_last)
        self._state = state_of(self._network)
        self._forms = {
            block: _Region(block, _COMPILED[type(block)])
            for block in self._network.modules()
            if type(block) in _COMPILED
        }


class _Region:
    """The forward of one block by the compiled function of its kind."""

    def __init__(self, block: nn.Module, function: Callable[..., Tensor]) -> None:
        self._block, self._function = block, function
        self._text = text_attentions(block)

    def __call__(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if self._text:
            (context,) = arguments
            arguments = tuple(part for layer in self._text for part in context[layer])
        with _more_translations():
            return self._function(self._block, x, *arguments, **named)


def _more_translations() -> Any:
    """Let torch translate each function for as many shapes as a network has; where a release calls the limits by other
    names, it translates as many as it does by itself."""
    config = getattr(getattr(torch, "_dynamo", None), "config", None)
    limits = {"recompile_limit": MAX_TRANSLATIONS, "accumulated_recompile_limit": 8 * MAX_TRANSLATIONS}
    known = {name: limit for name, limit in limits.items() if hasattr(config, name)}
    return config.patch(**known) if known else nullcontext()


def _resnet_block(block: ResnetBlock, x: Tensor, time: Tensor | None = None) -> Tensor:
    return ResnetBlock.forward(block, x, time)


def _transformer(block: SpatialTransformer, x: Tensor, *keys_values: Tensor) -> Tensor:
    layers = [layer for inner in block.transformer_blocks for layer in inner.text_attentions()]
    return SpatialTransformer.forward(block, x, ProjectedContext.of(layers, keys_values))


def _downsample(block: Downsample, x: Tensor) -> Tensor:
    return Downsample.forward(block, x)


def _upsample(block: Upsample, x: Tensor, size: Any = None) -> Tensor:
    return Upsample.forward(block, x, size)


_FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    ResnetBlock: _resnet_block,
    SpatialTransformer: _transformer,
    Downsample: _downsample,
    Upsample: _upsample,
}
_COMPILED = {kind: torch.compile(function, dynamic=False, fullgraph=True) for kind, function in _FUNCTIONS.items()}


def check_compiler(device: str) -> None:
    """Raise a MissingDependencyError if what torch writes for `device` cannot be translated here."""
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise MissingDependencyError("--backend compile needs triton on a GPU; run: pip install triton")
    if device == "cpu" and not (os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "c++", "cl")))):
        raise MissingDependencyError("--backend compile needs a C++ compiler on the CPU; install g++ or clang++")

"""A U-Net whose weights pass through memory block by block, while the next block is read as the present one computes.

The arithmetic is that of the resident network, on the same weights in the same layout: outputs are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.checkpoints.mapping import empty, placed, prefetch, put, release
from latentdiff.model.memory.parts import Part, trim
from latentdiff.networks.layers import Downsample, ResnetBlock, TransformerBlock, Upsample, text_attentions

_BLOCKS = (ResnetBlock, TransformerBlock, Downsample, Upsample)


class StreamedPart(Part):
    """A U-Net of which, while it runs, only two blocks have their weights: the one that computes and the next.

    What belongs to no block (the first and last convolution, the embeddings, the projections around transformers, the
    text's keys and values) stays.

    Args:
        module: the U-Net, on the meta device.
        stored: its weights, mapped.
    """

    def __init__(self, module: nn.Module, stored: Mapping[str, Tensor]) -> None:
        super().__init__(module, stored)
        blocks = [(name, block) for name, block in module.named_modules() if isinstance(block, _BLOCKS)]
        stay = _text_weights(module)
        self._blocks = {
            block: {
                f"{name}.{own}": stored[f"{name}.{own}"]
                for own in block.state_dict()
                if not f"{name}.{own}".startswith(stay)
            }
            for name, block in blocks
        }
        streamed = {name for tensors in self._blocks.values() for name in tensors}
        self._resident = {name: tensor for name, tensor in stored.items() if name not in streamed}
        order = list(self._blocks)
        self._next = dict(zip(order, [*order[1:], order[0]], strict=True))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._fetched: dict[nn.Module, Future[Any]] = {}
        self._copies: torch.cuda.Stream | None = None
        for block in order:
            block.register_forward_pre_hook(self._before)
            block.register_forward_hook(self._after, always_call=True)

    def ready(self) -> nn.Module:
        """The network; its blocks get their weights when they are called."""
        if not self.is_ready:
            if self._device.type == "cuda":
                self._pin()
            self._load(self._resident)
        return self.module

    def give_back(self) -> bool:
        """See `Part`."""
        self._forget()
        return super().give_back()

    def _before(self, block: nn.Module, inputs: Any) -> None:
        future = self._fetched.pop(block, None) or self._fetch(block)
        weights, arrived = future.result()
        if self._is_stale(weights):  # fetched before the network was changed to another format
            weights, arrived = self._fetch(block).result()
        if arrived is not None:
            present = torch.cuda.current_stream(self._device)
            present.wait_event(arrived)
            for tensor in weights.values():
                tensor.record_stream(present)  # or its memory could be taken for the next copy while it is in use
        for name, tensor in weights.items():
            put(self.module, name, tensor)
        self._forget()
        self._fetched[self._next[block]] = self._fetch(self._next[block])

    def _after(self, block: nn.Module, inputs: Any, output: Any) -> None:
        own = self._blocks[block]
        empty(self.module, own)
        for tensor in own.values():
            release(tensor)

    def _fetch(self, block: nn.Module) -> Future[Any]:
        """Begin to bring the weights of a block to the device, in the format that the network has now."""
        present = {name: self.module.get_parameter(name) for name in self._blocks[block]}
        return self._pool.submit(self._bring, block, present)

    @torch.inference_mode(False)
    def _bring(self, block: nn.Module, like: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        own = self._blocks[block]
        if self._copies is None:
            # what this thread allocated and another one freed stays with the C library otherwise, and grows by the step
            trim()
            for tensor in own.values():
                prefetch(tensor)
            return {name: placed(tensor, like[name], self._device) for name, tensor in own.items()}, None
        with torch.cuda.stream(self._copies):
            brought = {
                name: tensor.to(self._device, like[name].dtype, non_blocking=True) for name, tensor in own.items()
            }
            return brought, self._copies.record_event()

    def _pin(self) -> None:
        """Keep the blocks' weights in page-locked memory of the host, from where a GPU fetches them by itself."""
        self._copies = torch.cuda.Stream(self._device)
        for own in self._blocks.values():
            for name, tensor in own.items():
                own[name] = placed(tensor, self.module.get_parameter(name), "cpu").pin_memory()

    def _is_stale(self, weights: Mapping[str, Tensor]) -> bool:
        return any(tensor.dtype != self.module.get_parameter(name).dtype for name, tensor in weights.items())

    def _forget(self) -> None:
        """Drop what was fetched for blocks that did not come next."""
        for future in self._fetched.values():
            future.cancel()
        self._fetched.clear()


def has_blocks(module: nn.Module) -> bool:
    """Whether a network has blocks whose weights can be streamed."""
    return any(isinstance(block, _BLOCKS) for block in module.modules())


def block_bytes(module: nn.Module) -> int:
    """The most bytes of weights that a streamed U-Net has in memory at a time: what stays, and its three largest
    blocks.

    Three, because the memory of a block that was left may be taken again a moment after the next but one is being read.
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in module.state_dict().items()}
    stay = _text_weights(module)
    blocks = [
        sum(size for name, size in sizes.items() if name.startswith(f"{prefix}.") and not name.startswith(stay))
        for prefix, block in module.named_modules()
        if isinstance(block, _BLOCKS)
    ]
    return sum(sizes.values()) - sum(blocks) + sum(sorted(blocks)[-3:])


def _text_weights(network: nn.Module) -> tuple[str, ...]:
    """How the names begin of what the text goes through before the blocks run, once per prompt; it is small."""
    layers = set(text_attentions(network))
    names = [name for name, module in network.named_modules() if module in layers]
    return tuple(f"{name}.{leaf}." for name in names for leaf in ("to_k", "to_v"))

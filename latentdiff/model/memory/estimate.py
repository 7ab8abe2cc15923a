"""How much memory an image takes, from sizes alone, before anything is allocated; and how much this process may take.

What is counted: the weights, and the activations of the moment at which most of them are alive. What a process has of
its own before (interpreter, torch, a GPU's context) is not: it is there already when the question is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from latentdiff.model.memory.streaming import block_bytes
from latentdiff.networks.config import UNetConfig, VAEConfig

TILE_OVERHEAD = 3  # float32 images of a tiled decode: the sum, its weights, and the tile
_FEED_FORWARD = 18  # widths alive in a feed-forward: input, its norm, 8 inside, and 4 of the gate and 4 of the product
_DECODER = 3  # maps of the second level's width at the image's size in a ResBlock: input, norm, two of half the width
_SLACK = 64 * 2**20  # what an allocator keeps of memory that was freed, at most (glibc's `M_TRIM_THRESHOLD`)
_ROOT = Path("/")
_UNLIMITED = 2**60  # control groups write numbers of this size for "no limit"


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights of each part, and of the most that the U-Net holds at a time."""

    text_encoder: int
    unet: int
    vae: int
    streamed: int

    @classmethod
    def of(cls, text_encoder: nn.Module, unet: nn.Module, vae: nn.Module, *, streamed: bool) -> Weights:
        """Of these networks, which may lie on the meta device, in the formats that they have."""
        held = block_bytes(unet) if streamed else weight_bytes(unet)
        return cls(weight_bytes(text_encoder), weight_bytes(unet), weight_bytes(vae), held)


@dataclass(frozen=True)
class Workload:
    """What is going to be computed.

    Args:
        rows: inputs that the U-Net sees at once: images of a batch, twice as many with guidance.
        height, width: of the latents.
        unet_bytes, vae_bytes: of one number in each.
        quadratic: whether attention holds its whole matrix of weights.
        window: largest side of what the U-Net sees at once, in latents; None is all.
        tile: side in pixels of what the VAE sees at once, if that is asked for.
        low_memory: the U-Net's weights are streamed, and large images decoded in tiles.
        beside: bytes of the weights of ControlNets.
        before: bytes of the weights of the largest network that is used before the U-Net, an image encoder say.
    """

    unet: UNetConfig
    vae: VAEConfig
    weights: Weights
    rows: int
    height: int
    width: int
    unet_bytes: int
    vae_bytes: int
    quadratic: bool = False
    low_memory: bool = False
    window: int | None = None
    tile: int | None = None
    beside: int = 0
    before: int = 0

    @property
    def is_tiled(self) -> bool:
        """Whether the image is decoded in tiles: it is larger than those of the training, and memory is to be
        saved."""
        tile = self.vae.sample_size // self.vae.downscale
        return self.low_memory and max(self.height, self.width) > tile

    @property
    def tile_in_use(self) -> int | None:
        """Side in pixels of what the decoder sees at once; None is all."""
        return self.tile or (self.vae.sample_size if self.is_tiled else None)

    def changed(self, **fields: object) -> Workload:
        """The same with other fields."""
        return replace(self, **fields)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a network's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def held_bytes(module: nn.Module) -> int:
    """Bytes of those of a network's weights that lie in memory, and not on the meta device."""
    held = (parameter for parameter in module.parameters() if parameter.device.type != "meta")
    return sum(parameter.numel() * parameter.element_size() for parameter in held)


def denoising_bytes(workload: Workload) -> int:
    """Activations of one call of the U-Net."""
    config, levels = workload.unet, range(len(workload.unet.block_out_channels))
    height, width = (min(side, workload.window or side) for side in (workload.height, workload.width))
    sizes = [(_ceil(height, 2**level), _ceil(width, 2**level)) for level in levels]
    maps = [workload.rows * h * w * width for (h, w), width in zip(sizes, config.block_out_channels, strict=True)]
    kept = sum((config.layers_per_block + 1) * count for count in maps)  # the skips
    kept *= 2 if workload.beside else 1  # and as many residuals
    widest = max(_FEED_FORWARD * count for count in maps)
    attention = 0
    if workload.quadratic:
        tokens = [h * w for h, w in sizes]
        attention = 2 * max(
            workload.rows * heads * count**2
            for heads, count, present in zip(config.num_heads, tokens, config.attention_levels, strict=True)
            if present
        )
    return (kept + widest + attention) * workload.unet_bytes + _SLACK


def decoding_bytes(workload: Workload) -> int:
    """Activations of the decoder for one image."""
    factor, pixels = workload.vae.downscale, workload.tile_in_use
    tile = max(workload.height, workload.width) if pixels is None else max(1, pixels // factor)
    height, width = (min(side, tile) for side in (workload.height, workload.width))
    widths = workload.vae.block_out_channels
    # At the size of the image the decoder comes from the second level's width and goes to the first's.
    whole = _DECODER * widths[min(1, len(widths) - 1)] * height * width * factor**2 * workload.vae_bytes
    image = TILE_OVERHEAD * workload.vae.out_channels * workload.height * workload.width * factor**2 * 4
    return whole + image + _SLACK


def needed(workload: Workload, *, at_once: bool) -> int:
    """Bytes at the peak: with all parts in memory at once, or each for as long as it is used."""
    weights, denoising, decoding = workload.weights, denoising_bytes(workload), decoding_bytes(workload)
    unet = workload.beside + (weights.streamed if workload.low_memory else weights.unet)
    if at_once and not workload.low_memory:
        return weights.text_encoder + unet + weights.vae + max(denoising, decoding, workload.before)
    return max(weights.text_encoder, workload.before, unet + denoising, weights.vae + decoding)


def in_gigabytes(count: int) -> str:
    """ "2.2 GB"."""
    return f"{count / 1e9:.1f} GB"


def advice(workload: Workload, free: int) -> str:
    """The options, each of which would alone make a workload fit into `free` bytes; empty if none would."""
    short = replace(
        workload.weights, **{name: size * 2 // workload.unet_bytes for name, size in vars(workload.weights).items()}
    )
    half, before = (size * 2 // workload.unet_bytes for size in (workload.beside, workload.before))
    options = {
        "--batch-size 1": workload.changed(rows=2),
        "--precision bf16": workload.changed(weights=short, unet_bytes=2, vae_bytes=2, beside=half, before=before),
        "--attention sdpa": workload.changed(quadratic=False),
        "--low-memory": workload.changed(low_memory=True),
    }
    return " or ".join(
        name for name, changed in options.items() if changed != workload and needed(changed, at_once=False) <= free
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def available_memory(device: torch.device, root: Path = _ROOT) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say.

    On a CPU that is what the kernel counts as available, or less where a control group (a container) sets a limit.

    Args:
        root: where the files of the system lie, for tests.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [_meminfo(root).get("MemAvailable"), *_groups(root)]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


def free_swap(device: torch.device, root: Path = _ROOT) -> int:
    """Bytes that the system can move from memory to a disk, slowly, to make room for what is on a device."""
    return _meminfo(root).get("SwapFree", 0) if device.type == "cpu" else 0


def _meminfo(root: Path) -> dict[str, int]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {
        name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if rest.split()
    }


def _groups(root: Path) -> Iterator[int | None]:
    """What each control group above this process leaves of its limit; file pages that can be dropped do not count."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, limit, usage, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        top = root / base
        here = top / path.lstrip("/")
        # Inside a container the path may be that of the host; its own group is then mounted at the top.
        here = here if here.exists() else top
        for folder in (here, *(parent for parent in here.parents if parent == top or top in parent.parents)):
            yield _left(folder, limit, usage, cache)


def _left(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        most = int((folder / limit).read_text())  # "max" is no number: no limit
        used = int((folder / usage).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most >= _UNLIMITED else most - used + int(counts.get(cache, 0))

"""Noise: one stream per image, so that an image depends on its seed and on nothing else.

All noise of an image, at the start and in stochastic steps, comes from one generator on the CPU that is seeded with
the image's seed, and is drawn in float32 before it moves; solvers of the stochastic equation take theirs from a
Brownian path of the same seed. So image i of a batch is the image made alone with its seed, on every device. Other
programs draw otherwise; `SOURCES` has their ways, for which the same holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from math import prod

import torch
from torch import Tensor

from latentdiff.diffusion.brownian import BrownianNoise
from latentdiff.diffusion.philox import normal
from latentdiff.errors import UsageError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NoiseRule:
    """Where the noise of an image comes from besides its seed.

    Attributes:
        source: a name of `SOURCES`.
        index: the image's place in the batch of the program that drew it, where a batch shares one generator.
        delta: what is added to the seed for all noise after the first draw; A1111's "eta noise seed delta".
    """

    source: str = "cpu"
    index: int = 0
    delta: int = 0


OURS = NoiseRule()


def _on_cpu(seed: int, shape: Shape, rule: NoiseRule, before: Shape | None = None) -> Iterator[Tensor]:
    """One generator of torch on the CPU for each image; also A1111's "CPU".

    Args:
        before: of one more draw, before all others.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if before is not None:
        yield _drawn(generator, before)
    yield _drawn(generator, shape)
    if rule.delta:
        generator = torch.Generator("cpu").manual_seed((seed + rule.delta) % 2**64)
    while True:
        yield _drawn(generator, shape)


def _on_gpu(seed: int, shape: Shape, rule: NoiseRule) -> Iterator[Tensor]:
    """A generator on an NVIDIA GPU for each image: A1111's "GPU" and "NV"."""
    yield from islice(_of_batch(seed, shape, 0), 1)
    yield from islice(_of_batch((seed + rule.delta) % 2**64, shape, 0), 0 if rule.delta else 1, None)


def _of_batch(seed: int, shape: Shape, index: int) -> Iterator[Tensor]:
    """The draws of image `index` of a batch that one generator on an NVIDIA GPU draws for."""
    size = prod(shape)
    return (torch.from_numpy(normal(seed, call, size, first=index * size)).view(shape) for call in count())


def _comfy(seed: int, shape: Shape, rule: NoiseRule) -> Iterator[Tensor]:
    """ComfyUI on an NVIDIA GPU: the first draw is one of the whole batch on the CPU, all later ones are on the GPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(rule.index):
        _drawn(generator, shape)
    yield _drawn(generator, shape)
    yield from _of_batch((seed + rule.delta) % 2**64, shape, rule.index)


# Each gives the draws (C, h, w) of one image, in a row, float32.
SOURCES: dict[str, Callable[[int, Shape, NoiseRule], Iterator[Tensor]]] = {
    "cpu": _on_cpu,
    "nv": _on_gpu,
    "comfy": _comfy,
}


class NoiseStream:
    """Unit normal noise for a batch of images; every call gives the next (N, C, h, w).

    Args:
        seeds: one per image, 0 to 2**64 - 1.
        shape: (C, h, w) of one image's latents.
        rule: how it is drawn, if not as here.
        device, dtype: where and as what the noise is wanted.

    Raises:
        UsageError: no seed, or one out of range.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        *,
        rule: NoiseRule = OURS,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not seeds:
            raise UsageError("at least one seed is needed, found none")
        for seed in seeds:
            if not 0 <= seed < 2**64:
                raise UsageError(f"a seed must be a whole number from 0 to 2**64 - 1, found {seed}")
        self._draws = [SOURCES[rule.source](seed, tuple(shape), rule) for seed in seeds]
        self._seeds, self._shape, self._rule = seeds, tuple(shape), rule
        self._brownian: BrownianNoise | None = None  # which few samplers ask for
        self._device = torch.device(device)
        self._dtype = dtype

    def __call__(self) -> Tensor:
        noise = torch.stack([next(draws) for draws in self._draws])
        return noise.to(self._device, self._dtype)  # (N, C, h, w)

    def first(self, shape: Shape) -> Tensor:
        """A draw (N, *shape) of another shape than the latents', before all others: of what else is noised.

        Raises:
            UsageError: the noise is that of another program, which draws none.
        """
        if self._rule.source != "cpu":
            raise UsageError(f"expected the noise_source cpu with this model, found {self._rule.source}")
        own = (_on_cpu(seed, self._shape, self._rule, before=shape) for seed in self._seeds)
        self._draws = list(own)
        return torch.stack([next(draws) for draws in self._draws]).to(self._device, self._dtype)

    def between(self, sigma_hat: float, next_sigma_hat: float) -> Tensor:
        """What the images' Brownian paths add between two noise levels, as unit normal noise (N, C, h, w)."""
        if self._brownian is None:
            self._brownian = BrownianNoise(self._seeds, self._shape)
        return self._brownian.between(sigma_hat, next_sigma_hat).to(self._dtype).to(self._device)


def start_noise(
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    *,
    rule: NoiseRule = OURS,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise (N, C, h, w) that sampling starts from: the first draw of every image's stream."""
    return NoiseStream(seeds, shape, rule=rule, device=device, dtype=dtype)()


def _drawn(generator: torch.Generator, shape: Shape) -> Tensor:
    # In float32 whatever torch's default is: a seed draws other numbers in float64.
    return torch.randn(shape, generator=generator, dtype=torch.float32)

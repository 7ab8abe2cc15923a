"""Images that are the same, or nearly so: hashes of pixels, and of coarse gradients (dHash)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Gradients differ in at most so many of 64 bits, and thumbnails by so many of 255 levels on average. Re-encoded and
# scaled copies stay below both; the second tells flat images apart, which have no gradients.
NEAR_BITS = 4
NEAR_LEVELS = 8.0
_BANDS = NEAR_BITS + 1
_COMPARED = 500  # images with an equal band, at most, that one is compared with; flat parts make some bands very common


@dataclass(frozen=True)
class Look:
    """What an image is compared by."""

    pixels: str  # SHA-256 of size and RGB values
    gradients: int  # 64 bits
    thumbnail: bytes  # 8 x 8 x 3 levels


def look_at(image: Image.Image) -> Look:
    """Hash an RGB image."""
    pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)  # (8, 9)
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    thumbnail = image.resize((8, 8), Image.Resampling.BOX).tobytes()
    return Look(pixels, int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail)


def same(looks: Sequence[Look]) -> list[list[int]]:
    """Groups of two or more images with equal pixels."""
    groups: dict[str, list[int]] = {}
    for index, look in enumerate(looks):
        groups.setdefault(look.pixels, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def near(looks: Sequence[Look]) -> list[list[int]]:
    """Groups of two or more images that nearly look the same; of equal images only the first counts.

    Two hashes that differ in at most NEAR_BITS bits agree on at least one of NEAR_BITS + 1 bands of bits, so that only
    images that share a band are compared.
    """
    firsts = list({look.pixels: index for index, look in reversed(list(enumerate(looks)))}.values())
    parent = {index: index for index in firsts}

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for one, other in _candidates(looks, sorted(firsts)):
        if root(one) != root(other) and are_near(looks[one], looks[other]):
            parent[root(other)] = root(one)
    groups: dict[int, list[int]] = {}
    for index in sorted(firsts):
        groups.setdefault(root(index), []).append(index)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def shared(looks: Sequence[Look], others: Sequence[Look]) -> list[tuple[int, int]]:
    """Pairs (index in `looks`, index in `others`) of images that are the same or nearly so, one for each of
    `others`."""
    joined = [*looks, *others]
    found: dict[int, int] = {}
    exact = {look.pixels: index for index, look in enumerate(looks)}
    for number, other in enumerate(others):
        if other.pixels in exact:
            found[number] = exact[other.pixels]
    for one, other in _candidates(joined, range(len(joined))):
        number = other - len(looks)
        if one < len(looks) <= other and number not in found and are_near(joined[one], joined[other]):
            found[number] = one
    return [(one, number) for number, one in sorted(found.items())]


def are_near(one: Look, other: Look) -> bool:
    """Whether two images nearly look the same."""
    if (one.gradients ^ other.gradients).bit_count() > NEAR_BITS:
        return False
    levels = (np.frombuffer(look.thumbnail, np.uint8).astype(np.int16) for look in (one, other))
    return float(np.abs(np.subtract(*levels)).mean()) <= NEAR_LEVELS


def _candidates(looks: Sequence[Look], indices: Iterable[int]) -> Iterable[tuple[int, int]]:
    """Pairs, the smaller index first, that agree on a band of bits."""
    bands: dict[tuple[int, int], list[int]] = {}
    width = -(-64 // _BANDS)
    for index in indices:
        for band in range(_BANDS):
            part = looks[index].gradients >> band * width & ((1 << width) - 1)
            earlier = bands.setdefault((band, part), [])
            yield from ((one, index) for one in earlier[:_COMPARED])
            earlier.append(index)

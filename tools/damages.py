"""Damage to one thing of a scene, from hardly visible to melted, as half-trained models paint things.

A damage changes a sprite before it is drawn, so that what stands beside the thing stays whole. Its severity runs from 0 to 1;
up to CLEAR people still call the thing a good one, and from MELTED on they do not. The judge is not taught what lies between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from glyphs import Sprite
from PIL import Image

CLEAR, MELTED = 0.3, 0.6  # severities
LEAST_CHANGE = 0.06  # share of a thing that has to change before it counts as damaged: a blurred egg is an egg

Layers = np.ndarray  # (h, w, 4) float32: premultiplied RGB in 0-1, and the share of the ground that is covered
Damage = Callable[[Layers, float, np.random.Generator], Layers]  # (layers, severity, rng) -> layers


def layers_of(sprite: Sprite) -> Layers:
    return np.concatenate([sprite.colour / 255.0, 1.0 - sprite.keep], axis=-1)


def sprite_of(layers: Layers, sprite: Sprite) -> Sprite:
    """The sprite with other layers; colours stay within what is covered."""
    cover = layers[..., 3:].clip(0.0, 1.0)
    colour = np.minimum(layers[..., :3].clip(0.0, None), cover)
    return replace(sprite, colour=255.0 * colour, keep=1.0 - cover)


def change(before: Layers, after: Layers) -> float:
    """How much of a thing is not as it was, as a share of all that covers the ground."""
    return float(np.abs(after - before).mean(-1).sum() / before[..., 3].sum())


def side_of(layers: Layers) -> int:
    """Longest side in pixels of what covers at least half of the ground."""
    rows, columns = (np.flatnonzero((layers[..., 3] > 0.5).any(axis)) for axis in (1, 0))
    return max(int(np.ptp(along)) + 1 if len(along) else 1 for along in (rows, columns))


def blurred(layers: Layers, severity: float, rng: np.random.Generator) -> Layers:
    """Gaussian blur, whose radius grows to a tenth of the thing's side."""
    return _blur(layers, 0.10 * severity * side_of(layers))


def warped(layers: Layers, severity: float, rng: np.random.Generator) -> Layers:
    """Every point moved by a smooth random field; short waves tear features, long ones bend the outline."""
    side = side_of(layers)
    wave = rng.uniform(0.18, 0.5)  # of the side
    # A short wave does its harm with shorter ways.
    return _moved(layers, 0.30 * severity * wave * side * _field(layers, wave * side, 2, rng))


def curdled(layers: Layers, severity: float, rng: np.random.Generator) -> Layers:
    """Features run into blotches of the thing's own colours with hard edges: neighbours change places, small waves are
    lost, middle ones exaggerated."""
    side = side_of(layers)
    blotch = rng.uniform(0.03, 0.07) * side
    torn = _moved(layers, 1.6 * severity**1.4 * blotch * _field(layers, 2.5 * blotch, 2, rng))
    light = 0.12 * severity * _field(layers, 2.5 * blotch, 1, rng) * torn[..., 3:]
    torn[..., :3] += light
    fine = _blur(torn, 0.5 * severity * blotch)
    return fine + 1.2 * severity * (fine - _blur(torn, (0.3 + 2.0 * severity) * blotch))


def erased(layers: Layers, severity: float, rng: np.random.Generator) -> Layers:
    """Parts are missing, up to three fifths of the thing."""
    return layers * (1.0 - _patches(layers, 0.6 * severity**2, rng))


def smeared(layers: Layers, severity: float, rng: np.random.Generator) -> Layers:
    """What is inside the outline dissolves into its own colours, more and more of it."""
    side = side_of(layers)
    cover = layers[..., 3:]
    inside = _blur(layers, 0.14 * side)
    flat = inside[..., :3] / np.maximum(inside[..., 3:], 1e-3) * cover
    flat += cover * 0.12 * _field(layers, 0.2 * side, 1, rng)
    where = _patches(layers, min(1.0, 1.5 * severity**1.5), rng)
    return np.concatenate([layers[..., :3] + where * (flat - layers[..., :3]), cover], axis=-1)


def shuffled(layers: Layers, severity: float, rng: np.random.Generator) -> Layers:
    """Its pieces change places: at full severity all, at less so many of them."""
    count = int(rng.integers(2, 5))
    solid = layers[..., 3] > 0.5
    (top, bottom), (left, right) = ((found.min(), found.max() + 1) for found in np.nonzero(solid))
    height, width = (bottom - top) // count, (right - left) // count
    places = [(top + row * height, left + column * width) for row in range(count) for column in range(count)]
    moved = [place for place in places if rng.random() < severity] or places[:2]
    out = layers.copy()
    for (y, x), (from_y, from_x) in zip(moved, moved[1:] + moved[:1], strict=True):
        out[y : y + height, x : x + width] = layers[from_y : from_y + height, from_x : from_x + width]
    return _blur(out, rng.uniform(0.0, 0.03) * side_of(layers))


def smudged(layers: Layers, severity: float, rng: np.random.Generator) -> Layers:
    """A cloud of the thing's own colours, more of it than of the thing."""
    side = side_of(layers)
    solid = layers[layers[..., 3] > 0.9]
    palette = solid[rng.integers(len(solid), size=int(rng.integers(2, 5)))] if len(solid) else layers.reshape(-1, 4)[:2]
    maps = _field(layers, rng.uniform(0.15, 0.5) * side, len(palette), rng)
    cloud = palette[maps.argmax(-1)] * _blob(layers, rng)[..., None]
    cloud = _blur(cloud, rng.uniform(0.01, 0.08) * side)
    return layers + min(1.0, 0.4 + severity) * (cloud - layers)


# Each with how often it is drawn. The first five have a harmless form, too.
GRADED: dict[str, Damage] = {
    "blurred": blurred, "warped": warped, "curdled": curdled, "erased": erased, "smeared": smeared,
}  # fmt: skip
UNGRADED: dict[str, Damage] = {"shuffled": shuffled, "smudged": smudged}


def mixed(layers: Layers, other: Layers, rng: np.random.Generator) -> Layers:
    """Two things in one: halves, patches of both, or one shining through the other."""
    kind = rng.random()
    if kind < 0.3:
        weight = np.full((*layers.shape[:2], 1), rng.uniform(0.35, 0.65), dtype=np.float32)
    elif kind < 0.6:
        rows, columns = np.mgrid[-1 : 1 : 1j * layers.shape[0], -1 : 1 : 1j * layers.shape[1]]
        angle = rng.uniform(0, 2 * np.pi)
        line = rows * np.sin(angle) + columns * np.cos(angle) + rng.uniform(-0.15, 0.15)
        weight = _steps(line[..., None], 0.05)
    else:
        weight = _patches(np.maximum(layers, other), rng.uniform(0.35, 0.65), rng)
    return layers + weight * (other - layers)


def damaged(layers: Layers, melted: bool, rng: np.random.Generator) -> Layers:
    """One to three damages of the graded kinds: all of them harmless, or the first at least not."""
    names = rng.choice(list(GRADED), size=int(rng.choice((1, 2, 3), p=(0.5, 0.3, 0.2))), replace=False)
    # Harms add up, so that each of several has less of what people let pass.
    allowed = CLEAR / len(names) ** 0.5
    for number, name in enumerate(names):
        least, most = (0.0, allowed) if not melted else (MELTED if number == 0 else 0.0, 1.0)
        severity = rng.uniform(least, most)
        layers = GRADED[name](layers, float(severity), rng)
    return layers


def _blur(layers: Layers, radius: float) -> Layers:
    """Gaussian blur; nothing lies beyond the border."""
    if radius < 0.3:
        return layers
    rows, columns = (_gaussian(length, radius) for length in layers.shape[:2])
    across = np.tensordot(rows, layers, axes=(1, 0))  # (h, w, 4)
    return np.matmul(columns, across)


def _gaussian(length: int, radius: float) -> np.ndarray:
    """The matrix (length, length) that blurs along one axis."""
    places = np.arange(length, dtype=np.float32)
    weights = np.exp(-(((places[:, None] - places) / radius) ** 2) / 2)
    return weights / (radius * np.float32(np.sqrt(2 * np.pi)))


def _field(layers: Layers, wave: float, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise (h, w, channels) of about unit variance, with waves of about `wave` pixels."""
    height, width = layers.shape[:2]
    rows, columns = (max(2, round(length / max(wave, 2.0))) + 2 for length in (height, width))
    coarse = rng.standard_normal((channels, rows, columns), dtype=np.float32)
    # Off the grid by a random part of a wave, so that no place is always calm.
    x, y = rng.uniform(0.0, 1.0, 2)
    box = (x, y, columns - 1 + x, rows - 1 + y)
    planes = [Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC, box=box) for p in coarse]
    return 1.2 * np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _moved(layers: Layers, offset: np.ndarray) -> Layers:
    """Each pixel taken from `offset` (h, w, 2: x and y in pixels) away."""
    height, width = layers.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    # In units of the half side, as grid_sample counts.
    grid = np.stack([(2 * (x + offset[..., 0]) + 1) / width - 1, (2 * (y + offset[..., 1]) + 1) / height - 1], axis=-1)
    planes = torch.from_numpy(np.ascontiguousarray(layers.transpose(2, 0, 1)))[None]
    moved = F.grid_sample(planes, torch.from_numpy(grid.astype(np.float32))[None], align_corners=False)
    return moved[0].permute(1, 2, 0).numpy()


def _patches(layers: Layers, share: float, rng: np.random.Generator) -> np.ndarray:
    """A soft mask (h, w, 1) of blobs that takes about `share` of the thing."""
    side = side_of(layers)
    height = _field(layers, rng.uniform(0.15, 0.45) * side, 1, rng)
    solid = layers[..., 3] > 0.5
    if share <= 0.0 or not solid.any():
        return np.zeros_like(height)
    return _steps(height - np.quantile(height[solid], 1.0 - min(share, 1.0)), rng.uniform(0.05, 0.3))


def _steps(values: np.ndarray, width: float) -> np.ndarray:
    """0 below -width, 1 above width, and a slope between."""
    return (0.5 + values / (2 * width)).clip(0.0, 1.0).astype(np.float32)


def _blob(layers: Layers, rng: np.random.Generator) -> np.ndarray:
    """The thing's outline (h, w), softened and bent; 0-1."""
    side = side_of(layers)
    outline = _blur(layers[..., 3:], rng.uniform(0.06, 0.15) * side)
    bent = outline + 0.18 * _field(layers, rng.uniform(0.2, 0.5) * side, 1, rng) * (outline > 0.05)
    return _steps(bent - 0.5, rng.uniform(0.1, 0.4))[..., 0]

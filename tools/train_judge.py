"""Train the judge of `latentdiff evaluate` on renders, from nothing.

    python tools/make_scenes.py data/scenes --count 40000 --split train --seed 0
    python tools/make_scenes.py data/scenes-held-out --count 30000 --split test --seed 2
    python tools/train_judge.py data/scenes data/scenes-held-out weights/judge --steps 4500 --seed 0

The judge sees scenes only, never a generated image and never the weights of a generative model. Unlike the model, it
has to know the combinations that are held out, or it would fail right images of them; so it is trained on scenes of
both splits, and tested on others. Blur, noise, JPEG, shifts, colour jitter and erased objects make it indifferent to
the softness of generated images. It takes half an hour on one core.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from scene_language import BACKGROUNDS, NOUNS, OBJECT_COLOURS
from torch import Tensor
from tqdm import tqdm

from latentdiff.errors import DataError, LatentDiffError
from latentdiff.evaluation.judge import save_judge
from latentdiff.evaluation.network import STRIDE, JudgeConfig, JudgeNetwork, JudgeOutput
from latentdiff.files import atomic_path

BATCH = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.02
WARMUP = 200  # steps
SAVE_EVERY = 250  # steps
CENTRE = 0.75  # cells; a cell whose middle is nearer to an object's centre holds it, so one to four cells do
SMALLEST_VISIBLE_SHARE = 0.7  # of an object that a shift pushes over the edge and that still counts


@dataclass
class Scene:
    """One image (H, W, 3) uint8 with its objects; `boxes` (K, 4) are left, top, right, bottom in pixels."""

    pixels: np.ndarray
    background: int
    nouns: np.ndarray  # (K,)
    colours: np.ndarray  # (K,)
    boxes: np.ndarray  # (K, 4)


def read_scenes(folder: Path, config: JudgeConfig) -> list[Scene]:
    """Decode every image of a folder made by make_scenes.py.

    Raises:
        DataError: there is no such folder, or its images are of another size.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise DataError(f"expected scenes in {folder}, found no metadata.jsonl; make them with tools/make_scenes.py")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    return [
        _read_scene(folder, json.loads(line), config)
        for line in tqdm(lines, desc="reading", unit="scene", mininterval=1.0)
    ]


def _read_scene(folder: Path, line: dict[str, Any], config: JudgeConfig) -> Scene:
    with Image.open(folder / line["file_name"]) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape != (config.size, config.size, 3):
        found = f"{pixels.shape[1]}x{pixels.shape[0]} in {line['file_name']}"
        raise DataError(f"expected {config.size}x{config.size} pixels, found {found}")
    objects = line["scene"]["objects"]
    own_colours = len(config.colours)
    return Scene(
        pixels,
        config.backgrounds.index(line["scene"]["background"]),
        np.array([config.nouns.index(entry["noun"]) for entry in objects]),
        np.array([config.colours.index(entry["colour"]) if entry["colour"] else own_colours for entry in objects]),
        np.array([entry["box"] for entry in objects], dtype=np.float32),
    )


def augmented(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene as a generative model might have painted it: shifted, soft, off in colour; sometimes short of an
    object."""
    pixels, keep = _erased(scene, rng)
    image, boxes = _shifted(pixels, scene.boxes, rng)
    size = pixels.shape[0]
    inside = np.clip(boxes, 0, size)
    keep &= _areas(inside) > SMALLEST_VISIBLE_SHARE * _areas(boxes)
    image = _softened(image, rng)
    values = np.asarray(image, dtype=np.float32)
    if rng.random() < 0.6:
        values = values * rng.uniform(0.93, 1.07, 3) + rng.uniform(-10, 10, 3)
    if rng.random() < 0.5:
        values = values + rng.normal(0, rng.uniform(1, 12), values.shape)
    pixels = np.clip(values, 0, 255).astype(np.uint8)
    return Scene(pixels, scene.background, scene.nouns[keep], scene.colours[keep], inside[keep])


def _erased(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paint one object over in one scene of four, so that the judge never infers one object from the others."""
    keep = np.ones(len(scene.boxes), dtype=bool)
    if rng.random() >= 0.25:
        return scene.pixels, keep
    chosen = int(rng.integers(len(scene.boxes)))
    left, top, right, bottom = scene.boxes[chosen].astype(int)
    pixels = scene.pixels.copy()
    pixels[top:bottom, left:right] = pixels[0, 0]
    keep[chosen] = False
    return pixels, keep


def _shifted(pixels: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """Scale by up to a tenth and shift by up to eight pixels; the background fills what becomes free."""
    image, size = Image.fromarray(pixels), pixels.shape[0]
    scale, (dx, dy) = rng.uniform(0.9, 1.12), rng.uniform(-8, 8, 2)
    ground = tuple(int(value) for value in pixels[0, 0])
    matrix = (1 / scale, 0, size / 2 * (1 - 1 / scale) - dx, 0, 1 / scale, size / 2 * (1 - 1 / scale) - dy)
    moved = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=ground)
    offset = np.array([dx, dy, dx, dy], dtype=np.float32)
    return moved, (boxes - size / 2 + offset) * scale + size / 2


def _softened(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    kind = rng.random()
    if kind < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6)))
    elif kind < 0.55:
        small = int(rng.uniform(0.4, 1.0) * image.width)
        image = image.resize((small, small), Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BICUBIC)
    if rng.random() < 0.25:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.uniform(25, 90)))
        image = Image.open(buffer).convert("RGB")
    return image


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


@dataclass
class Targets:
    """What the network should say about a batch; P positive cells, at an object's centre and around it."""

    heat: Tensor  # (N, h, w) 1 where a centre is near, falling off around
    cells: tuple[Tensor, Tensor, Tensor]  # image, row, column (P,)
    weight: Tensor  # (P,)
    noun: Tensor  # (P,)
    colour: Tensor  # (P,)
    box: Tensor  # (P, 4)
    background: Tensor  # (N,)


def make_targets(scenes: Sequence[Scene], size: int) -> Targets:
    """Heat and positive cells of a batch; cells beside those that hold a centre learn its names and box with less
    weight."""
    side = size // STRIDE
    grid = np.arange(side)
    heat = np.zeros((len(scenes), side, side), dtype=np.float32)
    image = np.concatenate(
        [np.full(len(scene.nouns), number) for number, scene in enumerate(scenes)]
    )  # (K,) of all objects
    left, top, right, bottom = np.concatenate([scene.boxes for scene in scenes]).T / STRIDE  # in cells
    x, y = (left + right) / 2, (top + bottom) / 2
    column, row = (np.minimum(centre.astype(int), side - 1) for centre in (x, y))
    spread = np.maximum(0.7, np.hypot(right - left, bottom - top) / 14)
    distance = np.hypot(grid + 0.5 - x[:, None, None], grid[:, None] + 0.5 - y[:, None, None])  # (K, side, side)
    bumps = np.where(distance < CENTRE, 1.0, np.exp(-((distance / spread[:, None, None]) ** 2) / 2))
    np.maximum.at(heat, image, bumps.astype(np.float32))

    down, across = (offset.reshape(-1, 1) for offset in np.mgrid[-1:2, -1:2])  # (9, 1)
    rows, columns = row + down, column + across  # (9, K)
    weight = np.where(np.hypot(x - columns - 0.5, y - rows - 0.5) < CENTRE, 1.0, 0.3)  # (9, K)
    width, height = ((length / side + 0 * rows) for length in (right - left, bottom - top))
    box = np.stack([(x - columns - 0.5) / side, (y - rows - 0.5) / side, width, height], axis=-1)  # (9, K, 4)
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)

    def taken(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.broadcast_to(values, (*inside.shape, *values.shape[2:]))[inside])

    noun, colour = (np.concatenate([getattr(scene, name) for scene in scenes])[None] for name in ("nouns", "colours"))
    return Targets(
        heat=torch.from_numpy(heat),
        cells=(taken(image[None]), taken(rows), taken(columns)),
        weight=taken(weight).float(),
        noun=taken(noun),
        colour=taken(colour),
        box=taken(box).float(),
        background=torch.tensor([scene.background for scene in scenes]),
    )


def loss_of(output: JudgeOutput, target: Targets) -> Tensor:
    """Focal loss of the centres (Zhou et al. 2019, eq. 1), cross-entropies of the names, L1 of the boxes."""
    probability, logit = output.centre.sigmoid(), output.centre
    centre = target.heat == 1  # (N, h, w)
    hit = (1 - probability) ** 2 * F.logsigmoid(logit)
    miss = (1 - target.heat) ** 4 * probability**2 * F.logsigmoid(-logit)
    centres = -torch.where(centre, hit, miss).sum() / centre.sum().clamp(min=1)
    image, row, column = target.cells

    def at_cells(values: Tensor) -> Tensor:
        return values[image, :, row, column]  # (P, channels)

    noun = F.cross_entropy(at_cells(output.noun), target.noun, reduction="none")
    colour = F.cross_entropy(at_cells(output.colour), target.colour, reduction="none")
    box = (at_cells(output.box) - target.box).abs().sum(1)
    named = ((noun + colour + 5.0 * box) * target.weight).sum() / target.weight.sum().clamp(min=1)
    return centres + named + 0.3 * F.cross_entropy(output.background, target.background)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def batch_of(scenes: Sequence[Scene], step: int, seed: int) -> list[Scene]:
    """The batch of a step, the same whether or not the run was interrupted."""
    rng = np.random.default_rng((seed, step))
    return [augmented(scenes[index], rng) for index in rng.integers(len(scenes), size=BATCH)]


def train(scenes: Sequence[Scene], config: JudgeConfig, out: Path, steps: int, seed: int) -> JudgeNetwork:
    """Train a network, or go on where an interrupted run stopped."""
    torch.manual_seed(seed)
    network = JudgeNetwork(config).to(memory_format=torch.channels_last)
    decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    checkpoint, first = out / "training.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    progress = tqdm(range(first, steps), initial=first, total=steps, unit="step", mininterval=5.0)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        scenes_of_step = batch_of(scenes, step, seed)
        pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes_of_step]))  # (N, H, W, 3)
        images = (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2)  # (N, 3, H, W), channels last in memory
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(images)
        loss = loss_of(output, make_targets(scenes_of_step, config.size))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise LatentDiffError(f"the loss is not finite at step {step}")
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            with atomic_path(checkpoint) as temporary:
                torch.save(state, temporary)
    return network


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("data", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--steps", type=click.IntRange(1), default=4500, show_default=True, help=f"Batches of {BATCH}.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(data: tuple[Path, ...], out: Path, steps: int, seed: int) -> None:
    config = JudgeConfig(tuple(NOUNS), tuple(OBJECT_COLOURS), tuple(BACKGROUNDS))
    try:
        scenes = [scene for folder in data for scene in read_scenes(folder, config)]
        network = train(scenes, config, out, steps, seed)
        save_judge(network, out)
    except (LatentDiffError, OSError) as error:
        sys.exit(f"error: {error}")
    (out / "training.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main()

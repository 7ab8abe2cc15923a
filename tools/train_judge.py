"""Train the judge of `latentdiff evaluate` on composed scenes.

    python tools/train_judge.py weights/judge --seed 0

The judge sees composed scenes, whose things are whole or damaged (`damages.py`), and never the weights of a generative model.
A thing that is too damaged to be called by its name is "unknown", a class of its own beside the nouns; what is only soft, as
the decoder of a good model makes it, keeps its name. So the judge's certainty falls as a thing melts. Unlike the model, it
has to know the combinations that are held out, or it would fail right images of them; so it is trained on scenes of both
splits, and measured (`score_judge.py`) on others.

With --damaged, it also sees images of half-trained models in which no thing is clear. An interrupted run goes on where it last
wrote a checkpoint.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from glyphs import Glyphs, fetch_glyphs, glyphs_option
from judge_scenes import IGNORED, Composer, Scene, composed_batch, read_damaged, varied
from scene_language import BACKGROUNDS, OBJECT_COLOURS, PLACES
from torch import Tensor
from tqdm import tqdm

from latentdiff.checkpoints.files import read_tensors
from latentdiff.errors import LatentDiffError
from latentdiff.evaluation.judge import WEIGHTS_NAME, peaks, save_judge
from latentdiff.evaluation.network import STRIDE, JudgeConfig, JudgeNetwork, JudgeOutput
from latentdiff.files import atomic_path
from latentdiff.training.optimizer import FusedAdamW

BATCH = 32
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.02
MOMENTUM = 0.95  # of Muon
WARMUP = 20  # steps
FALL = 0.4  # of all steps, in which the learning rate falls
SAVE_EVERY = 10  # steps
DAMAGED_PER_BATCH = 3  # images of --damaged, instead of as many scenes
CENTRE = 0.75  # cells; a cell whose middle is nearer to an object's centre holds it, so one to four cells do
LIKELY = 0.2  # a centre's probability from which a thing stands there in an image whose things nobody has marked


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

    noun = F.cross_entropy(at_cells(output.noun), target.noun, ignore_index=IGNORED, reduction="none")
    colour = F.cross_entropy(at_cells(output.colour), target.colour, ignore_index=IGNORED, reduction="none")
    box = (at_cells(output.box) - target.box).abs().sum(1)
    named = ((noun + colour + 5.0 * box) * target.weight).sum() / target.weight.sum().clamp(min=1)
    return centres + named + 0.3 * F.cross_entropy(output.background, target.background)


def unknown_loss(output: JudgeOutput) -> Tensor:
    """Cross-entropy with "unknown" at every place of images (N, 3, H, W) where the network itself sees a thing."""
    image, row, column = (peaks(output.centre) & (output.centre.sigmoid() > LIKELY)).nonzero(as_tuple=True)
    logits = output.noun[image, :, row, column]  # (P, nouns + 1)
    unknown = torch.full((len(logits),), logits.shape[1] - 1)
    return F.cross_entropy(logits, unknown, reduction="sum") / max(1, len(logits))


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, a plateau, and a linear fall to zero; a run on its plateau may still be given other `steps`."""
    falling = (steps - step) / max(1, round(FALL * steps))
    return LEARNING_RATE * min((step + 1) / WARMUP, 1.0, falling)


class Trainer:
    """A network, its optimizer and the checkpoint in `out`, from which an interrupted run goes on."""

    def __init__(self, config: JudgeConfig, out: Path, seed: int, start: Path | None = None) -> None:
        torch.manual_seed(seed)
        self.network = JudgeNetwork(config).to(memory_format=torch.channels_last)
        if start:
            load_fitting(self.network, start)
        self.optimizer = make_optimizer(self.network)
        self.checkpoint, self.step = out / "training.pt", 0
        if self.checkpoint.is_file():
            state = torch.load(self.checkpoint, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def learn(self, scenes: Sequence[Scene], damaged: np.ndarray, rate: float) -> float:
        """One step on scenes and on damaged images (M, H, W, 3) uint8, of which there may be none; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        pixels = torch.from_numpy(np.concatenate([np.stack([scene.pixels for scene in scenes]), damaged]))
        images = (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2)  # (N, 3, H, W), channels last in memory
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = self.network(images)
        composed, painted = output[: len(scenes)], output[len(scenes) :]
        loss = loss_of(composed, make_targets(scenes, self.network.config.size))
        if len(damaged):
            loss = loss + len(damaged) / len(scenes) * unknown_loss(painted)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
        self.optimizer.step()
        self.step += 1
        if not math.isfinite(loss.item()):
            raise LatentDiffError(f"the loss is not finite at step {self.step}")
        return loss.item()

    def save(self) -> None:
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        with atomic_path(self.checkpoint) as temporary:
            torch.save(state, temporary)


def make_optimizer(network: JudgeNetwork) -> FusedAdamW:
    """Muon for the kernels between the first layer and the heads, which learns from fewer images; AdamW for the rest."""
    own = {name: parameter for name, parameter in network.named_parameters()}
    edges = ("stem.1.", "cell.", "background.")
    hidden = [value for name, value in own.items() if value.ndim > 1 and not name.startswith(edges)]
    matrices = [value for name, value in own.items() if value.ndim > 1 and name.startswith(edges)]
    groups = [
        {"params": hidden, "weight_decay": WEIGHT_DECAY, "orthogonal": True, "betas": (MOMENTUM, 0.0)},
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": [value for value in own.values() if value.ndim <= 1], "weight_decay": 0.0},
    ]
    return FusedAdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99))


def load_fitting(network: JudgeNetwork, folder: Path) -> None:
    """Take those weights of another judge that have the same shape: all of a judge of the same words, else its trunk."""
    own = network.state_dict()
    found = read_tensors(folder / WEIGHTS_NAME).tensors
    network.load_state_dict(own | {k: v.float() for k, v in found.items() if k in own and v.shape == own[k].shape})


def train(trainer: Trainer, compose: Composer, damaged: np.ndarray, steps: int, seed: int) -> None:
    """Train up to a step; the batches depend on the seed and the step alone."""
    few = min(DAMAGED_PER_BATCH, len(damaged))
    losses: deque[float] = deque(maxlen=20)
    progress = tqdm(range(trainer.step, steps), initial=trainer.step, total=steps, unit="step", mininterval=5.0)
    for step in progress:
        scenes = composed_batch(compose, step, seed, BATCH - few)
        chosen = varied(damaged, few, np.random.default_rng((seed, step, 1)))
        losses.append(trainer.learn(scenes, chosen, learning_rate(step, steps)))
        progress.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            trainer.save()


def config_of(glyphs: Glyphs, size: int = 128) -> JudgeConfig:
    """The world's words, and the class "unknown"."""
    return JudgeConfig(glyphs.nouns, tuple(OBJECT_COLOURS), (*BACKGROUNDS, *PLACES), size=size, unknown=True)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--steps", type=click.IntRange(1), default=2400, show_default=True, help=f"Batches of {BATCH}.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--start", type=click.Path(path_type=Path, exists=True), help="Folder of a judge; its weights that fit are taken."
)
@click.option(
    "--damaged", type=click.Path(path_type=Path, exists=True), multiple=True,
    help="Folder of images in which no thing is clear, with their metadata.jsonl.",
)  # fmt: skip
@glyphs_option
def main(out: Path, steps: int, seed: int, start: Path | None, damaged: tuple[Path, ...], glyphs: Path | None) -> None:
    try:
        sprites = Glyphs(glyphs or fetch_glyphs(Path("data")))
        config = config_of(sprites)
        nothing = np.empty((0, config.size, config.size, 3), dtype=np.uint8)
        images = np.concatenate([nothing, *(read_damaged(folder, config.size) for folder in damaged)])
        trainer = Trainer(config, out, seed, start)
        train(trainer, Composer(sprites, config), images, steps, seed)
        save_judge(trainer.network, out)
    except (LatentDiffError, OSError) as error:
        sys.exit(f"error: {error}")
    trainer.checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()

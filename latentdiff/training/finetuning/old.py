"""What a model knew before it was fine-tuned: its own predictions for old prompts, on its own way from noise to images.

The start model walks from noise to an image of each prompt, guided as it is when it draws. Where it was and what it predicted
there, with the prompt and with the empty one, are written down. The same places are then given to the model that is trained:
what it predicts otherwise, it has forgotten; and to be as before can be a part of the loss. The empty prompt counts as much
as the others: guidance takes several times what it predicts, so that all images change where it changes a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentdiff.training.data.randomness import generator
from latentdiff.training.data.tokens import CaptionTokens
from latentdiff.training.loss import DenoisingLoss

_AT_ONCE = 16
_ROWS_FOR_ONE = 4  # rows of a batch for which there is one old place

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Walks:
    """Places on the walks of P prompts, S of each, and what the start model predicted there.

    Attributes:
        text: what the network is told, by name, P rows each; see `DenoisingLoss.prediction`.
        empty: the same of the empty prompt, one row each.
        guidance: scale by which the model was guided.
        x: noisy latents, (P, S, C, h, w) float32.
        timesteps: (P, S) int64, falling.
        raw, raw_empty: predictions with the prompt and with the empty one, (P, S, C, h, w) float32 each.
    """

    text: Arrays
    empty: Arrays
    guidance: float
    x: np.ndarray
    timesteps: np.ndarray
    raw: np.ndarray
    raw_empty: np.ndarray

    def __len__(self) -> int:
        return self.timesteps.size

    def rows(self, places: np.ndarray, empty: np.ndarray) -> Arrays:
        """The places numbered so, of P S, for a batch, with the empty prompt where `empty` says so: `old_x`,
        `old_timesteps`, `old_raw`, and `old_` with each name of the text."""
        prompt, level = np.divmod(places, self.timesteps.shape[1])
        raw = np.where(empty[:, None, None, None], self.raw_empty[prompt, level], self.raw[prompt, level])
        numbers = {"x": self.x[prompt, level], "timesteps": self.timesteps[prompt, level], "raw": raw}
        text = {
            name: np.where(empty.reshape(-1, *[1] * (rows.ndim - 1)), self.empty[name], rows[prompt])
            for name, rows in self.text.items()
        }
        return {f"old_{name}": values for name, values in (numbers | text).items()}


def texts(prompts: Sequence[str], tokens: CaptionTokens, side: int, *, tells_sizes: bool) -> Arrays:
    """What a network is told of prompts.

    Args:
        side: of the images in pixels, for networks that are told it.
    """
    told: Arrays = {"tokens": tokens.rows(prompts, max(map(tokens.chunks, prompts)))}
    if tells_sizes:
        told["sizes"] = np.tile(np.array([side, side, 0, 0, side, side], np.float32), (len(prompts), 1))
    return told


@torch.no_grad()
def walks(
    module: DenoisingLoss, text: Arrays, empty: Arrays, keys: Sequence[str], shape: tuple[int, int, int], *, count: int,
    guidance: float, seed: int, purpose: str,
) -> Walks:  # fmt: skip
    """Let the model as it is walk; the noise depends on seed, purpose and key alone.

    The walk is DDIM (Song et al. 2021) without added noise, from the noisiest timestep down. Each one stops at `count`
    timesteps that are spread evenly from an offset of its own.

    Args:
        text, empty: see `Walks`.
        keys: names each prompt.
        shape: (C, h, w) of the latents.
    """
    noise, offsets = [], []
    for key in keys:
        random = generator(seed, "old", purpose, key)
        noise.append(random.standard_normal(shape, dtype=np.float32))
        offsets.append(random.random())
    last = len(module.objective.alpha) - 1
    places = (np.arange(count) + np.array(offsets)[:, None]) / count  # (P, S) in [0, 1)
    timesteps = last - (places * len(module.objective.alpha)).astype(np.int64)
    parts = []
    for start in range(0, len(keys), _AT_ONCE):
        own = slice(start, start + _AT_ONCE)
        told = {name: rows[own] for name, rows in text.items()}
        parts.append(_walk(module, told, empty, np.stack(noise[own]), timesteps[own], guidance))
    x, raw, raw_empty = (np.concatenate(of) for of in zip(*parts, strict=True))
    return Walks(text, empty, guidance, x, timesteps, raw, raw_empty)


def _walk(
    module: DenoisingLoss, text: Arrays, empty: Arrays, noise: np.ndarray, timesteps: np.ndarray, guidance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    objective = module.objective
    x = torch.from_numpy(noise).to(objective.alpha.device)
    at = torch.full((len(x),), len(objective.alpha) - 1, device=x.device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for column in range(timesteps.shape[1] + 1):
        raw, raw_empty = predicted(module, text, x, at), predicted(module, _repeated(empty, len(x)), x, at)
        if column:
            found.append((x, raw, raw_empty))
        if column < timesteps.shape[1]:
            following = torch.from_numpy(np.ascontiguousarray(timesteps[:, column])).to(x.device)
            x, at = objective.moved(x, raw_empty.lerp(raw, guidance), at, following), following
    return tuple(torch.stack(each, 1).cpu().numpy() for each in zip(*found, strict=True))  # type: ignore[return-value]


def _repeated(text: Arrays, count: int) -> Arrays:
    """A text of one row as that of a batch."""
    return {name: np.repeat(row, count, axis=0) for name, row in text.items()}


def predicted(module: DenoisingLoss, text: Arrays, x: Tensor, timesteps: Tensor) -> Tensor:
    """What a model predicts, (n, C, h, w) float32."""
    told = {name: torch.from_numpy(np.ascontiguousarray(rows)).to(x.device) for name, rows in text.items()}
    return module.prediction(x, timesteps, told).float()


class Forgetting:
    """How much a model has kept of what it knew.

    The scale: 1 is to predict all as before. 0 is to be as far from that as the start model itself is where it is given
    another one of the old prompts. In between it falls with the mean square of the distance, that of guided velocities
    (Salimans & Ho 2022), so that no noise level counts more for what the model is trained to predict.

    Args:
        module: the start model.
        of: its walks.
    """

    def __init__(self, module: DenoisingLoss, of: Walks) -> None:
        self._walks = of
        others = {name: np.roll(rows, 1, axis=0) for name, rows in of.text.items()}
        self._scale = self._squares(module, others)

    def kept(self, module: DenoisingLoss) -> float:
        """What the model as it is has kept, 0 to 1."""
        squares = self._squares(module, self._walks.text)
        if not self._scale:  # a model that does not heed its text
            return float(squares == 0)
        return max(0.0, 1.0 - squares / self._scale)

    @torch.no_grad()
    def _squares(self, module: DenoisingLoss, text: Arrays) -> float:
        """Sum of the squared distances of the guided velocities that are predicted with `text` to those of before."""
        total, of, objective = 0.0, self._walks, module.objective
        for start in range(0, len(of.x), _AT_ONCE):
            own = slice(start, start + _AT_ONCE)
            told = {name: rows[own] for name, rows in text.items()}
            for level in range(of.timesteps.shape[1]):
                x, raw, raw_empty, timesteps = (
                    torch.from_numpy(np.ascontiguousarray(values[own, level])).to(objective.alpha.device)
                    for values in (of.x, of.raw, of.raw_empty, of.timesteps)
                )
                now = predicted(module, told, x, timesteps)
                now_empty = predicted(module, _repeated(of.empty, len(x)), x, timesteps)
                guided, before = (
                    objective.velocity(without.lerp(with_prompt, of.guidance), x, timesteps)
                    for with_prompt, without in ((now, now_empty), (raw, raw_empty))
                )
                total += float((guided - before).double().square().sum())
        return total


class Practice:
    """Old places that are part of the batches, so that what the model predicts there stays as it was.

    This is learning without forgetting (Li & Hoiem 2016) on the model's own images, as the prior preservation of Ruiz et
    al. 2023 is, but with the start model's prediction for a target in place of the noise: it has nothing to learn from
    them that it did not know.

    Args:
        of: the start model's walks.
        weight: what they count in the loss, as that of the images counts 1.
        batch_size: of the global batch.
        seed: of the run.
    """

    def __init__(self, of: Walks, weight: float, batch_size: int, seed: int) -> None:
        self._walks, self._seed = of, seed
        # A mean over the old rows of the whole batch, written as one over all of its rows, however these are split.
        self._weight = weight * batch_size / len(range(0, batch_size, _ROWS_FOR_ONE))

    def rows(self, step: int, rows: range) -> Arrays:
        """What goes with the given rows of a step's batch: see `Walks.rows`; and `old_weights` (n,)."""
        chosen = [row for row in rows if row % _ROWS_FOR_ONE == 0]
        weights = [self._weight] * len(chosen) or [0.0]  # every part has a loss of each kind
        chosen = chosen or [rows.start]
        places = [generator(self._seed, "practice", step, row).integers(len(self._walks)) for row in chosen]
        empty = [(step + row // _ROWS_FOR_ONE) % 2 == 1 for row in chosen]  # every other one
        found = self._walks.rows(np.array(places), np.array(empty))
        return {**found, "old_weights": np.array(weights, np.float32)}

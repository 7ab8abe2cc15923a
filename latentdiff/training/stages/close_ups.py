"""Close-ups: parts of scenes around one thing, so that the names of things are learned on few latents.

A thing fills a sixth to a half of its scene; a crop of the cached latents around it costs that much less to train on and asks
for the same. Things that fill their scene are few; they take their turn among the close-ups with the whole of it. Which
scenes there are, where their things stand and how each is called alone is read from the metadata.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentdiff.errors import DataError
from latentdiff.training.data import Dataset
from latentdiff.training.data.captions import choose
from latentdiff.training.data.randomness import uniform
from latentdiff.training.material import Material
from latentdiff.training.samples import Arrays, Batches, step_numbers
from latentdiff.training.stages.config import DiffusionStageSection
from latentdiff.training.stages.scenes import read_scenes

# Sides of close-ups are multiples of this many latents, for a U-Net that halves them twice.
_STEP = 4


@dataclass(frozen=True)
class CloseUps:
    """Crops of one side.

    Attributes:
        side: of the crops, in latents.
        scenes, tops, lefts: where each crop lies, (n,) int64.
        captions: what each shows.
    """

    side: int
    scenes: np.ndarray
    tops: np.ndarray
    lefts: np.ndarray
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)

    def crop(self, latents: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """The chosen crops of their scenes' latents (len(chosen), ..., h, w): (len(chosen), ..., side, side)."""
        places = zip(latents, self.tops[chosen], self.lefts[chosen], strict=True)
        return np.stack([scene[..., y : y + self.side, x : x + self.side] for scene, y, x in places])


class CloseUpBatches(Batches):
    """Batches of whole scenes, and in a share of the steps of close-ups in their place.

    Args:
        of: the scenes, all of one size, with cached latents.
        num_train_timesteps: of the noise schedule.
        close_ups: those of the scenes of `of`.
    """

    def __init__(
        self,
        of: Material,
        settings: DiffusionStageSection,
        seed: int,
        num_train_timesteps: int,
        close_ups: Sequence[CloseUps],
    ) -> None:
        super().__init__(of.samples, of.training, settings, seed, num_train_timesteps)
        self._share, self._close_ups = settings.close_up_share, close_ups

    def names(self, step: int) -> list[str]:
        if (close_ups := self._of_step(step)) is None:
            return super().names(step)
        chosen = self._chosen(close_ups, step, range(self._settings.batch_size * self._factor(close_ups)))
        return [self._samples.data.names[index] for index in close_ups.scenes[chosen]]

    def arrays(self, step: int, rows: range) -> Arrays:
        if (close_ups := self._of_step(step)) is None:
            return super().arrays(step, rows)
        # A batch of crops is larger as their sides are shorter; any crop may come at any step.
        factor, samples, settings = self._factor(close_ups), self._samples, self._settings
        rows = range(rows.start * factor, rows.stop * factor)
        chosen = self._chosen(close_ups, step, rows)
        larger = settings.model_copy(update={"batch_size": settings.batch_size * factor})
        shape = (samples.latent[0], close_ups.side, close_ups.side)
        numbers, posterior, _ = step_numbers(larger, self._seed, step, rows, shape, self._timesteps)
        keys = [samples.latent_key(index) for index in close_ups.scenes[chosen]]
        mean, logvar = np.moveaxis(close_ups.crop(samples.latents.rows(keys), chosen), 1, 0)
        captions = [
            choose([close_ups.captions[place]], self._rules, seed=self._seed, step=step, row=row)
            for place, row in zip(chosen, rows, strict=True)
        ]
        return {
            "latents": mean + np.exp(0.5 * logvar) * posterior,
            **samples.text(captions, 1),
            "weights": np.ones(len(rows), np.float32),
            **numbers,
        }

    def _of_step(self, step: int) -> CloseUps | None:
        turn = close_up_turn(step, self._share)
        return None if turn is None or not self._close_ups else self._close_ups[turn % len(self._close_ups)]

    def _factor(self, close_ups: CloseUps) -> int:
        return self._samples.latent_shape(0)[-1] // close_ups.side

    def _chosen(self, close_ups: CloseUps, step: int, rows: range) -> np.ndarray:
        return (uniform((self._seed, "close-ups", step), rows) * len(close_ups)).astype(np.int64)


def read_close_ups(data: Dataset, latent_size: int, downscale: int) -> list[CloseUps]:
    """The close-ups of a data set, by their side; that of a thing that fills its scene is the scene.

    Args:
        data: images whose metadata has, for each, `scene.objects` with `box` in pixels and `text`.
        latent_size: side of a scene in latents.
        downscale: pixels per latent.

    Raises:
        DataError: the metadata does not say where things are.
    """
    found: dict[int, list[tuple[int, int, int, str]]] = defaultdict(list)
    for index, (entry, scene) in enumerate(zip(data.entries, read_scenes(data), strict=True)):
        try:
            things = [(thing["text"], np.array(thing["box"]) / downscale) for thing in scene["objects"]]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"expected the `box` and `text` of each thing in `scene.objects` of {entry.name}, as"
                f" tools/make_scenes.py writes it, for close-ups; found {error!r}"
            ) from error
        boxes = [box for _, box in things]
        for text, box in things:
            side = min(_side(box), latent_size)
            left, top = (_start(box, boxes, axis, side, latent_size) for axis in (0, 1))
            found[side].append((index, top, left, text))
    return [_close_ups(side, rows) for side, rows in sorted(found.items())]


def _close_ups(side: int, rows: Sequence[tuple[int, int, int, str]]) -> CloseUps:
    scenes, tops, lefts, captions = zip(*rows, strict=True)
    return CloseUps(side, np.array(scenes), np.array(tops), np.array(lefts), captions)


def _side(box: np.ndarray) -> int:
    """Latents that hold a box (left, top, right, bottom) in latents, with a little of the ground around it."""
    longest = max(box[2] - box[0], box[3] - box[1])
    return int(-(-(longest + 0.5) // _STEP) * _STEP)


def _start(box: np.ndarray, boxes: Sequence[np.ndarray], axis: int, side: int, latent_size: int) -> int:
    """Where a crop begins along an axis: where it holds least of other things; else on the grid of the U-Net's lowest level,
    on which it looks as in the whole scene; else where the thing is central."""
    middle = (box[axis] + box[axis + 2]) / 2
    wanted = middle - side / 2
    starts = [
        start
        for start in range(latent_size - side + 1)
        if start <= box[axis] + 0.5 and box[axis + 2] - 0.5 <= start + side
    ]

    def cost(start: int) -> tuple[float, bool, float]:
        others = (b for b in boxes if b is not box)
        shown = sum(max(0.0, min(start + side, b[axis + 2]) - max(start, b[axis])) for b in others)
        return shown, start % _STEP != 0, abs(start - wanted)

    return min(starts, key=cost) if starts else int(np.clip(round(wanted), 0, latent_size - side))


def close_up_turn(step: int, share: float) -> int | None:
    """Number of the close-up step that `step` is, counted from 0; None where it is a step of whole scenes."""
    before, after = int(step * share), int((step + 1) * share)
    return before if after > before else None

"""Close-ups: parts of scenes around one thing, so that the names of things are learned on few latents.

A thing fills a sixth to a half of its scene; a crop of the cached latents around it costs that much less to train on and asks
for the same. Which scenes there are, where their things stand and how each is called alone is read from the metadata.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentdiff.errors import DataError
from latentdiff.training.captioned_folder import METADATA, CaptionedFolder

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
        """The chosen crops of latents (scenes, C, h, w), (len(chosen), C, side, side) float32."""
        places = zip(self.scenes[chosen], self.tops[chosen], self.lefts[chosen], strict=True)
        return np.stack([latents[i, :, y : y + self.side, x : x + self.side] for i, y, x in places]).astype(np.float32)


def read_close_ups(data: CaptionedFolder, latent_size: int, downscale: int) -> list[CloseUps]:
    """The close-ups of a folder, by their side; things that fill a scene have none.

    Args:
        data: a folder whose metadata has, for each scene, `scene.objects` with `box` in pixels and `text`.
        latent_size: side of a scene in latents.
        downscale: pixels per latent.

    Raises:
        DataError: the metadata does not say where things are.
    """
    path = data.folder / METADATA
    found: dict[int, list[tuple[int, int, int, str]]] = defaultdict(list)
    try:
        with open(path, encoding="utf-8") as lines:
            scenes = [json.loads(line)["scene"]["objects"] for line in lines if line.strip()][: len(data)]
        for index, things in enumerate(scenes):
            boxes = [np.array(thing["box"]) / downscale for thing in things]
            for thing, box in zip(things, boxes, strict=True):
                side = _side(box)
                if side < latent_size:
                    left, top = (_start(box, boxes, axis, side, latent_size) for axis in (0, 1))
                    found[side].append((index, top, left, thing["text"]))
    except (OSError, KeyError, TypeError) as error:
        raise DataError(
            f"expected {path} with the `box` and `text` of each thing in `scene.objects`, as tools/fluent_scenes.py"
            f" writes it, for close-ups; found {type(error).__name__}: {error}"
        ) from error
    return [_close_ups(side, rows) for side, rows in sorted(found.items())]


def _close_ups(side: int, rows: Sequence[tuple[int, int, int, str]]) -> CloseUps:
    scenes, tops, lefts, captions = zip(*rows, strict=True)
    return CloseUps(side, np.array(scenes), np.array(tops), np.array(lefts), captions)


def _side(box: np.ndarray) -> int:
    """Latents that hold a box (left, top, right, bottom) in latents, with a little of the ground around it."""
    longest = max(box[2] - box[0], box[3] - box[1])
    return int(-(-(longest + 0.5) // _STEP) * _STEP)


def _start(box: np.ndarray, boxes: Sequence[np.ndarray], axis: int, side: int, latent_size: int) -> int:
    """Where a crop begins along an axis: the thing as central as the scene's border and the other things allow."""
    middle = (box[axis] + box[axis + 2]) / 2
    wanted = middle - side / 2
    starts = [
        start
        for start in range(latent_size - side + 1)
        if start <= box[axis] + 0.5 and box[axis + 2] - 0.5 <= start + side
    ]

    def cost(start: int) -> tuple[float, float]:
        others = (b for b in boxes if b is not box)
        return sum(max(0.0, min(start + side, b[axis + 2]) - max(start, b[axis])) for b in others), abs(start - wanted)

    return min(starts, key=cost) if starts else int(np.clip(round(wanted), 0, latent_size - side))


def close_up_turn(step: int, share: float) -> int | None:
    """Number of the close-up step that `step` is, counted from 0; None where it is a step of whole scenes."""
    before, after = int(step * share), int((step + 1) * share)
    return before if after > before else None

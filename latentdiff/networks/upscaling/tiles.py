"""An image passed through a network in overlapping tiles, so that its memory does not grow with the image.

A tile's border, where the network misses what lies beyond, is left out; over the next pixels a tile is faded into its
neighbour. What a network sees from further away than the border makes no seam, as it changes slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

BORDER = 24  # pixels of a tile that are left out where another one lies beyond
FADE = 16  # pixels over which two neighbours are mixed
SMALLEST_TILE = 2 * (2 * BORDER + FADE)

Pixels = np.ndarray  # (H, W, 3), uint8


def in_tiles(
    pixels: Pixels, factor: int, tile: int, enlarge: Callable[[Pixels], Pixels], *, multiple: int = 1
) -> Pixels:
    """The image (H, W, 3) `factor` times larger, by a network that sees at most `tile` x `tile` pixels of it.

    Args:
        enlarge: (h, w, 3) -> (h factor, w factor, 3).
        multiple: tiles begin at multiples of it, as networks that gather pixels in blocks need it.
    """
    height, width = pixels.shape[:2]
    rows, columns = spans(height, tile, multiple), spans(width, tile, multiple)
    result = np.empty((height * factor, width * factor, 3), np.uint8)
    for top, bottom, above in rows:
        kept = top + (BORDER if above else 0)
        end = bottom - (BORDER if bottom < height else 0)
        band = np.empty(((end - kept) * factor, width * factor, 3), np.uint8)
        for left, right, before in columns:
            piece = enlarge(pixels[top:bottom, left:right])[(kept - top) * factor : (end - top) * factor]
            first, last = left + (BORDER if before else 0), right - (BORDER if right < width else 0)
            piece = piece[:, (first - left) * factor : (last - left) * factor].swapaxes(0, 1)
            _lay(band.swapaxes(0, 1), first * factor, piece, before * factor)
        _lay(result, kept * factor, band, above * factor)
    return result


def spans(side: int, tile: int, multiple: int = 1) -> list[tuple[int, int, int]]:
    """Tiles that cover `side`: first pixel, end, and over how many pixels one is mixed with the one before.

    All but the last begin where the one before has that many pixels left that both know well.
    """
    if side <= tile:
        return [(0, side, 0)]
    step = (tile - 2 * BORDER - FADE) // multiple * multiple
    starts = [*range(0, side - tile, step), -(-(side - tile) // multiple) * multiple]
    ends = [min(start + tile, side) for start in starts]
    mixed = [0, *(end - BORDER - after - BORDER for (_, after), end in zip(pairwise(starts), ends, strict=False))]
    return list(zip(starts, ends, mixed, strict=True))


def _lay(whole: Pixels, first: int, piece: Pixels, mixed: int) -> None:
    """Put a piece down from row `first` on, its first `mixed` rows faded in over what lies there."""
    whole[first + mixed : first + len(piece)] = piece[mixed:]
    for rows in _slices(mixed):
        share = ((np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) / mixed)[:, None, None]
        below = whole[first + rows.start : first + rows.stop]
        whole[first + rows.start : first + rows.stop] = (
            below + share * (piece[rows] - below.astype(np.float32))
        ).round()


def _slices(count: int) -> Iterator[slice]:
    yield from (slice(start, min(start + FADE, count)) for start in range(0, count, FADE))

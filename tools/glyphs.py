"""The glyphs of the scenes: Microsoft's Fluent Emoji in 3D, from the npm package @lobehub/fluent-emoji-3d (MIT)."""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageFilter
from scene_language import NEW_NOUNS, NOUNS, OBJECT_COLOURS

from latentdiff.errors import DataError, MissingDependencyError
from latentdiff.files import atomic_path

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
ARCHIVE = "lobehub-fluent-emoji-3d-1.1.0.tgz"

FEWEST = 12  # nouns of a world: with fewer, it can lack held-out combinations of some kind

MARGIN = 2  # pixels between a thing and the border of its cell, so that things never touch
_PLAIN = 0.55  # luminance that a tinted thing shows its colour at
_BLUR, _DOWN, _RIGHT, _DARK = 3.0, 3, 1, 0.38  # of the soft shadow, for an image of 128 pixels
_PAD = 8  # pixels around a cell that its shadow may reach

_VARIATION = "-fe0f"  # the code point that asks for the coloured form; some file names have it


@dataclass(frozen=True)
class Sprite:
    """A glyph ready to be drawn into a cell, its shadow with it.

    Attributes:
        colour: premultiplied RGB, (side + 2 pad, side + 2 pad, 3) float32 in 0-255.
        keep: what of the ground shines through, (side + 2 pad, side + 2 pad, 1) float32 in 0-1.
        box: left, top, right, bottom of the glyph in its cell.
        own: mean colour of the glyph, (3,).
        side: pixels of the cell.
    """

    colour: np.ndarray
    keep: np.ndarray
    box: tuple[int, int, int, int]
    own: np.ndarray

    @property
    def side(self) -> int:
        return len(self.keep) - 2 * _PAD


class Glyphs:
    """Sprites by noun, colour and size.

    Args:
        source: folder with the package's WebP files (at any depth), or its .tgz archive.

    Raises:
        DataError: it is neither.
    """

    def __init__(self, source: Path) -> None:
        self.source = Path(source)
        if not self.source.exists():
            raise DataError(f"expected the emoji package at {source}, found nothing; `npm pack {PACKAGE}` fetches it")
        self.sprite = lru_cache(maxsize=None)(self._sprite)

    @cached_property
    def _files(self) -> dict[str, Path | bytes]:
        """Code points -> file or its bytes."""
        if self.source.is_dir():
            return {path.stem.replace(_VARIATION, ""): path for path in sorted(self.source.rglob("*.webp"))}
        try:
            with tarfile.open(self.source) as archive:
                members = [member for member in archive if member.name.endswith(".webp")]
                return {Path(m.name).stem.replace(_VARIATION, ""): archive.extractfile(m).read() for m in members}
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{self.source} is no folder of emoji and no .tgz archive: {error}") from error

    @cached_property
    def nouns(self) -> tuple[str, ...]:
        """Those nouns of the world whose emoji are here, in the world's order.

        Raises:
            DataError: they are too few for scenes of every kind.
        """
        found = tuple(noun for noun, emoji in NOUNS.items() if _file_name(emoji) in self._files)
        if len(found) < FEWEST:
            raise DataError(
                f"expected the emoji of at least {FEWEST} nouns in {self.source}, found {len(found)};"
                f" `npm pack {PACKAGE}` fetches all"
            )
        return found

    def image(self, noun: str) -> Image.Image:
        """A noun's emoji, or an emoji itself, cut to its outline; RGBA.

        Raises:
            DataError: the package has no such emoji.
        """
        emoji = (NOUNS | NEW_NOUNS).get(noun, noun)
        name = _file_name(emoji)
        if name not in self._files:
            raise DataError(f"{self.source} has no emoji {name} for {noun!r}; expected the files of {PACKAGE}")
        found = self._files[name]
        image = Image.open(found if isinstance(found, Path) else io.BytesIO(found)).convert("RGBA")
        return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox())

    def _sprite(self, noun: str, colour: str | None, side: int) -> Sprite:
        """The noun's glyph, in its own colours or in shades of one, for a cell of `side` pixels."""
        fitted = _fit(self.image(noun), side - 2 * MARGIN)
        if colour:
            fitted = tinted(fitted, OBJECT_COLOURS[colour])
        left, top = (side - fitted.width) // 2, (side - fitted.height) // 2
        canvas = Image.new("RGBA", (side + 2 * _PAD, side + 2 * _PAD))
        canvas.paste(fitted, (_PAD + left, _PAD + top))
        pixels = np.asarray(canvas, dtype=np.float32)
        alpha = pixels[..., 3:] / 255.0
        shadow = Image.new("L", canvas.size)
        shadow.paste(fitted.getchannel("A"), (_PAD + left + _RIGHT, _PAD + top + _DOWN))
        dark = np.asarray(shadow.filter(ImageFilter.GaussianBlur(_BLUR)), dtype=np.float32)[..., None] / 255.0
        weight = alpha.sum()
        return Sprite(
            colour=pixels[..., :3] * alpha,
            keep=(1 - alpha) * (1 - _DARK * dark),
            box=(left, top, left + fitted.width, top + fitted.height),
            own=(pixels[..., :3] * alpha).sum((0, 1)) / weight,
        )


def draw(canvas: np.ndarray, sprite: Sprite, left: int, top: int) -> None:
    """Draw a sprite into (H, W, 3) float32 in place, its cell's corner at the given pixel."""
    height, width = canvas.shape[:2]
    side = sprite.keep.shape[0]
    x0, y0 = left - _PAD, top - _PAD
    rows = slice(max(0, -y0), min(side, height - y0))
    columns = slice(max(0, -x0), min(side, width - x0))
    region = canvas[y0 + rows.start : y0 + rows.stop, x0 + columns.start : x0 + columns.stop]
    region *= sprite.keep[rows, columns]
    region += sprite.colour[rows, columns]


def tinted(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in shades of one colour: its mean luminance becomes the colour itself, what is darker or lighter a shade of it.

    Without that shift a black hat in pink is maroon, and cheese in brown is beige.
    """
    pixels = np.asarray(image, dtype=np.float64)
    luminance = pixels[..., :3] @ (0.299, 0.587, 0.114) / 255.0  # (h, w)
    luminance += _PLAIN - np.average(luminance, weights=pixels[..., 3])
    middle = np.array(colour, dtype=np.float64)
    shades = np.stack([0.25 * middle, middle, middle + 0.6 * (255.0 - middle)])  # dark, plain, light
    ramp = np.stack([np.interp(luminance, (0.0, _PLAIN, 1.0), shades[:, channel]) for channel in range(3)], axis=-1)
    return Image.fromarray(np.concatenate([ramp, pixels[..., 3:]], axis=-1).round().astype(np.uint8))


def _file_name(emoji: str) -> str:
    return "-".join(f"{ord(character):04x}" for character in emoji).replace(_VARIATION, "")


def _fit(image: Image.Image, side: float) -> Image.Image:
    factor = side / max(image.size)
    width, height = (max(1, round(length * factor)) for length in image.size)
    # Premultiplied, so that what is invisible does not bleed into the edges.
    return image.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")


def fetch_glyphs(cache: Path) -> Path:
    """The package's archive in `cache`, fetched by `npm pack` unless it is there.

    Raises:
        MissingDependencyError: npm is missing or cannot fetch it.
    """
    path = cache / ARCHIVE
    if path.is_file():
        return path
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, capture_output=True, text=True)
            data = next(Path(folder).glob("*.tgz")).read_bytes()
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            raise MissingDependencyError(
                f"the emoji of the scenes could not be fetched: `npm pack {PACKAGE}` failed ({type(error).__name__});"
                " name its archive or a folder of its files with --glyphs"
            ) from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


glyphs_option = click.option(
    "--glyphs", type=click.Path(path_type=Path), help="Folder or archive of the emoji; without it, npm fetches them."
)

"""Where and how images are written, and which files are there already."""

from __future__ import annotations

import itertools
import os
import re
import sys
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentdiff.errors import DataError, UsageError
from latentdiff.files import IMAGE_FORMATS, image_format
from latentdiff.recipe import read_recipe

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.pipeline import Pipeline

LONGEST_SLUG = 100  # bytes; file systems take 255 for the whole name


@dataclass(frozen=True)
class Writing:
    """How image files are written.

    metadata: with their recipes.
    quality: see `image.save_image`.
    ending: of the names of files in a folder, ".png".
    """

    metadata: bool = True
    quality: int = 95
    ending: str = ".png"

    @classmethod
    def taken_from(cls, settings: dict[str, Any], out: Path) -> Writing:
        """What `options.WRITING` says for --out, taken out of `settings`.

        Raises:
            UsageError: --format names another format than --out.
        """
        name = settings.pop("file_format")
        ending = f".{name}" if name else ".png"
        writing = cls(not settings.pop("no_metadata"), settings.pop("quality"), ending)
        if name and is_file(out) and image_format(out) != IMAGE_FORMATS[ending]:
            raise UsageError(f"expected a folder with --format {name}, or a file {out.stem}{ending}; found --out {out}")
        return writing

    def save(self, image: Image.Image, path: Path) -> None:
        """Write an image."""
        from latentdiff.image import save_image

        save_image(image, path, metadata=self.metadata, quality=self.quality)


def is_file(out: Path) -> bool:
    """Whether a place to write to is an image file, by its ending; else it is a folder.

    Raises:
        UsageError: it has the ending of images of a kind that latentdiff does not write.
    """
    return image_format(out) is not None


def check_image_file(option: str, path: Path) -> None:
    """Make sure, before any work is done, that an image can be written to the file that an option names.

    Raises:
        UsageError: it cannot.
    """
    if not is_file(path):
        raise UsageError(f"expected {option} FILE with an ending of {', '.join(IMAGE_FORMATS)}, found {path}")
    check_writable(path)


def check_apart(places: Mapping[str, Path | None]) -> None:
    """Make sure that no two options, by their names, write the same image file.

    Raises:
        UsageError: two do.
    """
    seen: dict[Path, str] = {}
    for option, place in places.items():
        if place and is_file(place):
            other = seen.setdefault(place.resolve(), option)
            if other != option:
                raise UsageError(f"{other} and {option} both name {place}; give each a file of its own")


def check_writable(path: Path) -> None:
    """Make sure, before any work is done and without leaving a trace, that `path`, an image file or a folder, can be
    written.

    Raises:
        UsageError: it cannot.
    """
    folder = path.absolute().parent if is_file(path) else path.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: {folder} is not a folder; choose another place with --out")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror} in {folder}; choose another place with --out"
        ) from error
    if is_file(path) and path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")


def image_path(
    out: Path, wanted: Mapping[str, Any], taken: Container[Path] = (), ending: str = ".png"
) -> tuple[Path, bool]:
    """Where the image with the recipe fields `wanted` belongs, and whether it is there already.

    A file that holds another image, or is `taken` for one, is left alone: in a folder, the name gets a number.

    Raises:
        UsageError: `out` is a file that holds another image.
    """
    if is_file(out):
        if out.exists() and not _holds(out, wanted):
            raise UsageError(f"{out} holds another image; remove it or choose another name with --out")
        return out, out.exists()
    for path in (out / name for name in _names(wanted["prompt"], wanted["seed"], ending)):
        if path in taken:
            continue
        if not path.exists():
            return path, False
        if _holds(path, wanted):
            return path, True
    raise AssertionError("unreachable: there are more names than files")


def save_results(
    images: Sequence[Image.Image],
    out: Path,
    before: Mapping[str, Image.Image],
    *,
    compare: Path | None,
    writing: Writing,
) -> None:
    """Write the images that a task made, under names that are free, and print where they lie.

    Args:
        before: what went in, by its name: {"source": ..., "mask": ...}; of any modes and sizes.
        compare: a file for all of it side by side.
    """
    from latentdiff.image import side_by_side

    for image in images:
        recipe = read_recipe(image.info)
        path = out if is_file(out) else _free(out, recipe.prompt, recipe.seed, writing.ending)
        writing.save(image, path)
        click.echo(path)
    if compare:
        results = {f"seed {read_recipe(image.info).seed}": image for image in images}
        writing.save(side_by_side({**before, **(results if len(images) > 1 else {"result": images[0]})}), compare)
        click.echo(compare)


def check_results(out: Path, compare: Path | None, count: int) -> None:
    """Make sure, before any work is done, that `save_results` will be able to write `count` images.

    Raises:
        UsageError: it will not, or a file of that name is there already.
    """
    check_count(out, count)
    check_apart({"--out": out, "--compare": compare})
    if compare:
        check_image_file("--compare", compare)
    check_writable(out)
    if is_file(out) and out.exists():
        raise UsageError(f"{out} is there already; remove it or choose another name with --out")


def check_transparency(out: Path, writing: Writing, image: Path, mask: Image.Image | None = None) -> None:
    """Make sure, before any work is done, that results as transparent as `image` where the mask is not white can be
    written.

    Raises:
        UsageError: they are to be JPEG files.
    """
    if image_format(out if is_file(out) else out / f"name{writing.ending}") != "JPEG":
        return
    import numpy as np

    from latentdiff.image import open_image
    from latentdiff.reading.colours import colours_of
    from latentdiff.tasks.inversion import is_inversion

    alpha = None if is_inversion(image) else colours_of(open_image(image), os.fspath(image)).alpha
    if alpha is None:
        return
    painted = np.asarray(mask) == 255 if mask is not None and mask.size == alpha.size else np.False_
    if ((np.asarray(alpha) < 255) & ~painted).any():
        raise UsageError(
            f"{image} has transparent parts, which JPEG does not hold; choose .png, .webp or .avif for the result"
        )


def check_count(out: Path, count: int) -> None:
    """Make sure that `count` images fit into `out`.

    Raises:
        UsageError: it is one file.
    """
    if is_file(out) and count > 1:
        raise UsageError(f"expected a folder for {count} images, found --out {out}")


def shown_source(pipe: Pipeline, image: Path) -> Image.Image:
    """The image; of an inversion, what the VAE keeps of it."""
    from latentdiff.image import as_rgb, open_image, to_pil
    from latentdiff.tasks.inversion import Inversion, is_inversion

    if not is_inversion(image):
        return as_rgb(open_image(image))
    found = Inversion.load(image)
    return to_pil(pipe.decode(found.latents[-1:]))[0].crop((0, 0, *found.size))


def free_path(folder: Path, stem: str, ending: str) -> Path:
    """A file of that name that is not there yet; the next ones get a number."""
    return next(path for path in (folder / name for name in _numbered(stem, ending)) if not path.exists())


def _free(folder: Path, prompt: str, seed: int, ending: str) -> Path:
    return next(path for path in (folder / name for name in _names(prompt, seed, ending)) if not path.exists())


def _names(prompt: str, seed: int, ending: str) -> Iterator[str]:
    slug = re.sub(r"\W+", "-", prompt.lower()).strip("-_").encode()[:LONGEST_SLUG].decode(errors="ignore")
    encoding = sys.getfilesystemencoding()
    slug = slug.encode(encoding, "ignore").decode(encoding)  # what names of files can hold here
    yield from _numbered(f"{slug.rstrip('-_') or 'image'}-{seed}", ending)


def _numbered(stem: str, ending: str) -> Iterator[str]:
    yield f"{stem}{ending}"
    yield from (f"{stem}-{number}{ending}" for number in itertools.count(2))


def _holds(path: Path, wanted: Mapping[str, Any]) -> bool:
    from latentdiff.image import open_image

    try:
        recipe = read_recipe(open_image(path).info)
    except DataError:
        return False
    return all(getattr(recipe, name) == value for name, value in wanted.items())

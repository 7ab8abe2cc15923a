"""Where pictures are written, and which files are there already."""

from __future__ import annotations

import itertools
import os
import re
import sys
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentdiff.errors import DataError, UsageError
from latentdiff.recipe import read_recipe

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.pipeline import Pipeline

LONGEST_SLUG = 100  # bytes; file systems take 255 for the whole name


def check_writable(path: Path) -> None:
    """Make sure, before any work is done and without leaving a trace, that `path` can be written.

    Raises:
        UsageError: it cannot.
    """
    folder = path.absolute().parent if path.suffix == ".png" else path.absolute()
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
    if path.suffix == ".png" and path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")


def picture_path(out: Path, wanted: Mapping[str, Any], taken: Container[Path] = ()) -> tuple[Path, bool]:
    """Where the picture with the recipe fields `wanted` belongs, and whether it is there already.

    A file that holds another picture, or is `taken` for one, is left alone: in a folder, the name gets a number.

    Raises:
        UsageError: `out` is a file that holds another picture.
    """
    if out.suffix == ".png":
        if out.exists() and not _holds(out, wanted):
            raise UsageError(f"{out} holds another picture; remove it or choose another name with --out")
        return out, out.exists()
    for path in (out / name for name in _names(wanted["prompt"], wanted["seed"])):
        if path in taken:
            continue
        if not path.exists():
            return path, False
        if _holds(path, wanted):
            return path, True
    raise AssertionError("unreachable: there are more names than files")


def save_results(
    images: Sequence[Image.Image], out: Path, before: Mapping[str, Image.Image], *, compare: Path | None, metadata: bool
) -> None:
    """Write the pictures that a task made, under names that are free, and print where they lie.

    Args:
        before: what went in, by its name: {"source": ..., "mask": ...}; of any modes and sizes.
        compare: a file for all of it side by side.
    """
    from latentdiff.image import save_png, side_by_side

    for image in images:
        recipe = read_recipe(image.info)
        path = out if out.suffix == ".png" else _free(out, recipe.prompt, recipe.seed)
        save_png(image, path, metadata=metadata)
        click.echo(path)
    if compare:
        results = {f"seed {read_recipe(image.info).seed}": image for image in images}
        save_png(side_by_side({**before, **(results if len(images) > 1 else {"result": images[0]})}), compare)
        click.echo(compare)


def check_results(out: Path, compare: Path | None, count: int) -> None:
    """Make sure, before any work is done, that `save_results` will be able to write `count` pictures.

    Raises:
        UsageError: it will not, or a file of that name is there already.
    """
    if out.suffix == ".png" and count > 1:
        raise UsageError(f"expected a folder for {count} pictures, found --out {out}")
    if compare and compare.suffix != ".png":
        raise UsageError(f"expected --compare FILE.png, found {compare}")
    for place in filter(None, (out, compare)):
        check_writable(place)
    if out.suffix == ".png" and out.exists():
        raise UsageError(f"{out} is there already; remove it or choose another name with --out")


def shown_source(pipe: Pipeline, picture: Path) -> Image.Image:
    """The picture; of an inversion, what the VAE keeps of it."""
    from latentdiff.image import as_rgb, open_image, to_pil
    from latentdiff.tasks.inversion import Inversion, is_inversion

    if not is_inversion(picture):
        return as_rgb(open_image(picture))
    found = Inversion.load(picture)
    return to_pil(pipe.decode(found.latents[-1:]))[0].crop((0, 0, *found.size))


def _free(folder: Path, prompt: str, seed: int) -> Path:
    return next(path for path in (folder / name for name in _names(prompt, seed)) if not path.exists())


def _names(prompt: str, seed: int) -> Iterator[str]:
    slug = re.sub(r"\W+", "-", prompt.lower()).strip("-_").encode()[:LONGEST_SLUG].decode(errors="ignore")
    encoding = sys.getfilesystemencoding()
    slug = slug.encode(encoding, "ignore").decode(encoding)  # what names of files can hold here
    stem = f"{slug.rstrip('-_') or 'picture'}-{seed}"
    yield f"{stem}.png"
    yield from (f"{stem}-{number}.png" for number in itertools.count(2))


def _holds(path: Path, wanted: Mapping[str, Any]) -> bool:
    from latentdiff.image import open_image

    try:
        recipe = read_recipe(open_image(path).info)
    except DataError:
        return False
    return all(getattr(recipe, name) == value for name, value in wanted.items())

"""The names that commands are given: what is read is there, and what is written has an ending that means it.

Looked at while the command line is parsed, long before anything heavy is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from latentdiff.errors import CheckpointError, DataError, UsageError
from latentdiff.files import IMAGE_FORMATS, check_named, is_hub_id

# What looks like the ending of a file's name, unlike that of "v1.5" or "run.2026-11-30".
_ENDING = re.compile(r"\.[a-z][a-z0-9]{1,4}|\.safetensors|\.inversion", re.I)

Callback = Callable[[click.Context, click.Parameter, Any], Any]


class ImageFile(click.Path):
    """An image file, or an inversion in its place, that is there."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        path = super().convert(value, param, ctx)
        check_image(path)
        return path


def check_image(path: str | os.PathLike[str]) -> None:
    """Make sure that there is something of that name.

    Raises:
        DataError: there is not.
    """
    if not os.path.exists(path):
        raise DataError(f"no image at {os.fspath(path)}")


def check_there(what: str, path: str) -> None:
    """Make sure that there is something of that name.

    Raises:
        CheckpointError: there is not.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"there is no {what} {path}")


def check_data(source: str) -> None:
    """Make sure that captioned images may be there: on this machine, in shards that a pattern names, or on a hub.

    Raises:
        DataError: they cannot.
    """
    if not (os.path.exists(source) or is_hub_id(source) or set(source) & set("*?[{:")):
        raise DataError(f"expected captioned images at {source}, found no such folder or file")


def model_there(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    """A callback: the model, or a part of one, can be on this machine or on a hub."""
    if name is not None:
        check_named(name)
    return name


def folder_there(what: str) -> Callback:
    """A callback: the folder of `what` is there."""

    def check(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise UsageError(f"there is no folder {path} of {what}")
        return path

    return check


def written(*endings: str, folder: bool) -> Callback:
    """A callback: the name ends in one of `endings`, or is that of a folder where one is wanted.

    The name of a folder that is there may look as it likes.
    """

    def check(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        if path is None or path.suffix.lower() in endings or (folder and path.is_dir()):
            return path
        if not folder or _ENDING.fullmatch(path.suffix):
            expected = " or ".join(
                [f"an ending of {', '.join(endings)}"] * bool(endings) + ["the name of a folder"] * folder
            )
            raise UsageError(f"cannot write {path}: expected {expected}, found {path.suffix or 'none'}")
        return path

    return check


IMAGES = written(*IMAGE_FORMATS, folder=True)
FOLDER = written(folder=True)

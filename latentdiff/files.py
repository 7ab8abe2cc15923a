"""Writing files so that a crash, a full disk or Ctrl-C never leaves half of one behind; and what is no path at all."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from latentdiff.errors import CheckpointError, LatentDiffError, UsageError

CACHE_VARIABLE = "LATENTDIFF_CACHE"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Ends of names of files; the last part of a hub id may have a dot, "stable-diffusion-v1.5".
_SUFFIX = re.compile(r"\.(safetensors|ckpt|bin|pth?|zip|tar|gz|tgz|ya?ml|jsonl?|txt|csv|parquet|png|jpe?g|webp)$", re.I)

# Image formats that are written, by the endings of their files; the first ending of each is what `--format` says.
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF"}
_OTHER_IMAGES = frozenset(
    ".apng .bmp .dib .emf .eps .exr .gif .hdr .heic .heif .ico .j2k .jfif .jp2 .jpe .jpx .jxl .mkv .mov .mp4 .npy .pbm .pcx "
    ".pdf .pgm .pnm .ppm .psd .qoi .svg .tga .tif .tiff .webm .wmf .xcf".split()
)


def image_format(path: str | os.PathLike[str]) -> str | None:
    """The name that Pillow has for the image format that the ending of `path` asks for, in capitals or not; None for a
    name without an ending of images, which is that of a folder.

    Raises:
        UsageError: it is a format of images that latentdiff does not write, or that this Pillow cannot write.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _OTHER_IMAGES:
        raise UsageError(f"cannot write {path}: expected an ending of {', '.join(IMAGE_FORMATS)}, found {path.suffix}")
    name = IMAGE_FORMATS.get(suffix)
    if name in ("WEBP", "AVIF"):
        from PIL import features

        if not features.check(name.lower()):
            raise UsageError(f"cannot write {path}: this Pillow does not know {name}; update it: pip install -U pillow")
    return name


def cache_folder(purpose: str) -> Path:
    """Where something that took long to make is kept: in $LATENTDIFF_CACHE, or else where the system keeps a user's
    caches. It may be deleted at any time, and may be impossible to write to."""
    given = os.environ.get(CACHE_VARIABLE)
    return (Path(given) if given else _user_caches() / "latentdiff") / purpose


def _user_caches() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local"))
    if sys.platform == "darwin":
        return Path(os.path.expanduser("~/Library/Caches"))
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))


def is_hub_id(name: str) -> bool:
    """Whether a name can only be that of something on a hub, `owner/name`, and is no mistyped path.

    Where the first part is a folder, somebody meant that folder.
    """
    owner = name.partition("/")[0]
    return bool(_HUB_ID.fullmatch(name)) and not _SUFFIX.search(name) and not Path(owner).exists()


def check_named(name: str) -> None:
    """Make sure that a model may be there: something on this machine, or the id of a hub.

    Raises:
        CheckpointError: it is neither.
    """
    try:
        is_there = bool(name) and Path(os.path.expanduser(name)).exists()
    except (OSError, ValueError):  # a name that no file can have
        is_there = False
    if not is_there and not is_hub_id(name):
        raise nothing_at(name)


def nothing_at(name: str) -> CheckpointError:
    """The error for a name of nothing."""
    return CheckpointError(
        f"no such folder or file, no model at {name or 'an empty name'}: expected a folder, a file, or a hub id such as "
        "org/name"
    )


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """Give a temporary path beside `path` to write to; on success it becomes `path`, on failure it disappears.

    The temporary file lies in the same folder (so that the final rename is atomic) and keeps the suffix of `path` (so
    that libraries which choose a format by suffix work). Missing parent folders are made.

    Raises:
        LatentDiffError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise LatentDiffError(
            f"cannot write {path}: {error.strerror or error}; choose another place with --out"
        ) from error
    temporary = Path(name)
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise LatentDiffError(f"cannot write {path}: {reason}; free some space or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    # The mask can only be read by setting it; mkstemp's private 0600 would surprise whoever shares the folder.
    mask = os.umask(0)
    os.umask(mask)
    return mask

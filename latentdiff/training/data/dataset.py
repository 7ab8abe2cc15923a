"""Captioned images from any source as one indexed data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageColor
from tqdm import tqdm

from latentdiff.errors import DataError, UsageError
from latentdiff.files import atomic_path, is_hub_id
from latentdiff.reading.json import parse_json
from latentdiff.reading.plain import read_text
from latentdiff.training.data import huggingface
from latentdiff.training.data.captions import worded
from latentdiff.training.data.entries import PREFERRED, REJECTED, Entry, Listing, Unusable
from latentdiff.training.data.folders import METADATA, list_folder
from latentdiff.training.data.images import BACKGROUND, SUFFIXES, image_size, read_image
from latentdiff.training.data.shards import find_shards, list_shards

LONGEST_INDEX = 2**30  # bytes; 100 for each of ten million images

Result = TypeVar("Result")

_Measured = tuple[int, int, str]  # width, height, hash of the content


@dataclass(frozen=True)
class DataSource:
    """One of the places that a data set comes from.

    Attributes:
        path: a folder, a tar file or a range of them, a `metadata` file, or the id of a data set on the hub.
        repeats: how often each of its images is seen in an epoch.
        weight: factor of the loss of its images.
        prefix: words before each of its captions.
        suffix: words behind each of them.
        regularization: whether its images only remind the model of what it knows.
    """

    path: str | os.PathLike[str]
    repeats: int = 1
    weight: float = 1.0
    prefix: str = ""
    regularization: bool = False
    suffix: str = ""

    def __post_init__(self) -> None:
        if self.repeats < 1 or not self.weight > 0:
            raise UsageError(
                f"expected repeats of at least 1 and a weight above 0 for {os.fspath(self.path)},"
                f" found {self.repeats} and {self.weight}"
            )


@dataclass
class Dataset:
    """Images with captions in a fixed order. Images are decoded when they are asked for; captions are in memory.

    Attributes:
        entries: the images that can be used.
        sizes: width and height of each, in pixels, after EXIF rotation.
        contents: a hash of the file of each.
        repeats: how often each is seen in an epoch.
        weights: factor of the loss of each.
        reminders: indices of those that only remind the model of what it knows.
        problems: what was left out, and why.
        notes: what was decided on the way, for people.
        layouts: what was recognised, one line a source.
        background: the colour under transparent images.
    """

    entries: list[Entry] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    problems: list[Unusable] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    background: str = BACKGROUND
    reminders: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each image, for messages."""
        return tuple(entry.name for entry in self.entries)

    @cached_property
    def captions(self) -> tuple[tuple[str, ...], ...]:
        """Captions of each image; `("",)` where it has none and that was allowed."""
        return tuple(entry.captions or ("",) for entry in self.entries)

    @property
    def paired(self) -> bool:
        """Whether these are pairs of a preferred and a rejected image."""
        return bool(self.entries) and self.entries[0].rejected is not None

    def load(self, index: int, *, rejected: bool = False) -> Image.Image:
        """Decode an image: RGB, 8 bits, upright, transparency on `background`.

        Args:
            rejected: take the other one of a pair.

        Raises:
            DataError: it cannot be read; the message names it.
        """
        entry = self.entries[index].images[int(rejected)]
        try:
            source = entry.origin.source()
        except OSError as error:
            raise DataError(f"cannot read the image {entry.name}: {error.strerror or error}") from error
        return read_image(source, entry.name, background=self.background)

    def leave_out(self, problems: Mapping[int, Unusable]) -> None:
        """Move images, by index, to the problems; the others get new indices."""
        keep = [index for index in range(len(self)) if index not in problems]
        self.problems += problems.values()
        self.entries = [self.entries[index] for index in keep]
        self.sizes = [self.sizes[index] for index in keep]
        self.contents = [self.contents[index] for index in keep]
        self.repeats = [self.repeats[index] for index in keep]
        self.weights = [self.weights[index] for index in keep]
        self.reminders = {place for place, index in enumerate(keep) if index in self.reminders}
        for name in ("names", "captions", "fingerprint"):
            self.__dict__.pop(name, None)  # made from the entries when they were first asked for

    @cached_property
    def fingerprint(self) -> str:
        """Changes when an image is added, removed, renamed or gets another content; captions do not matter. 16 hex
        digits."""
        return self._hash_with(self.contents)

    @property
    def listing(self) -> str:
        """As `fingerprint`, known before any image is read: by the times and sizes of the files."""
        return self._hash_with([entry.stamp() for entry in self.entries])

    def _hash_with(self, about: Sequence[str]) -> str:
        digest = hashlib.sha256(f"{self.background}\n".encode())
        for entry, known in zip(self.entries, about, strict=True):
            digest.update(f"{entry.name}\0{known}\n".encode())
        return digest.hexdigest()[:16]


def read_dataset(
    sources: Sequence[DataSource | str | os.PathLike[str]],
    *,
    caption_column: str | None = None,
    strict: bool = False,
    allow_missing: bool = False,
    verify: bool = True,
    background: str = BACKGROUND,
    index: Path | None = None,
    limit: int | None = None,
    pairs: bool | None = False,
) -> Dataset:
    """Find the images and captions of one or more sources; each layout is recognised by itself.

    Args:
        sources: folders, shards, saved data sets or hub ids; with repeats and weights as `DataSource`.
        caption_column: of metadata files and data sets; by default the first of text, caption, captions, prompt, txt.
        strict: an image that cannot be read is an error; otherwise it is left out and listed in `problems`.
        allow_missing: images without a caption are taken, with the empty one.
        verify: decode every image once, so that a damaged one is found now; otherwise only headers are read.
        background: the colour under transparent images, as CSS names it.
        index: a folder for what was found out about the images, so that the next run need not read them all again.
        limit: take the first so many images alone.
        pairs: whether they are to be pairs of a preferred and a rejected image; None takes either.

    Raises:
        DataError: there are no images or captions, or an image cannot be read and `strict` is set; they are pairs, or
            not, where the other is wanted.
    """
    given = [source if isinstance(source, DataSource) else DataSource(source) for source in sources]
    if not given:
        raise UsageError("expected a folder of captioned images, found none")
    _check_colour(background)
    data = Dataset(background=background)
    for source in given:
        listing = list_source(source.path, caption_column)
        _check_pairs(source, listing, pairs)
        prefix = f"{Path(source.path).name}/" if len(given) > 1 else ""
        _add(data, source, listing, prefix, allow_missing)
    data.entries, data.repeats, data.weights = data.entries[:limit], data.repeats[:limit], data.weights[:limit]
    _measure(data, verify, index)
    if strict and data.problems:
        first = data.problems[0]
        raise DataError(f"{len(data.problems)} images cannot be used, the first is {first.name}: {first.reason}")
    if not data.entries:
        first = data.problems[0]
        raise DataError(f"none of {len(data.problems)} images can be used, the first is {first.name}: {first.reason}")
    return data


def list_source(source: str | os.PathLike[str], column: str | None = None) -> Listing:
    """Recognise the layout of a source and list what is there.

    Raises:
        DataError: it is none that is known; the message says what was looked for and what was there.
    """
    path = Path(source)
    if path.name in METADATA and path.is_file():
        path = path.parent
    if path.is_dir():
        return _list_folder(path, column)
    if shards := find_shards(os.fspath(source)):
        return list_shards(shards, column)
    if path.exists():
        raise DataError(f"expected a folder, a metadata file or a tar file of captioned images, found the file {path}")
    if is_hub_id(os.fspath(source)):
        return huggingface.list_hub(os.fspath(source), column)
    raise DataError(f"expected captioned images at {path}, found no such folder or file")


def _list_folder(folder: Path, column: str | None) -> Listing:
    if huggingface.is_saved(folder):
        return huggingface.list_saved(folder, column)
    suffixes = {path.suffix.lower() for path in folder.rglob("*") if path.is_file()}
    if not suffixes & SUFFIXES and not any((folder / name).is_file() for name in METADATA):
        if ".tar" in suffixes:
            return list_shards(find_shards(folder), column)
        if ".parquet" in suffixes:
            return huggingface.list_parquet(sorted(folder.rglob("*.parquet")), column)
    return list_folder(folder, column)


def _check_pairs(source: DataSource, listing: Listing, wanted: bool | None) -> None:
    found = any(entry.rejected for entry in listing.entries)
    if wanted is None or found == wanted or not listing.entries:
        return
    if found:
        raise DataError(
            f"{os.fspath(source.path)} holds pairs of preferred and rejected images; learn from them with finetune --loss dpo"
        )
    raise DataError(
        f"expected pairs of images in {os.fspath(source.path)}, found single ones; name each pair in a metadata file with"
        f" the columns {PREFERRED}, {REJECTED} and text"
    )


def _add(data: Dataset, source: DataSource, listing: Listing, prefix: str, allow_missing: bool) -> None:
    missing = [entry for entry in listing.entries if not entry.captions]
    if missing and not allow_missing:
        raise DataError(
            f"{len(missing)} of {len(listing.entries)} images in {os.fspath(source.path)} have no caption, the first is"
            f" {missing[0].name}; write them, or take the images without with --allow-missing"
        )
    count = len(listing.entries)
    if source.regularization:
        data.reminders |= set(range(len(data), len(data) + count))
    data.entries += [
        replace(entry, name=f"{prefix}{entry.name}", captions=worded(entry.captions, source.prefix, source.suffix))
        for entry in listing.entries
    ]
    data.repeats += [source.repeats] * count
    data.weights += [source.weight * entry.weight for entry in listing.entries]
    data.problems += [Unusable(f"{prefix}{problem.name}", problem.reason) for problem in listing.problems]
    data.notes += [f"{os.fspath(source.path)}: {note}" for note in listing.notes]
    kind = "pairs of images" if any(entry.rejected for entry in listing.entries) else "images"
    data.layouts.append(f"{os.fspath(source.path)}: {listing.layout}, {count} {kind}")


def _measure(data: Dataset, verify: bool, index: Path | None) -> None:
    """Fill in sizes and contents, and move what cannot be read to the problems."""

    def measure(number: int) -> _Measured | Unusable:
        entry = data.entries[number]
        try:
            sizes, contents = [], []
            for place, one in enumerate(entry.images):
                source = one.origin.source()
                size = data.load(number, rejected=bool(place)).size if verify else image_size(source, one.name)
                content = source if isinstance(source, bytes) else source.read_bytes()
                sizes.append(size)
                contents.append(hashlib.blake2b(content, digest_size=8).hexdigest())
            # Both images of a pair go into one bucket, so that they are as large as what both cover.
            width, height = (min(sides) for sides in zip(*sizes, strict=True))
            return width, height, "".join(contents)
        except (DataError, OSError) as error:
            return problem(entry, error)

    # By all that was listed: what cannot be read is found out once too.
    file = index / f"images-{data.listing}-{'whole' if verify else 'headers'}.json" if index else None
    measured = _read_index(file, data) if file else None
    if measured is None:
        measured = each(measure, len(data), "read images")
        if file:
            found = [item.reason if isinstance(item, Unusable) else item for item in measured]
            with atomic_path(file) as temporary:
                temporary.write_text(json.dumps(found), encoding="utf-8")
    data.sizes = [(0, 0) if isinstance(item, Unusable) else item[:2] for item in measured]
    data.contents = ["" if isinstance(item, Unusable) else item[2] for item in measured]
    data.leave_out({number: item for number, item in enumerate(measured) if isinstance(item, Unusable)})


def _read_index(file: Path, data: Dataset) -> list[_Measured | Unusable] | None:
    """What was measured of each image, or what is wrong with it; None where there is no such file, or a damaged one."""
    if not file.is_file():
        return None
    try:
        found = parse_json(read_text(file, DataError, LONGEST_INDEX), str(file), DataError)
        return [
            Unusable(entry.name, item) if isinstance(item, str) else (int(item[0]), int(item[1]), str(item[2]))
            for entry, item in zip(data.entries, found, strict=True)
        ]
    except (DataError, ValueError, TypeError, LookupError):
        return None


def problem(entry: Entry, error: DataError | OSError) -> Unusable:
    """What is wrong with an image that could not be read."""
    said = getattr(error, "strerror", None) or str(error)
    return Unusable(entry.name, said.removeprefix(f"cannot read {entry.name} as an image: "))


def each(work: Callable[[int], Result], count: int, label: str) -> list[Result]:
    """`work(0), work(1), ...` on several threads, in order; a bar shows up where it takes long."""
    block = 4096  # a pool holds all that it was given in memory
    done: list[Result] = []
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=count, desc=label, leave=False, delay=2) as bar,
    ):
        for start in range(0, count, block):
            for result in pool.map(work, range(start, min(start + block, count))):
                done.append(result)
                bar.update()
    return done


def _check_colour(colour: str) -> None:
    try:
        ImageColor.getrgb(colour)
    except ValueError as error:
        raise UsageError(f"expected a colour such as white or #808080, found {colour!r}") from error

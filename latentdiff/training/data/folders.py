"""Layouts of local folders: metadata files of Hugging Face's image folders, and captions beside the images."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.errors import DataError, MissingDependencyError
from latentdiff.reading.json import parse_json
from latentdiff.reading.plain import LONGEST_CAPTION, bounded_lines, exists, open_file, read_text
from latentdiff.training.data.entries import (
    PREFERRED,
    REJECTED,
    WEIGHT,
    Entry,
    FileOrigin,
    Listing,
    Unusable,
    as_captions,
    as_weight,
    caption_column,
)
from latentdiff.training.data.images import SUFFIXES

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = (".txt", ".caption")
FILE_NAME = "file_name"
MARK = ".hint"  # in the name of a hint for ControlNets beside its image: cat.png, cat.hint.png
UNREAD = (".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".cr2", ".nef", ".dng", ".arw")  # images in formats not read
HELD_OUT = ("validation", "valid", "val", "test", "dev")


def list_folder(folder: Path, column: str | None) -> Listing:
    """Images and captions of a folder, in the order of the metadata file or of the names.

    A folder with `train/` beside `validation/` or `test/` gives what is in `train/`.

    Raises:
        DataError: there are no images or no captions; the message says what was looked for and what was there.
    """
    whole = folder
    if (folder / "train").is_dir() and (others := [name for name in HELD_OUT if (folder / name).is_dir()]):
        if not any((folder / name).is_file() for name in METADATA):
            folder = folder / "train"
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    metadata = [path for path in paths if path.name in METADATA]
    images, hints = _without_hints([path for path in paths if path.suffix.lower() in SUFFIXES])
    if not images and not metadata:
        raise DataError(f"no images in {folder}: looked for {_looked_for()}; found {_there(paths)}")
    listing = _from_metadata(folder, metadata, images, column) if metadata else _from_sidecars(folder, images, paths)
    if not any(entry.captions for entry in listing.entries):
        if listing.problems:
            raise DataError(f"no image of {folder} can be used; the first: {listing.problems[0].reason}")
        raise DataError(
            f"no captions in {folder}: looked for {', '.join(METADATA)}, and for {' and '.join(SIDECARS)} files named"
            f" as the images; found {_there(paths)}{_guess(paths, images)}"
        )
    unread = Counter(path.suffix.lower() for path in paths if path.suffix.lower() in UNREAD)
    if unread:
        listing.notes.append(f"{_counted(unread)} files are left out: convert them to one of {', '.join(sorted(SUFFIXES))}")
    if hints:
        listing.notes.append(f"{hints} images are hints of others, as {MARK} in their names says, and are not trained on")
    if folder != whole:
        listing.notes.append(f"took train/ and left {', '.join(f'{name}/' for name in others)}")
    return listing


def _without_hints(images: list[Path]) -> tuple[list[Path], int]:
    """The images that are not the hint of another, as cat.hint.png is of cat.png; and how many are."""
    stems = {path.with_suffix("") for path in images}
    kept = [path for path in images if not (path.stem.endswith(MARK) and path.with_name(path.stem[: -len(MARK)]) in stems)]
    return kept, len(images) - len(kept)


def _from_metadata(folder: Path, metadata: list[Path], images: list[Path], column: str | None) -> Listing:
    listing = Listing(" and ".join(sorted({path.name for path in metadata})), [])
    named = set()
    for table in metadata:
        rows = list(rows_of(table))
        found = (
            caption_column(dict.fromkeys(name for _, row in rows for name in row), column, str(table)) if rows else ""
        )
        paired = any(PREFERRED in row or REJECTED in row for _, row in rows)
        for number, row in rows:
            place = f"{table} row {number}"
            paths = [table.parent / _cell(row, name, place) for name in ((PREFERRED, REJECTED) if paired else (FILE_NAME,))]
            named.update(paths)
            if missing := [path for path in paths if not (exists(path) and path.is_file())]:
                problem = Unusable(_name(missing[0], folder), f"{table.name} names it, but there is no such file")
                listing.problems.append(problem)
                continue
            captions, weight = as_captions(row.get(found), place), as_weight(row.get(WEIGHT), place)
            entry, *other = [Entry(_name(path, folder), captions, FileOrigin(path), weight) for path in paths]
            for rejected in other:
                entry = replace(entry, name=f"{entry.name} > {rejected.name}", rejected=rejected)
            listing.entries.append(entry)
    if not named:
        raise DataError(f"{metadata[0]} is empty; expected one row per image")
    if weighted := sum(entry.weight != 1 for entry in listing.entries):
        listing.notes.append(f"{weighted} images have a {WEIGHT} of their own in {listing.layout}")
    if left := [path for path in images if path not in named]:
        listing.notes.append(
            f"{len(left)} images are not in {listing.layout} and are left out, the first is {left[0].name}"
        )
    return listing


def _cell(row: dict[str, Any], name: str, place: str) -> str:
    """The file that a row names in a column."""
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise DataError(f"{place}: expected a {name!r}, found {_short(row)}")
    return value


def _from_sidecars(folder: Path, images: list[Path], paths: list[Path]) -> Listing:
    sidecars = {path.with_suffix(path.suffix.lower()): path for path in paths if path.suffix.lower() in SIDECARS}
    used: Counter[str] = Counter()
    listing = Listing("", [])
    for image in images:
        texts = [place for suffix in SIDECARS if (place := image.with_suffix(suffix)) in sidecars]
        used.update(path.suffix for path in texts[:1])
        if len(texts) > 1:
            listing.notes.append(f"{image.name} has a .txt and a .caption file; the .txt is taken")
        try:
            captions = as_captions(_read_text(sidecars[texts[0]]), str(texts[0])) if texts else ()
        except DataError as error:  # of one caption, which the others have no part in
            listing.problems.append(Unusable(_name(image, folder), str(error)))
            continue
        listing.entries.append(Entry(_name(image, folder), captions, FileOrigin(image)))
    listing.layout = f"{' and '.join(sorted(used)) or 'no'} files beside the images"
    stems = {image.with_suffix("") for image in images}
    alone = [path for path in sidecars.values() if path.with_suffix("") not in stems]
    if alone:
        listing.notes.append(f"{len(alone)} captions have no image, the first is {alone[0].name}")
    return listing


def rows_of(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a metadata file with their numbers, from 1."""
    if table.suffix == ".parquet":
        yield from enumerate(_parquet_rows(table), start=1)
        return
    try:
        with io.TextIOWrapper(open_file(table, DataError), encoding="utf-8-sig", newline="") as file:
            lines = bounded_lines(file, str(table))
            rows = _json_rows(table, lines) if table.suffix == ".jsonl" else _csv_rows(table, lines)
            yield from rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {table}: {error}; save it as UTF-8") from error


def _json_rows(table: Path, lines: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{table} row {number}"
        row = parse_json(line, place, DataError, remedy='expected {"file_name": ..., "text": ...}')
        if not isinstance(row, dict):
            raise DataError(f'{place}: expected {{"file_name": ..., "text": ...}}, found {line[:60]!r}')
        yield number, row


def _csv_rows(table: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in enumerate(csv.DictReader(lines), start=1):
        if None in row:  # where the reader puts them; a caption with a comma would lose its end
            raise DataError(f'{table} row {number} has more cells than there are columns; write "captions, with commas"')
        yield number, row


def _parquet_rows(table: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(f"{table} needs pyarrow; pip install 'latentdiff[data]'") from error
    try:
        return pyarrow.parquet.read_table(table).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise DataError(f"cannot read {table}: {error}") from error


def _read_text(path: Path) -> str:
    return read_text(path, DataError, LONGEST_CAPTION)


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _short(row: dict[str, Any]) -> str:
    return repr({name: value for name, value in row.items() if value is not None})[:80]


def _looked_for() -> str:
    return f"{', '.join(METADATA)}, and for {', '.join(sorted(SUFFIXES))} files"


def _there(paths: list[Path]) -> str:
    """What lies in a folder, by kind: "46 .png, 1 metadata.json1"."""
    kinds = Counter(
        path.name if path.name.startswith("metadata") else path.suffix.lower() or path.name for path in paths
    )
    return _counted(kinds) or "nothing"


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))


def _guess(paths: list[Path], images: list[Path]) -> str:
    """What may be wrong where there are captions, but none of an image."""
    if close := next((path for path in paths if path.name.startswith("metadata") and path.name not in METADATA), None):
        return f"; {close.name} is not one of these names"
    captions = [path for path in paths if path.suffix in SIDECARS]
    if captions and images:
        return f"; {captions[0].name} belongs to no image, the first image is {images[0].name}"
    return ""

"""Where images that belong to the captioned ones lie, hints and masks: beside them, in a folder, or in a column."""

from __future__ import annotations

from pathlib import Path

from latentdiff.errors import DataError
from latentdiff.reading.plain import exists
from latentdiff.training.data.dataset import Dataset, each
from latentdiff.training.data.entries import FileOrigin
from latentdiff.training.data.folders import FILE_NAME, MARK, METADATA, rows_of
from latentdiff.training.data.images import SUFFIXES, image_size

_IN_PLACE = {
    "hint": "or let hints be made of the images with --control-kind",
    "mask": "or take the transparency of the images with --masks alpha",
}
_ASPECT = 0.02  # a hint's proportions may differ by so much of its image's, as much as rounding a small one does


def hint_files(data: Dataset, place: str | None, what: str = "hint") -> list[Path]:
    """The hint, or the mask, of each image.

    Args:
        data: images that lie in files of their own.
        place: a folder with hints of the images' names, in any format; or the column of the metadata that names them,
            from the metadata's folder; None for NAME.hint.png beside NAME.
        what: "hint" or "mask", for messages.

    Raises:
        DataError: an image has none, or one of other proportions, or hints cannot be looked for there.
    """
    images = [entry.origin.path for entry in data.entries if isinstance(entry.origin, FileOrigin)]
    if len(images) < len(data):
        raise DataError(
            f"expected image files to look for the {what} of, found shards or a saved data set; write them out as a folder,"
            f" {_IN_PLACE[what]}"
        )
    if place is None:
        wanted = f"{MARK[1:]} files beside the images, as {images[0].stem}{MARK}.png"
        found = [_any_format(image.with_suffix(MARK)) for image in images]
    elif (folder := Path(place)).is_dir():
        wanted = f"images of the same names in {folder}"
        found = [_any_format((folder / name).with_suffix("")) for name in data.names]
    else:
        wanted = f"files that the column {place!r} of the metadata names"
        found = _of_column(images, place, what)
    missing = [name for name, file in zip(data.names, found, strict=True) if file is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(data)} images have no {what}, the first is {missing[0]}; looked for {wanted}; another"
            f" place is given with --{what}s FOLDER|COLUMN"
        )
    files = [file for file in found if file is not None]
    _check_aspects(data, files, what)
    return files


def _any_format(stem: Path) -> Path | None:
    """The file whose name is `stem` and a suffix of an image."""
    names = (stem.with_name(stem.name + suffix) for suffix in (".png", *sorted(SUFFIXES - {".png"})))
    return next((path for path in names if exists(path)), None)


def _of_column(images: list[Path], column: str, what: str) -> list[Path | None]:
    tables = {image.parent: table for image in images if (table := _table_above(image)) is not None}
    if not tables:
        raise DataError(f"expected a folder or a column of the metadata as --{what}s, found {column!r} and no metadata")
    named: dict[Path, Path] = {}
    for table in dict.fromkeys(tables.values()):
        named |= _named_by(table, column, what)
    return [path if (path := named.get(image)) is not None and exists(path) else None for image in images]


def _table_above(image: Path) -> Path | None:
    places = (folder / name for folder in image.parents for name in METADATA)
    return next((table for table in places if table.is_file()), None)


def _named_by(table: Path, column: str, what: str) -> dict[Path, Path]:
    """By image, what the column of a metadata file names."""
    rows = [row for _, row in rows_of(table)]
    if not any(column in row for row in rows):
        there = ", ".join(dict.fromkeys(name for row in rows for name in row))
        raise DataError(
            f"expected a folder or a column of {table} as --{what}s, found {column!r}; its columns are {there}"
        )
    return {
        table.parent / row[FILE_NAME]: table.parent / row[column]
        for row in rows
        if isinstance(row.get(FILE_NAME), str) and isinstance(row.get(column), str)
    }


def _check_aspects(data: Dataset, files: list[Path], what: str) -> None:
    sizes = each(lambda number: image_size(files[number], str(files[number])), len(files), f"look at {what}s")
    for name, (width, height), (own_width, own_height) in zip(data.names, data.sizes, sizes, strict=True):
        if abs(own_width * height / (own_height * width) - 1) > _ASPECT:
            raise DataError(
                f"expected the {what} of {name} in its proportions, {width} x {height} pixels, found {own_width} x"
                f" {own_height}; make it again, or crop it as the image was"
            )

"""Hugging Face data sets, saved on disk or by hub id, through the library `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.errors import DataError, MissingDependencyError
from latentdiff.training.data.entries import Entry, Listing, as_captions, caption_column

SPLIT = "train"
_SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class RowOrigin:
    """The image of one row; `table` gives it encoded, not decoded."""

    table: Any  # datasets.Dataset
    column: str
    row: int

    def source(self) -> Path | bytes:
        image = self.table[self.row][self.column]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"])

    def stamp(self) -> str:
        return f"{self.table._fingerprint} {self.row}"


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder with `save_to_disk`."""
    return any((folder / name).is_file() for name in _SAVED)


def list_saved(folder: Path, column: str | None) -> Listing:
    """Rows of a data set that `save_to_disk` wrote; of several splits it is `train`."""
    loaded = _load(lambda datasets: datasets.load_from_disk(str(folder)), str(folder))
    return _list(loaded, column, str(folder), "Hugging Face data set on disk")


def list_parquet(files: list[Path], column: str | None) -> Listing:
    """Rows of parquet files that hold the images themselves, as a data set of the hub is stored."""
    names = [str(path) for path in files]
    place = str(files[0].parent)
    loaded = _load(lambda datasets: datasets.load_dataset("parquet", data_files=names, split=SPLIT), place)
    return _list(loaded, column, place, "parquet files with images")


def list_hub(hub_id: str, column: str | None) -> Listing:
    """Rows of the train split of a data set on the hub."""
    loaded = _load(lambda datasets: datasets.load_dataset(hub_id, split=SPLIT), hub_id)
    return _list(loaded, column, hub_id, "Hugging Face data set")


def _load(load: Callable[[Any], Any], place: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(f"{place} needs the library datasets; pip install 'latentdiff[data]'") from error
    try:
        return load(datasets)
    except Exception as error:  # the library has no common base for what it says about missing and damaged data
        said = " ".join(str(error).split())[:200]
        raise DataError(f"cannot load the data set {place}: {type(error).__name__}: {said}") from error


def _list(table: Any, column: str | None, place: str, layout: str) -> Listing:
    import datasets

    notes = []
    if isinstance(table, datasets.DatasetDict):
        splits = list(table)
        if SPLIT not in table and len(splits) != 1:
            raise DataError(f"expected a split {SPLIT!r} in {place}, found {', '.join(splits)}")
        name = SPLIT if SPLIT in table else splits[0]
        notes = [f"took the split {name!r} of {', '.join(splits)}"] if len(splits) > 1 else []
        table = table[name]
    images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise DataError(f"expected a column of images in {place}, found the columns {', '.join(table.column_names)}")
    captions = caption_column([name for name in table.column_names if name not in images], column, place)
    encoded = table.select_columns([images[0]]).cast_column(images[0], datasets.Image(decode=False))
    entries = [
        Entry(f"row {row}", as_captions(value, f"{place} row {row}"), RowOrigin(encoded, images[0], row))
        for row, value in enumerate(table[captions])
    ]
    return Listing(layout, entries, notes=notes)

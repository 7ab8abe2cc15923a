"""What composed scenes hold, as the metadata beside their captions says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentdiff.errors import DataError
from latentdiff.reading.json import parse_object
from latentdiff.reading.plain import read_text
from latentdiff.training.data import Dataset

METADATA = "metadata.jsonl"


def read_scenes(data: Dataset) -> list[dict[str, Any]]:
    """The `scene` of each image, from the nearest metadata.jsonl above it.

    Raises:
        DataError: there is none.
    """
    scenes = find_scenes(data)
    for entry, scene in zip(data.entries, scenes, strict=True):
        if scene is None:
            raise DataError(
                f"expected a `scene` of {entry.name} in {METADATA}, as tools/make_scenes.py writes it, found none"
            )
    return [scene for scene in scenes if scene is not None]


def find_scenes(data: Dataset) -> list[dict[str, Any] | None]:
    """As `read_scenes`, None for an image without."""
    scenes: dict[Path, Any] = {}
    found: list[dict[str, Any] | None] = []
    for entry in data.entries:
        path = getattr(entry.origin, "path", Path(entry.name))
        if path not in scenes:
            scenes |= {path: None, **_scenes_beside(path)}
        found.append(scenes[path] if isinstance(scenes[path], dict) else None)
    return found


def _scenes_beside(image: Path) -> dict[Path, Any]:
    """By path, the scenes of all images that one metadata file names."""
    folder = next((folder for folder in image.parents if (folder / METADATA).is_file()), None)
    if folder is None:
        return {}
    path = folder / METADATA
    lines = read_text(path, DataError).split("\n")
    rows = [parse_object(line, str(path), DataError, remedy="mend that line") for line in lines if line.strip()]
    return {folder / row["file_name"]: row.get("scene") for row in rows if isinstance(row.get("file_name"), str)}

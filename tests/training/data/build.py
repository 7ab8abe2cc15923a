"""Small captioned folders and shards."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def an_image(seed: int = 0, size: tuple[int, int] = (16, 12)) -> Image.Image:
    """Smooth colours that no other seed has."""
    grid = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jsonl_folder(folder: Path, count: int = 3, *, size: tuple[int, int] = (16, 12), seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        an_image(seed + index, size).save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": f"picture {seed + index}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A tar file of samples: key -> field -> content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, fields in samples.items():
            for field, content in fields.items():
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path

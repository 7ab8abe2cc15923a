"""Which part of the check failed in each task, how often, and an image of each: where to look first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.evaluation.prompts import TASKS
from latentdiff.evaluation.protocol import Outcome, Result
from latentdiff.evaluation.rules import KINDS, Kind
from latentdiff.image import contact_sheet, open_image, save_png

SHEET_NAME = "failures.png"
_SIDE = 256  # pixels of an example
_COLUMNS = 5


@dataclass(frozen=True)
class Group:
    """The images of a task that fail for one kind of reason; each image is in one group, by its first reason."""

    task: str
    kind: Kind
    images: int
    share: float  # of the task's images
    example: Outcome

    def to_json(self) -> dict[str, Any]:
        image = image_path(Path(), self.example.number, self.example.index).as_posix()
        return {"task": self.task, "kind": self.kind, "images": self.images, "share": self.share, "example": image}


def groups_of(result: Result) -> list[Group]:
    """Those that occur, by task and kind."""
    found: list[Group] = []
    for task, score in result.tasks.items():
        for kind in KINDS:
            own = [one for one in result.outcomes if (one.task, one.kind) == (task, kind)]
            if own:
                found.append(Group(task, kind, len(own), len(own) / score.images, own[0]))
    return found


def failure_table(result: Result) -> str:
    """Shares of each task's images by kind; a dash where none fails so."""
    shares = {(group.task, group.kind): f"{group.share:.3f}" for group in groups_of(result)}
    rows = [f"{'images that fail':20}" + "".join(f"{kind:>16}" for kind in KINDS)]
    for task in result.tasks:
        rows.append(f"{TASKS[task]:20}" + "".join(f"{shares.get((task, kind), '-'):>16}" for kind in KINDS))
    return "\n".join(rows)


def image_path(folder: Path, number: int, index: int) -> Path:
    """Where GenEval's layout keeps image `index` of prompt `number`."""
    return folder / f"{number:05d}" / "samples" / f"{index:04d}.png"


def save_examples(folder: Path, groups: Sequence[Group]) -> None:
    """Write failures.png with an image of each group, read from the folder; without groups, remove an older one."""
    sheet = folder / SHEET_NAME
    if not groups:
        sheet.unlink(missing_ok=True)
        return
    images = [open_image(image_path(folder, group.example.number, group.example.index)) for group in groups]
    images = [image.convert("RGB").resize((_SIDE, _SIDE)) for image in images]
    captions = [f"{TASKS[group.task]}, {group.kind} ({group.images}): {group.example.prompt}" for group in groups]
    save_png(contact_sheet(images, captions, columns=_COLUMNS), sheet)

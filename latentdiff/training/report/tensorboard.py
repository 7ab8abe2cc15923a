"""A run's log and samples for TensorBoard, beside `log.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from latentdiff.errors import MissingDependencyError

FOLDER = "tensorboard"  # in the run folder


class TensorBoard:
    """Writes event files below `tensorboard/` in the run folder.

    Args:
        run: the run folder.
        step: of the resumed checkpoint; events beyond it belong to a lost continuation and are hidden.

    Raises:
        MissingDependencyError: tensorboard is not installed.
    """

    def __init__(self, run: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError(
                "TensorBoard's files need the package tensorboard: pip install 'latentdiff[tensorboard]';"
                " log.jsonl and report.html are written without it"
            ) from error
        self._writer = SummaryWriter(str(run / FOLDER), purge_step=step + 1 if step else None)

    def write(self, entry: Mapping[str, float]) -> None:
        """Take in one entry of `log.jsonl`; losses on held-out and on training images share the group "loss at fixed
        noise"."""
        step = int(entry["step"])
        for name, value in entry.items():
            if name != "step":
                self._writer.add_scalar(tag(name), value, step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Take in a sample sheet."""
        self._writer.add_image(f"samples/{name}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def tag(name: str) -> str:
    """The name of a measurement of `log.jsonl` where charts are grouped by what stands before the stroke."""
    if name.startswith(("val_", "train_")) or name == "gap":
        return f"loss at fixed noise/{name}"
    return f"training/{name}"

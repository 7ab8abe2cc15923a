"""Where the embedded model lies: inside an installed package, or beside it in a checkout of the sources."""

from __future__ import annotations

from pathlib import Path

from latentdiff.errors import CheckpointError


def embedded_model() -> Path:
    """The folder of the model that latentdiff brings along.

    Raises:
        CheckpointError: this installation has none.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "weights", package.parent / "weights"):
        if (folder / "model_index.json").is_file():
            return folder
    raise CheckpointError(f"expected the embedded model in {package / 'weights'}, found none; give a model with --model")

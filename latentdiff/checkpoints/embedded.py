"""Where the embedded model lies: inside an installed package, or beside it in a checkout of the sources."""

from __future__ import annotations

from pathlib import Path

from latentdiff.errors import CheckpointError

MODEL_INDEX = "model_index.json"
EMBEDDED_NAME = "latentdiff-embedded"  # what recipes call the embedded model
JUDGE = "judge"  # folder of the judge of `latentdiff evaluate`, beside the model's parts


def embedded_model() -> Path:
    """The folder of the model that latentdiff brings along.

    Raises:
        CheckpointError: this installation has none.
    """
    for folder in _places():
        if (folder / MODEL_INDEX).is_file():
            return folder
    raise CheckpointError(f"expected the embedded model in {_places()[0]}, found none; give a model with --model")


def embedded_judge() -> Path:
    """The folder of the judge that latentdiff brings along.

    Raises:
        CheckpointError: this installation has none.
    """
    for folder in _places():
        if (folder / JUDGE).is_dir():
            return folder / JUDGE
    raise CheckpointError(f"expected the judge in {_places()[0] / JUDGE}, found none; install latentdiff again")


def _places() -> tuple[Path, Path]:
    package = Path(__file__).resolve().parents[1]
    return package / "weights", package.parent / "weights"

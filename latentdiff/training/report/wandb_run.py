"""A run's log and samples for Weights & Biases, beside `log.jsonl`."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.errors import ConfigError, MissingDependencyError
from latentdiff.files import atomic_path
from latentdiff.training.report.tensorboard import tag

PROJECT = "latentdiff"  # unless WANDB_PROJECT says otherwise
ID = "wandb-id.txt"  # in the run folder: a run that goes on, goes on there too

# Seconds that the end of a run may wait for what was not sent yet; it lies in the run folder and can be sent later.
_PATIENCE = 60.0

# What is sent is what the run logs and what its configuration says: nothing about the machine, its user, or the code.
_PRIVATE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "finish_timeout": _PATIENCE,
    "host": "",
    "save_code": False,
    "silent": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


def check_installed() -> None:
    """Say before a training what is missing.

    Raises:
        MissingDependencyError: wandb is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise MissingDependencyError(
            "tracking by Weights & Biases needs wandb: pip install 'latentdiff[wandb]'; log.jsonl, report.html and"
            " TensorBoard's files are written without it"
        )


class WandB:
    """Sends entries and images to Weights & Biases, or keeps them in the run folder with WANDB_MODE=offline.

    The environment says the rest, as of any run of theirs: WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY, WANDB_API_KEY.

    Args:
        run: the run folder.
        settings: the configuration, as it is to be shown.

    Raises:
        MissingDependencyError: wandb is not installed.
        ConfigError: it cannot begin: nobody is logged in, or the network fails.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        check_installed()
        import wandb

        known = {name: value for name, value in _PRIVATE.items() if name in wandb.Settings.model_fields}
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=os.environ.get("WANDB_NAME") or run.resolve().name,
                id=_id(run),
                resume="allow",
                dir=str(run),
                config=dict(settings),
                settings=wandb.Settings(**known),
            )
        except Exception as error:
            raise ConfigError(
                f"Weights & Biases cannot begin: {error}; log in with `wandb login`, or set WANDB_MODE=offline and send the"
                " run later"
            ) from error
        self._image: Any = wandb.Image
        # Steps that are taken again after a stop are logged again; by a step of its own, they fall onto the same places.
        self._run.define_metric("*", step_metric="step")

    @property
    def place(self) -> str:
        """Where the run is to be seen, for people."""
        if self._run.offline:
            return f"offline; send it with: wandb sync {Path(self._run.dir).parent}"
        return self._run.url or ""

    def write(self, entry: Mapping[str, float]) -> None:
        """Take in one entry of `log.jsonl`, under the names that it has in TensorBoard."""
        self._run.log({name if name == "step" else tag(name): value for name, value in entry.items()})

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Take in a sample sheet."""
        self._run.log({"step": step, f"samples/{name}": self._image(image.convert("RGB"))})

    def close(self) -> None:
        self._run.finish()


def _id(run: Path) -> str:
    path = run / ID
    if not path.is_file():
        with atomic_path(path) as temporary:
            temporary.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()

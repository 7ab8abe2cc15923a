"""A fine-tuning from its configuration to its result: data, caches, training, result, report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from latentdiff.errors import LatentDiffError, UsageError
from latentdiff.networks.device import is_out_of_memory
from latentdiff.training.checkpoint import newest_checkpoint
from latentdiff.training.finetuning.config import METHOD_DEFAULTS, FinetuneConfig, load_finetune_config, resumed_config
from latentdiff.training.finetuning.finishing import finish
from latentdiff.training.finetuning.preparation import Preparation, make_accelerator, write_config
from latentdiff.training.finetuning.rates import rate_advice
from latentdiff.training.folder import owned
from latentdiff.training.replay import verify_resume

_KEEPS = (
    "each caption has a word that the model does not know, so what it knew is kept meanwhile;"
    " --keep nothing trains on the images alone"
)


def finetune(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str] | Mapping[str, Any]] | None = None,
    *,
    resume: str | os.PathLike[str] | None = None,
    verify_resume: int | None = None,
    config: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Path:
    """Fine-tune a model on captioned images.

    Args:
        data: one or more folders, shards or data sets; see `latentdiff data check`.
        resume: folder of a run to go on with, from its newest whole checkpoint.
        verify_resume: take at least so many steps before that checkpoint again, and compare every bit, before going on.
        config: a YAML file.
        settings: any key of `FinetuneConfig`, which replace those of the file: method, out, max_steps, lr ...

    Returns:
        The result: `OUT/lora.safetensors` for method lora, the model folder `OUT/model` for method full, the ControlNet
        `OUT/controlnet` for method controlnet.

    Raises:
        UsageError: there is no data, or `out` holds a run already.
        ConfigError: an unknown key, or a value outside its domain.
        DataError: the images cannot be trained on, or the run folder cannot be written to.
        NotFiniteError: the loss became NaN or infinite; the newest checkpoint is from before.
        TrainingStopped: a signal ended the run after it was saved.
    """
    given = {**settings, **({} if data is None else {"data": data if isinstance(data, list | tuple) else [data]})}
    return run(resolve(resume and Path(resume), config and Path(config), given), verify_steps=verify_resume)


def resolve(resume: Path | None, config: Path | None, given: Mapping[str, Any]) -> FinetuneConfig:
    """The configuration of a new run, or of one that goes on.

    Raises:
        UsageError: see `finetune`.
        ConfigError: see `finetune`.
    """
    if resume is None:
        settings = load_finetune_config(config, given)
        if newest_checkpoint(settings.out / "checkpoints")[0]:
            raise UsageError(
                f"{settings.out} holds a run already; go on with --resume {settings.out}, or choose another --out"
            )
        return settings
    return resumed_config(Path(resume), config, given)


def run(settings: FinetuneConfig, *, verify_steps: int | None = None) -> Path:
    """Train as `settings` say, going on from the newest whole checkpoint in `settings.out`; see `finetune`."""
    accelerator, settings = make_accelerator(settings)
    try:
        with owned(settings.out, main=accelerator.is_main_process):
            accelerator.wait_for_everyone()  # the main one cleans the folder up, where others would write
            return _run(settings, accelerator, verify_steps)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LatentDiffError(
            "not enough memory for this training; try --gradient-checkpointing, --accumulation 4, --mixed-precision bf16,"
            " a smaller --resolution, or --method lora with --base-precision bf16"
        ) from error


def _run(settings: FinetuneConfig, accelerator: Accelerator, verify_steps: int | None) -> Path:
    made = Preparation(settings, accelerator)
    settings = made.settings
    if not newest_checkpoint(settings.out / "checkpoints")[0]:
        write_config(settings, accelerator)
    made.read_data()
    with made.computing():
        made.build_caches()
        with made.trainer() as trainer:
            trainer.start()
            if advice := rate_advice(settings, METHOD_DEFAULTS[settings.method]["lr"]):
                accelerator.print(f"note: {advice}")
            if made.keeps_by_itself:
                accelerator.print(f"note: {_KEEPS}")
            write_config(settings, accelerator)  # only once what lies in the folder has taken it
            if verify_steps:
                first, last = verify_resume(trainer, verify_steps)
                accelerator.print(f"steps {first} to {last}, taken again, give the same to the last bit")
            trainer.fit()
            result = finish(settings, trainer, made.method, made.material, made.sheets.written)
    accelerator.wait_for_everyone()
    return result

"""Putting adapter files of every dialect and kind into a model, and saying how much of them fits it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.kinds import Change, Misfit, read_change
from latentdiff.adapters.lora.names import all_names
from latentdiff.adapters.lora.reading import LoRAFile, family_of, made_for, read_lora
from latentdiff.adapters.lora.spec import changeable
from latentdiff.errors import CheckpointError
from latentdiff.networks.unet import UNet

_SHOWN = 5  # offending layers in an error message


@dataclass(frozen=True)
class LoadReport:
    """How much of an adapter file was put to use: `matched` of `total` layers, and why the others were not."""

    path: Path
    dialect: str
    matched: int
    total: int
    problems: tuple[str, ...] = ()
    kinds: str = "LoRA"
    words: tuple[str, ...] = ()  # embeddings that came along

    def __str__(self) -> str:
        text = f"matched {self.matched} of {self.total} layers ({self.dialect} names"
        text += ")" if self.kinds in ("LoRA", "") else f", {self.kinds})"
        text += f"; with the words {', '.join(self.words)}" if self.words else ""
        return text + (f"; left out: {_first(self.problems)}" if self.problems and self.matched else "")


def load_lora(
    path: str | os.PathLike[str] | LoRAFile,
    unet: UNet,
    text_encoder: nn.Module | None,
    *,
    allow_partial: bool = False,
) -> tuple[LoRA, LoadReport]:
    """Make the adapter of a file for a model: names of kohya's tools, of LyCORIS, of PEFT or of diffusers.

    Args:
        path: a safetensors file (or a pickle of tensors), or a folder that PEFT or diffusers wrote; or what
            `read_lora` made of it.
        unet, text_encoder: the model, which stays as it is; attach the adapter, or merge it.
        allow_partial: leave out what does not fit, as long as something does.

    Returns:
        The adapter, a LoRA in float32, and a report that says "matched 264 of 264 layers".

    Raises:
        CheckpointError: nothing is there, it is damaged, no adapter, or one for another model.
    """
    file = path if isinstance(path, LoRAFile) else read_lora(path)
    targets = dict(changeable(unet, text_encoder))
    known = all_names(targets, unet.config)
    layers: dict[str, Change] = {}
    problems = []
    for name, roles in file.layers.items():
        full = known.get(name)
        if full is None or full in layers:
            problems.append(f"{name} (the model has no such layer)" if full is None else f"{name} (a second time)")
            continue
        try:
            layers[full] = read_change(roles, targets[full], file.facts(name))
        except Misfit as misfit:
            problems.append(f"{name} ({misfit})")
    kinds = ", ".join(dict.fromkeys(change.kind for change in layers.values()))
    report = LoadReport(
        file.path, file.dialect, len(layers), len(file.layers), tuple(problems), kinds, tuple(file.words)
    )
    if problems and not (allow_partial and layers):
        raise CheckpointError(_does_not_fit(file, report, unet))
    ordered = {name: layers[name] for name in targets if name in layers}
    return LoRA(ordered, unet, text_encoder, file.metadata).to(unet.conv_in.weight.device), report


def _does_not_fit(file: LoRAFile, report: LoadReport, unet: UNet) -> str:
    theirs, ours = made_for(file), family_of(unet.config.cross_attention_dim)
    guess = "is damaged or not supported" if theirs == ours else f"was made for {theirs}, this model is {ours}"
    matched = f"matched {report.matched} of {report.total} layers ({report.dialect} names)"
    partly = "; --allow-partial loads what fits" if report.matched else ""
    return (
        f"the LoRA {file.path} does not fit this model: {matched}; not {_first(report.problems)}. Probably it "
        f"{guess}{partly}"
    )


def _first(problems: tuple[str, ...]) -> str:
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return ", ".join(problems[:_SHOWN]) + more

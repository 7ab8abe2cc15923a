"""The model that a command works with, as `options.MODEL_OPTIONS` name it, and its seeds."""

from __future__ import annotations

import gc
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.checkpoints.layout import read_ahead
from latentdiff.cli.loras import with_loras

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline

ADAPTING = ("loras", "embeddings", "allow_partial")
CHOICES = ("ema", "prediction_type", "zero_terminal_snr", "vae", "text_encoder", "base")
NAMES = ("model", *CHOICES, "device", "precision", "backend", "attention", "low_memory", "lora_dir")


@contextmanager
def loaded_model(settings: dict[str, Any]) -> Iterator[Pipeline]:
    """The model that a command's options name, which are taken out of `settings`.

    Inside the `with`, it has the LoRAs and the attention back end that were asked for.
    """
    chosen = {name: settings.pop(name) for name in NAMES}
    adapting = {name: settings.pop(name) for name in ADAPTING}
    read_ahead(Path(os.path.expanduser(embedded_model() if chosen["model"] is None else chosen["model"])))

    with _kept():
        from latentdiff.networks.attention import use_attention_backend
        from latentdiff.pipeline import Pipeline

    attention, lora_dir = chosen.pop("attention"), chosen.pop("lora_dir")
    pipe = Pipeline.load(chosen.pop("model"), **chosen)
    if lora_dir is not None:
        pipe.offer_loras(lora_dir)
    with with_loras(pipe, **adapting), use_attention_backend(attention) if attention else nullcontext():
        yield pipe


@contextmanager
def _kept() -> Iterator[None]:
    """Inside, what torch's import makes is not looked through for garbage, nor later: some 300,000 objects that stay."""
    is_first = "torch" not in sys.modules and gc.isenabled()
    if is_first:
        gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
            gc.enable()


def drawn_seed(seed: int | None) -> int:
    """The seed given, or one that is drawn and printed."""
    if seed is None:
        seed = secrets.randbelow(2**32)
        click.echo(f"seed: {seed}", err=True)
    return seed

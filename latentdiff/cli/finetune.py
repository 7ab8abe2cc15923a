"""`latentdiff finetune`: a model or a LoRA that has learned what is in a folder of captioned images."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

from latentdiff.cli.headings import Command, headed
from latentdiff.cli.options import ANY_PATH
from latentdiff.cli.places import check_data
from latentdiff.errors import Stopped, UsageError
from latentdiff.request.option import flag_of

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from latentdiff.training.finetuning.config import FinetuneConfig

# Flags in the order in which people look for them, and under which heading of help; "" is for what most people look for.
_LISTED = {
    "": ("data", "method", "model", "out", "resolution", "max_steps", "seed"),
    "Images and captions": (
        "validation", "validation_share", "caption_prefix", "caption_suffix", "shuffle_tags", "keep_tags", "tag_dropout",
        "caption_dropout", "long_captions", "masks", "unmasked_weight",
    ),
    "How data is read": ("caption_column", "allow_missing", "strict", "background", "stream"),
    "Sizes": ("buckets", "bucket_step", "max_aspect", "upscale", "crop", "flip"),
    "What is trained": (
        "targets", "train_text_encoder", "word", "initial_word", "control_model", "hints", "control_kind",
        "prediction_type", "zero_snr",
    ),
    "Adapters": (
        "adapter", "rank", "alpha", "rslora", "block_rank", "block_lr", "loraplus", "dropout", "rank_dropout",
        "module_dropout", "max_norm", "dora_lengths", "lokr_factor",
    ),
    "Keeping what the model knew, and stopping": ("keep", "old_prompts", "stop", "patience", "least_kept"),
    "Loss and noise": (
        "loss", "huber_c", "huber_schedule", "min_snr_gamma", "debiased", "dpo_beta", "prior_weight", "high_noise_share",
        "noise_offset", "pyramid_noise",
    ),
    "Optimizer": (
        "batch_size", "accumulation", "optimizer", "relative_step", "lr", "text_encoder_lr", "warmup_steps", "decay",
        "decay_steps", "betas", "weight_decay", "grad_clip", "ema_decay", "ema_every",
    ),
    "Speed and memory": (
        "device", "mixed_precision", "base_precision", "gradient_checkpointing", "attention", "compile", "cache_latents",
        "cache_text", "cache_precision", "cache", "loader_threads",
    ),
    "Samples meanwhile": (
        "prompts", "sample_count", "sample_steps", "sample_guidance", "sample_options", "preview_every",
    ),
    "Log and result": (
        "log_every", "validate_every", "validation_images", "checkpoint_every", "keep_checkpoints", "track", "result",
        "result_precision",
    ),
}  # fmt: skip
_PLACEHOLDERS = {
    "data": "FOLDER[:REPEATS]",
    "validation": "FOLDER",
    "hints": "FOLDER|COLUMN",
    "control_model": "FILE|FOLDER|HUB_ID",
    "model": "FOLDER|HUB_ID|FILE",
    "out": "FOLDER",
    "cache": "FOLDER",
    "keep": "auto|nothing|old[:WEIGHT]",
    "block_rank": "BLOCK=RANK",
    "block_lr": "BLOCK=LR",
    "sample_options": "NAME=VALUE",
}


class _ConfigCommand(Command):
    """A command that has a flag for every key of the configuration, which is read only when the command is used."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from latentdiff.training.finetuning.config import FinetuneConfig

        fields, known = FinetuneConfig.model_fields, {parameter.name for parameter in self.params}
        for heading, names in _LISTED.items():
            options = [_option(name, fields[name]) for name in names if name not in known]
            self.params += headed(heading, options) if heading else options
        return super().get_params(ctx)


def _option(name: str, field: FieldInfo) -> click.Option:
    """The flag of a key. Its value goes to the configuration as text, which alone says what is allowed."""
    flag, help_text = flag_of(name), " ".join((field.description or "").split())
    kinds = _kinds(field.annotation)
    if bool in kinds:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=help_text + _default(name, field))
    many = tuple in kinds and not _is_pair(field.annotation)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return click.Option(
        [flag],
        type=click.Choice(choices) if choices else str,
        multiple=many,
        nargs=2 if _is_pair(field.annotation) else 1,
        metavar=_PLACEHOLDERS.get(name) or (None if choices else _metavar(kinds)),
        help=help_text + (" May be repeated." if many else "") + _default(name, field),
    )


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation allows, without constraints: Literal[...] as it is, tuples as `tuple`."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    if hasattr(annotation, "__metadata__"):
        return _kinds(get_args(annotation)[0])
    return [annotation if origin is Literal else origin or annotation]


def _is_pair(annotation: Any) -> bool:
    return (
        get_origin(annotation) is tuple and len(get_args(annotation)) == 2 and get_args(annotation)[1] is not Ellipsis
    )


def _metavar(kinds: list[Any]) -> str:
    return "INTEGER" if int in kinds else "NUMBER" if float in kinds else "TEXT"


def _default(name: str, field: FieldInfo) -> str:
    from latentdiff.training.finetuning.config import METHOD_DEFAULTS

    of_methods = {method: values.get(name, field.default) for method, values in METHOD_DEFAULTS.items()}
    if len(set(of_methods.values())) > 1:
        return f"  [default: {', '.join(f'{method} {value}' for method, value in of_methods.items())}]"
    value = next(iter(of_methods.values()))
    if value is None or value == ():
        return ""
    shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
    return f"  [default: {' '.join(map(str, shown)) if isinstance(shown, tuple) else shown}]"


@click.command(cls=_ConfigCommand)
@click.option(
    "--config", type=ANY_PATH, metavar="FILE", help="YAML file with any of the keys below; flags replace its values."
)
@click.option("--resume", type=ANY_PATH, metavar="RUN", help="Go on with a run, from its newest whole checkpoint.")
@click.option(
    "--verify-resume",
    type=click.IntRange(1),
    metavar="N",
    help="With --resume: take at least N steps before that checkpoint again, and compare every bit.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what the run would take in steps, time, memory and disk on this machine, from a few steps that are tried"
    " out in a temporary folder; the exit status is 1 if it does not fit.",
)
def finetune(config: Path | None, resume: Path | None, verify_resume: int | None, dry_run: bool, **flags: Any) -> None:
    """Fine-tune a model on captioned images.

    The result is OUT/lora.safetensors, OUT/model, OUT/embedding.safetensors or OUT/controlnet, by method; OUT/report.html
    tells how it went. Every key of the YAML is also a flag.
    """
    if verify_resume and resume is None:
        raise UsageError("--verify-resume goes with --resume RUN")
    if verify_resume and dry_run:
        raise UsageError("a dry run takes no steps again; leave out --verify-resume or --dry-run")
    for source in flags.get("data") or ():
        check_data(source)
    given = _as_values({name: value for name, value in flags.items() if value is not None and value != ()})
    from latentdiff.training.finetuning.config import load_finetune_config, resumed_config

    # What is wrong is told before torch is loaded.
    if resume is None:
        load_finetune_config(config, given)
    else:
        resumed_config(resume, config, given)
    from accelerate import PartialState

    from latentdiff.training.finetuning.finetune import resolve, run

    settings = resolve(resume, config, given)
    if dry_run:
        _forecast(settings)
        return
    try:
        result = run(settings, verify_steps=verify_resume)
    except KeyboardInterrupt:  # before the first step, or after the last one
        raise Stopped(
            f"interrupted; go on with: {shlex.join(['latentdiff', 'finetune', '--resume', str(settings.out)])}"
        ) from None
    if PartialState().is_main_process:
        for line in _closing_lines(settings):
            click.echo(line, err=True)
        click.echo(result)


def _closing_lines(settings: FinetuneConfig) -> Iterator[str]:
    """How a run went and what is to be done with its result, in words."""
    from latentdiff.training.report.words import copies_in_words, learned_in_words, use_of_result

    if learned := learned_in_words(settings.out):
        yield f"learned: {learned}"
    if kept := _kept(settings):
        yield f"kept what it knew: {kept}"
    if copies := copies_in_words(settings.out):
        yield f"copies: {copies}"
    yield f"how it went: {settings.out / 'report.html'}"
    yield f"use it: {use_of_result(settings.out)}"


def _kept(settings: FinetuneConfig) -> str:
    """What the model still knows, in words; nothing where that was not measured."""
    from latentdiff.training.report.log import kept_by_result, kept_in_words

    share = kept_by_result(settings.out)
    if share is not None:
        return f"{share:.2f} (1 is all, 0 as far off as another prompt): {kept_in_words(share)}"
    return "all, the model itself is not changed" if settings.method in ("textual_inversion", "controlnet") else ""


def _forecast(settings: FinetuneConfig) -> None:
    from latentdiff.training.finetuning.trial import dry_run

    found = dry_run(settings)
    for line in found.lines():
        click.echo(line)
    click.get_current_context().exit(0 if found.fits else 1)


def _as_values(given: dict[str, Any]) -> dict[str, Any]:
    """Flags as values of the configuration: "none" is none, and a tuple of texts a list."""
    return {
        name: None if value == "none" else list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
    }

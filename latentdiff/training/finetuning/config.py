"""The configuration of a fine-tuning: one flat set of keys, the same in YAML, as flags of the command, and in Python.

What is not given has the default of its method. Paths are relative to the folder that the command is started in;
unknown keys are errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, PositiveInt, ValidationError, model_validator

from latentdiff.errors import ConfigError, UsageError
from latentdiff.training.config import Fraction, NotNegative, Section, StageSection, first_fault, read_yaml

METHODS = ("lora", "full", "textual_inversion")

# What differs between the methods; everything else has one default, given with its key.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"lr": 1e-3, "max_steps": 600, "weight_decay": 0.0, "ema_decay": 0.99},
    "full": {"lr": 1e-4, "max_steps": 1000, "ema_decay": 0.999},
    "textual_inversion": {
        "lr": 5e-3,
        "max_steps": 1000,
        "weight_decay": 0.0,
        "ema_decay": 0.99,
        "caption_dropout": 0.0,
    },
}


class DataEntry(Section):
    """One source of captioned images."""

    path: str
    """A folder, WebDataset shards, or a Hugging Face data set on disk or by id."""
    repeats: PositiveInt = 1
    """How often each of its images comes up in an epoch."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the loss of its images."""


def _entry(value: Any) -> Any:
    """FOLDER, FOLDER:REPEATS, or a mapping, also written as text: {path: FOLDER, repeats: 2}."""
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    if text.startswith("{"):
        return yaml.safe_load(text)
    path, colon, repeats = text.rpartition(":")
    if colon and repeats.isdecimal() and not Path(text).exists():
        return {"path": path, "repeats": int(repeats)}
    return {"path": text}


def _list(value: Any) -> Any:
    """One entry may stand alone; no entries may be none."""
    if value is None:
        return ()
    return [value] if isinstance(value, str | Path | Mapping) else value


Entry = Annotated[DataEntry, BeforeValidator(_entry)]
Entries = Annotated[tuple[Entry, ...], BeforeValidator(_list)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_list)]


class FinetuneConfig(StageSection):
    """A fine-tuning."""

    # --- what is trained
    method: Literal["lora", "full", "textual_inversion"] = "lora"
    """lora: small matrices beside the weights, a small file. full: all weights of the U-Net. textual_inversion: the
    embedding of one new word."""
    model: str | None = None
    """Folder, file or hub id of the model to start from; without it, the one that comes with latentdiff."""
    out: Path = Path("runs/finetune")
    """Folder of the run: checkpoints, log, samples, report, and the result."""
    seed: int = 0
    """Everything random in the run follows from it."""
    train_text_encoder: bool = False
    """Train the text encoder too (method full; for lora, put text_encoder into `targets`)."""
    text_encoder_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the text encoder where it differs from `lr`."""
    rank: PositiveInt = 8
    """Rank of the LoRA matrices."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The LoRA is scaled by alpha / rank; without it, alpha is the rank."""
    targets: Texts = ("attention",)
    """What the LoRA changes: attention, feed_forward, convolutions, text_encoder, or patterns of module names."""
    word: str | None = None
    """The new word of textual inversion, as prompts and captions will use it, for example <teapot>."""
    initial_word: str | None = None
    """A word of the model's vocabulary whose embedding the new word starts from."""

    # --- what is learned from
    data: Entries = ()
    """Where the captioned images are; several are trained on together. FOLDER:3 repeats each image three times an
    epoch."""
    validation: Entries = ()
    """Held-out captioned images that are never trained on; replaces `validation_share`."""
    validation_share: Fraction = 0.0
    """Share of the images of `data` to hold out, chosen by the seed."""
    caption_column: str | None = None
    """Column of the metadata that holds the captions, where it is not `text`."""
    strict: bool = False
    """Stop if an image cannot be read, in place of leaving it out."""
    allow_missing: bool = False
    """Take images without a caption, with the empty one."""
    background: str = "white"
    """Colour under transparent images."""
    stream: bool = False
    """Read WebDataset shards in sequence, without an index in memory: for millions of images; square crops, no
    caches."""
    resolution: PositiveInt | None = None
    """Side of the training images in pixels; with `buckets`, they have about the area of its square. Default: the
    model's."""
    buckets: bool = True
    """Keep the images' aspect ratios, and batch images of like ones; otherwise all are cropped to squares."""
    bucket_step: PositiveInt | None = None
    """Sides of buckets are multiples of this many pixels; without it, 64, or the VAE's factor below 256 pixels."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """Longest side of a bucket over its shortest; what is longer is cropped."""
    upscale: bool = False
    """Enlarge images that are smaller than their bucket; otherwise they go into a smaller bucket."""
    crop: Literal["center", "random"] = "center"
    """Which part of an image remains where it does not fit its bucket."""
    flip: bool = False
    """Mirror half of the images, at random."""
    long_captions: Literal["cut", "chunk"] = "cut"
    """Captions with more tokens than the model reads: cut their ends, or read them in several chunks."""
    shuffle_tags: bool = False
    """Shuffle the parts of captions that commas separate."""
    caption_dropout: Fraction = 0.1
    """Share of captions replaced by the empty one, so that guidance keeps its unconditional model."""
    loader_threads: PositiveInt = 2
    """Background threads that read images."""

    # --- how
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Gamma of the min-SNR loss weight (Hang et al. 2023), 5 is usual; none weighs all timesteps the same. With
    v-prediction it hardly counts the noisiest timesteps, where layout and colours are decided: the embedded model
    forgets them with it."""
    high_noise_share: Fraction = 0.0
    """Share of the timesteps drawn from the noisiest tenth alone, where a picture's layout is decided; others are
    uniform."""
    noise_offset: NotNegative = 0.0
    """Strength of noise that is constant over a latent's channel; 0.05 helps with very dark and very bright
    pictures."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same gradients."""
    attention: Literal["auto", "sdpa", "xformers", "plain"] = "auto"
    """Attention back end; auto is plain for small latents on a CPU in bf16, where it is faster, and PyTorch's
    kernels elsewhere."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of forward and backward passes; trained weights stay float32. auto is bf16 on a GPU that has it, else
    no."""
    base_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision in which frozen weights are kept (lora, textual_inversion); halves their memory."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes the GPU if there is one."""
    cache_latents: bool = True
    """Encode the images once and keep the latents on disk; does nothing where crops are random."""
    cache_text: bool = True
    """Encode the captions once and keep the embeddings on disk; does nothing where the text encoder is trained."""
    cache: Path | None = None
    """Folder of the caches, which runs may share; without it, `cache` in the run."""
    cache_precision: Literal["fp16", "fp32"] = "fp16"
    """Precision of the cached numbers."""

    # --- what is written
    result_precision: Literal["model", "fp32", "fp16", "bf16"] = "model"
    """Precision of the result's files; model is that of the model's own files, and fp32 for lora."""
    result: Literal["last", "best"] = "last"
    """Make the result from the last step, or from the one with the smallest validation loss, which is always kept."""
    prompts: Texts = ()
    """Prompts of the sample sheets; without them, some captions of the data."""
    sample_count: Annotated[int, Field(ge=0)] = 4
    """Captions to make samples of where no prompts are given; 0 makes none."""
    sample_steps: PositiveInt = 25
    """Denoising steps of the samples."""
    sample_guidance: NotNegative = 5.0
    """Guidance scale of the samples."""

    # --- defaults that differ from those of training from nothing
    max_steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt = 8
    """Images per optimizer step, over all processes and micro-batches."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps in which the learning rate rises linearly from 0."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Moment decays of AdamW."""
    ema_every: PositiveInt = 1
    """Steps between updates of the averaged weights; the decay is adjusted to it."""
    log_every: PositiveInt = 20
    """Steps between lines in log.jsonl."""
    validate_every: PositiveInt = 100
    """Steps between measurements on held-out images."""
    validation_images: PositiveInt = 64
    """Most held-out images used for them."""
    preview_every: PositiveInt = 200
    """Steps between sheets of samples."""
    checkpoint_every: PositiveInt = 100
    """Steps between checkpoints; a signal (Ctrl-C, SIGTERM) always writes one."""

    @model_validator(mode="before")
    @classmethod
    def _method_defaults(cls, values: Any) -> Any:
        method = values.get("method", "lora") if isinstance(values, Mapping) else None
        if not isinstance(method, str):
            return values
        own_lr = {"lr": 1.0} if values.get("optimizer") == "prodigy" else {}
        return {**METHOD_DEFAULTS.get(method, {}), **own_lr, **values}

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneConfig:
        if self.train_text_encoder and self.method != "full":
            raise ValueError("train_text_encoder goes with method full; for lora, put text_encoder into targets")
        if self.result == "best" and not (self.validation or self.validation_share):
            raise ValueError("the best step is known from held-out images: give validation or validation_share")
        if self.optimizer == "prodigy" and self.text_encoder_lr is not None:
            raise ValueError("prodigy knows one learning rate only; leave out text_encoder_lr")
        if self.method == "textual_inversion" and not self.word:
            raise ValueError("textual_inversion needs the new word, for example --word '<teapot>'")
        if self.validation and self.validation_share:
            raise ValueError("give either validation or validation_share, not both")
        return self


def load_finetune_config(path: Path | None, flags: Mapping[str, Any]) -> FinetuneConfig:
    """The defaults of the method, replaced by a YAML file, replaced by `flags`.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, or a value outside its domain.
        UsageError: there is no data.
    """
    values = {**(read_yaml(path) if path else {}), **flags}
    config = make_config(values, str(path) if path else "the options")
    if not config.data:
        raise UsageError("expected captioned images to train on, found none; give a folder with --data FOLDER")
    return config


def make_config(values: Mapping[str, Any], source: str) -> FinetuneConfig:
    """Make a configuration from plain values; `source` names them in messages."""
    try:
        return FinetuneConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_fault(error)}") from error

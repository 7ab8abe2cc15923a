"""What the configurations of training from nothing and of fine-tuning share: sections, data sources, and YAML.

Paths are relative to the folder that the command is started in. Unknown keys are errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from latentdiff.errors import ConfigError, UsageError
from latentdiff.reading.yaml import parse_yaml
from latentdiff.reading.yaml import read_yaml as read_yaml_value
from latentdiff.training.data import DataSource
from latentdiff.training.data.captions import CaptionRules, worded
from latentdiff.training.sample_options import as_texts, sample_options

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, arbitrary_types_allowed=True)


class DataEntry(Section):
    """One source of captioned images."""

    path: str
    """A folder, WebDataset shards, or a Hugging Face data set on disk or by id."""
    repeats: PositiveInt = 1
    """How often each of its images comes up in an epoch."""
    weight: Positive = 1.0
    """Factor on the loss of its images, where a U-Net is trained."""
    prefix: str = ""
    """Words before each of its captions, for example a word that stands for what is new."""
    suffix: str = ""
    """Words behind each of its captions."""
    regularization: bool = False
    """Its images only remind the model of what it knows: they count by `prior_weight` too, none is held out or drawn,
    and samples are not compared with them."""


def _entry(value: Any) -> Any:
    """FOLDER, FOLDER:REPEATS, or a mapping, also written as text: {path: FOLDER, repeats: 2}."""
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    if text.startswith("{"):
        return parse_yaml(text, "an entry of the data")
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


def sources(entries: Sequence[DataEntry], prior_weight: float = 1.0) -> list[DataSource]:
    """The entries as `read_dataset` takes them; images for regularization count so much less or more."""
    return [
        DataSource(
            entry.path,
            entry.repeats,
            entry.weight * (prior_weight if entry.regularization else 1.0),
            entry.prefix,
            entry.regularization,
            entry.suffix,
        )
        for entry in entries
    ]


def with_words(entries: Sequence[DataEntry], prefix: str, suffix: str) -> list[DataEntry]:
    """The entries with words around all captions of images to learn from, outside their own."""
    return [
        entry
        if entry.regularization
        else entry.model_copy(
            update={"prefix": f"{prefix} {entry.prefix}".strip(), "suffix": worded([entry.suffix], "", suffix)[0]}
        )
        for entry in entries
    ]


class ReadingSection(Section):
    """How captioned images are read, whatever their layout."""

    caption_column: str | None = None
    """Column of the metadata that holds the captions, where it is not `text`."""
    strict: bool = False
    """Stop if an image cannot be read, in place of leaving it out."""
    allow_missing: bool = False
    """Take images without a caption, with the empty one."""
    background: str = "white"
    """Colour under transparent images."""

    @property
    def reading(self) -> dict[str, Any]:
        """The same as `read_dataset` takes it."""
        return {name: getattr(self, name) for name in ReadingSection.model_fields}


class StageSection(Section):
    """What all stages have: batches, optimizer, and how often something is written."""

    max_steps: PositiveInt
    """Optimizer steps of the whole stage."""
    batch_size: PositiveInt
    """Images per optimizer step, over all processes and micro-batches."""
    accumulation: PositiveInt = 1
    """Micro-batches that a process splits its part of the batch into; less memory, same gradients."""
    optimizer: Literal["adamw", "muon", "adafactor", "lion", "schedulefree", "prodigy", "adamw8bit"] = "adamw"
    """muon takes the matrices of hidden layers and AdamW the rest, both at `lr`; adafactor keeps far less in memory, at the
    `lr` of adamw; lion keeps half, at a third to a tenth of that `lr`; schedulefree needs no decay, at that `lr` or more;
    prodigy finds the rate, with a `lr` of 1; adamw8bit keeps a quarter, for a GPU or, from bitsandbytes 0.50, a CPU. All but
    the first three need pip install 'latentdiff[optimizers]'."""
    relative_step: bool = False
    """adafactor sets its own steps, relative to the size of each weight and to the number of steps taken; `lr`, warm-up
    and decay do not count then."""
    lr: Positive
    """Learning rate after the warm-up."""
    warmup_steps: Count = 200
    """Steps in which the learning rate rises linearly from 0."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to 0."""
    decay_steps: PositiveInt | None = None
    """Length of the fall at the end of the stage; without it, everything after the warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """Moment decays of AdamW."""
    weight_decay: NotNegative = 0.01
    """Weight decay of AdamW, on matrices and kernels only."""
    grad_clip: Positive = 1.0
    """Largest norm of the gradient."""
    ema_decay: Fraction = 0.999
    """Decay per step of the averaged weights, which are those kept in the end."""
    ema_every: PositiveInt = 4
    """Steps between updates of the averaged weights; the decay is adjusted to it."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Precision of forward and backward passes; weights and optimizer stay in float32. auto is bf16 on a GPU or CPU that
    computes in it, else no."""
    compile: bool = False
    """Compile the networks with torch.compile: minutes at the start, faster steps on some machines."""
    loader_threads: PositiveInt = 2
    """Background threads that make batches."""
    log_every: PositiveInt = 50
    """Steps between lines in log.jsonl."""
    validate_every: PositiveInt = 500
    """Steps between measurements on held-out images."""
    validation_images: PositiveInt = 256
    """Most held-out images used for them."""
    preview_every: PositiveInt = 1000
    """Steps between sheets of samples."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints; a signal (Ctrl-C, SIGTERM) always writes one."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that stay on disk; so does that of the smallest validation loss."""

    track: Literal["wandb"] | None = None
    """wandb: send the log and the samples to Weights & Biases too, as WANDB_PROJECT, WANDB_NAME and WANDB_MODE=offline say;
    needs pip install 'latentdiff[wandb]'. TensorBoard's files are written wherever that is installed."""

    @model_validator(mode="after")
    def _optimizer_fits(self) -> StageSection:
        if self.relative_step and self.optimizer != "adafactor":
            raise ValueError("relative_step goes with optimizer adafactor")
        if self.optimizer == "schedulefree" and (self.decay != "constant" or self.ema_decay):
            raise ValueError(
                "schedulefree averages the weights itself, in place of a decay: expected decay constant and ema_decay 0,"
                f" found {self.decay} and {self.ema_decay:g}"
            )
        if self.optimizer == "schedulefree" and not self.betas[0]:
            raise ValueError("schedulefree needs betas of which the first is above 0, such as 0.9 0.999")
        return self


class ObjectiveSection(Section):
    """What an error of the U-Net costs."""

    loss: Literal["mse", "huber"] = "mse"
    """mse: the squared error. huber: the pseudo-Huber loss, on which outliers in the data have less influence."""
    huber_c: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Errors far above this count linearly under the huber loss."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How `huber_c` falls, from 1 at no noise to its value at the most: with the signal-to-noise ratio, exponentially in the
    timestep, or not at all."""
    min_snr_gamma: Positive | None = None
    """Gamma of the min-SNR loss weight (Hang et al. 2023), 5 is usual; none weighs all timesteps the same. With
    v-prediction it hardly counts the noisiest timesteps, where layout and colours are decided: the embedded model
    forgets them with it."""
    debiased: bool = False
    """Weigh timesteps by the debiased estimation of Yu et al. 2024, in place of min-SNR: the noisier, the more."""

    @model_validator(mode="after")
    def _weighs_once(self) -> ObjectiveSection:
        if self.debiased and self.min_snr_gamma is not None:
            raise ValueError("debiased and min_snr_gamma both weigh timesteps; give one of them")
        if self.loss == "mse" and (self.huber_c, self.huber_schedule) != (0.1, "snr"):
            raise ValueError("huber_c and huber_schedule go with loss huber")
        return self


class DenoisingSection(StageSection, ObjectiveSection):
    """What all stages have in which a U-Net learns to denoise latents under captions."""

    # --- what each step sees
    crop: Literal["center", "random"] = "center"
    """Which part of an image remains where it does not fit its size."""
    flip: bool = False
    """Mirror half of the images, at random."""
    long_captions: Literal["cut", "chunk"] = "cut"
    """Captions with more tokens than the model reads: cut their ends, or read them in several chunks."""
    shuffle_tags: bool = False
    """Shuffle the parts of captions that commas separate."""
    tag_dropout: Fraction = 0.0
    """Share of those parts that are left out, chosen at each step."""
    keep_tags: Count = 0
    """So many first parts are neither shuffled nor left out."""
    caption_dropout: Fraction = 0.1
    """Share of captions replaced by the empty one, so that guidance has an unconditional model."""
    cache_latents: bool = True
    """Encode the images once and keep the latents on disk; does nothing where crops are random."""
    cache_precision: Literal["fp16", "fp32"] = "fp16"
    """Precision of the cached numbers."""

    # --- how it is trained
    high_noise_share: Fraction = 0.0
    """Share of the timesteps drawn from the noisiest tenth alone, where an image's layout is decided; others are
    uniform."""
    noise_offset: NotNegative = 0.0
    """Strength of noise that is constant over a latent's channel; 0.05 helps with very dark and very bright
    images."""
    pyramid_noise: Fraction = 0.0
    """Strength of noise of coarser grids, each half as fine as the one before and counting by this factor less; 0.3
    helps with images that are dark, bright, or of large plain areas."""
    text_encoder_lr: Positive | None = None
    """Learning rate of the text encoder where it differs from `lr`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same gradients."""
    attention: Literal["auto", "sdpa", "xformers", "plain"] = "auto"
    """Attention back end; auto is plain for small latents on a CPU in bf16, where it is faster, and PyTorch's
    kernels elsewhere."""

    # --- what is drawn meanwhile
    prompts: Texts = ()
    """Prompts of the sample sheets; without them, some captions of the data."""
    sample_count: Count = 4
    """Captions to make samples of where no prompts are given; 0 makes none."""
    sample_steps: PositiveInt = 25
    """Denoising steps of the samples."""
    sample_guidance: NotNegative | None = None
    """Guidance scale of the samples; without it, the one that the model is drawn with where none is asked for."""
    sample_options: Annotated[tuple[str, ...], BeforeValidator(as_texts)] = ()
    """Any other options of `generate` for the samples, as NAME=VALUE: sampler=ddim, seed=7, width=96, negative_prompt=blur."""

    @property
    def caption_rules(self) -> CaptionRules:
        """What happens to captions at each step."""
        return CaptionRules(self.caption_dropout, self.shuffle_tags, self.tag_dropout, self.keep_tags)

    @field_validator("sample_options")
    @classmethod
    def _can_be_drawn_with(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        try:
            sample_options(texts)
        except UsageError as error:
            raise ValueError(str(error).partition(", found ")[0]) from None
        return texts

    @model_validator(mode="after")
    def _keeps_tags_from_something(self) -> DenoisingSection:
        if self.keep_tags and not self.caption_rules.rearranges:
            raise ValueError("keep_tags goes with shuffle_tags or tag_dropout")
        return self


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: no such file, no YAML, or something else than a mapping.
    """
    values = read_yaml_value(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, found {type(values).__name__}")
    return numbers(values)


def first_fault(error: ValidationError) -> str:
    """One line about the first of what pydantic complains about."""
    first, more = error.errors()[0], error.error_count() - 1
    place = ".".join(str(part) for part in first["loc"]) or "configuration"
    found = "" if isinstance(first["input"], Mapping) else f", found {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}{found}" + (f" (and {more} more)" if more else "")


def dump_config(config: BaseModel) -> str:
    """The YAML from which the same configuration is read."""
    return yaml.safe_dump(plain(config.model_dump(mode="json")), sort_keys=False)


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 (no dot) as text; everybody means the number."""
    if isinstance(value, Mapping):
        return {key: numbers(entry) for key, entry in value.items()}
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value

"""The configuration of a fine-tuning: one flat set of keys, the same in YAML, as flags of the command, and in Python.

What is not given has the default of its method. Paths are relative to the folder that the command is started in;
unknown keys are errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from latentdiff.errors import ConfigError, UsageError
from latentdiff.training.finetuning.adapter_options import AdapterSection
from latentdiff.training.finetuning.rates import optimizer_defaults
from latentdiff.training.sections import (
    Count,
    DenoisingSection,
    Entries,
    Fraction,
    Positive,
    ReadingSection,
    Texts,
    first_fault,
    read_yaml,
)

_SHARE_TO_STOP_BY = 0.1  # of the images, held out where a run is to decide by itself

_KEEP_WORDS = ("auto", "nothing")  # what stands in `keep` beside old
# What the old counts by itself. With 1, what the embedded model drew of known things had changed visibly after 600 steps.
KEEP_WEIGHT = 5.0

CONFIG = "config.yaml"  # in the folder of a run

METHODS = ("lora", "full", "textual_inversion", "controlnet")

# What differs between the methods; everything else has one default, given with its key.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    # Few images without their captions would teach that the empty prompt means them, which guidance leads away from.
    "lora": {"lr": 1e-3, "max_steps": 600, "weight_decay": 0.0, "ema_decay": 0.99, "caption_dropout": 0.0},
    "full": {"lr": 1e-4, "max_steps": 1000, "ema_decay": 0.999},
    "textual_inversion": {
        "lr": 5e-3,
        "max_steps": 1000,
        "weight_decay": 0.0,
        "ema_decay": 0.99,
        "caption_dropout": 0.0,
    },
    "controlnet": {"lr": 1e-5, "max_steps": 5000, "ema_decay": 0.999},
}


class FinetuneConfig(AdapterSection, DenoisingSection, ReadingSection):
    """A fine-tuning."""

    # --- what is trained
    method: Literal["lora", "full", "textual_inversion", "controlnet"] = "lora"
    """lora: an adapter beside the weights, a small file; `adapter` says of which kind. full: all weights of the U-Net.
    textual_inversion: the embedding of one new word. controlnet: a network that lets the model follow hints, such as
    edges."""
    model: str | None = None
    """Folder, file or hub id of the model to start from; without it, the one that comes with latentdiff."""
    out: Path = Path("runs/finetune")
    """Folder of the run: checkpoints, log, samples, report, and the result."""
    seed: int = 0
    """Everything random in the run follows from it."""
    train_text_encoder: bool | None = None
    """Train the text encoder too (method full; for lora, put text_encoder into `targets`). By itself where the model lists
    its words, for its text encoder has read no others."""
    prediction_type: Literal["model", "epsilon", "v_prediction"] = "model"
    """What the U-Net predicts in the end. Another kind than the model's has to be learned, which takes long (method full)."""
    zero_snr: bool = False
    """Train on noise levels of which the last holds no signal (Lin et al. 2023), so that images can be as dark or bright
    as the prompt says; for v_prediction (method full)."""
    word: str | None = None
    """The new word of textual inversion, as prompts and captions will use it, for example <teapot>."""
    initial_word: str | None = None
    """A word of the model's vocabulary whose embedding the new word starts from."""
    control_model: str | None = None
    """Folder, file or hub id of a ControlNet to start from; without it, it starts as a copy of the U-Net's way down."""

    # --- how errors count
    loss: Literal["mse", "huber", "dpo"] = "mse"  # type: ignore[assignment]  # one more than from nothing
    """mse: the squared error. huber: the pseudo-Huber loss, on which outliers in the data have less influence. dpo: learn
    from pairs of a preferred and a rejected image (Diffusion-DPO), with lora and full; lr is a tenth then and caption_dropout
    0, if nothing else is said."""
    dpo_beta: Positive = 2000.0
    """How much the model is held to what it was while it learns from pairs; 2000 to 5000 are usual."""

    # --- what is learned from
    data: Entries = ()
    """Where the captioned images are; several are trained on together. FOLDER:3 repeats each image three times an
    epoch."""
    validation: Entries = ()
    """Held-out captioned images that are never trained on; replaces `validation_share`."""
    validation_share: Fraction = 0.0
    """Share of the images of `data` to hold out, chosen by the seed."""
    caption_prefix: str = ""
    """Words before each caption of `data` and `validation`, such as a trigger word: "sks dog,"; the images for regularization
    stay without. With `shuffle_tags`, a comma and `keep_tags` keep it in front."""
    caption_suffix: str = ""
    """Words behind each of them, such as ", in the style of sks"."""
    hints: str | None = None
    """What a ControlNet is to follow: a folder of images with the names of those of `data`, or the column of the metadata
    that names them; without it, NAME.hint.png beside each image NAME."""
    control_kind: Literal["canny", "scribble", "xdog", "sobel", "tile"] | None = None
    """Make the hints of the images themselves, in place of reading them."""
    masks: str | None = None
    """Learn only what masks show in white: a folder of masks with the names of the images, or the column of the metadata
    that names them; alpha takes the transparency of the images themselves. A model for inpainting paints just that, in
    place of holes of random shapes."""
    unmasked_weight: Fraction = 0.0
    """What errors count where a mask is black; where it is white they count 1."""
    old_prompts: Texts = ()
    """Prompts of what the model knows already, on which forgetting is measured, and which `keep` keeps; without them,
    prompts of the words that the model lists, or general ones."""
    prior_weight: Positive = 1.0
    """Factor on the loss of the images of data with `regularization: true`, the prior loss weight of Ruiz et al. 2023."""
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

    # --- how
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of forward and backward passes; trained weights stay float32. auto is bf16 on a GPU that has it, else
    no."""
    base_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision in which frozen weights are kept (lora, textual_inversion); halves their memory."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes the GPU if there is one."""
    cache_text: bool = True
    """Encode the captions once and keep the embeddings on disk; does nothing where the text encoder is trained."""
    cache: Path | None = None
    """Folder of the caches, which runs may share; without it, `cache` in the run."""

    keep: str = "auto"
    """old or old:WEIGHT: keep what the model knew (lora, full), by its own predictions for old prompts, which are part of
    the loss with this weight, 3 if none is given. nothing: do not. auto: old where the model lists its words and each
    caption has one that it does not know, on which the new can hang."""

    stop: Literal["last", "auto"] = "last"
    """auto: stop before `max_steps` when more steps are not worth their time, and make the result from the best step: by the
    held-out loss in bands of timesteps, by what the model has kept of what it knew, and by whether samples copy training
    images. A tenth of the images is held out if nothing else is said."""
    patience: PositiveInt = 3
    """Measurements in a row without a better one that end a run with `stop: auto`."""
    least_kept: Fraction = 0.8
    """Share of what the model knew that it must keep with `stop: auto`, between 0 and 1."""

    # --- what is written
    result_precision: Literal["model", "fp32", "fp16", "bf16"] = "model"
    """Precision of the result's files; model is that of the model's own files, and fp32 for lora."""
    result: Literal["last", "best"] = "last"
    """Make the result from the last step, or from the one with the smallest validation loss, which is always kept."""

    # --- defaults that differ from those of training from nothing
    max_steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt = 8
    """Images per optimizer step, over all processes and micro-batches."""
    lr: Positive = 1e-4
    """Learning rate after the warm-up."""
    warmup_steps: Count = 50
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

    @property
    def keep_weight(self) -> float | None:
        """The weight in `keep`; None where nothing is kept, or where that follows from the data."""
        if self.keep in _KEEP_WORDS:
            return None
        what, colon, weight = self.keep.partition(":")
        value = float(weight) if colon else KEEP_WEIGHT
        if what != "old" or not 0 < value < math.inf:
            raise ValueError(self.keep)
        return value

    @field_validator("keep", mode="before")
    @classmethod
    def _keeps_nothing(cls, value: Any) -> Any:
        return "nothing" if value is None else value  # as runs have it that were begun before there was auto

    @field_validator("keep")
    @classmethod
    def _can_be_kept(cls, value: str) -> str:
        try:
            _ = cls.model_construct(keep=value).keep_weight
        except ValueError:
            expected = "auto, nothing, old, or old:WEIGHT with a weight above 0, such as old:0.5"
            raise ValueError(f"expected {expected}") from None
        return value

    @model_validator(mode="before")
    @classmethod
    def _method_defaults(cls, values: Any) -> Any:
        method = values.get("method", "lora") if isinstance(values, Mapping) else None
        if not isinstance(method, str):
            return values
        if values.get("stop") == "auto" and not values.get("validation") and not values.get("stream"):
            values = {**values, "validation_share": values.get("validation_share") or _SHARE_TO_STOP_BY}
        usual = METHOD_DEFAULTS.get(method, {})
        if values.get("loss") == "dpo" and usual:
            # Which image is right, only the prompt says; and the model draws the right ones already.
            usual = {**usual, "caption_dropout": 0.0, "lr": usual["lr"] / 10}
        return {**usual, **optimizer_defaults(values.get("optimizer"), usual), **values}

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneConfig:
        if self.train_text_encoder and self.method != "full":
            raise ValueError("train_text_encoder goes with method full; for lora, put text_encoder into targets")
        if (self.zero_snr or self.prediction_type != "model") and self.method != "full":
            raise ValueError("prediction_type and zero_snr change the whole model: they go with method full")
        if self.result == "best" and not (self.validation or self.validation_share):
            raise ValueError("the best step is known from held-out images: give validation or validation_share")
        self._stopping_fits()
        if (self.optimizer == "prodigy" or self.relative_step) and self.text_encoder_lr is not None:
            raise ValueError(f"{self.optimizer} finds one step size for all; leave out text_encoder_lr")
        if self.method == "textual_inversion" and not self.word:
            raise ValueError("textual_inversion needs the new word, for example --word '<teapot>'")
        keeps = self.keep not in _KEEP_WORDS
        if keeps and self.method not in ("lora", "full"):
            raise ValueError(f"keep goes with lora and full; {self.method} leaves the model as it is")
        if keeps and (self.zero_snr or self.prediction_type != "model"):
            raise ValueError("prediction_type and zero_snr change what is predicted, which keep would hold; leave out keep")
        self._hints_fit()
        self._masks_fit()
        self._pairs_fit()
        if self.prior_weight != 1 and not any(entry.regularization for entry in self.data):
            raise ValueError("prior_weight goes with data that is for regularization: {path: FOLDER, regularization: true}")
        if any(entry.regularization for entry in self.validation):
            raise ValueError("held-out images are not for regularization; leave that out of validation")
        if self.validation and self.validation_share:
            raise ValueError("give either validation or validation_share, not both")
        return self

    def _stopping_fits(self) -> None:
        if self.stop != "auto":
            return
        if not (self.validation or self.validation_share):
            raise ValueError("stop auto decides by held-out images: give validation or validation_share")
        if self.validate_every % self.checkpoint_every:
            raise ValueError(
                f"stop auto needs a checkpoint at each measurement: expected a validate_every that is a multiple of"
                f" checkpoint_every {self.checkpoint_every}, found {self.validate_every}"
            )

    def _masks_fit(self) -> None:
        if self.unmasked_weight and self.masks is None:
            raise ValueError("unmasked_weight goes with masks")
        if self.stream and self.masks is not None:
            raise ValueError("a stream of shards brings no masks; leave out stream, or write the images out as a folder")

    def _pairs_fit(self) -> None:
        if self.loss != "dpo":
            if self.dpo_beta != 2000:
                raise ValueError("dpo_beta goes with loss dpo")
            return
        if self.method not in ("lora", "full"):
            raise ValueError(f"loss dpo changes what the model draws: it goes with lora and full, not {self.method}")
        if self.zero_snr or self.prediction_type != "model":
            raise ValueError("prediction_type and zero_snr change what is predicted; loss dpo compares it with the start")
        if self.min_snr_gamma is not None or self.debiased:
            raise ValueError("loss dpo counts all timesteps the same; leave out min_snr_gamma and debiased")
        if self.masks is not None:
            raise ValueError("loss dpo compares whole images; leave out masks")
        if self.stream:
            raise ValueError("a stream of shards brings no pairs; leave out stream")
        if any(entry.regularization for entry in self.data):
            raise ValueError("images for regularization are no pairs; keep what the model knew with keep: old")

    def _hints_fit(self) -> None:
        of_controls = {"control_model": self.control_model, "hints": self.hints, "control_kind": self.control_kind}
        given = [name for name, value in of_controls.items() if value is not None]
        if given and self.method != "controlnet":
            raise ValueError(f"{given[0]} goes with method controlnet")
        if self.hints and self.control_kind:
            raise ValueError("give either hints that exist or a control_kind to make them by, not both")
        if self.stream and self.method == "controlnet":
            raise ValueError("a stream of shards brings no hints; leave out stream, or write the images out as a folder")


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


def resumed_config(run: Path, config: Path | None, flags: Mapping[str, Any]) -> FinetuneConfig:
    """That of a run that is gone on with, replaced by `flags`.

    Raises:
        ConfigError: an unknown key, or a value outside its domain.
        UsageError: there is no run, or another configuration is given.
    """
    if config is not None:
        raise UsageError(
            "--resume takes the configuration of the run; change single keys with their flags, without --config"
        )
    saved = Path(run) / CONFIG
    if not saved.is_file():
        raise UsageError(f"expected a run to resume in {run}, found no {CONFIG} there")
    return make_config({**read_yaml(saved), **flags, "out": run}, str(saved))


def make_config(values: Mapping[str, Any], source: str) -> FinetuneConfig:
    """Make a configuration from plain values; `source` names them in messages."""
    try:
        return FinetuneConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_fault(error)}") from error

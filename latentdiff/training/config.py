"""The configuration of a training run: one YAML file, validated, in which every key has a meaning written here.

Paths are relative to the folder that the command is started in. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveInt,
    ValidationError,
    model_validator,
)

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.errors import ConfigError
from latentdiff.networks.config import UNetConfig, VAEConfig

Fraction = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]


def _build(cls: type) -> BeforeValidator:
    """Make one of the model configurations from a mapping, refusing unknown names."""

    def build(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if unknown := sorted(set(value) - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(f"unknown {', '.join(map(repr, unknown))}")
        lists_to_tuples = {key: tuple(entry) if isinstance(entry, list) else entry for key, entry in value.items()}
        try:
            return cls(**lists_to_tuples)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    return BeforeValidator(build)


_AS_MAPPING = PlainSerializer(lambda value: _plain(dataclasses.asdict(value)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, arbitrary_types_allowed=True)


class TextEncoderSection(Section):
    """A CLIP text encoder; vocabulary and special tokens come from the tokenizer."""

    hidden_size: PositiveInt = 192
    """Width of the embeddings; the U-Net's `cross_attention_dim` must be the same."""
    num_hidden_layers: PositiveInt = 4
    """Transformer layers."""
    num_attention_heads: PositiveInt = 6
    """Heads of the self-attention."""
    intermediate_size: PositiveInt = 768
    """Width of the feed-forward layers."""
    max_position_embeddings: PositiveInt = 32
    """Longest prompt in tokens; the tokenizer's `model_max_length` must not be larger."""
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of the feed-forward layers."""


class ModelSection(Section):
    """What is trained."""

    tokenizer: Path
    """Folder of a CLIP tokenizer (vocab.json, merges.txt, tokenizer_config.json)."""
    vae: Annotated[VAEConfig, _build(VAEConfig), _AS_MAPPING]
    """Autoencoder; `scaling_factor` is measured at the end of its stage."""
    unet: Annotated[UNetConfig, _build(UNetConfig), _AS_MAPPING]
    """Denoiser; its channels must be those of the latents."""
    text_encoder: TextEncoderSection = TextEncoderSection()
    """Text encoder."""
    schedule: Annotated[ScheduleConfig, _build(ScheduleConfig), _AS_MAPPING]
    """Noise schedule and parameterization (`prediction_type`)."""

    @model_validator(mode="after")
    def _fits_together(self) -> ModelSection:
        channels = {self.vae.latent_channels, self.unet.in_channels, self.unet.out_channels}
        if len(channels) > 1:
            raise ValueError(
                f"vae.latent_channels, unet.in_channels and unet.out_channels must be equal, found {sorted(channels)}"
            )
        if self.unet.cross_attention_dim != self.text_encoder.hidden_size:
            raise ValueError(
                f"unet.cross_attention_dim {self.unet.cross_attention_dim} must equal"
                f" text_encoder.hidden_size {self.text_encoder.hidden_size}"
            )
        return self


class DataSection(Section):
    """What is learned from."""

    train: Path
    """Captioned folder to train on."""
    validation: Path
    """Captioned folder of held-out images, never trained on."""
    resolution: PositiveInt
    """Images are scaled and centre-cropped to this many pixels on a side."""
    limit: PositiveInt | None = None
    """Use only the first so many training images."""


class StageSection(Section):
    """What all stages have: batches, optimizer, and how often something is written."""

    max_steps: PositiveInt
    """Optimizer steps of the whole stage."""
    batch_size: PositiveInt
    """Images per optimizer step, over all processes and micro-batches."""
    accumulation: PositiveInt = 1
    """Micro-batches that a process splits its part of the batch into; less memory, same gradients."""
    optimizer: Literal["adamw", "muon", "adamw8bit", "prodigy"] = "adamw"
    """muon takes the matrices of hidden layers and AdamW the rest, both at `lr`; adamw8bit needs bitsandbytes, for a GPU
    or, in version 0.50, a CPU; prodigy needs prodigyopt, with a lr of about 1."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    """Steps in which the learning rate rises linearly from 0."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to 0."""
    decay_steps: PositiveInt | None = None
    """Length of the fall at the end of the stage; without it, everything after the warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """Moment decays of AdamW."""
    weight_decay: NotNegative = 0.01
    """Weight decay of AdamW, on matrices and kernels only."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    ema_decay: Fraction = 0.999
    """Decay per step of the averaged weights, which are those kept in the end."""
    ema_every: PositiveInt = 4
    """Steps between updates of the averaged weights; the decay is adjusted to it."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of forward and backward passes; weights and optimizer stay in float32."""
    compile: bool = False
    """Compile the networks with torch.compile: minutes at the start, faster steps on some machines."""
    log_every: PositiveInt = 50
    """Steps between lines in log.jsonl."""
    validate_every: PositiveInt = 500
    """Steps between measurements on held-out images."""
    validation_images: PositiveInt = 256
    """Held-out images used for them."""
    preview_every: PositiveInt = 1000
    """Steps between sheets of pictures."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints; a signal (Ctrl-C, SIGTERM) always writes one."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that stay on disk."""


class VAEStageSection(StageSection):
    """Images -> latents -> images."""

    start: Path | None = None
    """Folder of an autoencoder of the same configuration (a model's `vae/`) whose weights the stage starts from."""
    crop: PositiveInt = 64
    """Side of the random crops that are trained on, in pixels; a multiple of the VAE's downscale."""
    l1_weight: NotNegative = 1.0
    """Mean absolute error of the pixels in [-1, 1]."""
    mse_weight: NotNegative = 1.0
    """Mean squared error of the pixels."""
    gradient_weight: NotNegative = 0.5
    """Mean absolute error of the differences between neighbouring pixels: edges."""
    kl_weight: NotNegative = 1e-4
    """Kullback-Leibler divergence of the latents from a standard normal, mean per element."""
    perceptual_weight: NotNegative = 0.0
    """Distance in the features of `perceptual_network`."""
    perceptual_network: Path | None = None
    """Folder of a transformers vision model whose hidden states are the features; it gets pixels in [-1, 1]."""
    adversarial_weight: NotNegative = 0.0
    """Weight of a patch discriminator's verdict."""
    adversarial_start: Annotated[int, Field(ge=0)] = 2000
    """Step from which the discriminator is trained and heard."""

    @model_validator(mode="after")
    def _perceptual_needs_network(self) -> VAEStageSection:
        if self.perceptual_weight and self.perceptual_network is None:
            raise ValueError("perceptual_weight needs perceptual_network, a folder with a transformers vision model")
        return self


class TextStageSection(StageSection):
    """The text encoder alone: linear heads, thrown away afterwards, must tell from a caption what its scene holds."""


class DiffusionStageSection(StageSection):
    """U-Net and text encoder, on cached latents; the text encoder from where its own stage left it, if there is one."""

    caption_dropout: Fraction = 0.1
    """Share of captions replaced by the empty one, so that guidance has an unconditional model."""
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = 5.0
    """Gamma of the min-SNR loss weight (Hang et al. 2023); without it, all timesteps weigh the same."""
    high_noise_share: Fraction = 0.0
    """Share of the timesteps drawn from the noisiest tenth alone, where a picture's layout is decided; the rest is
    uniform."""
    start: Path | None = None
    """Folder of a U-Net of the same configuration (a model's `unet/`) whose weights the stage starts from."""
    close_up_share: Fraction = 0.0
    """Share of the steps on crops around single things, which cost less and teach their names; the metadata must say where
    things are and what each is called (`scene.objects` with `box` and `text`)."""
    attention: Literal["sdpa", "xformers", "plain"] = "sdpa"
    """Attention back end. PyTorch's fused kernels (`sdpa`) save memory; on a CPU, `plain` is faster for latents this
    small."""
    text_encoder_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the text encoder where it differs from `lr`."""


class TrainingConfig(Section):
    """A run: model, data, stages."""

    run: Path
    """Folder of the run: checkpoints, logs, caches, pictures, and the finished model in `model/`."""
    seed: int = 0
    """Everything random in the run follows from it."""
    model: ModelSection
    """What is trained."""
    data: DataSection
    """What is learned from."""
    vae: VAEStageSection
    """First stage."""
    decoder: VAEStageSection | None = None
    """Optional stage: the decoder goes on learning while the encoder, and so the latents, stay as they are."""
    text: TextStageSection | None = None
    """Optional stage: the text encoder learns from captions and the `scene` beside them in metadata.jsonl, without pictures."""
    diffusion: DiffusionStageSection
    """U-Net and text encoder."""
    model_dtype: Literal["float32", "float16"] = "float32"
    """Precision of the finished model's files."""

    @model_validator(mode="after")
    def _sizes(self) -> TrainingConfig:
        downscale = self.model.vae.downscale
        sizes = {"data.resolution": self.data.resolution, "vae.crop": self.vae.crop}
        if self.decoder:
            sizes["decoder.crop"] = self.decoder.crop
        for name, size in sizes.items():
            if size % downscale or size > self.data.resolution:
                raise ValueError(
                    f"{name} must be a multiple of the VAE's downscale {downscale} and at most data.resolution"
                    f" {self.data.resolution}, found {size}"
                )
        if self.model.unet.sample_size * downscale != self.data.resolution:
            raise ValueError(
                f"model.unet.sample_size must be data.resolution / downscale = {self.data.resolution // downscale},"
                f" found {self.model.unet.sample_size}"
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a YAML file; `overrides` such as "diffusion.lr=1e-3" replace single values.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, or a value outside its domain.
    """
    values = read_yaml(path)
    for override in overrides:
        _override(values, override)
    return validate_config(values, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: no such file, no YAML, or something else than a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the training configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, found {type(values).__name__}")
    return numbers(values)


def validate_config(values: Mapping[str, Any], source: str) -> TrainingConfig:
    """Make a configuration from plain values; `source` names them in messages."""
    try:
        return TrainingConfig.model_validate(numbers(values))
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_fault(error)}") from error


def first_fault(error: ValidationError) -> str:
    """One line about the first of what pydantic complains about."""
    first, more = error.errors()[0], error.error_count() - 1
    place = ".".join(str(part) for part in first["loc"]) or "configuration"
    found = "" if isinstance(first["input"], Mapping) else f", found {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}{found}" + (f" (and {more} more)" if more else "")


def dump_config(config: BaseModel) -> str:
    """The YAML from which the same configuration is read."""
    return yaml.safe_dump(_plain(config.model_dump(mode="json")), sort_keys=False)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"expected KEY=VALUE such as diffusion.lr=1e-3, found {override!r}")
    *sections, name = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: {text!r} is not a YAML value") from error


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

"""The configuration of training from nothing: one YAML file, validated, in which every key has its meaning written here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, PositiveInt, ValidationError, model_validator

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.errors import ConfigError
from latentdiff.networks.config import UNetConfig, VAEConfig
from latentdiff.reading.yaml import parse_yaml
from latentdiff.training.sections import (
    Count,
    DenoisingSection,
    Entries,
    Fraction,
    NotNegative,
    Positive,
    ReadingSection,
    Section,
    StageSection,
    Texts,
    first_fault,
    numbers,
    plain,
    read_yaml,
)


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


_AS_MAPPING = PlainSerializer(lambda value: plain(dataclasses.asdict(value)))


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
    guidance_scale: Positive | None = None
    """The guidance at which the model draws best, which goes with it: where none is asked for, it is drawn with this."""
    fast_steps: PositiveInt | None = None
    """Of how many steps `--fast` makes an image with the model, which goes with it; of 12 if it is null."""

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


class DataSection(ReadingSection):
    """What is learned from."""

    train: Entries
    """Captioned images to train on, one source or several: folders, WebDataset shards, Hugging Face data sets;
    FOLDER:3 repeats each image three times an epoch."""
    validation: Entries
    """Held-out captioned images, never trained on."""
    resolution: PositiveInt
    """Images are scaled and cropped to this many pixels on a side."""
    limit: PositiveInt | None = None
    """Use only the first so many training images."""
    strict: bool = True
    """Stop if an image cannot be read; otherwise it is left out, for which all are decoded once at the start."""

    @model_validator(mode="after")
    def _something(self) -> DataSection:
        if not self.train or not self.validation:
            raise ValueError("expected captioned images in `train` and in `validation`")
        return self


class VAEStageSection(StageSection):
    """Images -> latents -> images."""

    max_steps: Count
    """Optimizer steps of the whole stage; 0 takes the weights of `start` as they are, and its scaling factor."""
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
    adversarial_start: Count = 2000
    """Step from which the discriminator is trained and heard."""

    @model_validator(mode="after")
    def _something_to_save(self) -> VAEStageSection:
        if not self.max_steps and self.start is None:
            raise ValueError("max_steps 0 needs start, the folder of the autoencoder that is taken as it is")
        return self

    @model_validator(mode="after")
    def _perceptual_needs_network(self) -> VAEStageSection:
        if self.perceptual_weight and self.perceptual_network is None:
            raise ValueError("perceptual_weight needs perceptual_network, a folder with a transformers vision model")
        return self


class TextStageSection(StageSection):
    """The text encoder alone: linear heads, thrown away afterwards, must tell from a caption what its scene holds."""


class DiffusionStageSection(DenoisingSection):
    """U-Net and text encoder, on cached latents; the text encoder from where its own stage left it, if there is one."""

    start: Path | None = None
    """Folder of a model of the same configuration whose U-Net the stage starts from, and, where there is no stage text, whose
    text encoder."""
    close_up_share: Fraction = 0.0
    """Share of the steps on crops around single things, which cost less and teach their names; the metadata must say
    where things are and what each is called (`scene.objects` with `box` and `text`)."""
    min_snr_gamma: Positive | None = 5.0
    """Gamma of the min-SNR loss weight (Hang et al. 2023); without it, all timesteps weigh the same."""
    sample_count: Count = 16
    """Held-out captions to make samples of where no prompts are given; 0 makes none."""

    @model_validator(mode="after")
    def _close_ups_are_cut_from_the_cache(self) -> DiffusionStageSection:
        cached = self.cache_latents and self.crop == "center" and not self.flip and self.long_captions == "cut"
        if self.close_up_share and not cached:
            raise ValueError(
                "close_up_share needs cache_latents, crop: center, flip: false and long_captions: cut, since close-ups are"
                " cut from cached latents"
            )
        return self


class DistillationStageSection(DenoisingSection):
    """The finished U-Net in few steps and without guidance, by a LoRA beside it; see `stages.consistency`. Its images are
    drawn by `fast`."""

    guidance_scale: Positive = 5.0
    """Guidance scale of the teacher, which the student has in it: where it is used, there is no other."""
    segments: PositiveInt = 8
    """Steps of the student, which ends in its teacher's image; 1 is a latent consistency model (Luo et al. 2023), drawn
    by the sampler lcm in 4 steps with fresh noise in each."""
    teacher_steps: PositiveInt = 40
    """Steps of the teacher; they divide the timesteps, and `segments` divides them."""
    teacher_span: PositiveInt = 5
    """Steps of the teacher in each target, the rest of the segment is the student's own answer: 1 is consistency alone, as
    many as a segment has is regression on the teacher, dearer and learned in far fewer steps."""
    rank: PositiveInt = 32
    """Inner width of the LoRA; its file has about 230 KB a rank for the embedded model."""
    targets: Texts = ("attention", "feed_forward", "projections", "convolutions")
    """Layers of the U-Net with a LoRA: groups, or patterns such as unet.*.attn2.to_k."""
    loss: Literal["huber"] = "huber"
    """The pseudo-Huber distance, as Song & Dhariwal 2023 found best for consistency."""
    huber_c: Annotated[float, Field(gt=0, le=1)] = 0.03
    """Errors far above this count linearly."""
    huber_schedule: Literal["constant"] = "constant"
    """The same at all noise levels."""
    caption_dropout: Fraction = 0.0
    """Share of captions replaced by the empty one; the student is not asked without a prompt."""
    sample_count: Count = 16
    """Held-out captions to make samples of where no prompts are given; 0 makes none."""

    @model_validator(mode="after")
    def _trains_the_unet_alone(self) -> DistillationStageSection:
        idle = ("min_snr_gamma", "debiased", "text_encoder_lr", "gradient_checkpointing", "compile")
        if given := [name for name in idle if getattr(self, name)]:
            raise ValueError(f"{given[0]} is not for distillation, which compares a U-Net with itself; leave it out")
        if not self.cache_latents or self.crop != "center":
            raise ValueError("distillation needs cache_latents and crop: center, as it takes its images from the cache")
        return self


class TrainingConfig(Section):
    """A run: model, data, stages."""

    run: Path
    """Folder of the run: checkpoints, logs, caches, images, and the finished model in `model/`."""
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
    """Optional stage: the text encoder learns from captions and the `scene` beside them in metadata.jsonl, without
    images."""
    diffusion: DiffusionStageSection
    """U-Net and text encoder."""
    distillation: DistillationStageSection | None = None
    """Optional last stage: the same images in few steps."""
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


def validate_config(values: Mapping[str, Any], source: str) -> TrainingConfig:
    """Make a configuration from plain values; `source` names them in messages."""
    try:
        return TrainingConfig.model_validate(numbers(values))
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_fault(error)}") from error


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"expected KEY=VALUE such as diffusion.lr=1e-3, found {override!r}")
    *sections, name = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
    values[name] = parse_yaml(text, f"the value of {override[:60]!r}")

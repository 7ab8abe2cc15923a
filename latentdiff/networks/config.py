"""Model configurations: frozen dataclasses that say what they mean, read from and written to diffusers' `config.json`
files.

diffusers' files hold dozens of keys that Stable Diffusion never varies. Those are listed here once, with the
values that mean "not used"; anything else is refused, because a model built while ignoring a key would run and draw
nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

from latentdiff.diffusion.config import known_entries
from latentdiff.errors import ConfigError

# Keys of a U-Net's config.json that must keep the values of Stable Diffusion.
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0, 0.0),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}

# The same for the autoencoder. `force_upcast` is advice about float16, which the finite checks answer here.
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "force_upcast": (True, False),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}

# What is larger is no Stable Diffusion, and building it would take hours.
MOST_LEVELS = 12
LARGEST = {"layers_per_block": 32, "sample_size": 2**15, "transformer_depth": 32}

_CLASSES, _VECTOR, _WIDTH = "class_embed_type", "projection", "projection_class_embeddings_input_dim"
ADDED_KIND = "text_time"  # what diffusers calls the embedding of pooled text and sizes (Podell et al. 2023)

_DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The conditional U-Net of Stable Diffusion. The defaults are those of Stable Diffusion 1.5."""

    in_channels: int = 4  # 4 latent channels; 9 for inpainting models (latents, mask, masked latents)
    out_channels: int = 4
    sample_size: int = 64  # latent height and width that the model was trained on
    block_out_channels: tuple[int, ...] = (
        320,
        640,
        1280,
        1280,
    )  # one level per entry, each half the size of the one before
    layers_per_block: int = 2  # ResBlocks per level on the way down; one more on the way up
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)  # attention heads per level
    cross_attention_dim: int = 768  # width of the text embeddings
    use_linear_projection: bool = False  # around the transformers: linear layers (SD 2.x) or 1x1 convolutions (SD 1.x)
    norm_num_groups: int = 32
    upcast_attention: bool = False  # compute attention in float32 (SD 2.1 overflows float16 otherwise)
    time_cond_proj_dim: int | None = None  # width of the embedding by which the guidance scale is told, if it is
    transformer_depth: tuple[int, ...] = (1,)  # blocks in each transformer, per level, or one number for all
    added_dim: int | None = None  # width of pooled text and sizes together, where the U-Net is told them (SDXL)
    size_dim: int = 256  # width of the sinusoids of each of these sizes
    num_class_embeds: int | None = None  # labels, where the U-Net is told one (the x4 upscaler: how noisy the image is)
    class_dim: int | None = None  # width of the vector that the U-Net is told, if it is (unCLIP: an image's embedding)
    only_cross_attention: tuple[bool, ...] = (False,)  # per level: the first attention, too, is to the text

    def __post_init__(self) -> None:
        _check_values("U-Net", self)
        if self.time_cond_proj_dim is not None and self.time_cond_proj_dim < 4:
            raise ConfigError(f"U-Net time_cond_proj_dim must be 4 or more, found {self.time_cond_proj_dim}")
        levels = len(self.block_out_channels)
        for name in ("transformer_depth", "only_cross_attention"):
            if len(getattr(self, name)) == 1:
                object.__setattr__(self, name, getattr(self, name) * levels)
        if sum(told is not None for told in (self.added_dim, self.num_class_embeds, self.class_dim)) > 1:
            raise ConfigError("a U-Net is told sizes, a label or a vector; found several of them in its configuration")
        for name in ("attention_levels", "num_heads", "transformer_depth", "only_cross_attention"):
            if len(getattr(self, name)) != levels:
                raise ConfigError(f"U-Net {name} needs {levels} entries, one per level, found {getattr(self, name)}")
        _check_groups("U-Net", self.block_out_channels, self.norm_num_groups)
        for channels, heads in zip(self.block_out_channels, self.num_heads, strict=True):
            if channels % heads:
                raise ConfigError(f"U-Net width {channels} is not divisible by its {heads} attention heads")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """Read a U-Net's `config.json`.

        Raises:
            ConfigError: it describes another architecture or has an unknown key.
        """
        config = dict(config)
        added = _added(config)
        crossed = config.pop("only_cross_attention", False)
        depth = config.pop("transformer_layers_per_block", 1)
        down = config.pop("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
        up = config.pop("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
        attention = _attention_levels(down, _DOWN_BLOCKS)
        if _attention_levels(up, _UP_BLOCKS)[::-1] != attention:
            raise ConfigError(f"U-Net levels must mirror: down_block_types {down} do not match up_block_types {up}")
        # diffusers' `attention_head_dim` has held the number of heads since its first release.
        head_dim = config.pop("attention_head_dim", 8)
        heads = config.pop("num_attention_heads", None) or head_dim
        _refuse_other_architecture("U-Net", config, _UNET_FIXED, set(cls.__dataclass_fields__))
        channels = tuple(config.pop("block_out_channels", cls.block_out_channels))
        return cls(
            block_out_channels=channels,
            attention_levels=attention,
            num_heads=(heads,) * len(channels[: MOST_LEVELS + 1]) if isinstance(heads, int) else tuple(heads),
            transformer_depth=(depth,) if isinstance(depth, int) else tuple(depth),
            only_cross_attention=(crossed,) if isinstance(crossed, bool) else tuple(crossed),
            **added,
            **known_entries(cls, config, {"cross_attention_dim": 1280}),
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` from which diffusers builds the same U-Net."""
        down = {has: name for name, has in _DOWN_BLOCKS.items()}
        up = {has: name for name, has in _UP_BLOCKS.items()}
        same_heads = len(set(self.num_heads)) == 1
        return {
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            "attention_head_dim": self.num_heads[0] if same_heads else list(self.num_heads),
            "block_out_channels": list(self.block_out_channels),
            "center_input_sample": False,
            "cross_attention_dim": self.cross_attention_dim,
            "down_block_types": [down[has] for has in self.attention_levels],
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": self.in_channels,
            "layers_per_block": self.layers_per_block,
            "mid_block_scale_factor": 1,
            "norm_eps": 1e-5,
            "norm_num_groups": self.norm_num_groups,
            "out_channels": self.out_channels,
            "sample_size": self.sample_size,
            "up_block_types": [up[has] for has in reversed(self.attention_levels)],
            "upcast_attention": self.upcast_attention,
            "use_linear_projection": self.use_linear_projection,
            **({} if self.time_cond_proj_dim is None else {"time_cond_proj_dim": self.time_cond_proj_dim}),
            **({} if set(self.transformer_depth) == {1} else {"transformer_layers_per_block": self._written_depth()}),
            **({} if self.added_dim is None else self._written_added(self.added_dim)),
            **({} if self.num_class_embeds is None else {"num_class_embeds": self.num_class_embeds}),
            **({} if self.class_dim is None else {_CLASSES: _VECTOR, _WIDTH: self.class_dim}),
            **({"only_cross_attention": list(self.only_cross_attention)} if any(self.only_cross_attention) else {}),
        }

    def _written_depth(self) -> int | list[int]:
        depth = list(self.transformer_depth)
        return depth[0] if len(set(depth)) == 1 else depth

    def _written_added(self, width: int) -> dict[str, Any]:
        return {
            "addition_embed_type": ADDED_KIND,
            "addition_time_embed_dim": self.size_dim,
            _WIDTH: width,
        }


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The KL autoencoder. The defaults are those of Stable Diffusion 1.5."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512  # image height and width that the model was trained on
    scaling_factor: float = 0.18215  # brings latents to unit variance; applied in `vae.py` and nowhere else

    def __post_init__(self) -> None:
        _check_values("VAE", self)
        _check_groups("VAE", self.block_out_channels, self.norm_num_groups)

    @cached_property
    def downscale(self) -> int:
        """Pixels per latent along one side: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """Read an AutoencoderKL's `config.json`.

        Raises:
            ConfigError: it describes another architecture or has an unknown key.
        """
        config = dict(config)
        for key, expected in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if set(found := config.pop(key, [expected])) != {expected}:
                raise ConfigError(f"VAE {key} must all be {expected}, found {found}")
        _refuse_other_architecture("VAE", config, _VAE_FIXED, set(cls.__dataclass_fields__))
        channels = tuple(config.pop("block_out_channels", cls.block_out_channels))
        return cls(
            block_out_channels=channels, **known_entries(cls, config, {"layers_per_block": 1, "sample_size": 32})
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` from which diffusers builds the same autoencoder."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "in_channels": self.in_channels,
            "latent_channels": self.latent_channels,
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_num_groups,
            "out_channels": self.out_channels,
            "sample_size": self.sample_size,
            "scaling_factor": self.scaling_factor,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }


def _added(config: dict[str, Any]) -> dict[str, Any]:
    """Take what says that a U-Net is told pooled text and sizes, or a vector, out of `config`."""
    kind = config.pop("addition_embed_type", None)
    size_dim = config.pop("addition_time_embed_dim", None)
    width, classes = config.pop(_WIDTH, None), config.pop(_CLASSES, None)
    if classes == _VECTOR and kind is None and width is not None:
        return {"class_dim": width}
    if classes is not None:
        raise ConfigError(
            f"U-Net with {_CLASSES}={str(classes)[:40]} is another architecture than Stable Diffusion (expected none, or "
            f"{_VECTOR}, as unCLIP models have it, with {_WIDTH})"
        )
    if kind not in (None, ADDED_KIND) or (kind is None) != (width is None):
        raise ConfigError(
            f"U-Net with addition_embed_type={str(kind)[:40]} and {_WIDTH}={str(width)[:40]} is another "
            f"architecture than Stable Diffusion (expected neither, or {ADDED_KIND} and a width)"
        )
    return {} if kind is None else {"added_dim": width, **({} if size_dim is None else {"size_dim": size_dim})}


def _attention_levels(blocks: Any, names: Mapping[str, bool]) -> tuple[bool, ...]:
    try:
        return tuple(names[block] for block in blocks)
    except KeyError as error:
        raise ConfigError(f"U-Net block {error} is not supported; expected {' or '.join(names)}") from error


def _refuse_other_architecture(
    part: str, config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], fields: set[str]
) -> None:
    for key, value in config.items():
        if key in fixed:
            # A list of equal entries says the same as the single value.
            values = value if isinstance(value, (list, tuple)) else (value,)
            if any(entry not in fixed[key] for entry in values):
                raise ConfigError(
                    f"{part} with {key}={str(value)[:80]} is another architecture than "
                    f"Stable Diffusion 1.x, 2.x or XL (expected {fixed[key][0]!r})"
                )
        elif key not in fields and not key.startswith("_") and value not in (None, False):
            raise ConfigError(
                f"{part} has the unknown key {key[:80]}={str(value)[:80]}; latentdiff cannot tell what it changes"
            )


def _check_values(part: str, config: UNetConfig | VAEConfig) -> None:
    """Every value is of its type and of a size that can be built: nothing is allocated for one that is not."""
    for entry in fields(config):
        value, kind = getattr(config, entry.name), entry.type
        if value is None and "None" in kind:
            continue
        values = value if isinstance(value, tuple) else (value,)
        if not values or len(values) > MOST_LEVELS:
            raise ConfigError(f"{part} {entry.name} needs 1 to {MOST_LEVELS} entries, found {len(values)}")
        largest = LARGEST.get(entry.name, 2**16)
        for each in values:
            if "int" in kind and not (type(each) is int and 0 < each <= largest):
                raise ConfigError(f"{part} {entry.name} must be a number from 1 to {largest}, found {str(each)[:40]!r}")
            if "bool" in kind and not isinstance(each, bool):
                raise ConfigError(f"{part} {entry.name} must be true or false, found {str(each)[:40]!r}")
            if kind == "float" and not (isinstance(each, (int, float)) and 1e-6 < each < 1e6):
                raise ConfigError(f"{part} {entry.name} must be a number above 0, found {str(each)[:40]!r}")


def _check_groups(part: str, widths: tuple[int, ...], groups: int) -> None:
    for width in widths:
        if width % groups:
            raise ConfigError(f"{part} width {width} is not divisible by norm_num_groups {groups}")

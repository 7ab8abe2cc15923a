"""ControlNet (Zhang et al. 2023): a second way down, which sees a hint and is added to the skips of the U-Net.

The hint is an image in pixels: edges, depths, poses. Parameter names are those of diffusers' ControlNetModel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import ConfigError
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.device import in_float32
from latentdiff.networks.layers import Context, ProjectedContext
from latentdiff.networks.rows import Area, Rows, acts_at
from latentdiff.networks.unet import UNetEncoder

_ORDERS = ("rgb", "bgr")
_OF_UNIONS = ("num_control_type", "num_trans_channel", "num_trans_head", "num_trans_layer", "num_proj_channel")
_OWN = {
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """The way down of a U-Net, and what reads the hint.

    hint_widths: the hint passes through these; each after the first halves its sides.
    order: of the hint's channels, "rgb" or "bgr".
    pools: the outputs are averaged over the image, as those of the shuffle models are.
    modes: how many kinds of hints it is told apart, 0 if none; see `union`.
    mixing_layers: transformer blocks of such a network over the hint's mean.
    """

    unet: UNetConfig
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    order: str = "rgb"
    pools: bool = False
    modes: int = 0
    mixing_layers: int = 1

    def __post_init__(self) -> None:
        if not 1 <= len(self.hint_widths) <= 8 or not all(type(w) is int and 0 < w <= 4096 for w in self.hint_widths):
            raise ConfigError(f"a ControlNet's hint needs 1 to 8 widths up to 4096, found {str(self.hint_widths)[:60]}")
        if self.order not in _ORDERS:
            raise ConfigError(f"a ControlNet's hint has channels rgb or bgr, found {str(self.order)[:40]!r}")
        if not isinstance(self.pools, bool):
            raise ConfigError(f"global_pool_conditions must be true or false, found {str(self.pools)[:40]!r}")

    @property
    def downscale(self) -> int:
        """Pixels of the hint per latent along one side."""
        return 2 ** (len(self.hint_widths) - 1)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], *, modes: int = 0, mixing_layers: int = 1) -> Self:
        """Read a ControlNetModel's `config.json`; the last two are read off the tensors.

        Raises:
            ConfigError: it describes another architecture.
        """
        own = {name: config.get(name, default) for name, default in _OWN.items()}
        rest = {name: value for name, value in config.items() if name not in (*_OWN, *(_OF_UNIONS if modes else ()))}
        if own["conditioning_channels"] != 3:
            raise ConfigError(f"a ControlNet's hint has 3 channels, found {str(own['conditioning_channels'])[:40]}")
        if "down_block_types" in rest:
            mirrored = [str(name).replace("Down", "Up") for name in reversed(rest["down_block_types"])]
            rest["up_block_types"] = mirrored
        return cls(
            unet=UNetConfig.from_diffusers(rest),
            hint_widths=tuple(own["conditioning_embedding_out_channels"]),
            order=own["controlnet_conditioning_channel_order"],
            pools=own["global_pool_conditions"],
            modes=modes,
            mixing_layers=mixing_layers,
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` from which diffusers builds the same ControlNet."""
        config = self.unet.to_diffusers()
        for name in ("out_channels", "sample_size", "up_block_types", "center_input_sample"):
            config.pop(name)
        return config | {
            "_class_name": "ControlNetModel",
            "conditioning_channels": 3,
            "conditioning_embedding_out_channels": list(self.hint_widths),
            "controlnet_conditioning_channel_order": self.order,
            "global_pool_conditions": self.pools,
            **(self._of_unions() if self.modes else {}),
        }

    def _of_unions(self) -> dict[str, Any]:
        width = self.unet.block_out_channels[0]
        values = (self.modes, width, 8, self.mixing_layers, width)  # the number of heads changes nothing; see `union`
        return {"_class_name": "ControlNetUnionModel", **dict(zip(_OF_UNIONS, values, strict=True))}


def control_config(unet: UNetConfig, downscale: int) -> ControlNetConfig:
    """That of a new ControlNet for a U-Net. In published ones, beside a U-Net that is 320 wide, hints pass through 16, 32, 96
    and 256 channels at 8 pixels for a latent; beside others in proportion, through fewer for fewer pixels.

    Args:
        downscale: pixels for a latent along one side, a power of two.
    """
    levels, scale = downscale.bit_length(), unet.block_out_channels[0] / 320
    widths = (16, 32, 96, *[256] * (levels - 3))[:levels]
    return ControlNetConfig(unet=unet, hint_widths=tuple(max(8, 8 * round(width * scale / 8)) for width in widths))


class _HintEmbedding(nn.Module):
    """Convolutions from the hint in pixels to the width of the U-Net at the size of the latents."""

    def __init__(self, widths: Sequence[int], out: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, below in zip(widths, widths[1:], strict=False):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, below, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, hint: Tensor) -> Tensor:
        for conv in (self.conv_in, *self.blocks):
            hint = F.silu(conv(hint))
        return self.conv_out(hint)


class ControlNetwork(UNetEncoder):
    """Noisy latents, timestep, text and hint -> what is added to the skips and the middle of a U-Net."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        self.control = config
        widths, layers = config.unet.block_out_channels, config.unet.layers_per_block
        self.controlnet_cond_embedding = _HintEmbedding(config.hint_widths, widths[0])
        skips = [widths[0]]
        for level, width in enumerate(widths):
            skips += [width] * (layers + (level < len(widths) - 1))
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for width in skips)
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)

    @torch.no_grad()
    def start_from(self, unet: UNetEncoder) -> None:
        """Begin as training does: the way down is the U-Net's, and what is added to it and to its skips is zero (Zhang et
        al. 2023, section 3.1).

        The convolutions before the zero are drawn so that a hint keeps its size through them (He et al. 2015): under torch's
        own smaller weights it fades to a thousandth on its way, and thousands of steps pass before anything follows it.
        """
        beneath = unet.state_dict()
        self.load_state_dict({name: beneath.get(name, own) for name, own in self.state_dict().items()})
        hint = self.controlnet_cond_embedding
        for conv in (hint.conv_in, *hint.blocks):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        for conv in (hint.conv_out, *self.controlnet_down_blocks, self.controlnet_mid_block):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def embed_hint(self, hint: Tensor, mode: int | None = None) -> Tensor:
        """A hint (N, 3, H, W), RGB from 0 to 1, -1 where it is masked -> (N, C, h, w), once for all steps.

        Args:
            mode: its kind, of a network for several; see `union`.
        """
        return self.controlnet_cond_embedding(hint.flip(1) if self.control.order == "bgr" else hint)

    def embed_mode(self, mode: int | None) -> Tensor | None:
        """What a network for several kinds of hints adds to the embedding of the timestep; None of others."""
        return None

    def forward(
        self, x: Tensor, t: Tensor | float, context: Context, hint: Tensor, told: Tensor | None = None
    ) -> list[Tensor]:
        """The residuals of the skips from the first to the last, and of the middle.

        Args:
            x, t, context: as `UNet.forward` takes them; x without the channels of an inpainting model.
            hint: what `embed_hint` gave.
            told: what `embed_mode` gave.
        """
        time, context = self.embedded(x, t, context)
        time = time if told is None else time + told
        x, skips = self.encode(self.conv_in(x) + hint, time, context)
        convs = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        found = [conv(output) for conv, output in zip(convs, (*skips, x), strict=True)]
        return [one.mean((2, 3), keepdim=True) for one in found] if self.control.pools else found


@dataclass(frozen=True)
class AppliedControl:
    """A control on one walk.

    hint: (1, C, h, w), embedded.
    scale: of all that is added; with `guesses`, of the middle, and less of what lies above.
    guesses: acts on what is followed alone, so that the hint says what the prompt does not (guess mode).
    window: the timesteps low < t <= high at which it acts.
    told: of the hint's kind, (1, time channels), or None; see `ControlNetwork.embed_mode`.
    """

    network: ControlNetwork
    hint: Tensor
    scale: float
    guesses: bool
    window: tuple[float, float]
    told: Tensor | None = None

    def on(self, text: Context, count: int, *, avoided: bool) -> ControlRows:
        """On `count` rows of a batch with this text; `avoided` are those of the negative prompt."""
        acts = not (avoided and (self.guesses or self.network.control.pools))
        return ControlRows(self, self.network.project_context(text), torch.full((count,), acts))

    def within(self, rows: slice, columns: slice) -> AppliedControl:
        """The same for a part of the latents."""
        return replace(self, hint=self.hint[..., rows, columns])


@dataclass(frozen=True)
class ControlRows(Rows):
    """A control, the text as it sees it, and on which rows (N,) it acts."""

    control: AppliedControl
    projected: ProjectedContext
    acts: Tensor

    @classmethod
    def cat(cls, parts: Sequence[ControlRows]) -> ControlRows:
        """Join along the batch."""
        projected = ProjectedContext.cat([part.projected for part in parts])
        return cls(parts[0].control, projected, torch.cat([part.acts for part in parts]))

    def cut(self, area: Area) -> ControlRows:
        """See `Rows.cut`."""
        return replace(self, control=replace(self.control, hint=self.control.hint[..., *area]))

    def residuals(self, x: Tensor, t: float, text: Context, dtype: torch.dtype) -> list[Tensor] | None:
        """What is added at the rows of x (N, C, h, w), in `dtype`; None if nothing is.

        Args:
            text: for another dtype than that of the network, in which the projections are of no use.
        """
        control, network = self.control, self.control.network
        if not control.scale or not acts_at(control.window, t) or not self.acts.any():
            return None
        own = next(network.parameters()).dtype
        context: Context = self.projected if own == dtype else text
        rows = self.acts.nonzero().flatten().to(x.device)
        is_whole = len(rows) == len(x)
        with nullcontext() if own == dtype else in_float32(network):
            some = x if is_whole else x[rows]
            context = context if is_whole else _rows_of(context, rows)
            told = None if control.told is None else control.told.to(dtype)
            found = network(some.to(dtype), t, context, control.hint.to(dtype), told)
        scaled = [factor * one for factor, one in zip(self._factors(len(found)), found, strict=True)]
        if is_whole:
            return scaled
        return [one.new_zeros(len(x), *one.shape[1:]).index_copy(0, rows, one) for one in scaled]

    def _factors(self, count: int) -> list[float]:
        if not self.control.guesses or self.control.network.control.pools:
            return [self.control.scale] * count
        return [self.control.scale * factor for factor in torch.logspace(-1, 0, count).tolist()]


def matched(config: ControlNetConfig, unet: UNetConfig) -> ControlNetConfig:
    """With what leaves no trace in a file's tensors, as the number of heads, taken from the U-Net that it was made for."""
    own = replace(
        config.unet,
        num_heads=unet.num_heads,
        norm_num_groups=unet.norm_num_groups,
        upcast_attention=unet.upcast_attention,
        size_dim=unet.size_dim,
    )
    return replace(config, unet=own)


def _rows_of(context: Context, rows: Tensor) -> Context:
    if isinstance(context, Tensor):
        return context[rows]
    if not isinstance(context, ProjectedContext):
        return type(context)(context.text[rows], context.sizes[rows])
    some = ProjectedContext({layer: (k[rows], v[rows]) for layer, (k, v) in context.items()})
    some.added = None if context.added is None else context.added[rows]
    return some

"""The conditional U-Net of Stable Diffusion 1.x, 2.x and XL (Ronneberger et al. 2015; Ho et al. 2020; Rombach et al. 2022).

One class for every size: what the config describes is what is built. Parameter names are those of diffusers'
UNet2DConditionModel. Nothing here knows about guidance, caches or editing: those wrap the call or tap into named
modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from latentdiff.errors import UsageError
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.layers import (
    Context,
    Downsample,
    ProjectedContext,
    ResnetBlock,
    SizedText,
    SpatialTransformer,
    TimestepEmbedding,
    Upsample,
    added_embedding,
    sinusoidal_embedding,
    text_attentions,
)
from latentdiff.networks.pooled import split_pooled

_EPS = 1e-5


class UNetEncoder(nn.Module):
    """The way down to the middle: what a U-Net and a ControlNet share."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], config.time_cond_proj_dim)
        if config.added_dim is not None:
            self.add_embedding = TimestepEmbedding(config.added_dim, 4 * widths[0])
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, 4 * widths[0])
        if config.class_dim is not None:
            self.class_embedding = TimestepEmbedding(config.class_dim, 4 * widths[0])
        self.down_blocks = nn.ModuleList(_DownLevel(config, level) for level in range(len(widths)))
        self.mid_block = _MidBlock(config)

    def encode(self, x: Tensor, time: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        """What `conv_in` gave (N, C, h, w) -> the middle's output, and the skips from the first to the last."""
        skips = [x]
        for level in self.down_blocks:
            x = level(x, time, context, skips)
        return self.mid_block(x, time, context), skips

    def embedded(self, x: Tensor, t: Tensor | float, context: Context) -> tuple[Tensor, Tensor | ProjectedContext]:
        """The embedding of the timesteps, (N, time channels), with what the U-Net is told beside; and the text alone."""
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(x.shape[0])
        time = self.time_embedding(sinusoidal_embedding(t, self.config.block_out_channels[0]).to(x.dtype))
        if isinstance(context, ProjectedContext):
            return time if context.added is None else time + context.added, context
        text, added = self._told(context)
        return time if added is None else time + added, text

    def project_context(self, context: Tensor | SizedText) -> ProjectedContext:
        """Compute the text's keys and values of every cross-attention once, for use at every step of one prompt.

        Args:
            context: embeddings (N, L, cross_attention_dim), with sizes, a label or a vector if the U-Net is told them.
        """
        text, added = self._told(context)
        projected = ProjectedContext({layer: layer.keys_values(text) for layer in text_attentions(self)})
        projected.added = added
        return projected

    def enable_gradient_checkpointing(self) -> None:
        """Train with less memory: recompute each block's activations in the backward pass (Chen et al. 2016)."""
        for module in self.modules():
            if isinstance(module, _Level):
                module.checkpointing = True

    def _told(self, context: Tensor | SizedText) -> tuple[Tensor, Tensor | None]:
        """The text for the cross-attentions, and what is added to the embedding of the timestep."""
        config = self.config
        if config.added_dim is config.num_class_embeds is config.class_dim is None:
            if isinstance(context, SizedText):
                raise UsageError("this U-Net is told nothing beside the text, found numbers for it")
            return context, None
        if not isinstance(context, SizedText):
            raise UsageError("this U-Net is told numbers beside the text; expected a SizedText, found a tensor")
        sizes = context.sizes.to(context.text.device)
        if config.num_class_embeds is not None:
            return context.text, self.class_embedding(sizes[:, 0].long())
        if config.added_dim is None:
            return context.text, self.class_embedding(sizes.to(context.text.dtype))
        text, pooled = split_pooled(context.text, config.added_dim - sizes.shape[1] * config.size_dim)
        return text, self.add_embedding(added_embedding(pooled, sizes, config.size_dim))


class UNet(UNetEncoder):
    """Noisy latents, timestep and text -> raw prediction (noise, velocity or clean latents, as the model was
    trained)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths = config.block_out_channels
        self.up_blocks = nn.ModuleList(_UpLevel(config, level) for level in reversed(range(len(widths))))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self, x: Tensor, t: Tensor | float, context: Context, residuals: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Predict.

        Args:
            x: noisy latents (N, in_channels, h, w); any height and width.
            t: timesteps (N,) or one for all, whole or fractional, 0 to num_train_timesteps - 1.
            context: text embeddings (N, L, cross_attention_dim), with sizes if the U-Net is told them, or what
                `project_context` made of them.
            residuals: what is added to each skip, from the first to the last, and to the output of the middle.

        Returns:
            (N, out_channels, h, w).
        """
        time, context = self.embedded(x, t, context)
        x, skips = self.encode(self.conv_in(x), time, context)
        if residuals is not None:
            for index, residual in enumerate(residuals[:-1]):
                skips[index] = skips[index] + residual
            x = x + residuals[-1]
        for level in self.up_blocks:
            x = level(x, time, context, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class _Level(nn.Module):
    """ResBlocks of one resolution, each followed by a spatial transformer where the level has attention."""

    def __init__(self, config: UNetConfig, level: int, in_channels: list[int], *, attention: bool) -> None:
        super().__init__()
        width = config.block_out_channels[level]
        self.checkpointing = False
        self.resnets = nn.ModuleList(
            ResnetBlock(
                channels, width,
                time_channels=4 * config.block_out_channels[0], groups=config.norm_num_groups, eps=_EPS,
            )
            for channels in in_channels
        )  # fmt: skip
        if attention:
            crossed = config.only_cross_attention[level]
            self.attentions = nn.ModuleList(_transformer(config, level, crossed=crossed) for _ in in_channels)

    def block(self, index: int, x: Tensor, time: Tensor, context: Context) -> Tensor:
        """ResBlock number `index` and its transformer."""
        if self.checkpointing and torch.is_grad_enabled():
            # What a tap reads from its context must be the same when it is computed again.
            again = self._block if torch.compiler.is_compiling() else partial(copy_context().run, self._block)
            return checkpoint(again, index, x, time, context, use_reentrant=False)
        return self._block(index, x, time, context)

    def _block(self, index: int, x: Tensor, time: Tensor, context: Context) -> Tensor:
        x = self.resnets[index](x, time)
        return self.attentions[index](x, context) if hasattr(self, "attentions") else x


class _DownLevel(_Level):
    def __init__(self, config: UNetConfig, level: int) -> None:
        widths = config.block_out_channels
        in_channels = [widths[max(level - 1, 0)], *[widths[level]] * (config.layers_per_block - 1)]
        super().__init__(config, level, in_channels, attention=config.attention_levels[level])
        last = level == len(widths) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(widths[level], symmetric=True)])

    def forward(self, x: Tensor, time: Tensor, context: Context, skips: list[Tensor]) -> Tensor:
        """Appends every output to `skips`."""
        for index in range(len(self.resnets)):
            x = self.block(index, x, time, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class _MidBlock(nn.Module):
    """ResBlock, spatial transformer, ResBlock at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(
            ResnetBlock(
                width, width,
                time_channels=4 * config.block_out_channels[0], groups=config.norm_num_groups, eps=_EPS,
            )
            for _ in range(2)
        )  # fmt: skip
        self.attentions = nn.ModuleList([_transformer(config, len(config.block_out_channels) - 1, crossed=False)])

    def forward(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class _UpLevel(_Level):
    def __init__(self, config: UNetConfig, level: int) -> None:
        widths = config.block_out_channels
        below = widths[min(level + 1, len(widths) - 1)]
        # The skips come back in reverse: those of this level's blocks, then what entered the level.
        skip_channels = [*[widths[level]] * config.layers_per_block, widths[max(level - 1, 0)]]
        inputs = [below, *[widths[level]] * config.layers_per_block]
        in_channels = [a + b for a, b in zip(inputs, skip_channels, strict=True)]
        super().__init__(config, level, in_channels, attention=config.attention_levels[level])
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(widths[level])])

    def forward(self, x: Tensor, time: Tensor, context: Context, skips: list[Tensor]) -> Tensor:
        """Takes its skips from the end of `skips`."""
        for index in range(len(self.resnets)):
            x = self.block(index, torch.cat([x, skips.pop()], dim=1), time, context)
        for upsample in self.upsamplers:
            # The size of the level above need not be exactly twice this one's.
            x = upsample(x, size=skips[-1].shape[-2:])
        return x


def _transformer(config: UNetConfig, level: int, *, crossed: bool) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[level],
        config.cross_attention_dim,
        config.num_heads[level],
        groups=config.norm_num_groups,
        linear_projection=config.use_linear_projection,
        upcast=config.upcast_attention,
        depth=config.transformer_depth[level],
        crossed=crossed,
    )

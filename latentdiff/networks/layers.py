"""What the networks are built from: transformers, residual blocks, changes of resolution, the embedding of the timestep
(Ho et al. 2020, appendix B; Rombach et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.networks.attention import attention

KeysValues = tuple[Tensor, Tensor]  # each (N, heads, S, d)
# Keys and values that are attended to apart from the text's, and how strongly: a number, or (1, 1, L, 1) for the pixels.
Further = tuple[Tensor, Tensor, float | Tensor]



class ProjectedContext(dict[nn.Module, KeysValues]):
    """The text's keys and values for every cross-attention of one U-Net, made once per prompt by
    `UNet.project_context`.

    Attributes:
        added: (N, time channels), what pooled text and sizes, or what else the U-Net is told, add to the embedding of the
            timestep, if they do.
        further: what cross-attentions attend to besides; each answer is added to that of the text (decoupled
            cross-attention, Ye et al. 2023, eq. 5).
    """

    added: Tensor | None = None
    further: Mapping[nn.Module, Sequence[Further]] = {}

    @classmethod
    def of(cls, layers: Iterable[nn.Module], tensors: Sequence[Tensor]) -> Self:
        """Inverse of `tensors`: for engines, which take tensors alone."""
        layers = list(layers)
        context = cls(zip(layers, zip(tensors[::2], tensors[1::2], strict=False), strict=True))
        context.added = tensors[-1] if len(tensors) % 2 else None
        return context

    def tensors(self, layers: Iterable[nn.Module]) -> list[Tensor]:
        """Keys and values in the order of `layers`, and at the end what is added, if anything is."""
        found = [part for layer in layers for part in self[layer]]
        return found if self.added is None else [*found, self.added]

    def with_further(self, further: Mapping[nn.Module, Sequence[Further]]) -> Self:
        """The same, and what is attended to besides the text."""
        made = type(self)(self)
        made.added, made.further = self.added, further
        return made

    @classmethod
    def cat(cls, contexts: list[Self]) -> Self:
        """Join contexts of the same U-Net along the batch."""
        first = contexts[0]
        joined = cls(
            {
                layer: tuple(torch.cat(parts) for parts in zip(*(c[layer] for c in contexts), strict=True))
                for layer in first
            }
        )
        if first.added is not None:
            joined.added = torch.cat([context.added for context in contexts])
        return joined


class SizedText(NamedTuple):
    """Text embeddings with the numbers that a U-Net is told beside them: what `UNet.project_context` takes."""

    text: Tensor  # (N, L, C); of SDXL (N, L + 1, C), the pooled text in the last row; see `networks.pooled`
    sizes: Tensor  # (N, K): the sizes of SDXL, a label (K = 1), or a vector


Context = Tensor | SizedText | ProjectedContext


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or to a context.

    Args:
        channels: width of the queries and of the output.
        context_channels: width of the context.
        heads: number of heads; divides `channels`.
        bias: whether queries, keys and values have a bias (the autoencoder's do).
        upcast: compute in float32, for models whose scores overflow float16.
    """

    def __init__(
        self, channels: int, context_channels: int, heads: int, *, bias: bool = False, upcast: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels, channels, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def keys_values(self, context: Tensor) -> KeysValues:
        """context (N, S, context_channels) -> keys and values (N, heads, S, d)."""
        return self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (N, L, channels), context (N, S, context_channels) or projected -> (N, L, channels)."""
        q = self._split_heads(self.to_q(x))
        k, v = context[self] if isinstance(context, ProjectedContext) else self.keys_values(context)
        out = self._attend(q, k, v)
        if isinstance(context, ProjectedContext):
            for more_k, more_v, scale in context.further.get(self, ()):
                out = out + scale * self._attend(q, more_k, more_v)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.float(), k.float(), v.float()).to(q.dtype) if self.upcast else attention(q, k, v)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, heads, L, d)


class GEGLU(nn.Module):
    """A linear layer gated by a second one through GELU (Shazeer 2020)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, in_channels) -> (N, L, out_channels)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The position-wise part of a transformer block, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The identity keeps the place, and so the parameter names, of the dropout layer in the public layout.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each normalised before and added to its input.

    Args:
        crossed: the first attention, too, is to the text.
    """

    def __init__(
        self, channels: int, context_channels: int, heads: int, *, upcast: bool, crossed: bool = False
    ) -> None:
        super().__init__()
        self.crossed = crossed
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, context_channels if crossed else channels, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_channels, heads, upcast=upcast)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (N, L, C) -> (N, L, C)."""
        h = self.norm1(x)
        x = x + self.attn1(h, context if self.crossed else h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))

    def text_attentions(self) -> list[Attention]:
        """Those that read the text."""
        return [self.attn1, self.attn2] if self.crossed else [self.attn2]


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the pixels of a feature map, as a residual.

    The projections around them are 1x1 convolutions in Stable Diffusion 1.x and linear layers in 2.x and XL: the same
    mathematics with weights of another shape.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        heads: int,
        *,
        groups: int,
        linear_projection: bool,
        upcast: bool,
        depth: int = 1,
        crossed: bool = False,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_channels, heads, upcast=upcast, crossed=crossed) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (N, C, h, w) -> (N, C, h, w)."""
        height, width = x.shape[-2:]
        h = self.norm(x)
        h = self.proj_in(_to_tokens(h)) if self.linear_projection else _to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear_projection:
            return x + _to_map(self.proj_out(h), height, width)
        return x + self.proj_out(_to_map(h, height, width))


def text_attentions(network: nn.Module) -> list[Attention]:
    """All attentions of a network that read the text, in its order."""
    blocks = (module for module in network.modules() if isinstance(module, TransformerBlock))
    return [layer for block in blocks for layer in block.text_attentions()]


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (N, C, h, w) -> (N, h w, C)


def _to_map(x: Tensor, height: int, width: int) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (height, width))  # (N, h w, C) -> (N, C, h, w)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual connection; the time embedding enters between them.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; a 1x1 convolution adapts the residual where they differ.
        time_channels: width of the time embedding, or None for a block without one (the autoencoder's).
        groups: groups of the normalisation.
        eps: added to the variance by the normalisation.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, time_channels: int | None, groups: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (N, C_in, h, w) and time (N, time_channels) -> (N, C_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return residual + h


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution.

    The U-Net pads on all sides; the autoencoder pads on the right and at the bottom only (`symmetric=False`).
    """

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, ceil(h/2), ceil(w/2)); rounded down instead where padding is one-sided."""
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Enlarge by nearest neighbours, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        """(N, C, h, w) -> (N, C, *size); twice the resolution where no size is given."""
        x = F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=size)
        return self.conv(x)


def sinusoidal_embedding(t: Tensor, channels: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of geometrically spaced frequencies (Vaswani et al. 2017, section 3.5), cosines first as in Stable
    Diffusion.

    Args:
        t: timesteps (N,), whole or fractional.
        channels: width of the embedding, even.
        max_period: 2π times the longest wavelength.

    Returns:
        (N, channels) in float32.
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (N, channels / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """A two-layer perceptron on the sinusoidal embedding.

    Args:
        condition_channels: width of another embedding, if there is one: `cond_proj` makes of it what is added to the
            first. See `told_guidance`.
    """

    def __init__(self, in_channels: int, out_channels: int, condition_channels: int | None = None) -> None:
        super().__init__()
        if condition_channels is not None:
            self.cond_proj = nn.Linear(condition_channels, in_channels, bias=False)
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels) -> (N, out_channels)."""
        return self.linear_2(F.silu(self.linear_1(x)))


def added_embedding(pooled: Tensor, sizes: Tensor, size_channels: int) -> Tensor:
    """Pooled text and the sinusoids of some numbers, side by side (Podell et al. 2023, section 2.2).

    Args:
        pooled: (N, P).
        sizes: (N, K), in pixels; see `networks.sizes`.
        size_channels: width of each number's sinusoids.

    Returns:
        (N, P + K size_channels), in the dtype of `pooled`.
    """
    sinusoids = sinusoidal_embedding(sizes.flatten(), size_channels).unflatten(0, sizes.shape).flatten(1)
    return torch.cat([pooled, sinusoids.to(pooled)], dim=1)

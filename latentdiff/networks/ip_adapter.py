"""IP-Adapter (Ye et al. 2023): what a CLIP image encoder sees becomes tokens, with keys and values of their own for every
cross-attention. Parameter names are those of its files.

    out = softmax(q kᵀ / √d) v + scale softmax(q k'ᵀ / √d) v'          (eq. 5; k', v' of the image's tokens)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.networks.layers import Context, Further, KeysValues
from latentdiff.networks.rows import Rows, acts_at

HEAD = 64  # channels of a head of the resampler


@dataclass(frozen=True, kw_only=True)
class IPAdapterConfig:
    """What the tensors of a file show.

    kind: "plain" projects the embedding of the whole image; "full" each hidden state; "plus" resamples hidden states.
    image_width: of what it is given; width: of its tokens, the U-Net's `cross_attention_dim`.
    tokens: that an image becomes; 0 of "full" is one for each hidden state.
    inner, depth, heads, feed_forward: of the resampler.
    layers: number in the file -> width, of the cross-attentions.
    """

    kind: Literal["plain", "full", "plus"]
    image_width: int
    width: int
    tokens: int
    layers: Mapping[str, int]
    inner: int = 0
    depth: int = 0
    heads: int = 0
    feed_forward: int = 0


class IPAdapterNetwork(nn.Module):
    """What an image encoder gives -> keys and values for the cross-attentions of a U-Net."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.image_proj = {"plain": _Projection, "full": _FullProjection, "plus": _Resampler}[config.kind](config)
        self.ip_adapter = nn.ModuleDict(
            {
                number: nn.ModuleDict(
                    {name: nn.Linear(config.width, width, bias=False) for name in ("to_k_ip", "to_v_ip")}
                )
                for number, width in config.layers.items()
            }
        )

    def tokens(self, seen: Tensor) -> Tensor:
        """Embeddings (N, C), or hidden states (N, L, C) of N images that are seen as one -> (1, N tokens, width)."""
        return self.image_proj(seen).flatten(0, 1)[None]

    def keys_values(self, tokens: Tensor, attentions: Sequence[nn.Module]) -> dict[nn.Module, KeysValues]:
        """Of tokens (1, T, width) for the cross-attentions, in the order of the file: each (1, heads, T, d)."""
        found: dict[nn.Module, KeysValues] = {}
        for attention, layer in zip(attentions, self.ip_adapter.values(), strict=True):
            heads = (attention.heads, -1)
            k, v = (layer[name](tokens).unflatten(2, heads).transpose(1, 2) for name in ("to_k_ip", "to_v_ip"))
            found[attention] = k, v
        return found


class _Projection(nn.Module):
    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.image_width, config.tokens * config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, seen: Tensor) -> Tensor:
        """(N, C) -> (N, tokens, width)."""
        return self.norm(self.proj(seen).unflatten(1, (-1, self.norm.normalized_shape[0])))


class _FullProjection(nn.Module):
    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        seen, width = config.image_width, config.width
        self.proj = nn.Sequential(nn.Linear(seen, seen), nn.GELU(), nn.Linear(seen, width), nn.LayerNorm(width))

    def forward(self, seen: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, width)."""
        return self.proj(seen)


class _Resampler(nn.Module):
    """Learned queries that gather what they need of the hidden states (the Perceiver of Alayrac et al. 2022)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, config.tokens, config.inner))
        self.proj_in = nn.Linear(config.image_width, config.inner)
        self.layers = nn.ModuleList(
            nn.ModuleList([_Gathering(config), _feed_forward(config)]) for _ in range(config.depth)
        )
        self.proj_out = nn.Linear(config.inner, config.width)
        self.norm_out = nn.LayerNorm(config.width)

    def forward(self, seen: Tensor) -> Tensor:
        """(N, L, C) -> (N, tokens, width)."""
        x, latents = self.proj_in(seen), self.latents.expand(len(seen), -1, -1)
        for gather, feed_forward in self.layers:
            latents = latents + gather(x, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


class _Gathering(nn.Module):
    """Attention of the latents to the image and to themselves."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        inside, self.heads = config.heads * HEAD, config.heads
        self.norm1, self.norm2 = nn.LayerNorm(config.inner), nn.LayerNorm(config.inner)
        self.to_q = nn.Linear(config.inner, inside, bias=False)
        self.to_kv = nn.Linear(config.inner, 2 * inside, bias=False)
        self.to_out = nn.Linear(inside, config.inner, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """x (N, L, C), latents (N, T, C) -> (N, T, C)."""
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(x), latents], dim=1)).chunk(2, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, HEAD)).transpose(1, 2) for part in (self.to_q(latents), k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _feed_forward(config: IPAdapterConfig) -> nn.Sequential:
    wide = config.feed_forward
    return nn.Sequential(
        nn.LayerNorm(config.inner),
        nn.Linear(config.inner, wide, bias=False),
        nn.GELU(),
        nn.Linear(wide, config.inner, bias=False),
    )


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """Name of the transformer -> its cross-attention, in the order in which files number them, the odd numbers: down,
    up, middle (that of the attention processors of diffusers)."""
    order = ("down_blocks", "up_blocks", "mid_block")
    found = {name: module.attn2 for name, module in unet.named_modules() if hasattr(module, "attn2")}
    return {name: found[name] for start in order for name in found if name.startswith(start)}


@dataclass(frozen=True)
class AppliedImagePrompt:
    """An image prompt on one walk.

    followed, avoided: keys and values (1, heads, T, d), of the image, and of what stands for none.
    scales: how strongly it acts on each cross-attention; those that are not there are left as they are.
    window: the timesteps low < t <= high at which it acts.
    """

    followed: Mapping[nn.Module, KeysValues]
    avoided: Mapping[nn.Module, KeysValues]
    scales: Mapping[nn.Module, float | Tensor]
    window: tuple[float, float]

    def within(self, rows: slice, columns: slice) -> AppliedImagePrompt:
        """The same for a part of the latents."""
        return self

    def on(self, text: Context, count: int, *, avoided: bool) -> ImagePromptRows:
        """On `count` rows of a batch; `avoided` are those of the negative prompt."""
        own = self.avoided if avoided else self.followed
        rows = {layer: (k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for layer, (k, v) in own.items()}
        return ImagePromptRows(self, rows)


@dataclass(frozen=True)
class ImagePromptRows(Rows):
    """An image prompt, and its keys and values (N, heads, T, d) for the rows of a batch."""

    prompt: AppliedImagePrompt
    keys_values: Mapping[nn.Module, KeysValues]

    @classmethod
    def cat(cls, parts: Sequence[ImagePromptRows]) -> ImagePromptRows:
        """Join along the batch."""
        joined = {
            layer: (
                torch.cat([p.keys_values[layer][0] for p in parts]),
                torch.cat([p.keys_values[layer][1] for p in parts]),
            )
            for layer in parts[0].keys_values
        }
        return cls(parts[0].prompt, joined)

    def attends(self, t: float) -> bool:
        """See `Rows`."""
        return acts_at(self.prompt.window, t)

    def attended(self, dtype: torch.dtype) -> Mapping[nn.Module, Further]:
        """See `Rows`."""
        return {
            layer: (k.to(dtype), v.to(dtype), scale.to(dtype) if isinstance(scale, Tensor) else scale)
            for layer, scale in self.prompt.scales.items()
            for k, v in (self.keys_values[layer],)
        }

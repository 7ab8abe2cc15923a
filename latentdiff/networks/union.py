"""A ControlNet for several kinds of hints at once, which is told which of them it sees ("union" and "promax" of xinsir).

Its names and its arithmetic are those of diffusers' ControlNetUnionModel. The mixing layers of both let every token attend
to the same token of the other rows of the batch, which are equal where a prompt and a negative one are guided for one
image: each token sees itself alone. So it is here, and an image does not depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.networks.controlnet import ControlNetConfig, ControlNetwork
from latentdiff.networks.layers import TimestepEmbedding, sinusoidal_embedding


class _MixingLayer(nn.Module):
    """A transformer block on one token: attention to itself is its value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 1)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Module()
        self.mlp.c_fc = nn.Linear(width, 4 * width)
        self.mlp.c_proj = nn.Linear(4 * width, width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        weight, bias = (part.chunk(3)[2] for part in (self.attn.in_proj_weight, self.attn.in_proj_bias))
        x = x + self.attn.out_proj(F.linear(self.ln_1(x), weight, bias))
        wide = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(wide * torch.sigmoid(1.702 * wide))  # quick GELU


class UnionNetwork(ControlNetwork):
    """See `ControlNetwork`; `mode` is the place of a hint's kind among those that it was trained on."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        width = config.unet.block_out_channels[0]
        self.task_embedding = nn.Parameter(torch.empty(config.modes, width))
        self.transformer_layes = nn.ModuleList(  # so spelled in the files
            _MixingLayer(width) for _ in range(config.mixing_layers)
        )
        self.spatial_ch_projs = nn.Linear(width, width)
        self.control_add_embedding = TimestepEmbedding(config.modes * config.unet.size_dim, 4 * width)

    def embed_hint(self, hint: Tensor, mode: int | None = None) -> Tensor:
        """As `ControlNetwork.embed_hint`, shifted by what the network makes of the hint's mean and its kind."""
        features = super().embed_hint(hint)
        token = features.mean((2, 3)) + self.task_embedding[mode]
        for layer in self.transformer_layes:
            token = layer(token)
        return features + self.spatial_ch_projs(token)[:, :, None, None]

    def embed_mode(self, mode: int | None) -> Tensor:
        """What is added to the embedding of the timestep, (1, time channels)."""
        chosen = F.one_hot(torch.tensor(mode), self.control.modes)
        sinusoids = sinusoidal_embedding(chosen, self.control.unet.size_dim).flatten()[None]
        return self.control_add_embedding(sinusoids.to(self.task_embedding))

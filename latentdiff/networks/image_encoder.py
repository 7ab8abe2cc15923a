"""The image encoder of CLIP (Radford et al. 2021): a vision transformer (Dosovitskiy et al. 2021). Names are those of
transformers' CLIPVisionModelWithProjection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentdiff.networks.text_encoder import CLIPLayer, TowerConfig, check_tower

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in CLIP's training, and the standard deviations
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageEncoderConfig(TowerConfig):
    """The architecture; names and defaults are those of CLIPVisionConfig.

    Raises:
        ConfigError: a value is of the wrong type or makes no sense.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    projection_dim: int = 512
    image_size: int = 224
    patch_size: int = 32

    def __post_init__(self) -> None:
        check_tower("image encoder", self, 2**16, {"hidden_size": "num_attention_heads", "image_size": "patch_size"})


class ImageEncoder(nn.Module):
    """Images to one embedding each in CLIP's space, and to hidden states of their patches."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = _VisionTransformer(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, image_size, image_size), normalised by `MEAN` and `DEVIATION` -> embeddings (N, projection_dim)."""
        tower = self.vision_model
        last = tower.encoder["layers"][-1](tower(pixels))
        return self.visual_projection(tower.post_layernorm(last[:, 0]))

    def hidden(self, pixels: Tensor) -> Tensor:
        """pixels as `forward` takes them -> what the layer before the last gives, (N, 1 + patches, hidden_size)."""
        return self.vision_model(pixels)


class _VisionTransformer(nn.Module):
    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.embeddings = _PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # so spelt in every file
        layers = (CLIPLayer(config, causal=False) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 1 + patches, C), without the last layer."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder["layers"][:-1]:
            x = layer(x)
        return x


class _PatchEmbeddings(nn.Module):
    """Of patches and of their places, behind that of the whole."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(1 + (config.image_size // patch) ** 2, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 1 + patches, C)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight

"""Token ids -> embeddings: the CLIP text encoder of SD 1.x and 2.x, and the transformer that it is made of.

SD 1.x reads the last hidden state of CLIP ViT-L/14, SD 2.x the penultimate one of OpenCLIP ViT-H/14, both after the final
layer norm. The diffusers layout stores the second as a CLIP whose last layer is cut off, so that both are "the last
hidden state". SDXL has two encoders: `text_encoders`. Names are those on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import ConfigError, UsageError

PREFIX = "text_model."
PROJECTION = "text_projection"  # into CLIP's space, of the pooled text
PROJECTED = "CLIPTextModelWithProjection"  # what configurations call an encoder that has it


class TextEncoder(nn.Module):
    """CLIP text encoder (Radford et al. 2021), built from the `config.json` of a `text_encoder/` folder.

    The names in `state_dict()` are those on disk, with the `text_model.` level. `load_state_dict` is strict, takes
    names with and without that level, and ignores `position_ids`.

    Args:
        config: keys of transformers' CLIPTextConfig. Built under `torch.device("meta")` it takes no memory;
            load with `load_state_dict(state, assign=True)` then.

    Raises:
        ConfigError: the configuration is not that of a CLIP text encoder.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        kind = config.get("model_type", "clip_text_model")
        if kind not in ("clip_text_model", "clip"):
            raise ConfigError(
                f"expected the configuration of a CLIP text encoder, found model_type {kind!r}; use an SD 1.x or 2.x model"
            )
        self.config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **config}
        own = TextTransformerConfig.of(config)
        self.text_model = TextTransformer(own)
        if self.config["architectures"] == [PROJECTED]:
            self.text_projection = nn.Linear(own.hidden_size, _projection_width(config), bias=False)
        self.register_load_state_dict_pre_hook(_rename_for_loading)

    @property
    def context_length(self) -> int:
        """The longest prompt in tokens, start and end marks included."""
        return self.text_model.embeddings.position_embedding.weight.shape[0]

    @property
    def embedding_width(self) -> int:
        """Channels of the embeddings; equals the U-Net's `cross_attention_dim`."""
        return self.text_model.embeddings.token_embedding.weight.shape[1]

    @property
    def depth(self) -> int:
        """Layers, so that `skip` is less."""
        return len(self.text_model.encoder["layers"])

    def forward(self, token_ids: Tensor, skip: int = 0) -> Tensor:
        """Embed token ids (N, L), L at most `context_length`; return the last hidden state (N, L, C).

        Args:
            skip: leave out so many of the last layers; the final norm stays.
        """
        check_length(token_ids, self.context_length)
        return self.text_model(token_ids, skip)  # (N, L, C)


def disk_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under their names on disk: with the `text_model.` level and without `position_ids`."""
    return {
        name if name.startswith((PREFIX, PROJECTION)) else PREFIX + name: value
        for name, value in state.items()
        if not name.endswith("position_ids")
    }


def _rename_for_loading(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename in place, below `prefix`: a TextEncoder may be part of a larger module."""
    own = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
    renamed = disk_names({name[len(prefix) :]: value for name, value in own.items()})
    state.update({prefix + name: value for name, value in renamed.items()})


def _projection_width(config: Mapping[str, Any]) -> int:
    width = config.get("projection_dim", 512)
    if type(width) is not int or not 0 < width <= 2**16:
        raise ConfigError(
            f"expected a number up to {2**16} as projection_dim of the text encoder, found {str(width)[:40]}"
        )
    return width


def check_length(token_ids: Tensor, longest: int) -> None:
    """Raise a UsageError if token ids are not (N, L) with L at most `longest`."""
    if token_ids.dim() != 2 or token_ids.shape[1] > longest:
        shape = tuple(token_ids.shape)
        raise UsageError(f"expected token ids (N, L) with L at most {longest}, found shape {shape}")


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), the approximation of GELU that OpenAI trained CLIP with (Hendrycks & Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}

# More of these is no text encoder of this world, and would take hours to build; ViT-bigG has 32 layers.
LARGEST = {"num_hidden_layers": 256, "max_position_embeddings": 4096}


def check_tower(what: str, config: TowerConfig, largest: int, divided: Mapping[str, str]) -> None:
    """Check the configuration of one of CLIP's encoders before anything is built of it.

    Args:
        what: the encoder, for messages.
        config: its whole numbers and shares are known by their type.
        largest: of the whole numbers that LARGEST does not name.
        divided: by field, the field that has to divide it.

    Raises:
        ConfigError: a value is of the wrong type or makes no sense.
    """
    for field in fields(config):
        value, most = getattr(config, field.name), LARGEST.get(field.name, largest)
        if field.type == "int" and not (type(value) is int and 0 < value <= most):
            raise ConfigError(f"expected a number from 1 to {most} as {field.name} of the {what}, found {str(value)[:40]}")
        if field.type == "float" and not (isinstance(value, int | float) and 0 <= value < 1):
            raise ConfigError(f"expected a number from 0 to 1 as {field.name} of the {what}, found {str(value)[:40]}")
    if not isinstance(config.hidden_act, str) or config.hidden_act not in ACTIVATIONS:
        known, shown = ", ".join(ACTIVATIONS), str(config.hidden_act)[:40]
        raise ConfigError(f"expected hidden_act of the {what} to be one of {known}, found {shown!r}")
    for whole, part in divided.items():
        if getattr(config, whole) % getattr(config, part):
            raise ConfigError(
                f"the {what}'s {whole} {getattr(config, whole)} is not a multiple of its {part} {getattr(config, part)}"
            )


@dataclass(frozen=True)
class TowerConfig:
    """What the layers of either of CLIP's encoders are built from; names and defaults are those of transformers."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys of a `config.json` that describe this architecture; others serve the program that wrote them."""
        return cls(**{field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None})


@dataclass(frozen=True)
class TextTransformerConfig(TowerConfig):
    """The architecture; names and defaults are those of a `text_encoder/config.json`.

    Raises:
        ConfigError: a value is of the wrong type or makes no sense.
    """

    vocab_size: int = 49408
    max_position_embeddings: int = 77

    def __post_init__(self) -> None:
        check_tower("text encoder", self, 2**22, {"hidden_size": "num_attention_heads"})


class TextTransformer(nn.Module):
    """Token ids to hidden states. New weights are drawn as CLIP's were."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))})
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, token_ids: Tensor, skip: int = 0) -> Tensor:
        """token_ids (N, L) -> (N, L, C), without the last `skip` layers, after the final norm."""
        return self.final_layer_norm(self.hidden(token_ids, skip))

    def hidden(self, token_ids: Tensor, skip: int) -> Tensor:
        """token_ids (N, L) -> (N, L, C), without the last `skip` layers, before the final norm."""
        x = self.embeddings(token_ids)
        layers = self.encoder["layers"]
        for layer in layers[: len(layers) - skip]:
            x = layer(x)
        return x

    def last(self, hidden: Tensor, skip: int) -> Tensor:
        """What `forward` gives, (N, L, C), from what `hidden` gave without the last `skip` layers."""
        layers = self.encoder["layers"]
        for layer in layers[len(layers) - skip :]:
            hidden = layer(hidden)
        return self.final_layer_norm(hidden)


class _Embeddings(nn.Module):
    """Of tokens and of their places."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        """(N, L) -> (N, L, C)."""
        places = torch.arange(token_ids.shape[1], device=token_ids.device)
        return self.token_embedding(token_ids) + self.position_embedding(places)


class CLIPLayer(nn.Module):
    """Self-attention and a feed-forward network, each on the norm of what it is added to.

    Args:
        causal: each token sees itself and those before it, as in the text transformer; else all, as in that of images.
    """

    def __init__(self, config: TowerConfig, *, causal: bool = True) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(config, causal=causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _SelfAttention(nn.Module):
    """Each token attends to itself and to those before it, or to all."""

    def __init__(self, config: TowerConfig, *, causal: bool) -> None:
        super().__init__()
        width, self.causal = config.hidden_size, causal
        self.heads, self.dropout = config.num_attention_heads, config.attention_dropout
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(linear.weight, std=(2 * config.num_hidden_layers * width) ** -0.5)
        nn.init.normal_(self.out_proj.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        q, k, v = (self._split_heads(linear(x)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)  # (N, heads, L, d)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, heads, L, d)


class _FeedForward(nn.Module):
    """Two linear layers."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        nn.init.normal_(self.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.fc2.weight, std=(2 * config.num_hidden_layers * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        return self.fc2(self.activation(self.fc1(x)))

"""The text towers of OpenCLIP as that program computes them (extra `openclip`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import ConfigError, MissingDependencyError
from latentdiff.networks.text_encoder import check_length


class OpenCLIPTextEncoder(nn.Module):
    """The text tower of an OpenCLIP model, read at its penultimate layer as SD 2.x does (extra `openclip`).

    The names in `state_dict()` are OpenCLIP's (`token_embedding.weight`, `transformer.resblocks.0...`).

    Args:
        architecture: a name that open_clip knows. SD 2.x uses "ViT-H-14".
        skip_last: how many of the last layers are left out; 1 is the penultimate layer.

    Raises:
        MissingDependencyError: open_clip is not installed.
        ConfigError: open_clip does not know the architecture, or its text tower is not a CLIP transformer.
    """

    def __init__(self, architecture: str = "ViT-H-14", skip_last: int = 1) -> None:
        super().__init__()
        open_clip = _import_open_clip()
        from open_clip.transformer import TextTransformer

        model_config = open_clip.get_model_config(architecture)
        if model_config is None or "layers" not in model_config.get("text_cfg", {}):
            raise ConfigError(f"open_clip has no CLIP text transformer called {architecture!r}; SD 2.x uses 'ViT-H-14'")
        text = model_config["text_cfg"]
        tower = TextTransformer(
            context_length=text.get("context_length", 77),
            vocab_size=text.get("vocab_size", 49408),
            width=text["width"],
            heads=text["heads"],
            layers=text["layers"] - skip_last,
            act_layer=open_clip.model.QuickGELU if model_config.get("quick_gelu") else nn.GELU,
            output_dim=model_config["embed_dim"],
        )
        self.architecture, self.skip_last = architecture, skip_last
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.register_load_state_dict_pre_hook(_drop_unused_open_clip)

    @classmethod
    def from_pretrained(
        cls,
        architecture: str = "ViT-H-14",
        pretrained: str = "laion2b_s32b_b79k",
        skip_last: int = 1,
    ) -> OpenCLIPTextEncoder:
        """Load the text tower of `pretrained`: a tag of open_clip (downloaded unless cached) or a file."""
        open_clip = _import_open_clip()
        full = open_clip.create_model(architecture, pretrained=pretrained).state_dict()
        encoder = cls(architecture, skip_last)
        encoder.load_state_dict({name: full[name] for name in full if not name.startswith("visual.")})
        return encoder

    @property
    def context_length(self) -> int:
        """The longest prompt in tokens, start and end marks included."""
        return self.positional_embedding.shape[0]

    @property
    def embedding_width(self) -> int:
        """Channels of the embeddings; equals the U-Net's `cross_attention_dim`."""
        return self.positional_embedding.shape[1]

    @property
    def depth(self) -> int:
        """Layers that are there, so that `skip` is less."""
        return len(self.transformer.resblocks)

    def forward(self, token_ids: Tensor, skip: int = 0) -> Tensor:
        """Embed token ids (N, L), padded with 0 as OpenCLIP does; return the hidden state (N, L, C).

        Args:
            skip: leave out so many more of the last layers; the final norm stays.
        """
        check_length(token_ids, self.context_length)
        length = token_ids.shape[1]
        x = self.token_embedding(token_ids)  # (N, L, C)
        x = x + self.positional_embedding[:length].to(x.dtype)
        causal = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)  # (L, L)
        return self.ln_final(self.transformer(x, attn_mask=causal))  # (N, L, C)


def _drop_unused_open_clip(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Drop what the hidden state does not depend on: later layers and the projection to CLIP's space."""
    layers = len(module.transformer.resblocks)
    for name in list(state):
        parts = name[len(prefix) :].split(".")
        later_layer = parts[:2] == ["transformer", "resblocks"] and layers <= int(parts[2]) < layers + module.skip_last
        if name.startswith(prefix) and (later_layer or parts[0] in ("text_projection", "logit_scale", "attn_mask")):
            del state[name]


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependencyError(
            "the OpenCLIP text encoder needs open_clip; install it with: pip install 'latentdiff[openclip]'"
        ) from error
    return open_clip

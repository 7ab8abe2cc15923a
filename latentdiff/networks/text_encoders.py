"""The text encoders of SDXL as one (Podell et al. 2023, section 2.1): CLIP ViT-L and OpenCLIP ViT-bigG, side by side.

Each gives its last but one hidden state, without the final norm; the second also the pooled text: its state at the end
mark, projected. The refiner has the second alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import ConfigError
from latentdiff.networks.pooled import with_pooled
from latentdiff.networks.text_encoder import TextEncoder

FIRST, SECOND = "text_encoder", "text_encoder_2"  # folders of the diffusers layout, and modules here
PENULTIMATE = 1  # layers that are left out


@dataclass(frozen=True)
class Marks:
    """Numbers of the tokens that the encoders share, or not.

    end: the mark at the end of a text.
    padding: by encoder, what fills up a short text; token ids come with the first one's.
    """

    end: int
    padding: tuple[int, ...]

    def padded_for(self, number: int, token_ids: Tensor) -> Tensor:
        """Token ids (N, L) with the padding of encoder `number`."""
        given, own = self.padding[0], self.padding[number]
        if given == own:
            return token_ids
        fills = (token_ids == given).flip(1).cumprod(1).flip(1).bool()  # the run of them at the end
        if given == self.end:  # its first is the mark itself
            fills = fills & torch.cat([torch.zeros_like(fills[:, :1]), fills[:, :-1]], dim=1)
        return token_ids.masked_fill(fills, own)


def encoders_of(text_encoder: nn.Module | None) -> dict[str, Any]:
    """The text encoders by the part of a model that each is: one, or those of `TextEncoders`; none of None."""
    if isinstance(text_encoder, TextEncoders):
        return text_encoder.encoders
    return {} if text_encoder is None else {FIRST: text_encoder}


def unused_by(text_encoder: nn.Module | None) -> tuple[str, ...]:
    """Beginnings of full names (`text_encoder.…`) of what no output depends on, so that nothing there can be trained: of
    SDXL's first encoder the last layer and the final norm."""
    encoders = encoders_of(text_encoder)
    if SECOND not in encoders or FIRST not in encoders:
        return ()
    last = encoders[FIRST].depth - PENULTIMATE
    return f"{FIRST}.text_model.encoder.layers.{last}.", f"{FIRST}.text_model.final_layer_norm"


class TextEncoders(nn.Module):
    """Token ids (N, L) -> embeddings (N, L + 1, C), the pooled text in the last row; see `pooled`.

    Names in `state_dict()` begin with the folder of each encoder.

    Args:
        encoders: by `FIRST` and `SECOND`, or the second alone.
        zero_empty: zeros stand for an empty negative prompt.

    Raises:
        ConfigError: the second one has no projection, or they differ in what they read.
    """

    def __init__(self, encoders: Mapping[str, TextEncoder], marks: Marks, *, zero_empty: bool = False) -> None:
        super().__init__()
        if not hasattr(encoders[SECOND], "text_projection"):
            raise ConfigError(
                f"expected {SECOND} to be a CLIPTextModelWithProjection, which has the pooled text, found "
                f"{encoders[SECOND].config['architectures']}"
            )
        lengths = [encoder.context_length for encoder in encoders.values()]
        if len(set(lengths)) > 1:
            raise ConfigError(f"expected text encoders that read texts of one length, found {lengths} tokens")
        for name in (FIRST, SECOND):
            if name in encoders:
                self.add_module(name, encoders[name])
        self.marks, self._zero_empty = marks, zero_empty

    @property
    def encoders(self) -> dict[str, TextEncoder]:
        """By name, in order."""
        return dict(self.named_children())

    @property
    def context_length(self) -> int:
        """The longest prompt in tokens, start and end marks included."""
        return self.get_submodule(SECOND).context_length

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the embeddings by the encoder that they come from."""
        return tuple(encoder.embedding_width for encoder in self.encoders.values())

    @property
    def embedding_width(self) -> int:
        """Channels of the embeddings; equals the U-Net's `cross_attention_dim`."""
        return sum(self.widths)

    @property
    def pooled_width(self) -> int:
        """Channels of the pooled text."""
        return self.get_submodule(SECOND).text_projection.out_features

    @property
    def zero_empty(self) -> bool:
        """Whether zeros stand for an empty negative prompt."""
        return self._zero_empty

    @property
    def depth(self) -> int:
        """Layers, so that `skip` is less."""
        return min(encoder.depth for encoder in self.encoders.values()) - PENULTIMATE

    def forward(self, token_ids: Tensor, skip: int = 0) -> Tensor:
        """Embed token ids (N, L), padded as the first encoder's tokenizer does.

        Args:
            skip: leave out so many more of the last layers.
        """
        states = []
        for number, encoder in enumerate(self.encoders.values()):
            ids = self.marks.padded_for(number, token_ids)
            states.append(encoder.text_model.hidden(ids, PENULTIMATE + skip))
        last = encoder.text_model.last(states[-1], PENULTIMATE + skip)
        end = (ids == self.marks.end).int().argmax(dim=1)  # the first one
        pooled = encoder.text_projection(last[torch.arange(len(ids), device=ids.device), end])
        return with_pooled(torch.cat(states, dim=2), pooled)

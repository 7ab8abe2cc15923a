"""The text encoders of a model between the folder, where each is a part, and memory, where they are one module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.checkpoints.families import is_text
from latentdiff.checkpoints.modules import module_without_weights
from latentdiff.checkpoints.raw import RawModel
from latentdiff.checkpoints.tokenizer import open_tokenizer
from latentdiff.errors import CheckpointError
from latentdiff.networks.text_encoders import FIRST, SECOND, Marks, TextEncoders
from latentdiff.prompts.tokenizer import Tokenizer


def text_module(raw: RawModel, dtype: torch.dtype | None) -> tuple[nn.Module, dict[str, Tensor], Tokenizer]:
    """The text encoder, or the two as one, without weights; the tensors for it; and the tokenizer.

    Raises:
        CheckpointError: names, shapes or types do not fit, or the tokenizers read texts differently.
    """
    tokenizer = open_tokenizer(raw.tokenizer)
    parts = {part: module_without_weights(raw, part, dtype) for part in raw.parts if is_text(part)}
    for module, _ in parts.values():
        _check_tokens(tokenizer, module)
    if SECOND not in parts:
        return (*parts[FIRST], tokenizer)
    padding = [tokenizer.pad_token_id]
    if FIRST in parts:
        second = open_tokenizer(raw.second_tokenizer)
        _check_same(tokenizer, second)
        tokenizer.second = raw.second_tokenizer
        padding.append(second.pad_token_id)
    empties = bool(raw.configs["model_index"].get("force_zeros_for_empty_prompt", False))
    marks = Marks(tokenizer.eos_token_id, tuple(padding))
    both = TextEncoders({part: module for part, (module, _) in parts.items()}, marks, zero_empty=empties)
    tensors = {f"{part}.{name}": tensor for part, (_, own) in parts.items() for name, tensor in own.items()}
    return both.eval(), tensors, tokenizer


def second_tokenizer(files: Mapping[str, str], text_encoder: TextEncoders, tokenizer: Tokenizer) -> dict[str, str]:
    """The files of a second tokenizer for a model that was made in memory: the first's, with the second's padding."""
    (token,) = tokenizer.convert_ids_to_tokens([text_encoder.marks.padding[-1]])
    padded = {}
    for name, text in files.items():
        content: Any = json.loads(text) if name in ("tokenizer_config.json", "special_tokens_map.json") else None
        padded[name] = text if content is None else json.dumps({**content, "pad_token": token}, indent=2) + "\n"
    return padded


def _check_same(first: Tokenizer, second: Tokenizer) -> None:
    if (first.vocabulary, first.eos_token_id, first.model_max_length) != (
        second.vocabulary,
        second.eos_token_id,
        second.model_max_length,
    ):
        raise CheckpointError(
            "the tokenizers of the two text encoders differ in more than their padding, which is not supported; take the "
            "tokenizers of one model"
        )


def _check_tokens(tokenizer: Tokenizer, text_encoder: Any) -> None:
    """Make sure that the text encoder reads as long a prompt, and has an embedding for every token."""
    longest = text_encoder.context_length
    if tokenizer.model_max_length > longest:
        raise CheckpointError(
            f"the tokenizer and the text encoder do not fit: model_max_length is {tokenizer.model_max_length} tokens, the "
            f"text encoder reads {longest}; write that into tokenizer_config.json"
        )
    count = text_encoder.text_model.embeddings.token_embedding.weight.shape[0]
    if tokenizer.highest >= count:
        raise CheckpointError(
            f"the tokenizer and the text encoder do not fit: tokens are numbered up to {tokenizer.highest}, the text "
            f"encoder has embeddings up to {count - 1}; take the tokenizer of this model"
        )

"""What an adapter that is trained is like: the keys of method lora."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt, field_validator, model_validator

from latentdiff.training.sample_options import as_texts
from latentdiff.training.sections import Fraction, Positive, Section, Texts

Assignments = Annotated[tuple[str, ...], BeforeValidator(as_texts)]

_ONLY_FOR = {"dora_lengths": "dora", "lokr_factor": "lokr"}


class AdapterSection(Section):
    """An adapter, beside a model that stays as it is."""

    adapter: Literal["lora", "dora", "loha", "lokr", "oft"] = "lora"
    """What is added to the weights (method lora). lora: products of two matrices. dora: those, and new lengths of the
    weights' rows or columns. loha: two products, multiplied element by element. lokr: Kronecker products. oft: blocks of
    outputs are rotated."""
    rank: PositiveInt = 8
    """Rank of the matrices; of oft, the largest size of a block."""
    alpha: Positive | None = None
    """Products are scaled by alpha / rank; without it, alpha is the rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023), so that high ranks learn as fast as low
    ones."""
    targets: Texts = ("auto",)
    """What the adapter changes: attention, feed_forward, projections, convolutions, text_encoder, text_encoder_mlp, or
    patterns of module names. auto: attention; all of these where the model lists its words, for its text encoder has
    read no others."""
    block_rank: Assignments = ()
    """BLOCK=RANK: another rank for down, mid, up, text_encoder, a group of `targets`, or a pattern of module names; the
    last that fits decides, and 0 leaves the block out."""
    block_lr: Assignments = ()
    """BLOCK=LR: another learning rate for a block, which is named as in `block_rank`; the last that fits decides."""
    loraplus: Annotated[float, Field(ge=1)] | None = None
    """Learning rate of the second matrix as a multiple of that of the first (LoRA+, Hayou et al. 2024), which speeds learning
    up; for lora and dora; 16 is usual."""
    max_norm: Positive | None = None
    """Largest norm of what is added to a layer's weight; larger ones are scaled down after each step, so that none
    dominates; 1 is usual."""
    dropout: Fraction = 0.0
    """Share of the numbers of a layer's input that its adapter does not see, as PEFT's lora_dropout."""
    rank_dropout: Fraction = 0.0
    """Share of the ranks that are left out, chosen for each image (adapter lora)."""
    module_dropout: Fraction = 0.0
    """Share of the layers whose adapter is left out, chosen at each step."""
    dora_lengths: Literal["inputs", "outputs"] = "inputs"
    """What dora gives lengths to. inputs: a file that ComfyUI and the web UIs read. outputs: as PEFT and diffusers have
    it."""
    lokr_factor: PositiveInt | None = None
    """Largest size of the smaller factor of lokr; without it, the square root of the layer's. Smaller learns more, in a
    larger file."""

    @field_validator("block_rank")
    @classmethod
    def _are_ranks(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        if any(not value.isdecimal() for value in assignments(texts).values()):
            raise ValueError("expected BLOCK=RANK with a rank of 0 or more, such as mid=32")
        return texts

    @field_validator("block_lr")
    @classmethod
    def _are_rates(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(0 < _number(value) < math.inf for value in assignments(texts).values()):
            raise ValueError("expected BLOCK=LR with a rate above 0, such as mid=1e-4; block_rank mid=0 leaves it out")
        return texts

    @model_validator(mode="after")
    def _adapters_fit(self) -> AdapterSection:
        given = self.model_fields_set & AdapterSection.model_fields.keys()
        method = getattr(self, "method", "lora")
        changed = sorted(name for name in given if getattr(self, name) != AdapterSection.model_fields[name].default)
        if method != "lora" and (own := [name for name in changed if name not in ("rank", "alpha", "targets")]):
            raise ValueError(f"{own[0]} goes with method lora, found {method}")
        for name in changed:
            if _ONLY_FOR.get(name, self.adapter) != self.adapter:
                raise ValueError(f"{name} goes with adapter {_ONLY_FOR[name]}, found {self.adapter}")
        one_rate = getattr(self, "optimizer", "") == "prodigy" or getattr(self, "relative_step", False)
        if one_rate and (self.block_lr or self.loraplus is not None):
            raise ValueError("this optimizer finds one step size for all; leave out block_lr and loraplus")
        if self.loraplus is not None and self.adapter not in ("lora", "dora"):
            raise ValueError(f"loraplus goes with adapters lora and dora, found {self.adapter}")
        if self.max_norm is not None and getattr(self, "optimizer", "") == "schedulefree":
            raise ValueError("schedulefree trains other weights than those that it gives; leave out max_norm")
        self._dropout_fits()
        self._oft_fits()
        return self

    def _dropout_fits(self) -> None:
        if self.rank_dropout and self.adapter != "lora":
            raise ValueError(f"rank_dropout goes with adapter lora, found {self.adapter}")
        if not (self.dropout or self.rank_dropout or self.module_dropout):
            return
        if getattr(self, "compile", False):
            raise ValueError("dropouts are drawn at each step, which compiled networks cannot; leave out compile")
        if getattr(self, "loss", "") == "dpo":
            raise ValueError("loss dpo compares both images of a pair, without dropouts; leave them out")

    def _oft_fits(self) -> None:
        if self.adapter == "oft":
            if self.max_norm is not None:
                raise ValueError("oft rotates, which keeps norms; leave out max_norm")
            if self.rslora or self.alpha is not None:
                raise ValueError("oft rotates, and is not scaled; leave out alpha and rslora")
            if self.rank == 1:
                raise ValueError("the rank of oft is the size of its blocks: expected 2 or more, found 1")


def assignments(texts: Sequence[str]) -> dict[str, str]:
    """BLOCK=VALUE by block, in the order given.

    Raises:
        ValueError: one is not written so.
    """
    pairs = [text.rpartition("=") for text in texts]
    if not all(name.strip() and value.strip() for name, _, value in pairs):
        raise ValueError("expected BLOCK=VALUE, such as mid=32")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

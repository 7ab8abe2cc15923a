"""Differences as they are, of a whole weight, of a norm's, or of a bias."""

from __future__ import annotations

from torch import Tensor

from latentdiff.adapters.lora.kinds.change import LayerChange


class _OfWeight(LayerChange):
    def weight_change(self, weight: Tensor | None, strength: float = 1.0) -> Tensor:
        """See `LayerChange`."""
        (role,) = self.roles
        return strength * self.role(role)


class _OfBias(LayerChange):
    def bias_change(self, bias: Tensor | None, strength: float = 1.0) -> Tensor:
        """See `LayerChange`."""
        (role,) = self.roles
        return strength * self.role(role)


class Full(_OfWeight):
    """The difference of a whole weight."""

    kind, needs = "full difference", frozenset({"diff"})


class Norm(_OfWeight):
    """The difference of a norm's weight (LyCORIS, `train_norm`)."""

    kind, needs = "norm difference", frozenset({"w_norm"})


class Bias(_OfBias):
    """The difference of a bias."""

    kind, needs = "bias difference", frozenset({"diff_b"})


class NormBias(_OfBias):
    """The difference of a norm's bias."""

    kind, needs = "norm difference", frozenset({"b_norm"})


class UpBias(LayerChange):
    """The bias of a LoRA's second matrix (PEFT, `lora_bias`), which is multiplied as the matrices are."""

    kind, needs = "bias difference", frozenset({"up_bias"})

    def bias_change(self, bias: Tensor | None, strength: float = 1.0) -> Tensor:
        """See `LayerChange`."""
        factor = 1.0 if self.facts.rank is None else self.facts.factor(self.facts.rank)
        return strength * factor * self.role("up_bias")

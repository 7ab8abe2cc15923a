"""Products of other kinds than that of two matrices: elementwise (LoHa) and Kronecker's (LoKr).

Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation".
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from latentdiff.adapters.lora.kinds.change import LayerChange


class LoHa(LayerChange):
    """Two low-rank matrices, multiplied element by element; for convolutions perhaps with a Tucker core each."""

    kind = "LoHa"
    needs = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    takes = frozenset({"hada_t1", "hada_t2"})

    def weight_change(self, weight: Tensor | None, strength: float = 1.0) -> Tensor:
        """See `LayerChange`."""
        first, second = (
            rebuilt(self.role(f"hada_w{i}_a"), self.role(f"hada_w{i}_b"), self.role(f"hada_t{i}")) for i in (1, 2)
        )
        return strength * self.facts.factor(self.hada_w1_b.shape[0]) * first * second


class LoKr(LayerChange):
    """kron(w1, w2), where each may be a product of two matrices, the second with a Tucker core."""

    kind = "LoKr"
    takes = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})

    @classmethod
    def reads(cls, roles: Set[str]) -> bool:
        """Whether both factors are there, each whole or as a product."""
        return all(f"lokr_w{i}" in roles or {f"lokr_w{i}_a", f"lokr_w{i}_b"} <= roles for i in (1, 2))

    @property
    def rank(self) -> int | None:
        """The inner width of what is a product; None where both factors are whole."""
        return next((getattr(self, role).shape[0] for role in ("lokr_w1_b", "lokr_w2_b") if role in self.roles), None)

    def weight_change(self, weight: Tensor | None, strength: float = 1.0) -> Tensor:
        """See `LayerChange`. Two whole factors have no rank to divide by: LyCORIS takes 1, PEFT what was configured."""
        w1, w2 = self.role("lokr_w1"), self.role("lokr_w2")
        w1 = rebuilt(self.role("lokr_w1_a"), self.role("lokr_w1_b")) if w1 is None else w1
        w2 = rebuilt(self.role("lokr_w2_a"), self.role("lokr_w2_b"), self.role("lokr_t2")) if w2 is None else w2
        rank = self.rank or self.facts.rank
        factor = 1.0 if rank is None else self.facts.factor(rank)
        return strength * factor * torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - w1.ndim)), w2.contiguous())


def rebuilt(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """a (out, r) b (r, in ...) -> (out, in ...), the last sizes flattened; with a core, a and b are (r, out), (r, in).

    The core's form is sum_ij core[i, j, k, l] a[i, o] b[j, n] (Tucker 1966).
    """
    if core is None:
        return a.flatten(1) @ b.flatten(1)
    return torch.einsum("ij..., io, jn -> on...", core, a.flatten(1), b.flatten(1))

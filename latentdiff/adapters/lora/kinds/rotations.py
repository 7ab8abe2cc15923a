"""Rotations of the weight's rows or columns: OFT (Qiu et al. 2023) and BOFT (Liu et al. 2024).

A skew-symmetric Q makes a rotation by Cayley's transform, R = (I + Q)(I - Q)^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentdiff.adapters.lora.kinds.change import LayerChange, Misfit


class OFT(LayerChange):
    """Blocks of output channels, each rotated on its own, then scaled; kohya's tools and LyCORIS write it.

    Its alpha is the largest norm of all Q together, per output channel; 0 leaves it free.
    """

    kind = "OFT"
    needs = frozenset({"oft_blocks"})
    takes = frozenset({"rescale"})

    def weight_change(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """See `LayerChange`: blocks of (R^T W) rescale - W."""
        rotation = cayley(_bounded(_skew(self.role("oft_blocks")), self.facts.alpha, weight.shape[0]))  # (n, b, b)
        blocks = weight.reshape(rotation.shape[0], rotation.shape[1], -1)
        turned = (rotation.mT @ blocks).reshape(weight.shape)
        return strength * (_rescaled(turned, self.role("rescale")) - weight)


class BOFT(LayerChange):
    """Stages of rotations between channels that lie ever farther apart, as in a fast Fourier transform."""

    kind = "BOFT"
    needs = frozenset({"oft_blocks"})
    takes = frozenset({"rescale"})

    def weight_change(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """See `LayerChange`. The strength draws every stage towards doing nothing, as in LyCORIS."""
        stages = cayley(_bounded(_skew(self.role("oft_blocks")), self.facts.alpha, weight.shape[0]))  # (m, n, b, b)
        identity = torch.eye(stages.shape[-1], dtype=torch.float32, device=stages.device)
        turned = weight.flatten(1)  # (out, columns)
        for number, rotation in enumerate(identity + strength * (stages - identity)):
            reach = 2**number * rotation.shape[-1] // 2
            order = torch.arange(len(turned), device=turned.device).reshape(-1, 2, reach).transpose(1, 2).flatten()
            blocks = turned[order].reshape(rotation.shape[0], rotation.shape[1], -1)
            turned = torch.empty_like(turned).index_copy(0, order, (rotation @ blocks).reshape(turned.shape))
        return _rescaled(turned.reshape(weight.shape), self.role("rescale")) - weight


class InputOFT(LayerChange):
    """PEFT's OFT of linear layers: blocks of input channels, by the upper triangles of their Q.

    PEFT approximates Cayley's transform by the first terms of its Neumann series unless it was told not to.
    """

    kind = "OFT (PEFT)"
    needs = frozenset({"oft_R"})

    def weight_change(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """See `LayerChange`: W R^T - W by blocks of columns."""
        if weight.flatten(1).shape[1] != weight.shape[1]:
            raise Misfit("OFT (PEFT) of a convolution is no change of its weight")
        rotation = self._rotation(self.role("oft_R"))  # (n or 1, b, b)
        columns = weight.reshape(weight.shape[0], -1, rotation.shape[1])  # (out, n, b)
        turned = torch.einsum("onk, nck -> onc", columns, rotation.expand(columns.shape[1], -1, -1))
        return strength * (turned.reshape(weight.shape) - weight)

    def _rotation(self, triangles: Tensor) -> Tensor:
        size = round((1 + (1 + 8 * triangles.shape[1]) ** 0.5) / 2)
        rows, columns = torch.triu_indices(size, size, 1, device=triangles.device)
        q = triangles.new_zeros(len(triangles), size, size)
        q[:, rows, columns] = triangles
        q = q - q.mT
        if not self.facts.options.get("use_cayley_neumann", True):
            return cayley(q).mT
        terms = int(self.facts.options.get("num_cayley_neumann_terms", 5))
        if terms < 3:
            return torch.eye(size, dtype=torch.float32, device=q.device) + (2 * q if terms == 2 else 0 * q)
        powers = [q]
        while len(powers) < max(terms - 1, 3):  # PEFT makes four terms of three
            powers.append(powers[-1] @ q)
        return torch.eye(size, dtype=torch.float32, device=q.device) + 2 * sum(powers[:-1]) + powers[-1]


def cayley(q: Tensor) -> Tensor:
    """Skew-symmetric (..., b, b) -> rotation (..., b, b)."""
    identity = torch.eye(q.shape[-1], dtype=torch.float32, device=q.device)
    return torch.linalg.solve(identity - q, identity + q, left=False)


def _skew(blocks: Tensor) -> Tensor:
    return blocks - blocks.mT


def _bounded(q: Tensor, alpha: float | None, channels: int) -> Tensor:
    if not alpha:
        return q
    return q * (alpha * channels / (q.norm() + 1e-8)).clamp(max=1.0)


def _rescaled(weight: Tensor, rescale: Tensor | None) -> Tensor:
    return weight if rescale is None else weight * rescale.reshape(-1, *[1] * (weight.ndim - 1))

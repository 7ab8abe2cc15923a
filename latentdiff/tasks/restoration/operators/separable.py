"""Convolutions with kernels that are an outer product: one matrix along the columns, one along the rows, y = R x Cᵀ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A kernel whose second singular value is below this share of the first is an outer product.
RANK_ONE = 1e-12
# The longest side in pixels for which the matrices are decomposed; the time grows with its cube.
LONGEST = 1024


@dataclass(frozen=True)
class SingularValues:
    """The singular value decomposition U S Vᵀ of the matrix (m, n) of one axis, m <= n, for kernels mirrored at the
    borders."""

    u: Tensor  # (m, m)
    s: Tensor  # (m,), from the largest on
    v: Tensor  # (n, m)

    @classmethod
    def of(cls, line: Tensor, centre: int, factor: int, length: int) -> SingularValues:
        """y[i] = sum over j of line[j] x[factor i + centre - j] on `length` pixels, mirrored about the outermost
        ones."""
        places = factor * torch.arange(length // factor)[:, None] + centre - torch.arange(len(line))  # (m, k)
        last = length - 1
        places = last - (last - places.abs()).abs()
        matrix = torch.zeros(length // factor, length, dtype=torch.float64)
        matrix.scatter_add_(1, places, line.expand(len(matrix), -1))
        u, s, v_t = torch.linalg.svd(matrix, full_matrices=False)
        return cls(u, s, v_t.mT)

    def like(self, x: Tensor) -> SingularValues:
        """In the number format and on the device of x."""
        return SingularValues(self.u.to(x), self.s.to(x), self.v.to(x))


def lines_of(kernel: Tensor) -> tuple[Tensor, Tensor] | None:
    """A column (kh,) and a row (kw,) whose outer product is the kernel (kh, kw), float64, if there are any."""
    u, s, v_t = torch.linalg.svd(kernel, full_matrices=False)
    if len(s) > 1 and s[1] > RANK_ONE * s[0]:
        return None
    return u[:, 0] * s[0].sqrt(), v_t[0] * s[0].sqrt()


def filtered_back(y: Tensor, rows: SingularValues, columns: SingularValues, weight: Tensor) -> Tensor:
    """The transpose of the convolution with its singular values (m_rows, m_columns) replaced by `weight`; of y (N, C,
    h, w)."""
    return rows.v @ (weight * (rows.u.mT @ y @ columns.u)) @ columns.v.mT

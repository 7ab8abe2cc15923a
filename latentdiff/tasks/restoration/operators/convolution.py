"""Blur and loss of resolution: a convolution, and then every s-th pixel."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import UsageError
from latentdiff.request.task_options import FACTOR
from latentdiff.tasks.restoration.operators.kernels import box_kernel, check_kernel, cubic_kernel, gaussian_kernel
from latentdiff.tasks.restoration.operators.operator import Operator, Shape, conjugate_gradient
from latentdiff.tasks.restoration.operators.separable import LONGEST, SingularValues, filtered_back, lines_of

BORDERS = ("periodic", "reflect")
RESAMPLING_KERNELS = ("box", "bicubic", "gaussian")

# Frequencies that the kernel weakens below this share of its strongest count as lost: `pinv` leaves them at zero.
LOST = {torch.float32: 1e-3, torch.float64: 1e-8}

# What conjugate gradients may leave of Aᵀ (y - A x), as a share of what the noise of y puts there.
SHARE_OF_NOISE = {torch.float32: 0.1, torch.float64: 0.0}
# The least weight of a frequency, as a share of the strongest, in the guess by the periodic border. Those that the
# kernel takes away inside are not lost at mirrors, and the guess would be far too large there.
LEAST_AT_MIRRORS = 0.05


class Convolution(Operator):
    """y[i] = sum over j of k[j] x[s i + c - j] + n, on each colour channel alone, c being the kernel's centre.

    With the border "periodic" (the image repeats) adjoint, pseudo-inverse and proximal map are exact and cost a few
    FFTs; with "reflect" (the image is mirrored about its outermost pixels) they are exact for kernels that are an
    outer product, such as a Gaussian, and computed by conjugate gradients for others and for sides above 1024 pixels.

    Args:
        kernel: (kh, kw), as large as the image at most.
        centre: the entry (row, column) of the kernel that lies on the pixel itself; by default (kh // 2, kw // 2), as
            in SciPy.
        factor: s, 1 to keep every pixel.

    Raises:
        UsageError: a kernel that is not two-dimensional and finite, or an unknown border.
    """

    def __init__(
        self,
        kernel: Tensor,
        *,
        centre: tuple[int, int] | None = None,
        factor: int = 1,
        border: str = "reflect",
        noise_std: float = 0.0,
    ) -> None:
        super().__init__(noise_std=noise_std)
        if border not in BORDERS:
            raise UsageError(f"expected the border {' or '.join(BORDERS)}, found {border!r}")
        if factor < 1:
            raise UsageError(f"expected a factor of 1 or more, found {factor}")
        self.kernel = check_kernel(kernel)  # (kh, kw), float64
        self.centre = centre or (kernel.shape[0] // 2, kernel.shape[1] // 2)
        self.factor, self.border = factor, border
        self._lines = lines_of(self.kernel)
        # Iterations ask for the same ones again and again.
        self._windows: dict[tuple[object, ...], Tensor] = {}
        self._axes: dict[tuple[object, ...], tuple[SingularValues, SingularValues]] = {}

    def apply(self, x: Tensor) -> Tensor:
        """See the class."""
        self.measurement_shape(tuple(x.shape[1:]))
        if self.border == "periodic":
            blurred = torch.fft.irfft2(torch.fft.rfft2(x) * self._transfer(x, half=True), s=x.shape[-2:])
            return blurred[..., :: self.factor, :: self.factor]
        padded = F.pad(x, self._padding(), mode="reflect")
        blurred = torch.fft.irfft2(torch.fft.rfft2(padded) * self._window(padded).conj(), s=padded.shape[-2:])
        return blurred[..., : x.shape[-2] : self.factor, : x.shape[-1] : self.factor]

    def measurement_shape(self, image: Shape) -> Shape:
        """1 / s of each side."""
        channels, height, width = image
        if height % self.factor or width % self.factor:
            raise UsageError(f"expected an image whose sides are multiples of {self.factor}, found {width}x{height}")
        left, right, top, bottom = self._padding()
        room = (height, width) if self.border == "periodic" else (height - 1, width - 1)
        needed = self.kernel.shape if self.border == "periodic" else (max(top, bottom), max(left, right))
        if needed[0] > room[0] or needed[1] > room[1]:
            kh, kw = self.kernel.shape
            raise UsageError(
                f"the {kw}x{kh} kernel does not fit the image of {width}x{height} pixels; take a smaller kernel"
            )
        return channels, height // self.factor, width // self.factor

    def image_shape(self, measurement: Shape) -> Shape:
        """s times each side."""
        return measurement[0], measurement[1] * self.factor, measurement[2] * self.factor

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y: put zeros between the pixels, then correlate; what falls beyond a mirror is folded back."""
        if self.border == "periodic":
            return self._adjoint_of_spectrum(torch.fft.fft2(y))
        left, right, top, bottom = self._padding()
        height, width = self.image_shape(tuple(y.shape[1:]))[1:]
        spread = y.new_zeros(*y.shape[:2], top + height + bottom, left + width + right)
        spread[..., : height : self.factor, : width : self.factor] = y
        spread = torch.fft.irfft2(torch.fft.rfft2(spread) * self._window(spread), s=spread.shape[-2:])
        return _unreflected(_unreflected(spread, left, width, right).mT, top, height, bottom).mT

    def pinv(self, y: Tensor) -> Tensor:
        """A⁺ y; frequencies that the kernel has all but lost stay zero."""
        if self.border == "reflect":
            if (axes := self._separated(y)) is None:
                return super().pinv(y)
            values = torch.outer(axes[0].s, axes[1].s)
            kept = values > LOST[y.dtype] * values.max()
            return filtered_back(y, *axes, torch.where(kept, 1.0 / values.where(kept, 1.0), 0.0))
        power = self._power(y)  # (h, w)
        lost = power <= LOST[y.dtype] ** 2 * power.max()
        inverse = torch.where(lost, 0.0, 1.0 / power.where(~lost, 1.0))
        return self._adjoint_of_spectrum(torch.fft.fft2(y) * inverse)

    def prox(self, y: Tensor, z: Tensor, rho: float) -> Tensor:
        """z + Aᵀ (A Aᵀ + rho)⁻¹ (y - A z), in the Fourier domain, where A Aᵀ is diagonal (Zhao et al. 2016)."""
        if self.border == "reflect":
            return self._prox_at_mirrors(y, z, rho)
        missing = torch.fft.fft2(y - self.apply(z))
        return z + self._adjoint_of_spectrum(missing / (self._power(y) + rho))

    def _prox_at_mirrors(self, y: Tensor, z: Tensor, rho: float) -> Tensor:
        """Conjugate gradients, helped by the solution for the periodic border, which is about the same away from it."""
        if (axes := self._separated(y)) is not None:
            values = torch.outer(axes[0].s, axes[1].s)
            return z + filtered_back(y - self.apply(z), *axes, values / (values.square() + rho))
        if self.factor > 1:
            return super().prox(y, z, rho)
        power = self._transfer(z, half=True).abs().square()
        inverse = 1.0 / (power + max(rho, LEAST_AT_MIRRORS * power.max().item()))
        noise = self.noise_std * self.kernel.square().sum().sqrt().item()  # of Aᵀ y

        def periodic(x: Tensor) -> Tensor:
            return torch.fft.irfft2(torch.fft.rfft2(x) * inverse, s=x.shape[-2:])

        right = self.adjoint(y) + rho * z
        return conjugate_gradient(
            lambda x: self.adjoint(self.apply(x)) + rho * x,
            right,
            z,
            allowed=SHARE_OF_NOISE[right.dtype] * noise,
            precondition=periodic,
        )

    def _separated(self, y: Tensor) -> tuple[SingularValues, SingularValues] | None:
        """Both axes of images with measurements y (N, c, h, w), mirrored; None if they cannot be separated."""
        sides = self.image_shape(tuple(y.shape[1:]))[1:]
        if self._lines is None or max(sides) > LONGEST:
            return None
        key = (sides, y.dtype, y.device)
        if key not in self._axes:
            ways = zip(self._lines, self.centre, sides, strict=True)
            self._axes[key] = tuple(SingularValues.of(line, centre, self.factor, side).like(y) for line, centre, side in ways)
        return self._axes[key]

    def _padding(self) -> tuple[int, int, int, int]:
        """Pixels beyond the left, right, top and bottom border that the kernel reaches."""
        (kh, kw), (row, column), last = self.kernel.shape, self.centre, self.factor - 1
        return kw - 1 - column, max(column - last, 0), kh - 1 - row, max(row - last, 0)

    def _transfer(self, like: Tensor, *, half: bool = False) -> Tensor:
        """The Fourier transform of the kernel on the grid of `like`, (H, W) or its half."""
        height, width = like.shape[-2:]
        grid = like.new_zeros(height, width)
        grid[: self.kernel.shape[0], : self.kernel.shape[1]] = self.kernel.to(like)
        grid = grid.roll((-self.centre[0], -self.centre[1]), (0, 1))
        return torch.fft.rfft2(grid) if half else torch.fft.fft2(grid)

    def _window(self, padded: Tensor) -> Tensor:
        """The Fourier transform of the kernel as a window that begins at the first pixel of a mirrored image."""
        key = (padded.shape[-2:], padded.dtype, padded.device)
        if key not in self._windows:
            grid = padded.new_zeros(padded.shape[-2:])
            grid[: self.kernel.shape[0], : self.kernel.shape[1]] = self.kernel.flip(0, 1).to(padded)
            self._windows[key] = torch.fft.rfft2(grid)
        return self._windows[key]

    def _power(self, y: Tensor) -> Tensor:
        """The eigenvalues of A Aᵀ on the grid (h, w) of y: the mean over the s² frequencies that decimation folds
        together."""
        s, (height, width) = self.factor, y.shape[-2:]
        grid = y.new_zeros(s * height, s * width)
        power = self._transfer(grid).abs().square()
        return power.view(s, height, s, width).mean(dim=(0, 2))

    def _adjoint_of_spectrum(self, spectrum: Tensor) -> Tensor:
        """Aᵀ of measurements given by their Fourier transform (N, C, h, w): between pixels come zeros, so it
        repeats."""
        full = spectrum.repeat(1, 1, self.factor, self.factor)  # (N, C, H, W)
        transfer = self._transfer(full.real)
        return torch.fft.ifft2(full * transfer.conj()).real


class Deblur(Convolution):
    """The image was blurred with a known kernel; see `kernels` for Gaussian and motion blur.

    Args:
        kernel: (kh, kw), divided by its sum.
        border: "reflect" for photographs; "periodic" is exact and faster, and right where the blur was made so.
    """

    def __init__(self, kernel: Tensor, *, border: str = "reflect", noise_std: float = 0.0) -> None:
        kernel = check_kernel(kernel)
        total = kernel.sum().item()
        is_normal = math.isclose(total, 1.0, rel_tol=1e-12)  # dividing again would change the last bits
        super().__init__(kernel if is_normal else kernel / total, border=border, noise_std=noise_std)


class SuperResolution(Convolution):
    """The image was made `factor` times smaller.

    Args:
        kernel: "box" (the mean of each block), "bicubic" (as Pillow and MATLAB make images smaller), or "gaussian"
            (of standard deviation factor / 2).

    Raises:
        UsageError: an unknown kernel, or a factor below 2 or above 64.
    """

    def __init__(
        self, factor: int, *, kernel: str = "bicubic", border: str = "reflect", noise_std: float = 0.0
    ) -> None:
        factor = FACTOR("factor", factor)
        if kernel not in RESAMPLING_KERNELS:
            raise UsageError(f"expected the kernel {', '.join(RESAMPLING_KERNELS)}, found {kernel!r}")
        match kernel:
            case "box":
                line = box_kernel(factor)
            case "bicubic":
                line = cubic_kernel(factor)
            case _:
                line = gaussian_kernel(factor / 2, size=_same_parity(4 * factor + 1, factor))
        # Low pixel i covers the high pixels s i to s i + s - 1; the kernel is centred in their midst.
        centre = (len(line) + factor) // 2 - 1
        super().__init__(
            torch.outer(line, line), centre=(centre, centre), factor=factor, border=border, noise_std=noise_std
        )
        self.name = kernel

    def pinv(self, y: Tensor) -> Tensor:
        """A⁺ y; blocks of one colour for the box kernel."""
        return self.factor**2 * self._spread(y) if self.name == "box" else super().pinv(y)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        return self._spread(y) if self.name == "box" else super().adjoint(y)

    def prox(self, y: Tensor, z: Tensor, rho: float) -> Tensor:
        """Closed for the box kernel, whose blocks do not overlap: z + Aᵀ (y - A z) / (1/s² + rho)."""
        if self.name != "box":
            return super().prox(y, z, rho)
        return z + self._spread(y - self.apply(z)) / (1.0 / self.factor**2 + rho)

    def apply(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.name != "box":
            return super().apply(x)
        self.measurement_shape(tuple(x.shape[1:]))
        return F.avg_pool2d(x, self.factor)

    def _spread(self, y: Tensor) -> Tensor:
        """Each value over its block, divided by the number of pixels there."""
        s = self.factor
        return y.repeat_interleave(s, dim=-2).repeat_interleave(s, dim=-1) / s**2


def _unreflected(padded: Tensor, before: int, length: int, after: int) -> Tensor:
    """The adjoint of reflecting the last dimension: (..., before + length + after) -> (..., length)."""
    inner = padded[..., before : before + length].clone()
    inner[..., 1 : before + 1] += padded[..., :before].flip(-1)
    inner[..., length - 1 - after : length - 1] += padded[..., before + length :].flip(-1)
    return inner


def _same_parity(size: int, factor: int) -> int:
    return size if (size - factor) % 2 == 0 else size + 1

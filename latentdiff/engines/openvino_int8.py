"""The U-Net in 8 bits by OpenVINO, quantised by NNCF: an approximation, for speed.

NNCF runs the model on examples and gives every tensor the range that it had there, so that nothing has to be measured
while an image is made. It also moves scale from activations with outliers to weights (SmoothQuant, Xiao et al. 2022).
What is small or sensitive keeps its precision: the first and last convolution, the timestep, softmax and what it
weighs; and so do the first and last steps, which the U-Net itself computes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.engines import Example
from latentdiff.engines.int8 import is_outer, multiplies_in_8_bits
from latentdiff.engines.openvino import OpenVINONetwork, cached_model, convert, openvino_package, without_telemetry
from latentdiff.errors import MissingDependencyError
from latentdiff.networks.layers import Context
from latentdiff.networks.unet import UNet

SMOOTH_PRODUCTS = 0.5  # share of the differences between channels that SmoothQuant moves from activations to weights
SMOOTH_CONVOLUTIONS = 0.5
_KIND = {True: "", False: "-7"}  # bits of the weights, in names of files
_SENSITIVE = [".*conv_in.*", ".*conv_out.*", ".*time_emb.*"]  # patterns of names


class OpenVINOInt8Network(OpenVINONetwork):
    """A U-Net computed by OpenVINO in 8 bits, except for the first and last timesteps; called as the U-Net is.

    With a LoRA or another tap on the U-Net, the U-Net itself computes.

    Args:
        examples: gives what the U-Net sees while it makes images. Called once for each set of weights: the result is
            kept in the cache folder.

    Raises:
        MissingDependencyError: OpenVINO or NNCF is not installed.
        UsageError: the U-Net is not on the CPU, or in float16.
    """

    def __init__(self, unet: UNet, examples: Callable[[], Sequence[Example]]) -> None:
        super().__init__(unet)
        self._examples = examples
        _nncf()

    def __call__(self, x: Tensor, t: Tensor | float, context: Context) -> Tensor:
        """See `UNet.forward`."""
        if is_outer(float(torch.as_tensor(t).flatten()[0])):
            return self._unet(x, t, context)
        return super().__call__(x, t, context)

    def _model_file(self, inputs: list[Tensor]) -> Path:
        return cached_model(self._unet, f"-int8-{_nncf().__version__}{_KIND[multiplies_in_8_bits()]}", self._quantize)

    def _quantize(self, file: Path) -> None:
        """Write the quantised model to `file`."""
        examples = [example for example in self._examples() if not is_outer(example[1])]
        exact = file.with_name("exact.xml")
        convert(self._unet, self._flat, self._inputs(examples[0], 0), exact)
        nncf, openvino = _nncf(), openvino_package()
        # One row of each guided batch, with the text and without it in turns: half the time and memory.
        inputs = nncf.Dataset(
            range(len(examples)), lambda n: [each.numpy() for each in self._inputs(examples[n], n % 2)]
        )
        with _quiet():
            model = nncf.quantize(
                openvino.Core().read_model(exact),
                inputs,
                subset_size=len(examples),
                model_type=nncf.ModelType.TRANSFORMER,
                ignored_scope=nncf.IgnoredScope(patterns=_SENSITIVE, validate=False),
                advanced_parameters=_settings(),
            )
        openvino.save_model(model, file, compress_to_fp16=True)

    def _inputs(self, example: Example, row: int) -> list[Tensor]:
        """One row of an example, as the converted model takes it."""
        x, t, context = example
        parts = [x, *context.tensors(self._layers)]
        first, *others = (part[row : row + 1].float().contiguous() for part in parts)
        return [first, torch.tensor([t], dtype=torch.float32), *others]


def _settings() -> Any:
    """The whole range of all examples: ranges change from step to step, and their mean, which NNCF takes, cuts off
    ends.

    Without VNNI, sums of two products in 8 bits overflow on x86; weights of 7 bits do not.

    Correcting biases changed nothing. Chosen by the error of the embedded model's U-Net, see `docs/performance.md`.
    """
    from nncf import quantization

    fix = quantization.advanced_parameters.OverflowFix
    settings, ranges = quantization.advanced_parameters, quantization.range_estimator
    return settings.AdvancedQuantizationParameters(
        disable_bias_correction=True,
        overflow_fix=fix.FIRST_LAYER if multiplies_in_8_bits() else fix.ENABLE,
        activations_range_estimator_params=ranges.RangeEstimatorParametersSet.MINMAX,
        smooth_quant_alphas=settings.AdvancedSmoothQuantParameters(
            matmul=SMOOTH_PRODUCTS, convolution=SMOOTH_CONVOLUTIONS
        ),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's messages off the screen, and its progress bars off what may be read by a program."""
    with contextlib.redirect_stdout(sys.stderr if sys.stderr.isatty() else io.StringIO()):
        yield


@cache
def _nncf() -> Any:
    try:
        with without_telemetry():
            import nncf
    except ImportError as error:
        raise MissingDependencyError("nncf is not installed; run: pip install 'latentdiff[openvino]'") from error
    nncf.set_log_level(logging.ERROR)
    return nncf

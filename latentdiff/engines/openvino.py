"""The networks computed by OpenVINO on the CPU, compiled once for each shape.

A module is traced and converted once, with open shapes, and the result is kept in the cache folder under the checksum
of its weights; each shape that occurs is then compiled from that file, with its sizes fixed.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff import __version__
from latentdiff.engines.replacement import forms_in_force, plain_steps_in, refuse_gradients, state_of
from latentdiff.errors import MissingDependencyError, UsageError
from latentdiff.files import cache_folder
from latentdiff.networks.attention import use_attention_backend
from latentdiff.networks.device import in_float32
from latentdiff.networks.layers import Context, FeedForward, ProjectedContext, text_attentions
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE
from latentdiff.networks.weights import weights_hash

HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_NAME = "OpenVINO"
_TELEMETRY = "openvino_telemetry"


class OpenVINONetwork:
    """A U-Net computed by OpenVINO, in the precision that the U-Net has; called as the U-Net is.

    With a LoRA or another tap on the U-Net, the U-Net itself computes.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        UsageError: the U-Net is not on the CPU, or in float16.
    """

    def __init__(self, unet: UNet) -> None:
        self._unet = unet
        self._layers = text_attentions(unet)
        self._flat = _FlatUNet(unet, self._layers)
        self._compiled = _Compiled(unet, self._model_file)
        self._last: tuple[Context, list[Tensor]] | None = None

    def __call__(self, x: Tensor, t: Tensor | float, context: Context) -> Tensor:
        """See `UNet.forward`."""
        refuse_gradients(_NAME, x, *([context] if isinstance(context, Tensor) else []))
        if plain_steps_in(self._unet, _NAME):
            return self._unet(x, t, context)
        times = torch.as_tensor(t, dtype=torch.float32).reshape(-1)  # (N,) or (1,)
        return self._compiled(x, times, *self._tensors(context))

    def _model_file(self, inputs: list[Tensor]) -> Path:
        return converted(self._unet, self._flat, inputs)

    def _tensors(self, context: Context) -> list[Tensor]:
        if self._last is None or self._last[0] is not context:
            projected = context if isinstance(context, ProjectedContext) else self._unet.project_context(context)
            self._last = context, [part.float().contiguous() for part in projected.tensors(self._layers)]
        return self._last[1]


class OpenVINODecoder:
    """A VAE's decoder computed by OpenVINO; called as `VAE.decode` is. Tiles are left to the VAE."""

    def __init__(self, vae: VAE) -> None:
        self._vae = vae
        self._compiled = _Compiled(vae, partial(converted, vae, _FlatDecoder(vae)))

    def __call__(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """See `VAE.decode`."""
        refuse_gradients(_NAME, latents)
        if tile or plain_steps_in(self._vae, _NAME):
            return self._vae.decode(latents, tile=tile)
        return self._compiled(latents)


class _Compiled:
    """A module with float32 inputs as OpenVINO models, one for each shape, made again when the weights change.

    Args:
        file: gives for example inputs the file of the model, with open shapes.
    """

    def __init__(self, module: nn.Module, file: Callable[[list[Tensor]], Path]) -> None:
        self._module, self._file = module, file
        self._models: dict[Hashable, Callable[..., Any]] = {}
        self._state: Hashable = None
        _hint(module)
        openvino_package()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The module's output, in the dtype of the first input."""
        inputs_float32 = [each.detach().float().contiguous() for each in inputs]
        if self._state != state_of(self._module):
            self._models.clear()
            self._state = state_of(self._module)
        shapes = tuple(tuple(each.shape) for each in inputs)
        if shapes not in self._models:
            self._models[shapes] = self._compile(inputs_float32)
        (out,) = self._models[shapes]([each.numpy() for each in inputs_float32], share_inputs=True).values()
        return torch.from_numpy(out).to(inputs[0].dtype)

    def _compile(self, inputs: list[Tensor]) -> Callable[..., Any]:
        core = openvino_package().Core()
        model = core.read_model(self._file(inputs))
        model.reshape({index: list(each.shape) for index, each in enumerate(inputs)})
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _hint(self._module),
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        return core.compile_model(model, "CPU", settings)


class _FlatUNet(nn.Module):
    """The U-Net as a function of tensors: x, t, and those of a `ProjectedContext`."""

    def __init__(self, unet: UNet, layers: list[nn.Module]) -> None:
        super().__init__()
        self.unet, self._layers = unet, [layers]  # in a list of its own, so that torch sees each module once

    def forward(self, x: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        return self.unet(x, t, ProjectedContext.of(self._layers[0], context))


class _FlatDecoder(nn.Module):
    """The VAE as the function that `decode` is."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)


def converted(module: nn.Module, flat: nn.Module, inputs: list[Tensor]) -> Path:
    """The file of the module as OpenVINO has it, with open shapes; from the cache, or else made and put there."""
    return cached_model(module, "", lambda file: convert(module, flat, inputs, file))


def cached_model(module: nn.Module, form: str, make: Callable[[Path], None]) -> Path:
    """The file of one form of `module` in the cache; `make` writes one that is missing, to a path in a folder of its
    own."""
    release = openvino_package().__version__.split("-")[0]
    first = next(module.parameters()).dtype
    fingerprint = weights_hash(module, getattr(module, "config", module), first)
    name = f"{type(module).__name__.lower()}{form}-{fingerprint}-{release}-{__version__}"
    folder = cache_folder("openvino")
    if not (folder / name).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as making:
            make(Path(making, "model.xml"))
            _publish(Path(making), folder / name)
    return folder / name / "model.xml"


@torch.no_grad()
def convert(module: nn.Module, flat: nn.Module, inputs: list[Tensor], file: Path) -> None:
    """Write the module, which `flat` makes a function of tensors, as OpenVINO has it, with open shapes."""
    openvino = openvino_package()
    is_short = next(module.parameters()).dtype != torch.float32
    forms = {part: partial(_feed_forward, part) for part in module.modules() if isinstance(part, FeedForward)}
    with in_float32(module) if is_short else nullcontext(), use_attention_backend("sdpa"), forms_in_force(forms):
        traced = _traced(flat, tuple(inputs))
        # float16 holds what bf16 weights say, up to 3e-8, in the same space.
        model = openvino.convert_model(traced, example_input=tuple(inputs))
        openvino.save_model(model, file, compress_to_fp16=is_short)


def _feed_forward(block: FeedForward, x: Tensor) -> Tensor:
    """Value and gate as products of their own: OpenVINO then puts GELU into the second, and copies no halves."""
    inner, outer = block.net[0].proj, block.net[2]
    (value, gate), (value_bias, gate_bias) = inner.weight.chunk(2), inner.bias.chunk(2)
    return outer(F.linear(x, value, value_bias) * F.gelu(F.linear(x, gate, gate_bias)))


def _traced(flat: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    with warnings.catch_warnings():
        # The timestep is a tensor already; as_tensor, which the warning is about, passes it on.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(flat, inputs, check_trace=False)


def _publish(made: Path, place: Path) -> None:
    finished = made / "finished"
    finished.mkdir()
    for file in [*made.glob("model.*")]:
        file.rename(finished / file.name)
    try:
        finished.rename(place)
    except OSError:
        if not place.is_dir():  # another process may have been first
            raise


def _hint(module: nn.Module) -> str:
    first = next(module.parameters())
    if first.device.type not in ("cpu", "meta"):  # meta: not loaded yet
        raise UsageError(
            f"expected the model on the CPU for OpenVINO, found it on {first.device.type}; add --device cpu"
        )
    if first.dtype not in HINTS:
        raise UsageError("OpenVINO computes in fp32 or bf16 here, found fp16; choose another --precision")
    return HINTS[first.dtype]


@cache
def openvino_package() -> Any:
    """OpenVINO.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        with without_telemetry():
            import openvino
            import openvino.tools.ovc
    except ImportError as error:
        raise MissingDependencyError("openvino is not installed; run: pip install 'latentdiff[openvino]'") from error
    return openvino


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Let what is imported inside the `with` find no openvino_telemetry, which would report each use to its maker."""
    before = sys.modules.get(_TELEMETRY, _TELEMETRY)
    sys.modules[_TELEMETRY] = None
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]
        if before is not _TELEMETRY:
            sys.modules[_TELEMETRY] = before

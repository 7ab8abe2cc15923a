"""Where the computation runs and how precisely."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentdiff.errors import LatentDiffError, NotFiniteError, UsageError

_NO_CAUSE = "the model file is damaged, or the settings are extreme: try a lower guidance"
# Below this size a U-Net's step on a CPU is bound by overhead, not by arithmetic, and bf16 only adds conversions.
LARGE_ENOUGH_FOR_BF16 = 100_000_000


class PrecisionWarning(UserWarning):
    """A part did not fit into the chosen number format and was computed again in float32."""


@dataclass(frozen=True)
class Precision:
    """The number format of each part; `name` is "fp32", "bf16", "fp16" or "int8"."""

    name: str
    text_encoder: torch.dtype
    unet: torch.dtype
    vae: torch.dtype


FORMATS = {
    "fp32": Precision("fp32", torch.float32, torch.float32, torch.float32),
    "bf16": Precision("bf16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
    # The activations of SD's VAE do not fit into float16: the field's black images come from there.
    "fp16": Precision("fp16", torch.float16, torch.float16, torch.float32),
    # Of the modules, whose products `latentdiff.engines.int8` then rounds to 8 bits.
    "int8": Precision("int8", torch.bfloat16, torch.bfloat16, torch.bfloat16),
}


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device called `name`: "cpu", "cuda", "cuda:1", "mps", or "auto" for the first of cuda, mps, cpu there is.

    Raises:
        UsageError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if _is_available(kind)))
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"expected the device auto, cpu, cuda, cuda:N or mps, found {name!r}") from error
    if not _is_available(device.type):
        raise UsageError(f"this machine has no {device.type} device that torch can use; leave out --device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"found {torch.cuda.device_count()} CUDA devices, no {name}; they count from cuda:0")
    return device


def pick_precision(name: str, device: torch.device, parameters: int) -> Precision:
    """The precision called `name`; "auto" takes the fastest one that keeps the image.

    That is bf16 on a CUDA device that computes in it and fp16 on an older one, fp16 on mps, and on a CPU bf16 if
    it has instructions for it (AVX-512 BF16 or AMX) and the U-Net is large enough to gain from them, else fp32.

    Args:
        parameters: the size of the U-Net.

    Raises:
        UsageError: there is no such precision, or not on this device.
    """
    if name not in ("auto", *FORMATS):
        raise UsageError(f"expected a precision of auto, {', '.join(FORMATS)}, found {name!r}")
    if name == "int8" and device.type != "cpu":
        raise UsageError(f"--precision int8 computes on the CPU, found {device.type}; add --device cpu or choose bf16")
    if name != "auto":
        return FORMATS[name]
    if device.type == "cuda":
        return FORMATS["bf16" if computes_in_bf16("cuda") else "fp16"]
    if device.type == "mps":
        return FORMATS["fp16"]
    return FORMATS["bf16" if parameters >= LARGE_ENOUGH_FOR_BF16 and computes_in_bf16("cpu") else "fp32"]


def computes_in_bf16(kind: str) -> bool:
    """Whether devices of a kind, "cpu" or "cuda", have instructions for bfloat16 here."""
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for this; where a release lacks the private one, fp32 is the safe answer.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return kind == "cpu" and any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def finite_or_float32(
    part: str, module: nn.Module, compute: Callable[[torch.dtype], Tensor], *, where: Callable[[], str] = str
) -> Tensor:
    """The result of `compute`, which uses `module`; once more in float32 if it overflows a shorter format.

    Args:
        part: what is computed, for messages: "the U-Net".
        compute: is given the dtype of the module's weights at that moment.
        where: makes more for the error message: "at step 3 of 25".

    Raises:
        NotFiniteError: the result is not finite in float32 either.
    """
    dtype = next(module.parameters()).dtype
    result = compute(dtype)
    if torch.isfinite(result).all():
        return result
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(f"{part} overflows {name}; computed again in float32", PrecisionWarning, stacklevel=2)
        with in_float32(module):
            result = compute(torch.float32)
        if torch.isfinite(result).all():
            return result
    broken = _broken_weight(module)
    cause = f"its weight {broken} holds them: the model file is damaged" if broken else _NO_CAUSE
    place = f"{where()} ".lstrip()
    raise NotFiniteError(f"{part} gives NaN or infinity {place}in float32; {cause}")


def _broken_weight(module: nn.Module) -> str | None:
    """The first weight that is not finite."""
    in_memory = ((name, weight) for name, weight in module.state_dict().items() if weight.device.type != "meta")
    return next((name for name, weight in in_memory if not torch.isfinite(weight).all()), None)


def precision_of(unet: nn.Module) -> Precision:
    """The precision that a model has whose U-Net is `unet`; float32 for types in which nothing computes here."""
    dtype = next(unet.parameters()).dtype
    return next((precision for precision in FORMATS.values() if precision.unet == dtype), FORMATS["fp32"])


@contextmanager
def in_float32(module: nn.Module) -> Generator[None, None, None]:
    """Compute with `module` in float32 inside the `with`; afterwards it is bit for bit what it was."""
    dtype = next(module.parameters()).dtype
    module.to(torch.float32)
    try:
        yield
    finally:
        module.to(dtype)


@contextmanager
def apart_from_torch(device: str = "cpu") -> Generator[None, None, None]:
    """Inside, autocast and the default device that a program has set in torch for itself change nothing."""
    with ExitStack() as stack:
        for kind in {"cpu", device}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is torch's way of saying, on any device, that the memory does not suffice."""
    said = ("out of memory", "can't allocate memory")
    is_named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_named or isinstance(error, RuntimeError) and any(words in str(error).lower() for words in said)


@contextmanager
def explained_out_of_memory() -> Generator[None, None, None]:
    """Turn running out of memory inside the `with` into an error that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LatentDiffError(
            "not enough memory for this image; try --batch-size 1, a smaller --width and --height, "
            "--precision bf16, or --attention sliced"
        ) from error


def describe_device(device: torch.device) -> str:
    """The device for people: "cpu", or "cuda (NVIDIA H100)"."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def _is_available(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "mps":
        return torch.backends.mps.is_available()
    return kind == "cpu"

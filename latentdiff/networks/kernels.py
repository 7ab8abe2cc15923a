"""What the networks compute with on a CPU: oneDNN's matrix product, and the choice between two forms of a computation.

The product has a private name in torch, which no other file uses. Where a release of torch lacks the operation, or the
processor one of its formats (bfloat16 without AVX-512, say), torch's public functions compute the same.

Which form is faster on this machine is tried once, then remembered. The forms differ in rounding, so a choice must not
change: the first one for a kind of processor, a number of threads and a release of torch is written to the cache folder,
and all later programs follow it. What cannot be read or written there is tried again in each program.

`LATENTDIFF_FORMS` decides without trying: "torch" for torch's own forms, "fast" for ours.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UsageError
from latentdiff.files import cache_folder

VARIABLE = "LATENTDIFF_FORMS"
SECONDS = 0.2  # of a processor that a program spends on trials; other programs on a busy machine do not use them up
SECONDS_EACH = 0.012
NEEDED = 1.08  # times as fast another form must be; less may be noise of the clock
ROUNDS = 6
HOPELESS = 1.3  # times as long as torch's form: no need to look again
TOLERANCE = 0.03  # relative distance of the results; in bfloat16 they differ by some 0.005
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
_LARGEST = 2**20  # bytes of a file of choices that are read

Form = Callable[[], Tensor]
Trial = Callable[[], tuple[Form, Form]]  # makes torch's form and the other one, of the same inputs


class Choices:
    """What was chosen, in memory and in a file that programs add lines to; the first line about a form is in force.

    Args:
        path: the file, or None to remember in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._chosen = _read(path)
        self._left = SECONDS
        self.renew_lock()

    def renew_lock(self) -> None:
        """Let a forked process choose, whoever was choosing in the other one."""
        self._lock = threading.RLock()  # a form may be made of others

    def is_fast(self, form: str, trial: Trial, needed: float = NEEDED) -> bool:
        """Whether the other form of `form` is faster here; tried if that is not known and there is time left.

        Args:
            form: name, number format and size.
            needed: how many times as fast it has to be in the trial.
        """
        if form not in self._chosen:
            with self._lock:
                if form not in self._chosen:
                    self._choose(form, trial, needed)
        return self._chosen[form]

    def _choose(self, form: str, trial: Trial, needed: float) -> None:
        start = _busy()
        gain = speed_up(trial, min(self._left, SECONDS_EACH))
        self._left -= _busy() - start
        is_fast = gain > needed
        _append(self._path, {"form": form, "fast": is_fast, "gain": round(gain, 2)})
        self._chosen[form] = _read(self._path).get(form, is_fast)  # another program may have been first


@torch.no_grad()
def speed_up(trial: Trial, seconds: float) -> float:
    """How many times as fast as torch's form the other one is, by the least of some times; 0 if it fails, or gives
    something else, or there is too little time to say."""
    if seconds <= 0:
        return 0.0
    end, least = _busy() + seconds, [math.inf, math.inf]
    # One thread's own time is not disturbed by other programs; several threads wait for one another.
    clock = _busy if torch.get_num_threads() == 1 else time.perf_counter
    try:
        forms = trial()
        results: list[Tensor] = []
        for done in range(ROUNDS):
            for index, form in enumerate(forms):
                start = clock()
                out = form()
                least[index] = min(least[index], clock() - start)
                if not done:
                    results.append(out.float())
            if not done and not _agree(*results):
                return 0.0
            # The first call of each is slower, since oneDNN compiles, so that there are two at least.
            if done and (_busy() > end or (done > 1 and least[1] > HOPELESS * least[0])):
                break
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, MemoryError):
        return 0.0
    return least[0] / max(least[1], 1e-9)


def _agree(expected: Tensor, found: Tensor) -> bool:
    return bool((found - expected).norm() <= TOLERANCE * expected.norm())  # also false for NaN


_FINE = hasattr(time, "thread_time") and time.get_clock_info("thread_time").resolution < 1e-5


def _busy() -> float:
    """Seconds that this thread has computed; where the system does not count them finely, those of the wall."""
    return time.thread_time() if _FINE else time.perf_counter()


_used: dict[str, bool] = {}
_of_machine: dict[str, Choices] = {}


def _after_fork() -> None:
    for choices in _of_machine.values():
        choices.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def takes_fast_form(form: str, trial: Trial, needed: float = NEEDED) -> bool:
    """Whether to compute `form` by our form rather than by torch's, on this machine with this many threads.

    Raises:
        UsageError: `LATENTDIFF_FORMS` is something else than "measured", "torch" or "fast".
    """
    mode = os.environ.get(VARIABLE) or "measured"
    if mode not in ("measured", "torch", "fast"):
        raise UsageError(f"expected {VARIABLE} to be measured, torch or fast, found {mode!r}")
    if mode != "measured":
        is_fast = mode == "fast"
    else:
        is_fast = _choices().is_fast(form, trial, needed)
    _used[form] = is_fast
    return is_fast


def forms_in_use() -> str:
    """What decided the forms of this program, for recipes: "torch", "fast", or what measured choices depend on; "" if it
    has not computed on a CPU. It does not change with what else the program has drawn."""
    if not _used:
        return ""
    mode = os.environ.get(VARIABLE) or "measured"
    return mode if mode != "measured" else machine(torch.get_num_threads()).rpartition("-")[2]


def _choices() -> Choices:
    name = machine(torch.get_num_threads())
    if name not in _of_machine:
        _of_machine.setdefault(name, Choices(cache_folder("forms") / f"{name}.jsonl"))
    return _of_machine[name]


@cache
def machine(threads: int) -> str:
    """What choices depend on, as the name of a file: processor, allowed instructions, threads, release of torch."""
    limits = [f"{name}={os.environ.get(name, '')}" for name in _LIMITS]
    processor = _processor()
    facts = [*processor, torch.backends.cpu.get_cpu_capability(), *limits, str(threads), torch.__version__]
    readable = re.sub(r"[^a-z0-9]+", "-", f"{processor[0]} {threads} torch {torch.__version__}".lower()).strip("-")
    return f"{readable[:80]}-{hashlib.sha256('|'.join(facts).encode()).hexdigest()[:12]}"


def _processor() -> list[str]:
    """Its name, and on Linux its family, model and instructions: virtual machines hide the name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read(8192).split("\n\n")[0].splitlines()
    except OSError:
        first = []
    known = dict(line.split(":", 1) for line in first if ":" in line)
    about = {name.strip(): value.strip() for name, value in known.items()}
    name = about.get("model name") or platform.processor() or platform.machine()
    return [name, *(about.get(each, "") for each in ("vendor_id", "cpu family", "model", "stepping", "flags"))]


def _read(path: Path | None) -> dict[str, bool]:
    """The choices of a file; of what is damaged, the lines that are whole."""
    try:
        with open(path, "rb") as file:
            lines = file.read(_LARGEST).decode("utf-8", errors="replace").splitlines()
    except (OSError, TypeError):
        return {}
    chosen: dict[str, bool] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("form"), str) and isinstance(entry.get("fast"), bool):
            chosen.setdefault(entry["form"], entry["fast"])
    return chosen


def _append(path: Path | None, entry: dict[str, object]) -> None:
    """Add a line in one write, which programs that run at the same time do not tear."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            file.write(f"\n{json.dumps(entry)}\n".encode())
    except (OSError, AttributeError):
        pass  # a folder that cannot be written to costs only time


def has_taps(*modules: nn.Module) -> bool:
    """Whether anything, a LoRA say, listens to or changes what goes through one of these or a part of it."""
    return any(part._forward_hooks or part._forward_pre_hooks for module in modules for part in module.modules())


_THEN = {"none": lambda x: x, "gelu": F.gelu, "sigmoid": torch.sigmoid}


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """x weightᵀ + bias, followed by an activation: by oneDNN where it can, or else by torch.

    Args:
        x: (..., I) on a CPU.
        weight: (O, I).
        bias: (O,) or None.
        then: "none", "gelu" or "sigmoid".

    Returns:
        (..., O).
    """
    if not has_product(x.dtype):
        return _THEN[then](F.linear(x, weight, bias))
    return _operation()(x, weight, bias, then, [], "none" if then == "gelu" else "")


@cache
def has_product(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of this format here."""
    operation = _operation()
    if operation is None or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        x = torch.ones(16, 32, dtype=dtype)
        return all(bool((operation(x, x, None, then, [], "none") == 32.0).all()) for then in ("none", "gelu"))
    except RuntimeError:  # "could not create a primitive descriptor", say
        return False


@cache
def _operation() -> Callable[..., Tensor] | None:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not is_x86 or not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def windows(pixels: Tensor, height: int, width: int) -> Tensor:
    """The windows of pixels (N, H, W, C), one from each place: (N, H - height + 1, W - width + 1, height width C)."""
    count, rows, columns, channels = pixels.shape
    of_map, of_row, of_column, of_channel = pixels.stride()
    shape = (count, rows - height + 1, columns - width + 1, height, width, channels)
    return pixels.as_strided(shape, (of_map, of_row, of_column, of_row, of_column, of_channel)).flatten(3)


def as_matrix(kernel: Tensor) -> Tensor:
    """(O, I, a, b) -> (O, a b I), what `windows` are multiplied by; no copy where it lies with channels last."""
    return kernel.permute(0, 2, 3, 1).flatten(1)

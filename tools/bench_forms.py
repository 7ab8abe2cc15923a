"""The fast forms of the CPU against torch's own, at shapes of Stable Diffusion 1.5 with guidance, one thread.

    python tools/bench.py --only forms                 three instruction sets in turn, as far as the processor has them
    python tools/bench_forms.py float32                one number format on the processor as it is, as JSON

Each shape is computed by torch's form, by ours, and by whichever the trials of a fresh cache chose, in turns; the times
are the least of some, of the thread alone. Instruction sets are limited by the variables that oneDNN, torch and MKL
read, which is not quite a processor that has no more of them.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

INSTRUCTIONS = {
    "as it is": {},
    "AVX-512 without BF16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
DTYPES = ("float32", "bfloat16")
SLOW = 1.0  # seconds; what takes longer is timed once
CONTENDERS = ("torch", "fast", "measured")


@dataclass(frozen=True)
class Row:
    """Seconds of one shape by torch's form, by ours, and by the one that was chosen."""

    form: str
    shape: str
    torch: float
    fast: float
    chosen: float
    is_fast: bool


ATTENTION = ((2, 4096, 4096, 40), (8, 1024, 1024, 80), (16, 256, 256, 160), (8, 4096, 77, 40))  # heads, L, S, d
LINEAR = ((8192, 320, 320), (2048, 640, 640), (512, 1280, 1280), (77, 768, 768))  # rows, in, out
FEED_FORWARD = ((8192, 320), (2048, 640), (512, 1280))  # rows, channels
POINTWISE = ((640, 320, 64), (1280, 1280, 16))  # in, out, side; two maps each
SMALL = ((1280, 1280, 8), (2560, 1280, 8), (1280, 1280, 16))
UPSAMPLING = ((2, 1280, 16), (2, 640, 32), (1, 512, 64))  # maps, channels, side

Case = tuple[str, str, Callable[[], Any], Callable[[], Any]]


def cases(dtype: Any, tiny: bool) -> Iterator[Case]:
    """Form, shape, and what computes it by torch and by us."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from latentdiff.engines.fast_forms import use_fast_forms
    from latentdiff.networks.attention import auto_attention

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        x = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    for heads, tokens, keys, size in ATTENTION:
        q, k, v = (random(1, heads, length // (8 if tiny else 1), size) for length in (tokens, keys, keys))
        yield (
            "attention",
            f"{heads}x{tokens}x{keys}x{size}",
            partial(sdpa, q, k, v),
            partial(auto_attention, q, k, v),
        )
    for form, shape, module, inputs in _modules(8 if tiny else 1):
        plain = module.to(dtype).to(memory_format=torch.channels_last)
        ours = copy.deepcopy(plain)
        use_fast_forms(ours)
        given = [random(*each) for each in inputs]
        yield form, shape, partial(plain, *given), partial(ours, *given)


def _modules(shrink: int) -> Iterator[tuple[str, str, Any, list[tuple[int, ...]]]]:
    """Form, shape, module, and the shapes of its inputs."""
    from torch import nn

    from latentdiff.networks.layers import FeedForward, ResnetBlock, Upsample

    for rows, i, o in LINEAR:
        yield "linear", f"{rows}x{i} to {o}", nn.Linear(i // shrink, o // shrink), [(rows, i // shrink)]
    for rows, i in FEED_FORWARD:
        yield "feed-forward", f"{rows}x{i}", FeedForward(i // shrink), [(1, rows, i // shrink)]
    for size, windows in ((1, POINTWISE), (3, SMALL)):
        for i, o, side in windows:
            layer = nn.Conv2d(i // shrink, o // shrink, size, padding=size // 2)
            yield f"{size}x{size} convolution", f"2x{i}x{side}x{side} to {o}", layer, [(2, i // shrink, side, side)]
    for count, i, side in UPSAMPLING:
        yield "upsampling", f"{count}x{i}x{side}x{side}", Upsample(i // shrink), [(count, i // shrink, side, side)]
    block = ResnetBlock(320 // shrink, 320 // shrink, time_channels=1280 // shrink, groups=8, eps=1e-5)
    yield "resnet block", "2x320x64x64", block, [(2, 320 // shrink, 64, 64), (2, 1280 // shrink)]


def measured(dtype: str, repeat: int, tiny: bool) -> list[Row]:
    """All shapes in this process."""
    import torch

    from latentdiff.networks import kernels

    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for form, shape, plain, ours in cases(getattr(torch, dtype), tiny):
            runs = {
                "torch": plain,
                "fast": partial(_under, "fast", ours),
                "measured": partial(_under, "measured", ours),
            }
            kernels._used.clear()
            runs["measured"]()  # tries
            is_fast = any(kernels._used.values())
            least = dict.fromkeys(CONTENDERS, float("inf"))
            for _ in range(repeat):
                for name, run in runs.items():
                    start = time.thread_time()
                    run()
                    least[name] = min(least[name], time.thread_time() - start)
                if max(least.values()) > SLOW:
                    break
            rows.append(Row(form, shape, *least.values(), is_fast))
    return rows


def _under(mode: str, run: Callable[[], Any]) -> Any:
    os.environ["LATENTDIFF_FORMS"] = mode
    return run()


def table(repeat: int, tiny: bool) -> str:
    """Of all formats and instruction sets: how many times as fast our form is, and the chosen one."""
    columns: dict[str, dict[tuple[str, str], Row]] = {}
    for dtype in DTYPES:
        for name, limits in INSTRUCTIONS.items():
            with tempfile.TemporaryDirectory() as cache:
                environment = os.environ | limits | {"LATENTDIFF_CACHE": cache, "OMP_NUM_THREADS": "1"}
                command = [sys.executable, __file__, dtype, str(repeat), *(["tiny"] if tiny else [])]
                done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{dtype}, {name} failed:\n{done.stderr[-2000:]}")
            rows = [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]
            columns[f"{dtype}, {name}"] = {(row.form, row.shape): row for row in rows}
            print(f"... {dtype}, {name}", file=sys.stderr, flush=True)
    names = list(next(iter(columns.values())))
    lines = [f"| form | shape | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for name in names:
        lines.append(f"| {' | '.join([*name, *(_cell(column[name]) for column in columns.values())])} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    """Gain of our form, then that of the chosen one."""
    return f"{row.torch / row.fast:.2f} -> {row.torch / row.chosen:.2f}{' *' if row.is_fast else ''}"


if __name__ == "__main__":
    _, number_format, *rest = sys.argv
    print(json.dumps([asdict(row) for row in measured(number_format, int(rest[0]) if rest else 3, "tiny" in rest)]))

"""How `bench.py` lets contenders take turns: as waiting processes, or as whole programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from tools.bench_worker import Spec

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Result:
    """One contender in one race."""

    case: str
    what: str  # what all contenders of the race do
    contender: str
    seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)  # resident memory, or that of the GPU
    ready: float = 0.0  # seconds from loading to the end of the first run
    difference: str = ""
    at: dict[str, float] = field(default_factory=dict)  # of growth: size, batch and steps


class Worker:
    """A contender in its process."""

    def __init__(self, spec: Spec) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        command = [sys.executable, str(ROOT / "tools" / "bench_worker.py"), json.dumps(asdict(spec))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=ROOT
        )
        self.ready = self._answer()["ready"]

    def tell(self, command: str) -> dict[str, Any]:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries print warnings
                return json.loads(line)
        self.errors.seek(0)
        raise SystemExit(f"a contender failed:\n{self.errors.read()[-2000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


Compare = Callable[[Any, Any], str]


def race(case: str, what: str, specs: Mapping[str, Spec], repeat: int, compare: Compare | None = None) -> list[Result]:
    """Warm everyone up once, then run in turns; another one starts each round.

    Args:
        specs: name of the contender -> what it does.
        compare: (output of the first contender, own output) -> what the table says of their difference.
    """
    results = [Result(case, what, name) for name in specs]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        # The last one first: converters stand there, which for a while need twice their memory.
        workers = [stack.enter_context(Worker(spec)) for spec in reversed(specs.values())][::-1]
        order = list(zip(workers, results, strict=True))
        for worker, result in order:
            result.ready = worker.ready
        for _ in range(repeat):
            for worker, result in order:
                told = worker.tell("run")
                result.seconds.append(told["seconds"])
                result.peak_mb.append(told["peak_mb"])
            order = order[1:] + order[:1]
        if compare:
            _compare(workers, results, Path(folder), compare)
    return results


def _compare(workers: list[Worker], results: list[Result], folder: Path, compare: Compare) -> None:
    import torch

    outputs = []
    for number, worker in enumerate(workers):
        worker.tell(f"save {folder / str(number)}")
        outputs.append(torch.load(folder / str(number), weights_only=True))
    for result, output in zip(results[1:], outputs[1:], strict=True):
        result.difference = compare(outputs[0], output)


def relative(reference: Any, output: Any) -> str:
    """The largest difference, relative to the largest value."""
    return f"{float((output - reference).abs().max() / reference.abs().max()):.1e}"


def decibels(reference: Any, output: Any) -> str:
    """The signal-to-noise ratio of images with values 0 to 255, for each image; the worst and the mean."""
    errors = (output - reference).square().flatten(1).mean(dim=1).clamp(min=1e-9)
    ratios = 10 * (255**2 / errors).log10()
    return f"{float(ratios.mean()):.1f} dB (worst {float(ratios.min()):.1f})"


def race_programs(case: str, what: str, commands: Mapping[str, list[str]], repeat: int) -> list[Result]:
    """Run whole programs in turns, after one round that fills the disk cache."""
    results = {name: Result(case, what, name) for name in commands}
    for number in range(repeat + 1):
        for name, command in commands.items():
            seconds, peak_mb = run_program(command)
            if number:
                results[name].seconds.append(seconds)
                results[name].peak_mb.append(peak_mb)
    return list(results.values())


def run_program(command: list[str]) -> tuple[float, float]:
    """Run `command`; return seconds from start to end and its peak resident memory in MB.

    Raises:
        SystemExit: it failed; its last lines of output are the message.
    """
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command[:4])} ... failed:\n{output.read()[-2000:]}")
    return seconds, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)

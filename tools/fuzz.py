"""Damage and malice for every reader: thousands of mutated files, each read by a child with limits of time and memory.

    python tools/fuzz.py --cases 50000                  all readers in turn
    python tools/fuzz.py --cases 2000 --reader lora     one of them
    python tools/fuzz.py --only 1234                    one case again, with its traceback

A case is a pure function of --seed and its number. Outcomes:

    clean       an error of latentdiff in one line            same      read, with the contents of the seed
    changed     read, with other contents, where no checksum could tell
    wrong       read with other contents although a checksum could tell
    foreign     an exception that is not ours                 in use    read, and not usable
    hang        more than 10 s of processor time, or 60 s without an end
    memory      more than 1.5 GB                              crash     the process died

The last six are faults: the exit code is 1 if there is one, and --keep FOLDER keeps what led to it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from latentdiff.errors import LatentDiffError, printable  # noqa: E402
from tools.fuzzing import controls, image_prompts, images, models, upscalers  # noqa: E402
from tools.fuzzing.readers import Reader, Unusable  # noqa: E402

_KINDS = (
    models.Safetensors, models.Archive, models.Folder, models.SingleFile, models.Adapter, controls.Control,
    image_prompts.IPAdapters, image_prompts.ImageEncoders, image_prompts.T2IAdapters,
    upscalers.Upscaler,
    images.Inversions, images.Recipes, images.Foreign, images.Data, images.Settings,
)  # fmt: skip
READERS: dict[str, type[Reader]] = {kind.name: kind for kind in _KINDS}

SECONDS, PATIENCE, MEMORY = 10, 60, 1_500_000_000
FAULTS = ("wrong", "foreign", "in use", "hang", "memory", "crash")
OUTCOMES = ("clean", "same", "changed", *FAULTS)


@dataclass
class Result:
    """What became of the cases: per reader how many of each outcome; and what led to faults."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[tuple[int, str, str, str]] = field(default_factory=list)  # case, reader, outcome, why
    largest: int = 0  # bytes of memory that a child grew to beyond what it began with

    def note(self, case: int, reader: str, outcome: str, why: str) -> None:
        self.counts.setdefault(reader, Counter())[outcome] += 1
        if outcome in FAULTS:
            self.faults.append((case, reader, outcome, why))

    def table(self) -> str:
        rows = [f"{'reader':<12} {'cases':>6} " + " ".join(f"{name:>7}" for name in OUTCOMES)]
        total: Counter[str] = Counter()
        for reader, counts in self.counts.items():
            total += counts
            rows.append(_row(reader, counts))
        return "\n".join([*rows, _row("all", total)])


def _row(name: str, counts: Counter[str]) -> str:
    return f"{name:<12} {sum(counts.values()):>6} " + " ".join(f"{counts[outcome]:>7}" for outcome in OUTCOMES)


def fuzz(cases: int, seed: int, names: list[str], folder: Path, keep: Path | None = None, first: int = 0) -> Result:
    """Try so many cases, all in children of this process."""
    torch.set_num_threads(1)  # threads do not survive a fork
    readers = [READERS[name](folder / name) for name in names]
    result = Result()
    case, end = first, first + cases
    while case < end:
        case = _child(readers, case, end, seed, folder, keep, result)
    return result


def _child(
    readers: list[Reader], case: int, end: int, seed: int, folder: Path, keep: Path | None, result: Result
) -> int:
    """Fork a child that tries cases until one kills it; returns the number of the first that is left."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        _work(readers, case, end, seed, folder, theirs)
        os._exit(0)
    os.close(theirs)
    said = b""
    while True:
        ready, _, _ = select.select([ours], [], [], PATIENCE)
        chunk = os.read(ours, 2**16) if ready else b""
        *lines, said = (said + chunk).split(b"\n")
        for line in lines:
            number, outcome, why, grown = json.loads(line)
            result.note(number, readers[number % len(readers)].name, outcome, why)
            result.largest = max(result.largest, grown)
            if outcome in FAULTS:
                _keep(folder, keep, number)
            case = number + 1
        if not chunk:
            break
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.close(ours)
    _, status = os.waitpid(child, 0)
    if case < end and status:
        timed_out = not ready or os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGXCPU)
        result.note(case, readers[case % len(readers)].name, "hang" if timed_out else "crash", f"status {status}")
        _keep(folder, keep, case)
        case += 1
    return case


def _work(readers: list[Reader], case: int, end: int, seed: int, folder: Path, out: int) -> None:
    """What a child does: cases one after the other, each reported in a line."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries talk
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(case, end):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        outcome, why = attempt(readers[number % len(readers)], number, seed, folder / "case")
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        os.write(out, json.dumps([number, outcome, why[:300], grown]).encode() + b"\n")
        if outcome in FAULTS:
            os._exit(0)  # the parent keeps the files, and a fresh child goes on


def attempt(reader: Reader, number: int, seed: int, folder: Path) -> tuple[str, str]:
    """Make one mutant and read it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(f"{seed} {number}")
    mutant = reader.mutate(rng, folder)
    try:
        found = reader.read(mutant.path)
    except Unusable as error:
        return "in use", f"{mutant.what}: {error}"
    except LatentDiffError as error:
        said = str(error)
        is_line = said.isprintable() or said == printable(said)
        return ("clean", said) if is_line else ("foreign", f"{mutant.what}: not one printable line: {said!r}")
    except MemoryError as error:
        return "memory", f"{mutant.what}: {_origin(error)}"
    except Exception as error:
        return "foreign", f"{mutant.what}: {type(error).__name__}: {error} {_origin(error)}"
    if found == reader.expected(mutant.seed):
        return "same", ""
    return ("wrong", f"{mutant.what}: its checksum is wrong") if mutant.can_tell else ("changed", "")


def _origin(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-5:-1])


def _keep(folder: Path, keep: Path | None, number: int) -> None:
    if keep and (folder / "case").exists():
        shutil.rmtree(keep / str(number), ignore_errors=True)
        shutil.copytree(folder / "case", keep / str(number), symlinks=True, ignore=_unlike_files)


def _unlike_files(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_fifo()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--reader", action="append", choices=READERS, help="only these readers; repeat for several")
    parser.add_argument("--only", type=int, help="try this case in this process, with its traceback")
    parser.add_argument("--keep", type=Path, help="folder for the files that led to a fault")
    given = parser.parse_args()
    names = given.reader or list(READERS)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        if given.only is not None:
            reader = READERS[names[given.only % len(names)]](Path(folder) / "seeds")
            mutant = reader.mutate(random.Random(f"{given.seed} {given.only}"), Path(folder))
            print(reader.name, mutant.what, mutant.path, flush=True)
            print(reader.read(mutant.path) == reader.expected(mutant.seed))
            return 0
        result = fuzz(given.cases, given.seed, names, Path(folder), given.keep, given.first)
    print(result.table())
    for case, reader, outcome, why in result.faults[:50]:
        print(f"{outcome}: case {case} of {reader}: {printable(why)}")
    print(f"{time.monotonic() - started:.0f} s; memory grew by {result.largest / 2**20:.0f} MiB at most")
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())

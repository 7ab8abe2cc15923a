"""Kill commands at random moments and compare what is left: no half file, and the same bits after going on.

    python tools/kill.py --kills 100                    all four commands; name some to try only those

Each command is run once undisturbed, then again and again in a fresh folder: killed (SIGKILL) after a random part of its
time, continued by the same command (with --resume for training), until it ends, and compared file by file. The tiny
model and data are those of the tests.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

MOST_RESUMES = 20  # of one round: then it is left to end


@dataclass
class Case:
    """A command, and what of its results has to be the same: file names and contents, by name."""

    first: Sequence[str]
    again: Callable[[Path], Sequence[str]]
    results: Callable[[Path], dict[str, bytes]]


@dataclass
class Outcome:
    """Kills done, and what was wrong after them."""

    kills: int = 0
    faults: tuple[str, ...] = ()


def kill(case: Case, place: Path, kills: int, seed: int) -> Outcome:
    """Interrupt a command so many times, over as many rounds as that takes; `place` holds its input."""
    rng = random.Random(seed)
    whole = _round(place, "whole")
    started = time.monotonic()
    subprocess.run(case.first, cwd=whole, check=True, capture_output=True)
    length = time.monotonic() - started
    expected = case.results(whole)
    if not expected:
        raise RuntimeError("the undisturbed command left nothing to compare")
    done, faults, number = 0, [], 0
    while done < kills:
        folder = _round(place, f"round-{number}")
        command = case.first
        for _ in range(MOST_RESUMES):
            if done >= kills or not _interrupted(command, folder, rng.uniform(0.0, length)):
                break
            done += 1
            command = case.again(folder)
        ended = subprocess.run(case.again(folder), cwd=folder, capture_output=True, text=True)
        if ended.returncode:
            faults.append(f"round {number}: going on failed: {ended.stderr.strip().splitlines()[-1:]}")
        faults += [f"round {number}: {fault}" for fault in _differences(expected, case.results(folder))]
        shutil.rmtree(folder)
        number += 1
    return Outcome(done, tuple(faults))


def _round(place: Path, name: str) -> Path:
    """A folder with links to the input."""
    folder = place.parent / f"{place.name}-{name}"
    folder.mkdir()
    for path in place.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def _interrupted(command: Sequence[str], folder: Path, after: float) -> bool:
    """Run and kill, with all processes that it started; False if it ended before."""
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def _differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    missing = [f"{name} is missing" for name in expected.keys() - found.keys()]
    more = [f"{name} should not be there" for name in found.keys() - expected.keys()]
    return (
        missing + more + [f"{name} differs" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    )


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    """The contents of files by name; hidden ones, which killed programs leave, are none of the results."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()}


def cases(model: Path) -> dict[str, Case]:
    """The commands, for a place that holds what `prepare` makes."""
    python = [sys.executable, "-m", "latentdiff"]
    tune = [
        *python, "finetune", "--data", "train", "--model", str(model), "--out", "run", "--max-steps", "12",
        "--batch-size", "2", "--checkpoint-every", "3", "--resolution", "16", "--device", "cpu", "--sample-count", "0",
    ]  # fmt: skip
    make = [
        *python, "generate", "--prompts", "prompts.txt", "--model", str(model), "--seed", "1", "--steps", "2",
        "--out", "images", "--skip-existing", "--device", "cpu",
    ]  # fmt: skip
    change = [*python, "convert", str(model), "model.safetensors"]
    train = [*python, "train", "train.yaml", "--out", "run"]

    def resumed(folder: Path) -> Sequence[str]:
        there = (folder / "run/config.yaml").exists()
        return [*python, "finetune", "--resume", "run"] if there else tune

    return {
        "finetune": Case(tune, resumed, lambda folder: files(folder, "run/lora.safetensors")),
        "train": Case(train, lambda folder: train, lambda folder: files(folder, "run/**/*model.safetensors")),
        "convert": Case(change, lambda folder: change, lambda folder: files(folder, "model.safetensors")),
        "generate": Case(make, lambda folder: make, lambda folder: files(folder, "images/[!.]*")),
    }


def prepare(place: Path) -> Path:
    """Make the input of all commands: data, prompts, a training; returns the model's folder."""
    import yaml

    from tests.training.build import prepared, values
    from tools.fuzzing.readers import tiny_model

    place.mkdir()
    prepared(place)
    (place / "train.yaml").write_text(yaml.safe_dump(values(place)))
    (place / "prompts.txt").write_text("\n".join(f"a {colour} cat" for colour in ("red", "blue", "green", "white")))
    return tiny_model(place.parent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("commands", nargs="*", default=["finetune", "train", "convert", "generate"])
    parser.add_argument("--kills", type=int, default=100, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    code = 0
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        place = Path(folder) / "input"
        known = cases(prepare(place))
        for name in given.commands:
            (Path(folder) / name).mkdir()
            shutil.copytree(place, Path(folder) / name / "input", symlinks=True)
            outcome = kill(known[name], Path(folder) / name / "input", given.kills, given.seed)
            print(
                f"{name}: {outcome.kills} kills, {len(outcome.faults)} faults", *outcome.faults, sep="\n  ", flush=True
            )
            code |= bool(outcome.faults)
    return code


if __name__ == "__main__":
    sys.exit(main())

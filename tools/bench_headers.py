"""Processor time of reading the headers and the vocabulary of a model folder, beside the libraries that do less.

    python tools/bench_headers.py FOLDER

FOLDER is in the diffusers layout. Each line is the least of many rounds, the two in turns: ours checks sizes, depths,
numbers, places and characters; beside it stand safetensors' `safe_open`, which checks places, and plain `json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))

from latentdiff.reading.json import read_object  # noqa: E402
from latentdiff.reading.safetensors import read_header  # noqa: E402


def least(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Seconds of processor time, in turns."""
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for index, work in enumerate((ours, theirs)):
            start = time.process_time()
            work()
            best[index] = min(best[index], time.process_time() - start)
    return best[0], best[1]


def opened(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return [str(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 - it is no dict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=50)
    given = parser.parse_args()
    for path in sorted([*given.folder.rglob("*.safetensors"), *given.folder.rglob("*.json")]):
        if path.suffix == ".json":
            both = least(lambda: read_object(path), lambda: json.loads(path.read_text(encoding="utf-8")), given.rounds)  # noqa: B023
        else:
            both = least(lambda: read_header(path), lambda: opened(path), given.rounds)  # noqa: B023
        ours, theirs = (1000 * seconds for seconds in both)
        print(f"{path.relative_to(given.folder)!s:<60} {ours:8.2f} ms, beside {theirs:8.2f} ms: {ours / theirs:.2f}")


if __name__ == "__main__":
    main()

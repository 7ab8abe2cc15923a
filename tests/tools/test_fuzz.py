"""No damaged or hostile file gives a foreign exception, wrong contents, or takes long; and the harness sees those that do."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest

from latentdiff.errors import DataError
from tools import fuzz
from tools.fuzzing import mutations
from tools.fuzzing.readers import Mutant, Reader, Unusable

READERS = list(fuzz.READERS)


def faults(result: fuzz.Result) -> str:
    return "\n".join(map(str, result.faults[:20]))


def test_2000_cases(tmp_path):
    result = fuzz.fuzz(2000, 0, READERS, tmp_path)
    assert sum(map(sum, (counts.values() for counts in result.counts.values()))) == 2000
    assert not result.faults, faults(result)
    clean = sum(counts["clean"] for counts in result.counts.values())
    assert 500 < clean < 2000  # some damage is seen, some files stay as they are


@pytest.mark.slow
def test_50000_cases(tmp_path):
    result = fuzz.fuzz(50_000, 1, READERS, tmp_path)
    assert not result.faults, faults(result)


class Broken(Reader):
    """Each case goes wrong in another way."""

    name = "broken"

    def make(self, folder: Path) -> list[Path]:
        (folder / "seed").write_text("0")
        return [folder / "seed"]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        (folder / "mutant").write_text(str(rng.randrange(10**6)))
        return Mutant(folder / "mutant", "all", can_tell=True)

    def read(self, path: Path) -> int:
        number = int(path.read_text())
        ways = (KeyError, Unusable, MemoryError, lambda: DataError("a"), RecursionError)
        if number and number % 7 < len(ways):
            raise ways[number % 7]()
        if number % 7 == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def test_the_harness_sees_faults(tmp_path, monkeypatch):
    monkeypatch.setitem(fuzz.READERS, "broken", Broken)
    result = fuzz.fuzz(60, 0, ["broken"], tmp_path, tmp_path / "kept")
    counts = result.counts["broken"]
    assert sum(counts.values()) == 60
    assert all(counts[outcome] for outcome in ("foreign", "in use", "memory", "clean", "crash", "wrong")), counts
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {str(case) for case, *_ in result.faults}


def test_a_hang_is_seen(tmp_path, monkeypatch):
    def spin(self: Reader, path: Path) -> int:
        while path.name == "mutant":
            pass
        return 0

    monkeypatch.setattr(Broken, "read", spin)
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setitem(fuzz.READERS, "broken", Broken)
    assert fuzz.fuzz(2, 0, ["broken"], tmp_path).counts["broken"] == {"hang": 2}


def test_cases_are_a_function_of_the_seed():
    value = {"a": [1, {"b": "x"}], "c": 2.5}
    made = [mutations.text_of(random.Random(i), mutations.value_of(random.Random(i), value)) for i in range(50)]
    again = [mutations.text_of(random.Random(i), mutations.value_of(random.Random(i), value)) for i in range(50)]
    assert made == again and len(set(made)) > 30 and value == json.loads(json.dumps(value))

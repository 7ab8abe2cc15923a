"""Images shared by several processes, as launchers start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from latentdiff.cli.ranks import Ranks
from latentdiff.errors import UsageError
from latentdiff.image import open_image
from latentdiff.recipe import read_recipe
from tests.cli.conftest import files

ROOT = Path(__file__).parents[2]
PROMPTS = [
    "a cat",
    "two foxes!",
    "two foxes?",
    "a cat",
]  # the second and the third give the same name, the last is double


@pytest.fixture
def as_rank(monkeypatch):
    """Set the environment as a launcher does."""

    def set_environment(number: object, count: object, **more: object) -> None:
        for name, value in {"RANK": number, "WORLD_SIZE": count, **more}.items():
            monkeypatch.setenv(name, str(value))

    return set_environment


def arguments(model: Path, out: str) -> list[object]:
    options = ["-n", 3, "--batch-size", 2, "--steps", 2, "--out", out, "--device", "cpu"]
    return ["generate", "--model", model, *PROMPTS, *options]


def assert_same_images(one: Path, other: Path) -> None:
    """Under the same names, bit for bit, with the same recipes."""
    assert files(one) == files(other)
    for name in files(one):
        images = open_image(one / name), open_image(other / name)
        assert np.array_equal(*map(np.asarray, images)), name
        assert read_recipe(images[0].info) == read_recipe(images[1].info)


# --- Processes that cannot talk, one after the other
# ---------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_three_shares_are_the_whole(command, sd1, as_rank, workplace, order):
    command(*arguments(sd1, "alone"), "--seed", 7)
    printed = []
    for number in order:
        as_rank(number, 3)
        done = command(*arguments(sd1, "shared"), "--seed", 7)
        assert done.code == 0
        printed.append(done.out.split())
    assert sorted(map(len, printed)) == [3, 3, 3]
    assert sorted(sum(printed, [])) == [f"shared/{name}" for name in files(workplace / "shared")]  # none twice
    assert len(files(workplace / "shared")) == 9
    assert_same_images(workplace / "alone", workplace / "shared")


def test_what_one_process_left_is_made_by_any_number_of_others(command, sd1, as_rank, workplace):
    command(*arguments(sd1, "alone"), "--seed", 7)
    as_rank(1, 3)
    command(*arguments(sd1, "shared"), "--seed", 7)
    for number in (0, 1):
        as_rank(number, 2)
        command(*arguments(sd1, "shared"), "--seed", 7, "--skip-existing")
    assert files(workplace / "shared") == files(workplace / "alone")


@pytest.mark.parametrize("options", [[], ["--seed", 1, "--sheet", "sheet.png"]])
def test_what_needs_an_agreement_is_refused(command, sd1, as_rank, options):
    as_rank(0, 2)
    done = command("generate", "--model", sd1, "cat", *options)
    assert done.code == 2 and "have no MASTER_ADDR and MASTER_PORT" in done.errors[0]


@pytest.mark.parametrize("values", [(2, 2), ("x", 2), (0, 0), (-1, 2)])
def test_environments_that_make_no_sense(as_rank, values):
    as_rank(*values)
    with pytest.raises(UsageError, match="in the environment"):
        Ranks.of_environment()


def test_devices(monkeypatch, as_rank):
    assert Ranks().device("auto") == "auto" and Ranks.of_environment() == Ranks()
    as_rank(5, 8, LOCAL_RANK=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ranks = Ranks.of_environment()
    assert (ranks.number, ranks.count, ranks.local, ranks.is_first) == (5, 8, 1, False)
    assert ranks.device("auto") == "cuda:1" and ranks.device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ranks.device("auto") == "auto"


# --- Two processes at the same time
# ---------------------------------------------------------------------------------------


def launch(command: list[object], folder: Path) -> list[tuple[int, str, str]]:
    """Run a command as two processes that can talk; exit code, output and errors of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], env={**shared, "RANK": str(number), "OMP_NUM_THREADS": "1"}, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in running]
    return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


@pytest.fixture
def one_thread():
    """As the processes of `launch` have: the number of threads decides how sums are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes(command, sd1, workplace, one_thread):
    both = launch(["-m", "latentdiff", *arguments(sd1, "shared"), "--sheet", "sheet.png"], workplace)
    assert [code for code, _, _ in both] == [0, 0], both
    (seed,) = [line for _, _, err in both for line in err.splitlines() if line.startswith("seed: ")]
    printed = [out.split() for _, out, _ in both]
    assert printed[0].pop() == "sheet.png"
    assert sorted(sum(printed, [])) == [f"shared/{name}" for name in files(workplace / "shared")]
    assert all(printed)
    command(*arguments(sd1, "alone"), "--sheet", "other.png", "--seed", seed.removeprefix("seed: "))
    assert_same_images(workplace / "alone", workplace / "shared")
    assert np.array_equal(*(np.asarray(open_image(name)) for name in ("sheet.png", "other.png")))


TALK = """
import os, sys
from latentdiff.cli.ranks import joined
from latentdiff.errors import LatentDiffError
with joined() as ranks:
    assert ranks.agree(lambda: "drawn by " + str(ranks.number)) == "drawn by 0"
    if ranks.number == 1 and sys.argv[1] == "dies":
        os._exit(9)
    try:
        sys.exit(ranks.worst(ranks.number))
    except LatentDiffError as error:
        print(error)
        sys.exit(3)
"""


def test_all_leave_with_the_worst_exit_code(tmp_path):
    assert [code for code, _, _ in launch(["-c", TALK, "lives"], tmp_path)] == [1, 1]


def test_a_process_that_dies_is_noticed(tmp_path):
    (code, out, _), (killed, _, _) = launch(["-c", TALK, "dies"], tmp_path)
    assert (code, killed) == (3, 9)
    assert "one of them has ended" in out and "--skip-existing" in out

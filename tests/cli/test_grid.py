from __future__ import annotations

import pytest
from PIL import Image


def test_a_grid_is_written(command, sd1):
    done = command(
        "grid", "a cat", "--x", "steps=2,3", "--y", "prompt=cat|dog", "--model", sd1, "--seed", 1, "--width", 64,
        "--height", 64, "--out", "sheets",
    )  # fmt: skip
    assert done.code == 0 and done.out == "sheets/grid.png\n"
    width, height = Image.open("sheets/grid.png").size
    assert width >= 2 * 64 and height >= 2 * 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --x"),
        (["--y", "steps=1,2"], "expected --x"),
        (["--x", "steps=1,2", "-n", "2"], "an axis of seeds"),
        (["--x", "prompt=dog|fox"], "does not hold 'dog'"),
    ],
)
def test_wrong_usage_comes_before_the_model(command, arguments, message, tmp_path):
    """The folder is there, but holds no model."""
    done = command("grid", "a cat", *arguments, "--model", tmp_path)
    assert done.code == 2 and message in done.err

"""Every command that the README shows, with a model of SDXL's shape in place of the embedded one."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from latentdiff.checkpoints.conversion import convert
from latentdiff.cli import run
from latentdiff.image import open_image
from tests import peers
from tests.adapters.control.nets import saved
from tests.tasks.images import an_image, apart, mask
from tests.test_readme import FENCE, ROOT

# Of the embedded model alone: its words, its making, its measurement, and an image that it made; and what does not end.
LEFT_OUT = ("words", "train", "evaluate", "reproduce examples/scene.png", "serve")
# Small numbers in place of the defaults.
QUICK = {
    "generate": ("--width", 64, "--height", 64), "edit": (), "inpaint": (), "translate": (), "invert": (), "interpolate": (),
    "restore": ("--steps", 4), "finetune": ("--max-steps", 2, "--batch-size", 2, "--resolution", 64, "--validation-share", 0),
}  # fmt: skip
STEPPED = ("generate", "edit", "inpaint", "translate", "invert", "interpolate")


def shown() -> list[list[str]]:
    """The arguments of the README's commands, in their order."""
    blocks = (body for kind, body in FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8")) if kind == "bash")
    lines = (shlex.split(line, comments=True) for body in blocks for line in body.replace("\\\n", " ").splitlines())
    found = [words[1:] for words in lines if words and Path(words[0]).name == "latentdiff"]
    return [arguments for arguments in found if not " ".join(arguments).startswith(LEFT_OUT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands find, and leave for those after them."""
    place = tmp_path_factory.mktemp("xl-commands")
    shutil.copytree(ROOT / "examples", place / "examples")
    shutil.copytree(ROOT / "docs", place / "docs", ignore=shutil.ignore_patterns("*.md"))
    convert(peers.folder("xl"), place / "model.safetensors")
    (place / "my-images").mkdir()
    for number in range(6):
        an_image(128, 128, seed=number).save(place / f"my-images/{number}.png")
        (place / f"my-images/{number}.txt").write_text("a teapot", encoding="utf-8")
    return place


@pytest.mark.parametrize("arguments", shown(), ids=" ".join)
def test_a_command_of_the_readme(folder: Path, monkeypatch, capsys, arguments: list[str]) -> None:
    monkeypatch.chdir(folder)
    name, *rest = arguments
    code = run([name, *rest, *map(str, added(name, rest))])
    assert code == 0, capsys.readouterr().err


def added(name: str, rest: list[str]) -> list[object]:
    resumes = "--resume" in rest
    options: list[object] = [] if resumes else list(QUICK.get(name, ()))
    if name in QUICK and "--model" not in rest and not resumes:
        options += ["--model", "model.safetensors"]
    if name in STEPPED and "--steps" not in rest and not rest[0].endswith(".inversion"):
        options += ["--steps", 4]
    return options


MASKED = ("--mask", "mask.png")
PAINT = ("inpaint", "source.png", *MASKED)
CONTROL = ("--control", "source.png", "--control-model", "net:0.8")
# The families of docs/editing.md and docs/steering.md that the README does not show.
EDITORS = [
    [*PAINT, "--remove"],
    [*PAINT, "a fox", "--soft"],
    [*PAINT, "a fox", "--inversion", "source.inversion"],
    ["edit", "source.inversion", "a dog", "--strength", 0.8],
    *(["translate", "source.png", "a dog", "--method", method] for method in ("direct", "negative-prompt", "edict", "ddim")),
    ["restore", "source.png", "--operator", "inpaint", *MASKED],
    ["restore", "source.png", "--operator", "deblur", "--kernel", "gaussian:1"],
    ["restore", "source.png", "--operator", "denoise", "--sigma", 0.1],
    ["restore", "source.png", "--operator", "colourise"],
    ["generate", "a cat", *CONTROL],
    ["edit", "source.png", "a dog", *CONTROL],
    [*PAINT, "a fox", *CONTROL],
    ["generate", "a cat", "--hires", "1.5x", "--width", 64, "--height", 64],
    ["generate", "a [cat:dog:0.5] AND (fox:1.2)", "--guidance-kind", "apg"],
]


@pytest.mark.parametrize("arguments", EDITORS, ids=lambda arguments: " ".join(map(str, arguments)))
def test_an_editor(command, workplace: Path, arguments: list[object]) -> None:
    an_image().save("source.png")
    mask((16, 16, 48, 48)).save("mask.png")
    saved(workplace, "xl").rename("net")
    same = ("--model", peers.folder("xl"), "--steps", 3)
    if any(str(argument).endswith(".inversion") for argument in arguments):
        made = command("invert", "source.png", "--prompt", "a cat", *same, "--out", "source.inversion")
        assert made.code == 0, made.err
    done = command(*arguments, *same, "--out", "made.png")
    assert done.code == 0, done.err
    assert apart(open_image("made.png").resize((64, 64)), an_image()) > 5


MADE = {
    "sizes": ["generate", "a cat", "--original-size", 90, 100, "--crop-top-left", 0, 8],
    "cache": ["generate", "a cat", "--cache-interval", 2],
    "edit": ["edit", "source.png", "a dog"],
    "inpaint": ["inpaint", "source.png", "a dog", "--mask", "mask.png"],
    "translate": ["translate", "source.png", "a dog", "--method", "null-text"],
}


@pytest.mark.parametrize("name", MADE)
def test_reproduce(command, workplace: Path, name: str) -> None:
    an_image().save("source.png")
    mask((16, 16, 48, 48)).save("mask.png")
    arguments = MADE[name]
    model = ("--model", peers.folder("xl"))
    own = () if arguments[0] == "translate" else ("--seed", 1)
    made = command(*arguments, *own, *model, "--steps", 3, "--out", "made.png")
    assert made.code == 0, made.err
    again = command("reproduce", "made.png", *model)
    assert again.code == 0 and again.out.splitlines()[-1].startswith("identical"), again.out

"""What is wrong with names and values is said at once, in one line, before anything heavy is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import latentdiff

NO_MODEL = "no such folder or file, no model at nowhere"
# Arguments, exit code, what the error says.
WRONG = [
    ("edit none.png x", 1, "no image at none.png"),
    ("inpaint a.png x --mask none.png", 1, "no image at none.png"),
    ("inpaint a.png x --mask a.png --inversion none", 1, "no image at none"),
    ("inpaint a.png x", 2, "expected --mask FILE, or --extend"),
    ("invert none.png", 1, "no image at none.png"),
    ("translate none.png x", 1, "no image at none.png"),
    ("restore none.png --operator denoise", 1, "no image at none.png"),
    ("reproduce none.png", 1, "no image at none.png"),
    ("import none.png", 1, "no image at none.png"),
    ("control prepare canny none.png --out b.png", 1, "no image at none.png"),
    ("generate x --control none.png --control-model m", 1, "no image at none.png"),
    ("generate x --control a.png --control-model nowhere", 1, NO_MODEL),
    ("generate x --image-prompt none.png --ip-adapter m", 1, "no image at none.png"),
    ("generate x --image-prompt a.png --ip-adapter nowhere", 1, NO_MODEL),
    *((f"{command} --model nowhere", 1, NO_MODEL) for command in ("generate x", "edit a.png x", "words", "evaluate", "serve")),
    *((f"generate x --{part} nowhere", 1, NO_MODEL) for part in ("vae", "text-encoder", "base", "refiner")),
    ("generate x --lora none.safetensors:0.5", 1, "there is no LoRA file none.safetensors"),
    ("generate x --embedding none.pt", 1, "there is no embedding none.pt"),
    ("generate x --lora-dir none", 2, "there is no folder none of LoRAs"),
    ("generate x --preview p.png --preview-decoder none", 1, "there is no tiny decoder none"),
    ("lora inspect none", 1, "there is no LoRA file none"),
    ("lora merge none:0.5 --out merged", 1, "there is no LoRA file none"),
    ("lora convert none b.safetensors", 1, "there is no LoRA file none"),
    ("convert nowhere folder", 1, NO_MODEL),
    ("inspect nowhere", 1, NO_MODEL),
    ("train none.yaml", 1, "cannot read none.yaml"),
    ("report nowhere", 1, "found nothing at nowhere"),
    ("data check nowhere", 1, "expected captioned images at nowhere"),
    ("evaluate --scenes nowhere", 2, "there is no folder nowhere of scenes"),
    # places to write to
    ("generate x --out fox.xyz", 2, ".png, .jpg, .jpeg, .webp, .avif or the name of a folder, found .xyz"),
    ("generate x --out a.png/b", 2, "cannot write a.png/b"),
    ("grid x --x steps=1,2 --out fox.txt", 2, "found .txt"),
    ("edit a.png x --out fox.ckpt", 2, "found .ckpt"),
    ("interpolate x y --out fox.mpg", 2, "found .mpg"),
    ("invert a.png --out b.png", 2, "cannot write b.png: expected an ending of .inversion, found .png"),
    ("invert a.png --out b", 2, "expected an ending of .inversion, found none"),
    ("convert a.png b.png", 2, "expected an ending of .safetensors or the name of a folder, found .png"),
    ("lora merge a.png --out b.safetensors", 2, "expected the name of a folder, found .safetensors"),
    ("lora convert a.png b.pt", 2, "expected an ending of .safetensors, found .pt"),
    # values
    ("edit a.png x --strength 3", 2, "expected --strength to be a finite number of 0 to 1, found 3.0"),
    ("edit a.png x --steps 0", 2, "expected --steps to be"),
    ("inpaint a.png x --mask a.png --padding -1", 2, "expected --padding to be"),
    ("invert a.png --mixing 2", 2, "expected --mixing to be"),
    ("invert a.png --guidance nan", 2, "expected --guidance to be"),
    ("translate a.png x --tau-features 2", 2, "expected --tau-features to be"),
    ("translate a.png x --iterations -1", 2, "expected --iterations to be"),
    ("restore a.png --operator super-resolution", 2, "the operator super-resolution needs --factor"),
    ("restore a.png --operator super-resolution --factor 99", 2, "expected --factor to be a whole number of 2 to 64, found 99"),
    ("restore a.png --operator denoise --sigma -1", 2, "expected --sigma to be"),
    ("restore a.png --operator deblur --kernel gaussian:1e9", 2, "expected the standard deviation of the blur to be"),
    ("restore a.png --operator deblur --kernel gaussian:0", 2, "expected a standard deviation above 0 pixels"),
    ("restore a.png --operator deblur --kernel motion:0", 2, "expected the motion in pixels to be"),
    ("restore a.png --operator deblur --kernel gaussian:x", 2, "expected a kernel gaussian:STD or motion:LENGTH:ANGLE"),
    ("restore a.png --operator deblur --kernel gauss:2", 1, "there is no kernel gauss:2"),
    ("finetune --data . --rank 0", 1, "rank: Input should be greater than 0, found '0'"),
    ("finetune --resume run --rank 0", 1, "rank: Input should be greater than 0, found '0'"),
    ("finetune --resume none --rank 4", 2, "expected a run to resume in none, found no config.yaml there"),
    ("finetune --data . --keep new", 1, "keep: expected auto, nothing, old, or old:WEIGHT"),
    ("finetune --data . --sample-options steps=0", 1, "sample_options: expected steps to be a whole number of 1 or more"),
    ("finetune --data . --sample-options sampler=best", 1, "sample_options: expected sampler to be one of"),
    ("finetune --data . --sample-options hight=64", 1, "sample_options: there is no option 'hight'; did you mean 'height'?"),
    ("finetune --data . --lr nan", 1, "lr: "),
    ("finetune --data . --config none.yaml", 1, "none.yaml"),
    ("train a.png", 1, "a.png"),
    ("generate x --hires-strength 0.3", 2, "expected --hires, how much larger, with --hires-strength; found 0.3 alone"),
    ("generate x --cache-interval 0", 2, "expected --cache-interval to be"),
]
RUN = """
import json, sys
from contextlib import redirect_stderr
from io import StringIO
from latentdiff.cli import run
said = []
for line in json.load(sys.stdin):
    with redirect_stderr(StringIO()) as errors:
        code = run(line.split())
    said.append([code, errors.getvalue(), "torch" in sys.modules])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, tuple[int, str, bool]]:
    """What each command left, all in one process, and whether torch was loaded then."""
    folder = tmp_path_factory.mktemp("place")
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("data: [{path: .}]\nrank: 8\n")
    lines = [line for line, _, _ in WRONG]
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(lines), cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(latentdiff.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "run"]
    return {line: tuple(found) for line, found in zip(lines, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize(("line", "code", "message"), WRONG)
def test_told_at_once(said, line, code, message):
    found, errors, is_heavy = said[line]
    assert found == code and message in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert not is_heavy


@pytest.mark.parametrize("name", ["v1.5", "run.2026-11-30", "made", "old.jpegs.d"])
def test_folders_may_have_dots(command, sd1, name):
    done = command("generate", "cat", "--model", sd1, "--steps", 1, "--seed", 1, "--out", name)
    assert (done.code, done.out) == (0, f"{name}/cat-1.png\n")


def test_a_folder_that_is_there_may_look_like_a_file(command, sd1, workplace):
    (workplace / "fox.xyz").mkdir()
    assert command("generate", "cat", "--model", sd1, "--steps", 1, "--seed", 1, "--out", "fox.xyz").code == 0

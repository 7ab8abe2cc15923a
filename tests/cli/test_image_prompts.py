from __future__ import annotations

from pathlib import Path

import pytest

from latentdiff.image import open_image
from latentdiff.recipe import read_recipe
from tests.adapters.control import adapters, test_t2i_adapters
from tests.tasks.images import an_image, apart, mask


@pytest.fixture
def adapter(workplace) -> str:
    an_image(seed=4).save("face.png")
    an_image(seed=5).save("ugly.png")
    return adapters.saved(workplace, "sd1", "plus", suffix=".bin").name


def test_generate_and_reproduce(command, sd1, adapter):
    options = ["--model", sd1, "--steps", 3, "--seed", 1]
    asked = ["--image-prompt", "face.png:0.6@0.0-0.7", "--image-prompt", "ugly.png", "--ip-adapter", adapter]
    more = ["--negative-image-prompt", "ugly.png", "--image-prompt-blocks", "down_blocks=1,up_blocks.1=0.5"]
    done = command("generate", "cat", *options, *asked, *more, "--out", "a.png")
    assert done.code == 0, done.err
    first, second = read_recipe(open_image("a.png").info).image_prompts
    assert (first.scale, first.end, first.images[0]["file"], first.adapter["file"]) == (0.6, 0.7, "face.png", adapter)
    assert first.encoder["file"] == "image_encoder" and first.blocks == {"down_blocks": 1.0, "up_blocks.1": 0.5}
    assert (second.scale, second.negative["file"]) == (1.0, "ugly.png")
    done = command("reproduce", "a.png", "--model", sd1)
    assert done.out == "identical: every pixel is the same\n", done.err
    command("generate", "cat", *options, "--out", "plain.png")
    assert apart(open_image("a.png"), open_image("plain.png")) > 2
    Path("image_encoder").rename("moved")
    done = command("reproduce", "a.png", "--model", sd1)
    assert done.code == 1 and "say where it is with --source image_encoder1=FILE" in done.errors[0]
    places = [f"--source=image_encoder{number}=moved" for number in (1, 2)]
    assert command("reproduce", "a.png", "--model", sd1, *places).code == 0
    an_image(seed=9).save("face.png")
    done = command("reproduce", "a.png", "--model", sd1, *places)
    assert done.code == 1 and "image_prompt1" in done.errors[0] and "SHA-256 differs" in done.errors[0]


def test_in_other_tasks(command, sd1, adapter):
    an_image().save("photo.png")
    mask((8, 8, 40, 40)).save("mask.png")
    same = ["--model", sd1, "--steps", 3, "--seed", 1, "--image-prompt", "face.png", "--ip-adapter", adapter]
    for name, arguments in {
        "edited": ["edit", "photo.png", "cat", "--strength", 0.7],
        "painted": ["inpaint", "photo.png", "cat", "--mask", "mask.png"],
        "larger": ["generate", "cat", "--hires", "2x", "--hires-steps", 2],
    }.items():
        done = command(*arguments, *same, "--out", f"{name}.png")
        assert done.code == 0, done.err
        assert len(read_recipe(open_image(f"{name}.png").info).image_prompts) == 1
        assert command("reproduce", f"{name}.png", "--model", sd1).code == 0


def test_existing_images_are_known_by_their_image_prompts(command, sd1, adapter):
    same = ["generate", "cat", "--model", sd1, "--steps", 2, "--seed", 1, "--skip-existing"]
    prompt = ["--image-prompt", "face.png", "--ip-adapter", adapter]
    assert command(*same).code == command(*same, *prompt).code == 0
    done = command(*same, *prompt)
    assert "is there already" in done.err
    assert "is there already" not in command(*same, *prompt[:1], "face.png:0.5", *prompt[2:]).err


def test_a_t2i_adapter_is_a_control_model(command, sd1, workplace):
    an_image(seed=4).save("sketch.png")
    net = test_t2i_adapters.original(workplace, "light").name
    same = ["generate", "cat", "--model", sd1, "--steps", 3, "--seed", 1]
    done = command(*same, "--control", "sketch.png", "--control-model", f"{net}:0.8@0-0.7", "--out", "a.png")
    assert done.code == 0, done.err
    assert command("reproduce", "a.png", "--model", sd1).out == "identical: every pixel is the same\n"
    done = command(*same, "--control", "sketch.png", "--control-model", net, "--control-guess")
    assert len(done.errors) == 1 and "knows no guess mode" in done.errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-prompt", "face.png"], "expected --ip-adapter FILE with --image-prompt, found none"),
        (["--ip-adapter", "IP"], "expected --image-prompt FILE with --ip-adapter, found none"),
        (["--image-encoder", "x"], "expected --image-prompt FILE with --image-encoder, found none"),
        (["--image-prompt-blocks", "style"], "expected --image-prompt FILE with --image-prompt-blocks"),
        (["--image-prompt", "face.png", "--ip-adapter", "IP", "--ip-adapter", "IP"], "or 1, one for each, found 2"),
        (["--image-prompt", "none.png", "--ip-adapter", "IP"], "no picture|no image"),
        (["--image-prompt", "face.png", "--ip-adapter", "none.bin"], "no such folder or file, .*none.bin|none.bin"),
        (["--image-prompt", "face.png", "--ip-adapter", "face.png"], "expected model weights"),
        (["--image-prompt", "face.png", "--ip-adapter", "SD1"], "expected one IP-Adapter file in"),
        (
            ["--image-prompt", "face.png", "--ip-adapter", "IP", "--image-encoder", "no"],
            "no such folder or file|the folder of an image encoder",
        ),
        (
            ["--image-prompt", "face.png", "--ip-adapter", "IP", "--image-prompt-blocks", "style"],
            "known for SDXL alone",
        ),
        (["--image-prompt", "face.png", "--ip-adapter", "IP", "--image-prompt-blocks", "x"], "style or layout"),
    ],
)
def test_bad_input_is_one_line(command, sd1, adapter, arguments, message):
    places = {"IP": adapter, "SD1": sd1}
    done = command("generate", "cat", "--model", sd1, "--steps", 2, "--seed", 1, *(places.get(a, a) for a in arguments))
    found = [part in " ".join(done.errors) for part in message.split("|")]
    assert done.code != 0 and len(done.errors) == 1 and any(found), done.err

"""`latentdiff import`: the table, the command that makes the image here, and what `reproduce` makes of such images."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from latentdiff.adapters.lora.saving import save_lora
from latentdiff.cli.command_line import quoted
from latentdiff.image import open_image, save_image, save_png
from latentdiff.recipe import Recipe, read_recipe
from tests import peers
from tests.adapters.lora.conftest import make
from tests.request.foreign.test_comfy import changed
from tests.request.foreign.test_invokeai import VERSION_3

SETTINGS = "Steps: 2, Sampler: Euler a, Schedule type: Karras, CFG scale: 3, Seed: 5, Size: 64x48, Model: m"
TEXTS = {
    "plain": f"a fox\nNegative prompt: it's red\n{SETTINGS}, Clip skip: 2, ENSD: 7, RNG: NV",
    "quotes": f"-a \"fox\" \\(x\\) $HOME `id` '!'\n(red:1.2)\n{SETTINGS}",
    "silent": f"a [fox:cat:0.5]\n{SETTINGS}, Version: v1.9.4",
    "hostile": f"a \x1b[31mfox\u202e, 狐\n{SETTINGS}, Foo: \x1b[2J",
}


def image_with(name: str, **texts: str) -> Path:
    image = Image.new("RGB", (64, 48))
    image.info = dict(texts)
    save_png(image, name)
    return Path(name)


def words_of(line: str) -> list[str]:
    """A line as a shell takes it apart."""
    script = 'eval "set -- $0"; printf "%s\\0" "$@"'
    return (
        subprocess.run(["bash", "-c", script, line], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    )


def command_of(out: str) -> str:
    """The line under the table."""
    (line,) = [line for line in out.splitlines() if line.startswith("latentdiff ")]
    return line


@pytest.mark.parametrize("name", TEXTS)
def test_the_command_makes_what_the_text_says(command, sd1, name):
    path = image_with("a.png", parameters=TEXTS[name])
    done = command("import", path, "--model", sd1)
    assert done.code == 0 and "Seed" in done.out and done.out.isascii() == (name not in ("hostile",))
    assert "\x1b" not in done.out and "\u202e" not in done.out
    program, task, *rest = words_of(command_of(done.out))
    made = command(task, "--out", "b.png", *rest)
    assert (program, made.code) == ("latentdiff", 0)
    wanted, found = read_recipe(open_image(path).info), read_recipe(open_image("b.png").info)
    ours = Recipe.from_json(open_image("b.png").info["latentdiff"])
    same = ("prompt", "negative_prompt", "seed", "steps", "sampler", "spacing", "guidance_scale", "width", "height",
            "clip_skip", "prompt_syntax", "noise_source", "noise_start", "seed_delta", "told_timesteps")  # fmt: skip
    assert found == ours and {x: getattr(ours, x) for x in same} == {x: getattr(wanted, x) for x in same}
    again = command("import", "b.png", "--model", sd1)
    assert words_of(command_of(again.out))[1:3] == words_of(command_of(done.out))[1:3]


def test_reproduce_uses_the_same_account(command, sd1):
    image_with("a.png", parameters=f"{TEXTS['plain']}, Foo: bar")
    command(*words_of(command_of(command("import", "a.png", "--model", sd1).out))[1:], "--out", "b.png")
    made = open_image("b.png")
    made.info = {"parameters": f"{TEXTS['plain']}, Foo: bar"}
    save_png(made, "c.png")
    done = command("reproduce", "c.png", "--model", sd1)
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")
    assert "refused: Foo bar: latentdiff does not know this setting" in done.err.splitlines()
    save_image(made, "d.webp", quality=100)
    assert command("reproduce", "d.webp", "--model", sd1).out == "identical: every pixel is the same\n"


def test_loras_of_other_programs_are_found_by_their_names(command, sd1):
    Path("loras").mkdir()
    save_lora(make(peers.ours("sd1")), "loras/sty.safetensors")
    image_with("a.png", parameters=f"a fox <lora:sty:0.5>\n{SETTINGS}")
    line = command_of(command("import", "a.png", "--model", sd1, "--lora-dir", "loras").out)
    command(*words_of(line)[1:], "--out", "b.png")
    made = open_image("b.png")
    # The web UIs' hash: of what follows the header, whose length is in the first eight bytes.
    content = Path("loras/sty.safetensors").read_bytes()
    digits = hashlib.sha256(content[8 + struct.unpack("<Q", content[:8])[0] :]).hexdigest()[:12]
    for more in ("", f', Lora hashes: "sty: {digits}, other: 0123456789ab"'):
        made.info = {"parameters": f"a fox <lora:sty:0.5>\n{SETTINGS}{more}"}
        save_png(made, "c.png")
        assert command("reproduce", "c.png", "--model", sd1, "--lora-dir", "loras").code == 0
        assert "--lora-dir" in command("reproduce", "c.png", "--model", sd1).errors[0]
    made.info = {"parameters": f'a fox <lora:sty:0.5>\n{SETTINGS}, Lora hashes: "sty: 0123456789ab"'}
    save_png(made, "c.png")
    (error,) = command("reproduce", "c.png", "--model", sd1, "--lora-dir", "loras").errors
    assert "LoRA sty (SHA-256 0123456789ab" in error


def test_json_for_programs(command):
    image_with("a.png", parameters=f"{TEXTS['plain']}, ADetailer model: face.pt")
    image_with("i.png", invokeai_metadata=json.dumps(VERSION_3))
    image_with("c.png", prompt=json.dumps(changed()))
    image_with("none.png", other="x")
    done = command("import", "a.png", "i.png", "c.png", "none.png", "--json")
    first, invoke, comfy, none = json.loads(done.out)
    assert done.code == 1 and "carries no recipe" in none["error"] and none["image"] == "none.png"
    assert [one["name"] for one in first["fields"] if one["verdict"] == "refused"] == ["ADetailer model"]
    assert first["options"]["seed"] == 5 and first["command"].startswith("latentdiff generate 'a fox' ")
    assert comfy["program"] == "ComfyUI" and "--noise-source comfy" in comfy["command"]
    assert "--lora sty.safetensors:0.75" in invoke["command"] and "--vae sd-vae-ft-mse" in invoke["command"]


def test_what_lacks_something_has_no_command(command):
    image_with("a.png", parameters="a cat\nSteps: 2, Sampler: DPM adaptive, CFG scale: 3, Seed: 5, Size: 64x64")
    done = command("import", "a.png")
    assert done.code == 0 and "no command makes it here: Sampler: the text names the sampler 'DPM adaptive'" in done.out


def test_image_to_image_asks_for_the_image(command):
    image_with("a.png", parameters=f"a cat\n{SETTINGS}, Denoising strength: 0.5")
    assert words_of(command_of(command("import", "a.png").out))[:4] == ["latentdiff", "edit", "IMAGE.png", "a cat"]
    image_with("a.png", parameters=f"-a cat\n{SETTINGS}, Denoising strength: 0.5, Mask blur: 4")
    line = words_of(command_of(command("import", "a.png").out))
    assert line[:2] == ["latentdiff", "inpaint"] and line[-3:] == ["--", "IMAGE.png", "-a cat"] and "MASK.png" in line


def test_the_model_is_compared_with_the_hash(command, workplace):
    (workplace / "m.safetensors").write_bytes(b"other")
    image_with("a.png", parameters=f"a cat\n{SETTINGS}, Model hash: 6ce0161689")
    done = command("import", "a.png", "--model", "m.safetensors")
    assert "m.safetensors is another model: its SHA-256 begins with d9298a10d1" in done.out
    image_with("a.png", parameters=f"a cat\n{SETTINGS}, Model hash: d9298a10d1")
    assert "another model" not in command("import", "a.png", "--model", "m.safetensors").out


def test_images_of_ours(command, sd1):
    command("generate", "--model", sd1, "--steps", 2, "a cat", "--seed", 4, "--out", "a.png")
    out = command("import", "a.png").out
    assert "honoured" in out and "approximated" not in out and "--model sd1" in command_of(out)
    assert command("reproduce", "a.png", "--model", sd1).err == ""
    recipe = Recipe.from_json(open_image("a.png").info["latentdiff"])
    image_with("b.png", latentdiff=replace(recipe, task="restore").to_json())
    assert command_of(command("import", "b.png").out) == "latentdiff reproduce b.png"


@pytest.mark.parametrize(
    "text", ["", "a b", "it's", "a\nb", "\x00\x1b\u202e\U0001f600é", "\\n'\\", "$(id) `x` !!", "-n"]
)
def test_texts_are_quoted_for_shells(text):
    line = quoted(text)
    assert line.isprintable()
    assert words_of(f"x {line}") == ["x", text.replace("\x00", "")] or "\x00" in text


def test_the_embedded_model_needs_no_name(command):
    recipe = Recipe(prompt="a", seed=1, steps=2, sampler="ddim", guidance_scale=1.0, width=64, height=64,
                    model="latentdiff-embedded", prediction_type="v_prediction")  # fmt: skip
    image_with("a.png", **recipe.to_chunks())
    assert "--model" not in command_of(command("import", "a.png").out)


def test_a_place_in_a_batch_belongs_to_comfy(command, sd1):
    done = command("generate", "--model", sd1, "--steps", 1, "a cat", "--noise-index", 2, "--out", "a.png")
    assert done.code == 2 and "--noise-index belongs to the noise of comfy" in done.errors[0]
    assert peers.folder("sd1").exists()

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff.adapters.lora.metadata import lora_metadata
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.image import open_image
from latentdiff.recipe import read_recipe
from tests import peers
from tests.adapters.lora.conftest import make, our_outputs
from tests.cli.conftest import files


@pytest.fixture
def loras(workplace):
    """Two LoRA files for the tiny model, and a wrong one."""
    pipe = peers.ours("sd1")
    about = lora_metadata(pipe.unet.config, "epsilon", model="tiny", model_hash="ab" * 32, training={"images": 24})
    save_lora(make(pipe), workplace / "a.safetensors", about)
    save_lora(make(pipe, ("attention",), seed=2), workplace / "b.safetensors")
    tensors = load_file(workplace / "b.safetensors")
    wide = {name: torch.zeros(4, 2048) for name in tensors if name.endswith("attn2_to_k.lora_down.weight")}
    save_file(tensors | wide, workplace / "wrong.safetensors")
    return workplace


@pytest.fixture
def pipe(loras):
    """The model that the commands use too."""
    pipe = peers.ours("sd1")
    yield pipe
    pipe.unload_lora()


@pytest.fixture
def generate(command, sd1, loras):
    return lambda *more: command("generate", "--model", sd1, "cat", "--steps", 2, "--seed", 3, *more)


def pixels(path) -> np.ndarray:
    return np.asarray(open_image(path)).astype(int)


def test_generate_with_loras(generate, pipe):
    done = generate("--lora", "a.safetensors:0.5", "--lora", "b.safetensors", "--out", "x.png")
    assert (
        done.code == 0
        and "a.safetensors: matched 299 of 299 layers" in done.err
        and "b.safetensors: matched 128 of 128" in done.err
    )
    assert [(x["file"], x["scale"]) for x in read_recipe(open_image("x.png").info).loras] == [
        ("a.safetensors", 0.5),
        ("b.safetensors", 1.0),
    ]
    pipe.load_lora("a.safetensors", 0.5)
    pipe.load_lora("b.safetensors")
    (image,) = pipe("cat", steps=2, seed=3, progress=False)
    assert np.array_equal(pixels("x.png"), np.asarray(image))


def test_loras_are_not_left_in_the_model(generate):
    generate("--out", "1.png")
    generate("--lora", "a.safetensors", "--out", "2.png")
    generate("--out", "3.png")
    assert np.array_equal(pixels("1.png"), pixels("3.png")) and not np.array_equal(pixels("1.png"), pixels("2.png"))


def test_skip_existing_knows_loras(generate):
    assert generate().out == "images/cat-3.png\n"
    assert generate("--skip-existing", "--lora", "a.safetensors").out == "images/cat-3-2.png\n"
    assert generate("--skip-existing", "--lora", "a.safetensors").out == ""
    assert generate("--skip-existing", "--lora", "a.safetensors:2").out == "images/cat-3-3.png\n"


@pytest.mark.parametrize(
    ("lora", "code", "message"),
    [
        ("none.safetensors", 1, "there is no LoRA file none.safetensors"),
        ("wrong.safetensors", 1, "matched 112 of 128 layers"),
        ("a.safetensors:inf", 2, "finite LoRA scale"),
    ],
)
def test_wrong_loras(generate, loras, lora, code, message):
    before = files(loras)
    done = generate("--lora", lora)
    assert done.code == code and len(done.errors) == 1 and message in done.errors[0]
    assert files(loras) == before


def test_what_fits_of_a_wrong_lora(generate):
    done = generate("--lora", "wrong.safetensors", "--allow-partial", "--out", "x.png")
    assert done.code == 0 and "matched 112 of 128 layers" in done.err and "left out: " in done.err


def test_strength_by_part_is_in_the_recipe_and_made_again(command, generate, sd1):
    assert generate("--lora", "a.safetensors:unet=0.8,te=0", "--out", "x.png").code == 0
    assert generate("--lora", "a.safetensors:0.8", "--out", "y.png").code == 0
    assert not np.array_equal(pixels("x.png"), pixels("y.png"))
    assert read_recipe(open_image("x.png").info).loras[0]["scale"] == "unet=0.8,te=0"
    assert command("reproduce", "x.png", "--model", sd1).out.splitlines()[-1].startswith("identical")
    done = generate("--lora", "a.safetensors:0,8")
    assert done.code == 2 and "expected a strength such as 0.8, or unet=0.8,te=0.4" in done.errors[0]


def test_embeddings_by_file_and_folder(generate, loras):
    (loras / "words").mkdir()
    width = peers.ours("sd1").text_encoder.embedding_width
    generator = torch.Generator().manual_seed(1)
    torch.save({"string_to_param": {"*": torch.randn(2, width, generator=generator)}}, loras / "words/my-style.pt")
    save_file({"<teapot>": torch.randn(width, generator=generator)}, loras / "words/t.safetensors")
    done = generate("--embedding", "words", "--out", "x.png")
    assert done.code == 0 and "the word my-style (2 vectors)" in done.err and "the word <teapot>" in done.err
    assert [entry["file"] for entry in read_recipe(open_image("x.png").info).loras] == ["my-style.pt", "t.safetensors"]
    assert generate("--embedding", "words/t.safetensors", "--lora", "words/my-style.pt", "--out", "y.png").code == 0
    done = generate("--embedding", "nothing")
    assert done.code == 1 and "there is no embedding nothing" in done.errors[0]


def test_merge(command, sd1, loras, pipe):
    done = command("lora", "merge", "a.safetensors:0.5", "b.safetensors", "--model", sd1, "--out", "merged")
    assert done.code == 0 and done.out == "merged\n"
    pipe.load_lora("a.safetensors", 0.5)
    pipe.load_lora("b.safetensors")

    from diffusers import StableDiffusionPipeline

    from tests.adapters.lora.conftest import their_outputs

    merged = StableDiffusionPipeline.from_pretrained("merged", safety_checker=None)
    for a, b in zip(our_outputs(pipe), their_outputs(merged), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_convert_there_and_back(command, sd1, loras, pipe):
    assert command("lora", "convert", "a.safetensors", "p.safetensors", "--to", "peft", "--model", sd1).code == 0
    assert command("lora", "convert", "p.safetensors", "k.safetensors", "--model", sd1).code == 0
    assert "unet.conv_in.lora_A.weight" in load_file("p.safetensors")
    a, k = load_file("a.safetensors"), load_file("k.safetensors")
    assert a.keys() == k.keys()
    for name in ("a", "p", "k"):
        pipe.load_lora(f"{name}.safetensors")
        outputs = our_outputs(pipe)
        pipe.unload_lora()
        if name == "a":
            expected = outputs
        for x, y in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_inspect(command, loras):
    done = command("lora", "inspect", "a.safetensors")
    assert done.code == 0
    lines = {line.split(":")[0].strip(): line.partition(":")[2].strip() for line in done.out.splitlines()}
    assert lines["names"] == "kohya" and lines["rank"] == "4" and lines["alpha"] == "2"
    assert "128 attention" in lines["layers"] and "18 text encoder" in lines["layers"]
    assert lines["model"] == "tiny" and lines["images"] == "24" and lines["prediction_type"] == "epsilon"


def test_inspect_agrees_with_the_general_command(command, loras):
    done = command("inspect", "a.safetensors")
    assert "LoRA (safetensors)" in done.out and "kohya" in done.out and "tiny" in done.out


def test_inspect_of_another_thing(command, sd1, loras):
    done = command("lora", "inspect", sd1 / "vae/diffusion_pytorch_model.safetensors")
    assert done.code == 1 and "expected a LoRA" in done.errors[0]


@pytest.mark.parametrize(
    "arguments", [["merge"], ["convert", "a.safetensors"], ["convert", "a.safetensors", "b.pt"], ["inspect"]]
)
def test_wrong_usage(command, sd1, loras, arguments):
    more = ["--model", sd1] if arguments[0] == "convert" else []
    done = command("lora", *arguments, *more)
    assert done.code == 2 and len(done.errors) == 1


def test_reproduce_finds_loras(command, generate, sd1, loras):
    generate("--lora", "a.safetensors:0.5", "--out", "x/x.png")
    assert command("reproduce", "x/x.png", "--model", sd1).out.splitlines()[-1].startswith("identical")
    (loras / "elsewhere").mkdir()
    (loras / "a.safetensors").rename(loras / "elsewhere/renamed.safetensors")
    done = command("reproduce", "x/x.png", "--model", sd1)
    assert done.code == 1 and "made with the LoRA a.safetensors" in done.errors[0] and "--lora-dir" in done.errors[0]
    done = command("reproduce", "x/x.png", "--model", sd1, "--lora-dir", "elsewhere")
    assert done.out.splitlines()[-1].startswith("identical")
    assert json.loads(open_image("x/x.png").info["latentdiff"])["loras"][0]["scale"] == 0.5

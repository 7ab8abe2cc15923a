"""The official client draws, edits and watches, unchanged."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from latentdiff.recipe import read_recipe
from tests import peers

openai = pytest.importorskip("openai", reason="needs OpenAI's client, of the extra `test`")


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def image_of(b64: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    image.load()
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def test_images_are_those_of_the_pipeline(client):
    extra = {"seed": 5, "steps": 3, "guidance_scale": 3.0, "negative_prompt": "a dog", "sampler": "euler"}
    answer = client.images.generate(model="sd1", prompt="a cat", n=2, size="64x48", extra_body=extra)
    found = [image_of(each.b64_json) for each in answer.data]
    own = peers.ours("sd1")("a cat", num_images=2, width=64, height=48, **extra)
    assert max(np.abs(pixels(a) - pixels(b)).max() for a, b in zip(found, own, strict=True)) <= 1
    recipe = read_recipe(found[1].info)
    assert (recipe.prompt, recipe.seed, recipe.steps, recipe.sampler) == ("a cat", 6, 3, "euler")
    assert answer.size == "64x48" and answer.usage.input_tokens == 2


def test_another_model_takes_the_place_of_the_first(client):
    assert [model.id for model in client.models.list()] == ["sd1", "sd2"]
    extra = {"seed": 1, "steps": 2}
    found = image_of(client.images.generate(model="sd2", prompt="a fox", extra_body=extra).data[0].b64_json)
    assert np.abs(pixels(found) - pixels(peers.ours("sd2")("a fox", **extra)[0])).max() <= 1
    assert client.models.retrieve("sd2").owned_by == "latentdiff"


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client, name, kind):
    answer = client.images.generate(
        prompt="a cat", output_format=name, output_compression=80, extra_body={"steps": 2, "seed": 1}
    )
    assert image_of(answer.data[0].b64_json).format == kind and answer.output_format == name


def test_an_edit_keeps_what_the_mask_does_not_open(client, scene):
    """The mask of OpenAI is transparent where it is to be painted."""
    source = Image.open(scene).convert("RGB").resize((64, 64))
    mask = Image.new("RGBA", source.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (8, 8, 40, 40))
    answer = client.images.edit(
        image=("scene.png", png(source)),
        mask=("mask.png", png(mask)),
        prompt="a dog",
        extra_body={"steps": 3, "seed": 2},
    )
    change = np.abs(pixels(image_of(answer.data[0].b64_json)) - pixels(source)).max(axis=2)
    inside = np.zeros(change.shape, bool)
    inside[8:40, 8:40] = True
    assert change[~inside].max() == 0 and (change[inside] > 0).mean() > 0.9


def test_an_edit_without_a_mask_is_image_to_image(client, scene):
    from latentdiff import image_to_image

    source = Image.open(scene).convert("RGB").resize((64, 64))
    options = {"steps": 4, "seed": 2, "strength": 0.5}
    answer = client.images.edit(image=png(source), prompt="a dog", extra_body=options)
    own = image_to_image(peers.ours("sd1"), source, "a dog", **options)[0]
    assert np.abs(pixels(image_of(answer.data[0].b64_json)) - pixels(own)).max() <= 1


def test_partial_images_come_on_the_way(client):
    events = list(
        client.images.generate(
            prompt="a cat", stream=True, partial_images=2, extra_body={"steps": 6, "seed": 3, "sampler": "ddim"}
        )
    )
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    first, second, last = (pixels(image_of(event.b64_json)) for event in events)
    whole = client.images.generate(prompt="a cat", extra_body={"steps": 6, "seed": 3, "sampler": "ddim"}).data[0]
    assert np.array_equal(last, pixels(image_of(whole.b64_json)))
    assert np.abs(second - last).mean() < np.abs(first - last).mean(), "later previews are nearer to the image"


def test_partial_images_of_an_edit(client, scene):
    events = client.images.edit(
        image=png(Image.open(scene).resize((64, 64))),
        prompt="a dog",
        stream=True,
        partial_images=1,
        extra_body={"steps": 4},
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    ("fields", "kind", "param", "code"),
    [
        ({"model": "none"}, openai.NotFoundError, "model", "model_not_found"),
        ({"size": "big"}, openai.BadRequestError, "size", "invalid_value"),
        ({"size": "4096x64"}, openai.BadRequestError, "size", "limit_exceeded"),
        ({"size": "65x64"}, openai.BadRequestError, None, "invalid_value"),
        ({"n": 11}, openai.BadRequestError, "n", "invalid_value"),
        ({"n": 9}, openai.BadRequestError, "n", "limit_exceeded"),
        ({"prompt": "a" * 20_000}, openai.BadRequestError, "prompt", "limit_exceeded"),
        ({"prompt": "<lora:none>"}, openai.BadRequestError, "prompt", "invalid_value"),
        ({"response_format": "url"}, openai.BadRequestError, "response_format", "invalid_value"),
        ({"background": "transparent"}, openai.BadRequestError, "background", "invalid_value"),
        ({"extra_body": {"steps": 61}}, openai.BadRequestError, "steps", "limit_exceeded"),
        ({"extra_body": {"sampler": "none"}}, openai.BadRequestError, "sampler", "invalid_value"),
        ({"extra_body": {"step": 5}}, openai.BadRequestError, "step", "unknown_parameter"),
        ({"extra_body": {"eta": 0.5, "sampler": "euler"}}, openai.BadRequestError, None, "invalid_value"),
    ],
)
def test_errors_are_those_of_the_interface(client, fields, kind, param, code):
    with pytest.raises(kind) as caught:
        client.images.generate(**{"prompt": "a cat", **fields})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


def test_what_is_no_image_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="cannot read the image"):
        client.images.edit(image=b"GIF89a and nothing", prompt="a cat")
    with pytest.raises(openai.BadRequestError, match="transparent parts"):
        opaque = png(Image.new("RGB", (64, 64)))
        client.images.edit(image=opaque, mask=opaque, prompt="a cat", extra_body={"steps": 2})


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()

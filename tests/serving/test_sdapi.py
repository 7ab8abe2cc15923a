"""webuiapi, a client of AUTOMATIC1111's interface, draws, edits and reads progress, unchanged."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from PIL import Image

from latentdiff import image_to_image
from tests import peers
from tests.serving.conftest import wait_for

webuiapi = pytest.importorskip("webuiapi", reason="needs the extra `test`")


@pytest.fixture(scope="module")
def client(served):
    return webuiapi.WebUIApi(port=served.port, sampler="Euler a", steps=3)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def test_images_are_those_of_the_pipeline(client):
    options = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 7, "cfg_scale": 4, "width": 64, "height": 48}
    answer = client.txt2img(**options, sampler_name="DPM++ 2M", scheduler="karras", batch_size=2, n_iter=1)
    own = peers.ours("sd1")(
        "a cat", negative_prompt="a dog", seed=7, guidance_scale=4, width=64, height=48, num_images=2, steps=3,
        sampler="dpmpp-2m", spacing="karras",
    )  # fmt: skip
    assert max(np.abs(pixels(a) - pixels(b)).max() for a, b in zip(answer.images, own, strict=True)) <= 1
    assert answer.info["all_seeds"] == [7, 8] and answer.info["sampler_name"] == "DPM++ 2M"
    assert "Sampler: DPM++ 2M, Schedule type: Karras" in answer.info["infotexts"][0]


def test_the_client_finds_the_text_in_its_image(client):
    answer = client.txt2img(prompt="a fox", seed=3, width=64, height=64)
    found = client.png_info(answer.image)
    assert found.info == answer.info["infotexts"][0]
    assert found.parameters["Prompt"] == "a fox" and found.parameters["Seed"] == "3"


def test_an_image_is_changed(client, scene):
    source = Image.open(scene).convert("RGB")
    answer = client.img2img(
        images=[source], prompt="a dog", seed=1, steps=4, denoising_strength=0.5, width=64, height=64, sampler_name="DDIM",
        eta=0.0,
    )  # fmt: skip
    resized = source.resize((64, 64), Image.Resampling.LANCZOS)
    own = image_to_image(
        peers.ours("sd1"), resized, "a dog", seed=1, steps=4, strength=0.5, sampler="ddim", spacing="leading", eta=0.0,
        guidance_scale=7.0,
    )[0]  # fmt: skip
    assert np.abs(pixels(answer.image) - pixels(own)).max() <= 1


def test_a_second_pass_and_tiles(client):
    options = {"prompt": "a cat", "seed": 3, "width": 48, "height": 48, "sampler_name": "DDIM", "eta": 0.0}
    answer = client.txt2img(**options, enable_hr=True, hr_scale=2, hr_second_pass_steps=2, denoising_strength=0.5, tiling=True)
    own = peers.ours("sd1")(
        "a cat", seed=3, width=48, height=48, sampler="ddim", spacing="leading", eta=0.0, steps=3, guidance_scale=7.0,
        hires=2.0, hires_steps=2, hires_strength=0.5, seamless="xy",
    )[0]  # fmt: skip
    assert answer.image.size == (96, 96)
    assert np.abs(pixels(answer.image) - pixels(own)).max() <= 1


@pytest.mark.parametrize("invert", [0, 1])
def test_a_mask_is_painted_where_it_is_white(client, scene, invert):
    source = Image.open(scene).convert("RGB").resize((64, 64))
    mask = Image.new("L", source.size, 255 * invert)
    mask.paste(255 - 255 * invert, (16, 16, 48, 48))
    answer = client.img2img(
        images=[source], mask_image=mask, mask_blur=0, inpainting_mask_invert=invert, inpainting_fill=1,
        inpaint_full_res=False, prompt="a dog", width=64, height=64, denoising_strength=1.0,
    )  # fmt: skip
    change = np.abs(pixels(answer.image) - pixels(source)).max(axis=2)
    inside = np.zeros(change.shape, bool)
    inside[16:48, 16:48] = True
    assert change[~inside].max() == 0 and (change[inside] > 0).mean() > 0.9


def test_progress_tells_of_steps_and_shows_the_image(client):
    assert client.get_progress()["state"]["job_count"] == 0
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.txt2img(prompt="a cat", steps=60, width=128, height=128)))
    thread.start()
    seen = []

    def image_is_there() -> bool:
        seen.append(client.get_progress())
        return bool(seen[-1]["current_image"])

    wait_for(lambda: image_is_there() or not thread.is_alive())
    thread.join()
    assert seen[-1]["current_image"] and 0 < seen[-1]["progress"] < 1
    assert seen[-1]["state"]["sampling_steps"] == 60 and answers[0].image.size == (128, 128)


def test_an_interrupt_ends_the_request_with_what_there_is(client, served):
    answers = []
    request = {"prompt": "a cat", "steps": 60, "width": 128, "height": 128, "n_iter": 8}
    thread = threading.Thread(target=lambda: answers.append(client.txt2img(**request)))
    thread.start()
    wait_for(lambda: client.get_progress()["progress"] > 0.01)
    client.interrupt()
    thread.join()
    assert len(answers[0].images) < 8 and answers[0].info["prompt"] == "a cat"
    wait_for(lambda: served.engine.queue.in_making == 0)


def test_lists(client):
    assert [model["model_name"] for model in client.get_sd_models()] == ["sd1", "sd2"]
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= {sampler["name"] for sampler in client.get_samplers()}
    assert {"automatic", "karras", "sgm_uniform"} <= {each["name"] for each in client.get_schedulers()}
    assert client.get_loras() == [] and client.get_scripts() == {"txt2img": ["controlnet"], "img2img": ["controlnet"]}
    assert client.get_embeddings()["loaded"] == {}


@pytest.mark.slow
def test_every_sampler_and_schedule_of_the_lists_is_taken(client):
    for title in client.util_get_sampler_names():
        assert client.txt2img(prompt="a cat", sampler_name=title, steps=4, width=32, height=32).images
    for name in client.util_get_scheduler_names():
        assert client.txt2img(prompt="a cat", sampler_name="Euler", scheduler=name, steps=4, width=32, height=32).images


def test_another_model_is_chosen(client):
    client.util_set_model("sd2")
    try:
        assert client.util_get_current_model().startswith("sd2")
        assert client.txt2img(prompt="a cat", width=64, height=64).info["sd_model_name"] == "sd2"
    finally:
        client.util_set_model("sd1")
    answer = client.txt2img(prompt="a", width=64, height=64, override_settings={"sd_model_checkpoint": "sd2"})
    assert answer.info["sd_model_name"] == "sd2" and client.util_get_current_model().startswith("sd1")


@pytest.mark.parametrize(
    ("path", "fields", "status", "message"),
    [
        ("txt2img", {"sampler_name": "Nothing"}, 404, "Sampler not found"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "nothing"}}, 404, "Model not found"),
        ("txt2img", {"override_settings": {"sd_vae": "x"}}, 422, "sd_vae"),
        ("txt2img", {"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, 422, "hr_upscaler"),
        ("txt2img", {"enable_hr": True, "hr_prompt": "a dog"}, 422, "hr_prompt"),
        ("txt2img", {"enable_hr": True, "hr_scale": 4, "steps": 3}, 400, "at most 128 pixels"),
        ("txt2img", {"restore_faces": True}, 422, "restore_faces"),
        ("txt2img", {"script_name": "x/y/z plot"}, 422, "Script 'x/y/z plot' not found"),
        ("txt2img", {"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, 422, "Script 'ADetailer' not found"),
        ("txt2img", {"width": 4096}, 400, "at most 128 pixels"),
        ("txt2img", {"batch_size": 3, "n_iter": 3}, 400, "at most 8 images"),
        ("img2img", {}, 404, "Init image not found"),
        ("img2img", {"init_images": ["nothing"]}, 500, "Invalid encoded image"),
        ("png-info", {"image": "nothing"}, 500, "Invalid encoded image"),
    ],
)
def test_errors_are_those_of_the_interface(served, path, fields, status, message):
    answer = served.post(f"/sdapi/v1/{path}", {"prompt": "a cat", **fields})
    assert answer.status_code == status and message in answer.json()["detail"]


def test_wrong_types_are_told_as_fastapi_tells_them(served):
    answer = served.post("/sdapi/v1/txt2img", {"steps": "many"})
    assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == ["body", "steps"]

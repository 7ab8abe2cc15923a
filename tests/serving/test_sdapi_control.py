"""webuiapi speaks to the ControlNet extension: units, lists and hints, unchanged."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from latentdiff import ControlNet, IPAdapter, image_to_image
from latentdiff.errors import CheckpointError
from latentdiff.serving.models import Models
from latentdiff.serving.settings import WorkerSettings
from tests import peers
from tests.adapters.control import adapters
from tests.adapters.control.nets import hint

webuiapi = pytest.importorskip("webuiapi", reason="needs the extra `test`")
cv2 = pytest.importorskip("cv2", reason="needs the extra `control`")

NET = "sd1-5-False"
PLAIN, PLUS = "ip-adapter-plain-sd1-3", "ip-adapter-plus-sd1-3"
WALK = {"sampler": "ddim", "spacing": "leading", "eta": 0.0, "steps": 3, "guidance_scale": 7.0}


@pytest.fixture(scope="module")
def client(served):
    return webuiapi.WebUIApi(port=served.port, sampler="DDIM", steps=3)


@pytest.fixture(scope="module")
def net(served):
    return ControlNet.load(served.engine.settings.controls / NET)


@pytest.fixture(scope="module")
def plain(served):
    return IPAdapter.load(served.engine.catalogue.ip_adapter(PLAIN))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def drawn(client, *units, **options) -> Image.Image:
    scripts: dict = {}  # as the client keeps what it was given in its default
    common = {"prompt": "a cat", "seed": 7, "width": 64, "height": 64, "eta": 0.0, "alwayson_scripts": scripts}
    return client.txt2img(**common, controlnet_units=list(units), **options).image


def own(*controls, **options) -> Image.Image:
    steering = {"controls": list(controls) or None, **options}
    return peers.ours("sd1")("a cat", seed=7, width=64, height=64, **steering, **WALK)[0]


def apart(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(pixels(a) - pixels(b)).max())


def test_two_hints_are_followed(client, net):
    first, second = hint(1), hint(2)
    found = drawn(
        client,
        webuiapi.ControlNetUnit(image=first, model=NET, weight=0.8, guidance_end=0.7),
        webuiapi.ControlNetUnit(image=second, model=f"{NET} [12345678]", weight=0.5),
        webuiapi.ControlNetUnit(image=second, model=NET, enabled=False),
    )
    assert apart(found, own(net(first, scale=0.8, end=0.7), net(second, scale=0.5))) <= 1
    assert apart(found, drawn(client)) > 2


def test_guess_mode(client, net):
    unit = webuiapi.ControlNetUnit(image=hint(), model=NET, control_mode=2)
    assert apart(drawn(client, unit), own(net(hint(), guess=True))) <= 1
    assert apart(drawn(client, unit), own(net(hint()))) > 1


def test_edges_at_the_size_of_the_image(client, net, scene):
    """The scene is cut to a square of 64 pixels, as its edges are where they are found at 64."""
    source = Image.open(scene).convert("RGB").resize((128, 128))
    unit = webuiapi.ControlNetUnit(image=source, model=NET, module="canny", pixel_perfect=True, threshold_a=50, threshold_b=120)
    small = source.resize((64, 64), Image.Resampling.BOX)
    edges = Image.fromarray(cv2.Canny(np.asarray(small), 50, 120)).convert("RGB")
    assert apart(drawn(client, unit), own(net(edges))) <= 1


@pytest.mark.parametrize(("mode", "box"), [("Crop and Resize", (16, 0, 80, 64)), ("Just Resize", None)])
def test_other_proportions(client, net, mode, box):
    wide = hint(size=(96, 64))
    unit = webuiapi.ControlNetUnit(image=wide, model=NET, resize_mode=mode)
    expected = wide.crop(box) if box else wide.resize((64, 64), Image.Resampling.LANCZOS)
    assert apart(drawn(client, unit), own(net(expected))) <= 1


def test_what_is_changed_is_followed_where_a_unit_has_no_image(client, net):
    source = hint(3)
    answer = client.img2img(
        images=[source], prompt="a dog", seed=1, steps=4, denoising_strength=0.5, width=64, height=64, eta=0.0,
        controlnet_units=[webuiapi.ControlNetUnit(model=NET, weight=0.9)], alwayson_scripts={},
    )  # fmt: skip
    expected = image_to_image(
        peers.ours("sd1"), source, "a dog", seed=1, strength=0.5, controls=[net(source, scale=0.9)], **WALK | {"steps": 4}
    )[0]
    assert apart(answer.image, expected) <= 1


@pytest.mark.parametrize("module", ["ip-adapter_clip_sd15", "ip-adapter_clip_sdxl", "ip-adapter-auto"])
def test_an_image_is_resembled(client, plain, module):
    """Its proportions are its own, and modes of ControlNets mean nothing to it."""
    image = hint(size=(96, 64))
    unit = {"module": module, "weight": 0.7, "guidance_start": 0.2, "guidance_end": 0.9, "control_mode": 1}
    found = drawn(client, webuiapi.ControlNetUnit(image=image, model=f"{PLAIN} [6a3f6166]", **unit))
    assert apart(found, own(image_prompts=[plain(image, scale=0.7, start=0.2, end=0.9)])) <= 1
    assert apart(found, drawn(client)) > 2


def test_hints_and_image_prompts_together(client, served, net, plain):
    first, second = hint(1), hint(2)
    found = drawn(
        client,
        webuiapi.ControlNetUnit(image=first, model=PLUS, module="ip-adapter_clip_sd15", weight=0.5),
        webuiapi.ControlNetUnit(image=first, model=NET),
        webuiapi.ControlNetUnit(image=second, model=PLAIN, module="ip-adapter_clip_sd15"),
    )
    place = served.engine.catalogue.ip_adapter(PLUS)
    assert place.suffix == ".safetensors", "where there are both, of which one may be mapped"
    plus = IPAdapter.load(place)
    assert apart(found, own(net(first), image_prompts=[plus(first, scale=0.5), plain(second)])) <= 1


def test_an_encoder_elsewhere(tmp_path):
    (tmp_path / "alone").mkdir()
    place = adapters.saved(tmp_path, "sd1", "plain").rename(tmp_path / "alone" / "plain.safetensors")
    with pytest.raises(CheckpointError, match="--image-encoder"):
        Models(WorkerSettings(models={}), "cpu", print).ip_adapter(str(place))
    models = Models(WorkerSettings(models={}, image_encoder=str(tmp_path / "image_encoder")), "cpu", print)
    assert models.ip_adapter(str(place)) is models.ip_adapter(str(place))


def test_lists(client, served):
    assert client.controlnet_version() == 2
    assert client.controlnet_model_list() == [NET, PLAIN, PLUS]
    modules = {"none", "canny", "tile_resample", "ip-adapter_clip_sd15", "ip-adapter_clip_sdxl"}
    assert modules <= set(client.controlnet_module_list())
    assert served.get("/controlnet/settings").json() == {"control_net_unit_count": 4}
    detail = served.get("/controlnet/module_list").json()["module_detail"]["canny"]
    assert [slider["name"] for slider in detail["sliders"]] == ["Resolution", "Low Threshold", "High Threshold"]


def test_a_hint_is_shown(client, scene):
    source = Image.open(scene).convert("RGB")
    answer = client.controlnet_detect([source], module="canny", processor_res=source.width, threshold_a=60, threshold_b=150)
    assert np.array_equal(pixels(answer.image)[..., 0], cv2.Canny(np.asarray(source), 60, 150))


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "none.safetensors"}, 400, "no ControlNet called 'none.safetensors'"),
        ({"module": "openpose"}, 422, "module(openpose) not found"),
        ({"module": "ip-adapter_face_id"}, 422, "module(ip-adapter_face_id) not found"),
        ({"module": "ip-adapter_clip_sd15", "model": "plain"}, 400, "no IP-Adapter called 'plain'"),
        ({"module": "ip-adapter_clip_sd15", "model": PLAIN, "image": "AAAA"}, 400, "cannot read the image of an image prompt"),
        ({"module": "ip-adapter_clip_sd15", "model": PLAIN, "hr_option": "Low res only"}, 422, "hr_option"),
        ({"control_mode": "My prompt is more important"}, 422, "control_mode"),
        ({"resize_mode": 7}, 422, "resize_mode"),
        ({"hr_option": "Low res only"}, 422, "hr_option"),
        ({"weight": 3}, 422, "weight"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, 422, "guidance_start"),
        ({"mask": "x"}, 422, "mask"),
        ({"image": None}, 422, "has no image"),
        ({"image": "nothing"}, 500, "Invalid encoded image"),
        ({"image": 5}, 422, "base64"),
        ({"image": "AAAA"}, 400, "cannot read the image of a control"),
    ],
)
def test_what_is_not_done_is_refused(served, client, fields, status, message):
    unit = webuiapi.ControlNetUnit(image=hint(), model=NET).to_dict() | fields
    body = {"prompt": "a cat", "alwayson_scripts": {"ControlNet": {"args": [unit]}}}
    answer = served.post("/sdapi/v1/txt2img", body)
    assert answer.status_code == status and message in answer.json()["detail"], answer.text


def test_an_ip_adapter_shows_no_hint(served):
    body = {"controlnet_module": "ip-adapter_clip_sd15", "controlnet_input_images": ["AAAA"]}
    answer = served.post("/controlnet/detect", body)
    assert answer.status_code == 422 and "makes no image" in answer.json()["detail"]


def test_more_units_than_the_limit(served):
    unit = webuiapi.ControlNetUnit(image=hint(), model=NET).to_dict()
    prompt = webuiapi.ControlNetUnit(image=hint(), model=PLAIN, module="ip-adapter_clip_sd15").to_dict()
    units = [unit] * 3 + [prompt] * 2
    answer = served.post("/sdapi/v1/txt2img", {"prompt": "a", "alwayson_scripts": {"controlnet": {"args": units}}})
    assert answer.status_code == 400 and "at most 4 controls" in answer.json()["detail"]


def test_a_hint_that_grows_beyond_the_limit(served):
    """By its resolution; it is refused before it is decoded."""
    thin = webuiapi.ControlNetUnit(image=Image.new("L", (2, 9000)), model=NET, module="canny", processor_res=2048).to_dict()
    answer = served.post("/sdapi/v1/txt2img", {"prompt": "a", "alwayson_scripts": {"controlnet": {"args": [thin]}}})
    assert answer.status_code == 400 and "pixels" in answer.json()["detail"]
    body = {"controlnet_module": "canny", "controlnet_input_images": [thin["image"]], "controlnet_processor_res": 2048}
    answer = served.post("/controlnet/detect", body)
    assert answer.status_code == 400 and "pixels" in answer.json()["detail"]

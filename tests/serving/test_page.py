"""The page in a real browser: Debian's Chromium without a window. Images of it for docs/serve.md come from here."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.cli import run
from latentdiff.image import open_image
from latentdiff.prompts.words import read_words
from latentdiff.recipe import read_recipe
from latentdiff.request.options import OPTIONS
from tests.adapters.control import adapters
from tests.serving.conftest import Running, running, wait_for

selenium = pytest.importorskip("selenium", reason="needs the extra `test`")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("needs a browser: apt-get install chromium chromium-driver", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402

from latentdiff.serving.asked import NAMES  # noqa: E402
from latentdiff.serving.settings import Limits, WorkerSettings  # noqa: E402

SIDE = read_words(embedded_model()).size
SCREENSHOTS = os.environ.get("LATENTDIFF_SCREENSHOTS")  # an absolute path of a folder
PROMPT = "a fox to the left of a guitar on a purple background"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Running]:
    """A server of the embedded model."""
    worker = WorkerSettings(models={"latentdiff-embedded": None})
    with contextlib.chdir(tmp_path_factory.mktemp("page")):
        for colour in ("red", "blue", "green"):
            Path("data/squares").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (96, 96), colour).save(f"data/squares/{colour}.png")
            Path(f"data/squares/{colour}.txt").write_text(f"a {colour} square")
        controlnet(Path("controlnets"))
        ip_adapter(Path("adapters"))
        places = {"out": "images", "data": "data", "controls": "controlnets", "ip_adapters": "adapters"}
        places = {name: Path(place) for name, place in places.items()}
        with running(worker=worker, devices=("cpu",), **places, limits=Limits(steps=100)) as found:
            wait_for(lambda: found.engine.workers.ready)
            yield found


def controlnet(folder: Path) -> None:
    """A ControlNet for the embedded model that nobody has trained, of which something is seen."""
    config = UNet2DConditionModel.load_config(embedded_model() / "unet")
    shared = ("down_block_types", "block_out_channels", "attention_head_dim", "cross_attention_dim", "norm_num_groups")
    same = {name: config[name] for name in (*shared, "layers_per_block", "use_linear_projection", "in_channels")}
    torch.manual_seed(0)
    net = ControlNetModel(**same, conditioning_embedding_out_channels=(8, 16, 16, 32))
    with torch.no_grad():
        for conv in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            conv.weight.normal_(std=0.05)
    net.save_pretrained(folder / "edges")


def ip_adapter(folder: Path) -> None:
    """An IP-Adapter for the embedded model that nobody has trained, and its image encoder."""
    adapters.saved_encoder(folder)
    unet = UNet2DConditionModel.from_pretrained(embedded_model() / "unet")
    save_file(adapters.flat(adapters.for_unet(unet, "plain")), folder / "likeness.safetensors")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    profile = tmp_path_factory.mktemp("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """What a user does with it."""

    def __init__(self, browser: webdriver.Chrome, site: Running) -> None:
        self.browser, self.site = browser, site
        browser.set_window_size(1280, 900)
        browser.get(site.url)
        wait_for(lambda: self.script("return document.documentElement.dataset.ready"))
        wait_for(lambda: "ready" in self["status"].text)

    def __getitem__(self, name: str):
        return self.browser.find_element(By.ID, name)

    def all(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def script(self, code: str, *arguments: object) -> object:
        return self.browser.execute_script(code, *arguments)

    def type(self, **fields: object) -> None:
        for name, value in fields.items():
            place = self[name]
            self.script("arguments[0].value = ''", place)
            place.send_keys(str(value))

    def click(self, name: str) -> None:
        self.script("arguments[0].scrollIntoView({block: 'center'})", self[name])
        self[name].click()

    def show(self, tab: str) -> None:
        self[f"tab-{tab}"].click()

    def drawn(self) -> list:
        """Wait for the images of the tab Draw."""
        wait_for(lambda: self["go"].is_enabled())
        assert not self["error"].text
        return self.all("#results figure:not(.waiting) img")

    def screenshot(self, name: str) -> None:
        if SCREENSHOTS:
            self.browser.save_screenshot(str(Path(SCREENSHOTS) / f"serve-{name}.png"))

    def is_clean(self) -> None:
        """Nothing was said to the browser's console, and nothing sticks out at the side."""
        assert [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        assert self.script("return document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture
def page(browser, site) -> Iterator[Page]:
    found = Page(browser, site)
    yield found
    found.is_clean()


def kept(site: Running, image) -> Image.Image:
    """The file behind an image of the page."""
    return open_image(site.engine.settings.out / image.get_attribute("src").rpartition("/")[2])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def test_draw_with_previews(page, site):
    page.type(prompt=PROMPT, steps=20, seed=7, num_images=2)
    wait_for(lambda: "tokens" in page["account"].text)
    page.click("go")
    wait_for(lambda: page.all("#results img.preview"))
    images = page.drawn()
    assert [page.script("return arguments[0].naturalWidth", image) for image in images] == [SIDE, SIDE]
    assert all(int(figure.get_attribute("data-previews")) >= 2 for figure in page.all("#results figure"))
    recipes = [read_recipe(kept(site, image).info) for image in images]
    assert [(recipe.prompt, recipe.seed, recipe.steps) for recipe in recipes] == [(PROMPT, 7, 20), (PROMPT, 8, 20)]
    page.screenshot("draw")


def test_the_prompt_is_explained_while_one_types(page):
    page.type(prompt="(two cats:1.3) on a blue zeppelin")
    wait_for(lambda: "zeppelin" in page["remarks"].text)
    tokenizer = CLIPTokenizer.from_pretrained(embedded_model() / "tokenizer")
    tokens = len(tokenizer("two cats on a blue zeppelin")["input_ids"]) - 2  # without those at the ends
    assert f"{tokens} tokens" in page["account"].text
    page.script("document.querySelector('details.quiet').open = true")
    assert page["tokens"].text.startswith("two cats × 1.3")


def test_the_command_draws_the_same(page, site, tmp_path):
    page.type(prompt="a red car -- 'now'", negative_prompt="a dog", steps=3, seed=5)
    page.click("go")
    [image] = page.drawn()
    words = shlex.split(page["command"].text)
    assert words[0] == "latentdiff"
    words[words.index("--out") + 1] = str(tmp_path / "same.png")
    assert run(words[1:]) == 0
    assert np.array_equal(pixels(open_image(tmp_path / "same.png")), pixels(kept(site, image)))


def test_cancel_by_button_and_key(page, site):
    page.type(prompt="a cat", steps=100, num_images=8)
    for end in (lambda: page.click("cancel"), lambda: page["prompt"].send_keys(Keys.ESCAPE)):
        page["prompt"].send_keys(Keys.CONTROL, Keys.ENTER)
        wait_for(lambda: page.all("#results img.preview"))
        end()
        assert len(page.drawn()) < 8
        wait_for(lambda: site.engine.queue.in_making == len(site.engine.queue) == 0)


def test_inpaint_with_the_brush(page, site, scene, tmp_path):
    source = pixels(Image.open(scene))
    page.script("document.getElementById('source').open = true")
    page["image-file"].send_keys(str(scene))
    wait_for(lambda: page["brush"].is_displayed())
    page.type(prompt="a red balloon on a blue background", steps=8, seed=3)
    page.script("arguments[0].scrollIntoView({block: 'center'})", page["brush"])
    side = page["brush"].size["width"]
    stroke = ActionChains(page.browser).move_to_element_with_offset(page["brush"], -side // 4, 0).click_and_hold()
    stroke.move_by_offset(side // 8, side // 16).move_by_offset(side // 8, -side // 16).release().perform()
    page.screenshot("inpaint")
    page.click("go")
    [image] = page.drawn()
    change = np.abs(pixels(kept(site, image)) - source).max(axis=2)
    assert 0.02 < (change > 0).mean() < 0.5, "only what was painted changes"
    side = len(change)
    assert change[side * 5 // 8 :].max() == 0
    assert change[side * 5 // 12 : side * 25 // 48, side * 5 // 16 : side * 23 // 48].max() > 0
    words = shlex.split(page["command"].text)
    assert words[:2] == ["latentdiff", "inpaint"]
    words[words.index("--out") + 1] = str(tmp_path / "same.png")
    assert run(words[1:]) == 0
    assert np.array_equal(pixels(open_image(tmp_path / "same.png")), pixels(kept(site, image)))
    assert run(["reproduce", str(site.engine.settings.out / image.get_attribute("src").rpartition("/")[2])]) == 0
    original = pixels(kept(site, image))
    page.type(prompt="a dog")
    page.click("drop-image")
    press(page, "#results figure button", "Again")
    wait_for(lambda: [each.id for each in page.all("#results img")] not in ([], [image.id]))
    [again] = page.drawn()
    assert np.array_equal(pixels(kept(site, again)), original)


def test_paint_with_the_keyboard_and_begin_from_a_result(page, site):
    page.type(prompt="a cat", steps=3, seed=1)
    page.click("go")
    page.drawn()
    press(page, "#results figure button", "Change")
    wait_for(lambda: page["brush"].is_displayed())
    page["brush"].send_keys(Keys.ARROW_RIGHT, Keys.SPACE)
    assert "mask" in page.script("return import('./page/form.js').then((form) => Object.keys(form.values()))")


def make_it_again(page, site, image, places, tmp_path):
    """The copied command, `reproduce`, and *Again* in the gallery of a fresh page make the same pixels."""
    first = pixels(kept(site, image))
    words = shlex.split(page["command"].text)
    words[words.index("--out") + 1] = str(tmp_path / "same.png")
    assert run(words[1:]) == 0
    assert np.array_equal(pixels(open_image(tmp_path / "same.png")), first)
    assert run(["reproduce", str(site.engine.settings.out / image.get_attribute("src").rpartition("/")[2]), *places]) == 0
    page.browser.refresh()
    wait_for(lambda: page.script("return document.documentElement.dataset.ready"))
    page.show("gallery")
    wait_for(lambda: page.all("#gallery-images figure img"))
    press(page, "#gallery-images figure:first-child button", "Again")
    wait_for(lambda: page.all("#results figure:not(.waiting) img"))
    [again] = page.drawn()
    assert np.array_equal(pixels(kept(site, again)), first)


def test_an_image_is_followed(page, site, scene, tmp_path):
    """What the command says is the same, and so is what "Again" makes of the image in the gallery."""
    page.type(prompt="a cat", steps=3, seed=4)
    page.script("document.getElementById('follow').open = true")
    page.click("add-follow")
    page["follow-cards"].find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(scene))
    wait_for(lambda: page["follow-cards"].find_element(By.CSS_SELECTOR, "img").is_displayed())
    strength, _, end = page.all("#follow-cards input[type=number]")
    strength.send_keys("0.8"), end.send_keys("0.7")
    Select(page.all("#follow-cards select")[1]).select_by_visible_text("the image without details (tile)")
    page.script("arguments[0].scrollIntoView({block: 'center'})", page["follow-cards"])
    page.screenshot("control")
    page.click("go")
    [image] = page.drawn()
    first = kept(site, image)
    (recorded,) = read_recipe(first.info).controls
    assert (recorded.scale, recorded.end, recorded.prepare, recorded.model["file"]) == (0.8, 0.7, "tile", "edges")
    places = ["--source", "control_model1=controlnets/edges"]
    make_it_again(page, site, image, places, tmp_path)


def test_an_image_is_resembled(page, site, scene, tmp_path):
    """With two image prompts, of which the command and "Again" make the same."""
    Image.effect_mandelbrot((160, 80), (-2, -1, 1, 1), 30).save(tmp_path / "wide.png")
    page.type(prompt="a cat", steps=3, seed=4)
    page.script("document.getElementById('resemble').open = true")
    for place in (scene, tmp_path / "wide.png"):
        page.click("add-resemble")
        page.all("#resemble-cards input[type=file]")[-1].send_keys(str(place))
        wait_for(lambda: page.all("#resemble-cards img")[-1].is_displayed())
    strength, start, _ = page.all("#resemble-cards input[type=number]")[:3]
    strength.send_keys("0.6"), start.send_keys("0.2")
    page.script("arguments[0].scrollIntoView({block: 'start'})", page["resemble"])
    page.click("go")
    [image] = page.drawn()
    first = kept(site, image)
    one, other = read_recipe(first.info).image_prompts
    assert (one.scale, one.start, one.end, one.adapter["file"]) == (0.6, 0.2, 1.0, "likeness.safetensors")
    assert (other.scale, other.start, other.end, len(other.images)) == (1.0, 0.0, 1.0, 1)
    assert open_image(site.engine.settings.out / "inputs" / other.images[0]["file"]).size == (160, 80), "as it came"
    found = {"ip_adapter": "adapters/likeness.safetensors", "image_encoder": "adapters/image_encoder"}
    places = [word for n in "12" for role, place in found.items() for word in ("--source", f"{role}{n}={place}")]
    make_it_again(page, site, image, places, tmp_path)
    assert [legend.text for legend in page.all("#resemble-cards legend")] == ["Image prompt 1", "Image prompt 2"]


def test_a_hint_of_other_proportions_is_cut(page, site, tmp_path):
    Image.effect_mandelbrot((160, 80), (-2, -1, 1, 1), 30).save(tmp_path / "wide.png")
    page.type(prompt="a cat", steps=2, seed=4)
    page.script("document.getElementById('follow').open = true")
    page.click("add-follow")
    page["follow-cards"].find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(tmp_path / "wide.png"))
    wait_for(lambda: page["follow-cards"].find_element(By.CSS_SELECTOR, "img").is_displayed())
    page.click("go")
    [image] = page.drawn()
    (recorded,) = read_recipe(kept(site, image).info).controls
    assert open_image(site.engine.settings.out / "inputs" / recorded.image["file"]).size == (80, 80)
    press(page, "#follow-cards button", "Remove")
    assert "controls" not in page.script("return import('./page/form.js').then((form) => Object.keys(form.values()))")


def press(page: Page, selector: str, text: str) -> None:
    """Press the first button that says this."""
    button = next(button for button in page.all(selector) if button.text == text)
    page.script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()


def test_a_grid_has_labelled_axes(page):
    page.type(prompt="a red car on a green background", seed=3)
    page.show("grid")
    page.type(**{"x-values": "4, 12", "y-values": "2, 6"})
    page.script("document.getElementById('z-name').value = 'prompt'")
    page.type(**{"z-values": "red | blue"})
    page.click("grid-go")
    wait_for(lambda: len(page.all("#sheets td img")) == 8 and page["grid-go"].is_enabled())
    assert [cell.text for cell in page.all("#sheets table:first-child th")] == [
        "steps 4", "steps 12", "guidance scale 2", "guidance scale 6",
    ]  # fmt: skip
    assert [caption.text for caption in page.all("#sheets caption")] == ["red", "blue"]
    assert page["grid-save"].is_displayed()
    page.screenshot("grid")


def test_gallery_again_and_compare(page, site):
    for seed in (1, 2):
        page.type(prompt="a cat", steps=3, seed=seed)
        page.click("go")
        page.drawn()
    page.show("gallery")
    first = wait_for(lambda: page.all("#gallery-images figure img"))[0]
    original = kept(site, first)
    for figure in page.all("#gallery-images figure")[:2]:
        choose = next(button for button in figure.find_elements(By.TAG_NAME, "button") if button.text == "Choose")
        page.script("arguments[0].click()", choose)
    wait_for(lambda: page["viewer"].is_displayed())
    assert [cell.text for cell in page.all("#differences tr:first-of-type *")] == ["seed", "2", "1"]
    page["viewer"].send_keys(Keys.ESCAPE)
    press(page, "#gallery-images figure:first-child button", "Again")
    wait_for(lambda: page["draw"].is_displayed() and page.all("#results figure:not(.waiting) img"))
    [image] = page.drawn()
    assert np.array_equal(pixels(kept(site, image)), pixels(original))


def test_dropping_an_image_reads_its_recipe(page, tmp_path):
    """One of AUTOMATIC1111's, on whatever tab is open."""
    text = "a castle\nNegative prompt: fog\nSteps: 12, Sampler: Euler a, CFG scale: 6, Seed: 9, Size: 96x96, Model: x"
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    file = io.BytesIO()
    Image.new("RGB", (96, 96)).save(file, "PNG", pnginfo=info)
    page.script(
        """const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "castle.png", { type: "image/png" }));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));""",
        base64.b64encode(file.getvalue()).decode(),
    )
    wait_for(lambda: page.all("#fields-of-image tr"))
    assert "AUTOMATIC1111" in page["account-of-image"].text and "Euler a" in page["fields-of-image"].text
    press(page, "#account-of-image button", "Use these settings")
    values = {name: page[name].get_attribute("value") for name in ("prompt", "negative_prompt", "steps", "seed", "sampler")}
    assert values == {"prompt": "a castle", "negative_prompt": "fog", "steps": "12", "seed": "9", "sampler": "euler-a"}


def test_the_settings_of_an_image_are_told(page):
    """Those that say something: steps, guidance and sampler always, others where they are not the default."""
    page.type(prompt="a cat", steps=25, seed=6)
    page.click("go")
    [image] = page.drawn()
    page.script("arguments[0].click()", image)
    wait_for(lambda: page["viewer"].is_displayed())
    names = [cell.text for cell in page.all("#viewed th")]
    assert {"prompt", "seed", "steps", "guidance_scale", "sampler"} <= set(names)
    assert not {"clip_skip", "crop_top_left", "apg_bound"} & set(names)
    page["viewer"].send_keys(Keys.ESCAPE)


def test_what_carries_no_recipe_is_said(page, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.show("read")
    page["read-file"].send_keys(str(tmp_path / "plain.png"))
    wait_for(lambda: "no recipe" in page["account-of-image"].text)
    page.browser.get_log("browser")  # where the browser notes the answer 400


def test_on_a_phone(page):
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        page.type(prompt="a cat", steps=3)
        page.click("go")
        [image] = page.drawn()
        assert image.size["width"] > 100
        page.is_clean()
        page.screenshot("phone")
        for tab in ("grid", "gallery", "read"):
            page.show(tab)
            page.is_clean()
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_options_stand_under_their_headings(page):
    groups = page.script(
        "return [...document.querySelectorAll('#more > details')].map((group) =>"
        " [group.querySelector('summary').textContent, [...group.querySelectorAll('[name]')].map((one) => one.name)])"
    )
    expected: dict[str, list[str]] = {}
    for name in NAMES:
        if heading := OPTIONS[name].heading:
            expected.setdefault(heading, []).append(name)
    assert groups == [list(group) for group in expected.items()]


def test_everything_is_named_for_whoever_does_not_see_it(page):
    page.script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    nameless = page.script(
        """return [...document.querySelectorAll("input, select, textarea, button, canvas, img")].filter((each) =>
        !(each.labels?.length || each.ariaLabel || each.textContent.trim() || each.alt !== undefined && each.alt !== null
          && each.tagName === "IMG" || each.id === "edited")).map((each) => each.outerHTML)"""
    )
    assert nameless == []


def test_errors_of_the_server_are_shown(page):
    page.type(prompt="<lora:none> a cat")
    page.click("go")
    wait_for(lambda: "no LoRA called 'none'" in page["error"].text)
    page.browser.get_log("browser")


def test_nothing_comes_from_anywhere_else(page):
    """The page works without a network."""
    page.show("gallery")
    names = page.script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert names and all(name.startswith((page.site.url, "data:", "blob:")) for name in names)


def test_the_command_of_a_grid(page, tmp_path):
    page.type(prompt="a red car", seed=2, steps=9)
    page.show("grid")
    page.type(**{"x-values": "2, 4"})
    page.script("document.getElementById('y-name').value = 'prompt'")
    page.type(**{"y-values": "red | light blue"})
    page.script("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("grid-copy")
    words = shlex.split(wait_for(lambda: page.script("return window.copied")))
    assert words[:3] == ["latentdiff", "grid", "a red car"]
    words[words.index("--out") + 1] = str(tmp_path / "grid.png")
    assert run(words[1:]) == 0
    assert open_image(tmp_path / "grid.png").width > 2 * SIDE


def test_check_data(page):
    page.show("train")
    page.click("train-check")
    wait_for(lambda: page["train-state"].text == "done")
    assert "captions: 3 for 3 images" in page["train-said"].text


@pytest.mark.slow
def test_a_run_shows_curves_and_samples_and_its_lora_draws(page, site):
    page.show("train")
    page.type(**{"train-name": "squares", "train-max_steps": 4, "train-batch_size": 2, "train-rank": 2, "train-every": 2})
    page.type(**{"train-prompt": "a red square"})
    page.click("train-go")
    wait_for(lambda: page.all("#train-curves svg") and page.all("#train-samples img"))
    wait_for(lambda: page["train-state"].text == "done", 300)
    wait_for(lambda: "<lora:squares:1>" in page["train-result"].text)
    assert "loss" in page.script("return document.querySelector('#train-curves title').textContent")
    page.screenshot("train")
    page.show("draw")
    page.type(prompt="a red square <lora:squares:1>", steps=3)
    page.click("go")
    [image] = page.drawn()
    assert read_recipe(kept(site, image).info).loras[0]["file"] == "lora.safetensors"


def test_the_page_of_the_interfaces(page):
    page.browser.get(f"{page.site.url}/docs")
    wait_for(lambda: page.all("main section"))
    assert [each.get_attribute("id") for each in page.all("main section")] == ["OpenAI", "AUTOMATIC1111", "page", "state"]
    page.script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    text = page["OpenAI"].text
    assert "POST /v1/images/generations" in text and "guidance_scale" in text and "How strongly to follow the prompt" in text

"""Image prompts in a pipeline: what they act on, tasks, memory, engines, recipes, and what is refused."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff import ControlNet, IPAdapter, Pipeline, image_to_image, inpaint
from latentdiff.checkpoints.inspection import inspect
from latentdiff.engines import int8
from latentdiff.errors import CheckpointError, ConfigError, DataError, UsageError
from latentdiff.model.memory.estimate import needed, weight_bytes
from latentdiff.model.memory.parts import Part
from latentdiff.networks.device import PrecisionWarning
from latentdiff.recipe import read_recipe
from latentdiff.tasks import TASKS, refine
from tests import peers
from tests.adapters.control import adapters, nets
from tests.adapters.lora.conftest import make
from tests.tasks.images import an_image, apart, mask

QUICK = {"steps": 4, "seed": 1, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def plain(folder) -> IPAdapter:
    return IPAdapter.load(adapters.saved(folder, "sd1", "plain"))


@pytest.fixture(scope="module")
def plus(folder) -> IPAdapter:
    return IPAdapter.load(adapters.saved(folder, "sd1", "plus"))


shared = cache(peers.ours)


def steps_of(prompts, pipe=None, **options) -> list[torch.Tensor]:
    """The clean latents expected at each step."""
    found = []
    (pipe or shared("sd1"))(
        "cat", image_prompts=prompts, callback=lambda step, t, x0: found.append(x0), **QUICK | options
    )
    return found


def test_it_acts_in_its_share_of_the_steps(plain):
    none, whole = steps_of(None), steps_of([plain(an_image())])
    first, last = steps_of([plain(an_image(), end=0.5)]), steps_of([plain(an_image(), start=0.5)])
    assert all(torch.equal(a, b) for a, b in zip(first[:2], whole[:2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(last[:2], none[:2], strict=True))
    assert not torch.equal(first[2], whole[2]) and not torch.equal(last[2], none[2])
    assert all(torch.equal(a, b) for a, b in zip(steps_of([plain(an_image(), scale=0.0)]), none, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(steps_of([plain(an_image(), end=0.1)]), none, strict=True))


def test_an_image_does_not_depend_on_its_batch(plain, plus):
    prompts = [plain(an_image(), scale=0.6), plus([an_image(seed=1), an_image(seed=2)], negative=an_image(seed=3))]
    texts = ["cat", "a red fox AND a dog", "cat " * 90]
    together = shared("sd1")(texts, image_prompts=prompts, batch_size=3, **{**QUICK, "seed": [1, 1, 1]})
    alone = [shared("sd1")(text, image_prompts=prompts, **QUICK)[0] for text in texts]
    assert [apart(a, b) for a, b in zip(together, alone, strict=True)] <= [1, 1, 1]


def test_blocks_by_their_names(plain):
    """All blocks by name are all; two halves together are the whole."""
    named = plain(an_image(), blocks={"down_blocks": 1.0, "mid_block": 1.0, "up_blocks": 1.0})
    whole = steps_of([plain(an_image())])
    assert all(torch.equal(a, b) for a, b in zip(steps_of([named]), whole, strict=True))
    halves = [plain(an_image(), blocks={"down_blocks": 1.0}), plain(an_image(), blocks="mid_block=1,up_blocks=1")]
    for a, b in zip(steps_of(halves), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.equal(steps_of(halves[:1])[0], whole[0])


def test_guidance_of_one_takes_no_other_image(plain):
    prompts = [plain(an_image(), negative=an_image(seed=3))], [plain(an_image())]
    a, b = (steps_of(some, guidance_scale=1.0) for some in prompts)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_with_a_lora_and_a_control(plain, folder):
    pipe = peers.ours("sd1")
    control = ControlNet.load(nets.saved(folder))(nets.hint())
    prompts = [plain(an_image())]
    with make(pipe).attached():
        all_three = pipe("cat", image_prompts=prompts, controls=[control], **QUICK)[0]
        for left_out in ({"image_prompts": prompts}, {"controls": [control]}):
            assert apart(all_three, pipe("cat", **left_out, **QUICK)[0]) > 2
    assert apart(all_three, pipe("cat", image_prompts=prompts, controls=[control], **QUICK)[0]) > 2


def test_in_every_task(plain):
    pipe, prompts = shared("sd1"), [plain(an_image(seed=4))]
    tasks = {
        "edit": lambda **more: image_to_image(pipe, an_image(), "cat", **QUICK, **more),
        "inpaint": lambda **more: inpaint(pipe, an_image(), mask((8, 8, 48, 48)), "cat", **QUICK, **more),
        "hires": lambda **more: pipe("cat", hires=2, hires_steps=2, **QUICK, **more),
    }
    for task in tasks.values():
        steered = task(image_prompts=prompts)[0]
        assert apart(steered, task()[0]) > 2
        (recorded,) = read_recipe(steered.info).image_prompts
        assert len(recorded.adapter["sha256"]) == len(recorded.encoder["sha256"]) == 64


def test_a_refiner_takes_none(folder):
    """They act in the first model alone, and a recipe gives them back to it."""
    pipe = peers.ours("xl")
    an_image(seed=6).save(folder / "style.png")
    prompts = [IPAdapter.load(adapters.saved(folder, "xl", "plain"))(folder / "style.png", blocks="style")]
    (image,) = refine(pipe, pipe, "cat", switch=0.5, image_prompts=prompts, **QUICK)
    assert apart(image, refine(pipe, pipe, "cat", switch=0.5, **QUICK)[0]) > 2
    recipe = read_recipe(image.info)
    sources = {role: folder / entry["file"] for role, entry in recipe.roles().items() if role != "refiner"}
    again = TASKS["refine"](pipe, recipe, {**sources, "refiner": peers.folder("xl")})
    assert apart(image, again) == 0


def test_threads_make_what_they_make_alone(plain):
    pipe = shared("sd1")
    requests = [{"image_prompts": [plain(an_image(), scale=scale)]} if scale else {} for scale in (0, 0.5, 0, 1.0)]
    alone = [pipe("cat", **request, **QUICK)[0] for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda request: pipe("cat", **request, **QUICK)[0], requests))
    assert [apart(a, b) for a, b in zip(together, alone, strict=True)] == [0] * 4


def test_a_deep_cache_begins_anew_where_it_switches(plain):
    """With every second step from the cache; where a prompt's share ends, other layers are due."""
    options = {"steps": 2, "cache_interval": 2}
    half, whole = ([plain(an_image(), end=end)] for end in (0.5, 1.0))
    expected, found = steps_of(half, steps=2), steps_of(half, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    cached = steps_of(whole, **options)
    assert not torch.equal(cached[1], steps_of(whole, steps=2)[1]) and not torch.equal(cached[1], found[1])


def test_low_memory_makes_the_same_image(folder):
    pipe = Pipeline.load(peers.folder("sd1"), device="cpu", precision="fp32", low_memory=True)
    adapter = IPAdapter.load(adapters.saved(folder, "sd1", "plus"))
    low = pipe("cat", image_prompts=[adapter(an_image())], **QUICK)[0]
    assert apart(low, shared("sd1")("cat", image_prompts=[adapter(an_image())], **QUICK)[0]) == 0
    parts = list(pipe.residence.beside.values())
    assert len(parts) == 2 and all(type(part) is Part and not part.is_ready for part in parts)
    del adapter, parts
    assert not list(pipe.residence.beside.values())


def test_memory_is_counted(plain):
    residence = shared("sd1").residence
    shared("sd1")("cat", image_prompts=[plain(an_image())], **QUICK)
    part = residence.beside[plain.encoder]
    workload = residence.workload(2, 8, 8, before=[part, residence.beside[plain.weights]])
    assert workload.before == max(weight_bytes(part.module), weight_bytes(residence.beside[plain.weights].module)) > 0
    large = workload.changed(before=10**12)
    assert needed(large, at_once=True) > needed(large, at_once=False) == 10**12


def test_what_overflows_is_computed_in_float32(plain):
    pipe = Pipeline.load(peers.folder("sd1"), device="cpu", precision="bf16")
    prompts, unet = [plain(an_image())], pipe.unet

    def overflowing(x, t, context, *added):
        return torch.full_like(x, torch.inf)

    pipe._network = overflowing
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", PrecisionWarning)
        found = pipe("cat", image_prompts=prompts, **QUICK)[0]
    assert any("the U-Net overflows bfloat16" in str(each.message) for each in seen)
    assert next(unet.parameters()).dtype == torch.bfloat16
    assert apart(found, shared("sd1")("cat", image_prompts=prompts, **QUICK)[0]) < 12
    assert apart(found, shared("sd1")("cat", **QUICK)[0]) > 12


def test_what_was_seen_is_remembered(plain, monkeypatch):
    shared("sd1")("cat", image_prompts=[plain(an_image(seed=8))], **QUICK)
    from latentdiff.networks.image_encoder import ImageEncoder

    monkeypatch.setattr(ImageEncoder, "forward", None)
    monkeypatch.setattr(ImageEncoder, "hidden", None)
    shared("sd1")("cat", image_prompts=[plain(an_image(seed=8))], **QUICK)
    with pytest.raises(TypeError):
        shared("sd1")("cat", image_prompts=[plain(an_image(seed=9))], **QUICK)
    assert len(plain.remembered) <= 16


@pytest.mark.parametrize("backend", ["openvino", "compile"])
def test_back_ends_that_leave_the_modules_are_refused(plain, backend):
    pipe = peers.ours("sd1")
    pipe.backend = backend
    with pytest.raises(UsageError, match=f"image prompts need the back end torch, found {backend}"):
        pipe("cat", image_prompts=[plain(an_image())], **QUICK)


def test_an_adapter_of_another_model_is_refused(plain):
    for pipe in (Pipeline.load(device="cpu"), shared("xl")):
        with pytest.raises(CheckpointError, match="an IP-Adapter for another model: text width 32, expected") as error:
            pipe("cat", image_prompts=[plain(an_image())], **QUICK)
        assert "\n" not in str(error.value)


def test_other_layers_are_refused(folder):
    parts = adapters.adapter("sd1", "plain")
    del parts["ip_adapter"]["31.to_k_ip.weight"], parts["ip_adapter"]["31.to_v_ip.weight"]
    save_file(adapters.flat(parts), folder / "short.safetensors")
    with pytest.raises(CheckpointError, match="cross-attentions 15, expected 16"):
        shared("sd1")("cat", image_prompts=[IPAdapter.load(folder / "short.safetensors")(an_image())], **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, "scale to be a finite number of 0 or more"),
        ({"start": 0.6, "end": 0.5}, "start of an image prompt before its end"),
        ({"end": 1.5}, "end to be a finite number of 0 to 1"),
        ({"blocks": "magic"}, "blocks to be style or layout, or blocks with numbers"),
        ({"blocks": {"up_blocks": float("nan")}}, "blocks to be style or layout"),
        ({"weight": 0.5}, "no option 'weight'"),
    ],
)
def test_bad_arguments(plain, options, message):
    with pytest.raises(UsageError, match=message):
        plain(an_image(), **options)


def test_other_bad_input(plain):
    pipe = shared("sd1")
    with pytest.raises(UsageError, match="an image to resemble, or several, found none"):
        plain([])
    with pytest.raises(DataError, match="none.png"):
        plain("none.png")
    with pytest.raises(UsageError, match="what an IPAdapter makes of images"):
        pipe("cat", image_prompts=[an_image()], **QUICK)
    with pytest.raises(UsageError, match="the blocks of style are known for SDXL alone"):
        pipe("cat", image_prompts=[plain(an_image(), blocks="style")], **QUICK)
    with pytest.raises(UsageError, match="as down_blocks.0.attentions.0, .*, found 'up_blocks.9'"):
        pipe("cat", image_prompts=[plain(an_image(), blocks={"up_blocks.9": 1.0})], **QUICK)


def changed(folder: Path, name: str, change, kind: str = "plain") -> Path:
    """A copy of an adapter's file with something else in it."""
    tensors = {key: tensor.clone() for key, tensor in load_file(adapters.saved(folder, "sd1", kind)).items()}
    change(tensors)
    save_file(tensors, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("ip_adapter.1.to_v_ip.weight"), "1 missing: ip_adapter.1.to_v_ip.weight"),
        (lambda t: t.update({"ip_adapter.1.more": torch.ones(2)}), "1 unexpected: ip_adapter.1.more"),
        (lambda t: t.update({"image_proj.proj.bias": torch.ones(2)}), "of the wrong shape"),
        (lambda t: t.update({"image_proj.proj.bias": torch.ones(128, dtype=torch.int8)}), "expected floats"),
        (lambda t: t.pop("image_proj.norm.weight"), "is missing"),
        (lambda t: t.update({"image_proj.proj.weight": torch.ones(4)}), "no matrix"),
        (lambda t: t.update({"ip_adapter.1.to_k_lora.up.weight": torch.ones(2, 2)}), "FaceID, which needs insightface"),
        (lambda t: t.update({"image_proj.perceiver_resampler.proj_in.weight": torch.ones(2, 2)}), "FaceID"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("image_proj")], "expected an IP-Adapter in"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_files(change, message, folder):
    path = changed(folder, "changed.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as error:
        IPAdapter.load(path)
    assert "\n" not in str(error.value)


def test_places(folder, tmp_path):
    file = adapters.saved(folder, "sd1", "plus")
    alone = tmp_path / "models" / file.name
    alone.parent.mkdir()
    alone.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="which is not at .*models/image_encoder; say where it is"):
        IPAdapter.load(alone)
    with pytest.raises(CheckpointError, match="expected the folder of an image encoder"):
        IPAdapter.load(alone, image_encoder=tmp_path / "none")
    assert IPAdapter.load(alone.parent, image_encoder=folder / "image_encoder").weights.path == alone
    # An adapter of SDXL for the smaller encoder, which lies with those of 1.x.
    adapters.encoder().save_pretrained(tmp_path / "sdxl_models" / "image_encoder")
    assert IPAdapter.load(alone).encoder.path == tmp_path / "sdxl_models" / "image_encoder"
    config = tmp_path / "sdxl_models" / "image_encoder" / "config.json"
    text = config.read_text()
    config.write_text(text.replace(f'"hidden_size": {adapters.HIDDEN}', '"hidden_size": 80'))
    with pytest.raises(CheckpointError, match=f"needs an image encoder of width {adapters.HIDDEN}, found 80"):
        IPAdapter.load(alone)
    config.write_text(text.replace('"hidden_act": "gelu"', '"hidden_act": "magic"'))
    with pytest.raises(ConfigError, match="hidden_act of the image encoder"):
        IPAdapter.load(alone)
    config.write_text(text.replace("clip_vision_model", "siglip"))
    with pytest.raises(CheckpointError, match="expected the image encoder of CLIP"):
        IPAdapter.load(alone)
    (alone.parent / "b.bin").touch()
    with pytest.raises(CheckpointError, match="expected one IP-Adapter file in"):
        IPAdapter.load(alone.parent)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        IPAdapter.load(tmp_path / "none.bin")


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_inspect_names_it(suffix, folder):
    report = inspect(adapters.saved(folder, "sd1", "plus", suffix=suffix))
    assert report.kind.startswith("IP-Adapter (") and not report.problem
    assert report.family == "IP-Adapter Plus for a model of text width 32"
    assert "an image encoder of width 40" in " ".join(report.notes)
    assert inspect(folder / "image_encoder").family == "image encoder (CLIP)"
    change = {"ip_adapter.1.to_q_lora.up.weight": torch.ones(2, 2), "ip_adapter.1.to_q_lora.down.weight": torch.ones(2, 2)}
    face = changed(folder, "face.safetensors", lambda t: t.update(change))
    assert "FaceID" in inspect(face).problem


@pytest.mark.skipif(not int8.int8_is_possible(), reason="needs a CPU with VNNI instructions")
def test_in_eight_bits(plain):
    pipe, prompts = Pipeline.load(peers.folder("sd1"), device="cpu", precision="int8"), [plain(an_image())]
    found = pipe("cat", image_prompts=prompts, **QUICK)[0]
    assert apart(found, shared("sd1")("cat", image_prompts=prompts, **QUICK)[0]) < 12
    assert apart(found, shared("sd1")("cat", **QUICK)[0]) > 12

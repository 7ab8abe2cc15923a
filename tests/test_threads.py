"""One pipeline in many threads: each image is the one that is made when nobody else draws."""

from __future__ import annotations

import copy
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from latentdiff import Pipeline
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.diffusion.denoise import Cancelled
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.networks.kernels import has_taps
from latentdiff.tasks import image_to_image, inpaint, invert, translate
from tests import tiny
from tests.adapters.lora.conftest import make

THREADS = 8
Request = Callable[[Pipeline], np.ndarray]
SOURCE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
MASK = Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 4))
BRIEF = {"steps": 2, "progress": False}


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def requests(lora) -> list[Request]:
    """Twenty, that use the modules in all ways."""

    def draw(prompt: str, seed: int, **options) -> Request:
        return lambda pipe: pipe(prompt, seed=seed, output="latents", **{**BRIEF, **options}).numpy()

    def cancelled(error: Exception | None) -> Request:
        def callback(step: int, t: float, x0: torch.Tensor) -> bool:
            if error is not None:
                raise error
            return step < 1

        def ask(pipe: Pipeline) -> np.ndarray:
            with pytest.raises(type(error) if error else Cancelled):
                pipe("a cat <lora:style:1>", callback=callback, cache_interval=2, **BRIEF)
            return np.zeros(0)

        return ask

    def loaded(pipe: Pipeline) -> np.ndarray:
        with pipe.alone():
            pipe.load_lora(lora, 0.5, name="mine")
            try:
                return pixels(pipe("a dog", seed=3, **BRIEF))
            finally:
                pipe.unload_lora("mine")

    def previewed(pipe: Pipeline) -> np.ndarray:
        seen: list[np.ndarray] = []
        pipe("a fox", seed=4, callback=lambda step, t, x0: seen.append(pipe.decode(x0).numpy()), **BRIEF)
        return np.stack(seen)

    def edit(**options) -> Request:
        return lambda pipe: pixels(image_to_image(pipe, SOURCE, "a red cat", seed=5, **{**BRIEF, **options}))

    return [
        *(draw(f"a {colour} cat", seed) for seed, colour in enumerate(("red", "blue", "(red:1.3)"))),
        *(draw("a cat", seed, sampler=name) for seed, name in enumerate(("dpmpp-2m", "euler-a"))),
        *(draw("a cat", seed, cache_interval=2, steps=3) for seed in range(2)),
        draw("a cat", 2, cache_interval=3, cache_branch=1, steps=3),
        *(draw(f"a dog <lora:style:{weight}>", 7) for weight in (1, -1)),
        edit(),
        lambda pipe: pixels(pipe("a rocket", seed=8, **BRIEF)),
        edit(strength=0.9, cache_interval=2, steps=3),
        lambda pipe: pixels(inpaint(pipe, SOURCE, MASK, "a fox", seed=6, **BRIEF)),
        lambda pipe: pixels(translate(pipe, SOURCE, "a fox", steps=2, progress=False)),
        lambda pipe: invert(pipe, SOURCE, prompt="a cat", steps=2, measure=False, progress=False).latents.numpy(),
        cancelled(None),
        cancelled(ValueError("of the callback")),
        loaded,
        previewed,
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of two levels, for speed."""
    folder = tmp_path_factory.mktemp("model")
    levels = {"block_out_channels": (16, 32), "layers_per_block": 1}
    unet = tiny.unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **levels,
    )
    vae = tiny.vae(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **levels)
    text_encoder, words = tiny.text_encoder(num_hidden_layers=1), tiny.tokenizer(folder / "tokenizer-files")
    scheduler = DDIMScheduler(**tiny.BETAS, steps_offset=1, clip_sample=False)
    made = tiny.pipeline(unet, vae, text_encoder, words, scheduler)
    return tiny.save_real_layout(made, folder / "small", folder / "tokenizer-files")


def load(model, **options) -> Pipeline:
    return Pipeline.load(model, device="cpu", **{"precision": "fp32", **options})


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    save_lora(make(load(model), ("attention", "text_encoder")), folder / "style.safetensors")
    return folder / "style.safetensors"


@pytest.fixture
def busy() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-3)
    yield
    sys.setswitchinterval(before)


def differences(pipe: Pipeline, asked: list[Request]) -> list[str]:
    """What eight threads get otherwise than one, if each asks for all in an order of its own."""
    expected = [ask(pipe) for ask in asked]
    found: list[str] = []
    together = threading.Barrier(THREADS)

    def serve(thread: int) -> None:
        order = random.Random(thread).sample(range(len(asked)), len(asked))
        together.wait()
        for number in order:
            try:
                if not np.array_equal(asked[number](pipe), expected[number]):
                    found.append(f"request {number} differs")
            except Exception as error:
                found.append(f"request {number}: {type(error).__name__}: {error}")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(serve, range(THREADS)))
    return found


@pytest.fixture
def pipe(model, lora):
    pipe = load(model)
    pipe.offer_loras(lora.parent)
    return pipe


def test_mixed_requests_of_eight_threads(pipe, lora, busy):
    assert not differences(pipe, requests(lora))
    assert not pipe.sharing._inside and not pipe.adaptations() and not has_taps(pipe.unet, pipe.text_encoder)


MODES = {
    "low memory": {"low_memory": True},
    "bf16": {"precision": "bf16"},
    "compile": {"backend": "compile"},
    "openvino": {"backend": "openvino"},
}


@pytest.mark.parametrize("mode", ["low memory", "bf16"])
def test_other_modes(model, lora, mode, busy):
    pipe = load(model, **MODES[mode])
    pipe.offer_loras(lora.parent)
    asked = requests(lora)
    assert not differences(pipe, [asked[number] for number in (0, 5, 8)])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_all_requests_in_other_modes(model, lora, mode, busy):
    if mode == "openvino":
        pytest.importorskip("openvino")
    pipe = load(model, **MODES[mode])
    pipe.offer_loras(lora.parent)
    cached = mode in ("compile", "openvino")  # which have no module to tap
    assert not differences(pipe, requests(lora)[: 5 if cached else None])


def test_an_image_is_made_with_a_lora_or_without_it(pipe, lora, busy):
    """Loading waits for what is being drawn, and drawing for what is being loaded."""

    def draw() -> np.ndarray:
        return pipe("a cat", seed=1, output="latents", steps=3, progress=False).numpy()

    without = draw()
    pipe.load_lora(lora, name="mine")
    possible = [without, draw()]
    pipe.unload_lora()
    drawing = True

    def change() -> None:
        while drawing:
            pipe.load_lora(lora, name="mine")
            pipe.unload_lora("mine")

    with ThreadPoolExecutor(4) as pool:
        changing = pool.submit(change)
        made = [future.result() for future in [pool.submit(draw) for _ in range(12)]]
        drawing = False
        changing.result()
    assert not np.array_equal(*possible)
    assert all(any(np.array_equal(image, one) for one in possible) for image in made)


def test_a_model_is_read_once_by_threads_that_come_at_once(model):
    pipe, together = load(model), threading.Barrier(4)

    def ready(_: int) -> int:
        together.wait()
        return pipe.unet.conv_in.weight.data_ptr()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ready, range(4)))) == 1


def test_drawings_that_wait_for_one_another_are_refused(pipe, lora):
    """Both want to change the model in the midst of an image, which the other one is using."""
    pipe("a cat", **BRIEF)  # the first image, for which weights are read, is made alone
    together, said = threading.Barrier(2, timeout=60), []

    def draw(name: str) -> None:
        def callback(step: int, t: float, x0: torch.Tensor) -> None:
            together.wait()
            pipe.load_lora(lora, name=name)

        try:
            pipe("a cat", steps=1, progress=False, callback=callback)
        except UsageError as error:
            said.append(str(error))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(draw, ("one", "two")))
    assert len(said) == 1 and "two threads" in said[0] and len(pipe.adaptations()) == 1


def test_a_pickle_is_the_model_loaded_again(pipe, lora, tmp_path, monkeypatch):
    pipe.load_lora(lora, 0.5, name="mine")
    monkeypatch.chdir(tmp_path)
    expected = pipe("a cat <lora:style:-1>", seed=1, **BRIEF)
    pickled = pickle.dumps(pipe)
    assert len(pickled) < 5000
    for again in (pickle.loads(pickled), copy.deepcopy(pipe)):
        assert np.array_equal(pixels(again("a cat <lora:style:-1>", seed=1, **BRIEF)), pixels(expected))
        again.unload_lora("mine")
    assert len(pipe.adaptations()) == 1


def test_what_no_file_holds_is_not_pickled(model, lora):
    pipe = load(model)
    pipe.unet.conv_in.weight.data.add_(1.0)
    pipe.unet.conv_in.weight.requires_grad_(False).add_(1.0)
    with pytest.raises(UsageError, match="save it, and load that"):
        pickle.dumps(pipe)
    assert pickle.loads(pickle.dumps(load(model))).model_hash == pipe.model_hash


def test_another_file_is_not_taken_for_the_pickled_one(pipe, lora, tmp_path):
    own = shutil.copy(lora, tmp_path / "style.safetensors")
    pipe.load_lora(own)
    pickled = pickle.dumps(pipe)
    pipe.unload_lora()
    save_lora(make(pipe, ("attention",), seed=5), own)
    with pytest.raises(CheckpointError, match="others than when it was pickled"):
        pickle.loads(pickled)


FORKED = """
import os, sys, torch
from latentdiff import Pipeline
from latentdiff.errors import UsageError

def draw():
    return pipe("a cat", seed=1, steps=2, progress=False)[0].tobytes()

def in_a_fork(work):
    child = os.fork()
    if not child:
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def refused():
    try:
        draw()
    except UsageError as error:
        torch.set_num_threads(1)
        return 0 if "torch's 2 threads did not come along" in str(error) and draw() == expected else 2
    return 1

torch.set_num_threads(1)
pipe = Pipeline.load(sys.argv[1], device="cpu", precision="fp32")
expected = draw()
assert in_a_fork(lambda: draw() != expected) == 0
torch.set_num_threads(2)
draw()
assert in_a_fork(refused) == 0
torch.set_num_threads(1)
pipe = Pipeline.load(sys.argv[1], device="cpu", precision="fp32", low_memory=True)
draw()
def streamed():
    try:
        draw()
    except UsageError as error:
        return 0 if "streams" in str(error) else 2
assert in_a_fork(streamed) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_draws_or_says_what_it_lacks(model):
    environment = {**os.environ, "LATENTDIFF_FORMS": "torch"}  # which do not depend on the number of threads
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, str(model)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr

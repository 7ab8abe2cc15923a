from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.errors import LatentDiffError
from latentdiff.model.memory import estimate, residence
from latentdiff.model.memory.estimate import held_bytes, needed
from latentdiff.model.memory.residence import MemoryWarning
from tests import peers


def load(**options) -> Pipeline:
    return Pipeline.load(peers.folder("sd1"), device="cpu", **{"precision": "fp32", **options})


def make(pipe: Pipeline, **options) -> Tensor:
    return pipe("a red cat", steps=2, seed=1, progress=False, **{"output": "latents", **options})


def ready(pipe: Pipeline) -> set[str]:
    return {name for name, part in pipe.residence.parts.items() if part.is_ready}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Sets how many bytes the machine has free."""
    monkeypatch.setattr(residence, "free_swap", lambda device: 0)
    monkeypatch.setattr(estimate, "_SLACK", 0)  # more than a tiny model takes
    return lambda count: monkeypatch.setattr(residence, "available_memory", lambda device: count)


def test_loading_reads_no_weights():
    pipe = load()
    assert ready(pipe) == set()
    assert pipe.default_size == (64, 64) and not pipe.is_for_inpainting
    assert ready(pipe) == set()
    make(pipe)
    assert ready(pipe) == {"text_encoder", "unet"}
    make(pipe, output="images")
    assert ready(pipe) == {"text_encoder", "unet", "vae"}


def test_every_part_only_as_long_as_it_is_used(free):
    free(10**15)
    pipe, usual = load(), load()
    pipe.residence.keep = False
    for _ in range(2):
        (found,), (expected,) = make(pipe, output="images"), make(usual, output="images")
        assert found.tobytes() == expected.tobytes()
        assert ready(pipe) == {"vae"} and ready(usual) == {"text_encoder", "unet", "vae"}


def test_the_last_image_gives_a_large_model_back_and_leaves_a_small_one(free, monkeypatch: pytest.MonkeyPatch):
    free(10**15)
    small, large = load(), load()
    small.residence.expect_no_more()
    monkeypatch.setattr(residence, "SMALL", 0)
    large.residence.expect_no_more()
    (found,), (expected,) = make(large, output="images"), make(small, output="images")
    assert found.tobytes() == expected.tobytes()
    assert ready(large) == {"vae"} and ready(small) == {"text_encoder", "unet", "vae"}


def test_parts_are_given_back_where_memory_is_short(free, monkeypatch: pytest.MonkeyPatch):
    pipe = load()
    total = int(1.2 * needed(pipe.residence.workload(2, 8, 8), at_once=False))
    taken = lambda: sum(held_bytes(p.module) for p in pipe.residence.parts.values())  # noqa: E731
    monkeypatch.setattr(residence, "available_memory", lambda device: total - taken())
    (found,) = make(pipe, output="images")
    assert ready(pipe) == {"vae"}
    free(None)  # the system does not say
    (again,) = make(pipe, output="images")
    assert ready(pipe) == {"text_encoder", "unet", "vae"} and again.tobytes() == found.tobytes()


def test_parts_stay_where_that_is_asked_for(free):
    pipe = load()
    pipe.residence.keep = True
    free(3 * needed(pipe.residence.workload(2, 8, 8), at_once=True))
    make(pipe, output="images")
    free(0)
    pipe.residence.make_room("vae", 10**9)
    assert ready(pipe) == {"text_encoder", "unet", "vae"}


def test_what_does_not_fit_is_refused_before_anything_is_read(free):
    pipe = load()
    need = needed(pipe.residence.workload(8, 8, 8), at_once=False)
    free(need // 2)
    with pytest.raises(LatentDiffError, match=r"takes about .* GB .* are free; try .*a smaller --width"):
        make(pipe, num_images=4)
    assert ready(pipe) == set()


def test_a_close_fit_warns(free):
    pipe = load()
    free(int(needed(pipe.residence.workload(2, 8, 8), at_once=False) / 0.95))
    with pytest.warns(MemoryWarning, match="if it fails or is slow"):
        make(pipe)
    free(2 * needed(pipe.residence.workload(2, 8, 8), at_once=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemoryWarning)
        make(pipe)


def test_what_would_have_to_swap_warns(free, monkeypatch: pytest.MonkeyPatch):
    free(1)
    monkeypatch.setattr(residence, "free_swap", lambda device: 10**12)
    with pytest.warns(MemoryWarning, match="slow"):
        make(load())


def test_memory_that_the_model_has_already_counts_as_its_own(free):
    pipe = load()
    make(pipe, output="images")
    free(needed(pipe.residence.workload(2, 8, 8), at_once=False) - pipe.residence.workload(2, 8, 8).weights.unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemoryWarning)
        make(pipe)


def test_merged_weights_survive_a_shortage(free):
    pipe = load()
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.5)
    first = make(pipe)
    pipe.residence.keep = False
    make(pipe, output="images")
    assert "unet" in ready(pipe) and torch.equal(make(pipe), first)


def test_moving_to_another_precision_reads_the_file_again():
    pipe = load(precision="bf16")
    make(pipe)
    pipe.to("cpu", "fp32")
    assert torch.equal(make(pipe), make(load()))

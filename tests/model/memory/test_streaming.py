from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from latentdiff import Pipeline
from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.spec import LoRASpec
from latentdiff.errors import UsageError
from latentdiff.model.memory.streaming import StreamedPart, block_bytes
from latentdiff.networks.device import PrecisionWarning
from latentdiff.networks.layers import ResnetBlock, SpatialTransformer
from tests import peers


def load(**options) -> Pipeline:
    return Pipeline.load(peers.folder("sd1"), device="cpu", **options)


def make(pipe: Pipeline, **options) -> Tensor:
    return pipe("a red cat", steps=3, seed=1, progress=False, **{"output": "latents", **options})


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return make(load(precision="fp32"))


@pytest.fixture
def streamed() -> Pipeline:
    return load(precision="fp32", low_memory=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_are_bit_equal(precision: str):
    usual, low = load(precision=precision), load(precision=precision, low_memory=True)
    (expected,), (found,) = make(usual, output="images"), make(low, output="images")
    assert found.tobytes() == expected.tobytes()
    assert make(low, output="images")[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "options", [{"guidance_scale": 1.0}, {"cache_interval": 2}, {"sampler": "dpmpp-2m", "num_images": 2}], ids=str
)
def test_other_ways_through_the_network_are_bit_equal(streamed: Pipeline, options: dict):
    assert torch.equal(make(streamed, **options), make(load(precision="fp32"), **options))


def test_only_two_blocks_have_their_weights(streamed: Pipeline):
    blocks = [module for module in streamed.unet.modules() if isinstance(module, ResnetBlock | SpatialTransformer)]
    most = []

    def count(*_: object) -> None:
        most.append(sum(not block.norm1.weight.is_meta for block in blocks if isinstance(block, ResnetBlock)))

    for block in blocks:
        next(block.children()).register_forward_hook(count)
    make(streamed)
    assert max(most) == 1 and min(most) == 0  # the next block's weights wait outside
    assert all(parameter.is_meta for parameter in blocks[0].parameters())


def test_block_bytes_is_what_stays_and_the_largest_blocks():
    unet = load(precision="fp32").unet
    total = sum(4 * parameter.numel() for parameter in unet.parameters())
    largest = max(sum(4 * p.numel() for p in m.parameters()) for m in unet.modules() if isinstance(m, ResnetBlock))
    assert 3 * largest <= block_bytes(unet) < total / 2


def test_a_lora_acts_as_on_the_whole_model(streamed: Pipeline):
    results = []
    for pipe in (streamed, load(precision="fp32")):
        lora = LoRA.create(pipe.unet, pipe.text_encoder, LoRASpec(rank=2), seed=0)
        for layer in lora.layers.values():
            nn.init.normal_(layer.lora_up.weight, generator=torch.Generator().manual_seed(1))
        with lora.attached():
            results.append(make(pipe))
    assert torch.equal(*results)


def test_overflow_is_computed_again_in_float32(latents: Tensor):
    pipe = load(precision="fp16", low_memory=True)
    failed = []

    def overflow(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        failed.append(output.dtype)
        return output * float("nan") if output.dtype is torch.float16 else output

    pipe.unet.conv_out.register_forward_hook(overflow)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)
        found = make(pipe)
    assert failed == [torch.float16, torch.float32] * 3
    assert (found - latents).abs().max() < 0.05 * latents.abs().max()


def test_a_failing_step_leaves_no_weights_behind(streamed: Pipeline):
    block = streamed.unet.mid_block.attentions[0]
    handle = block.transformer_blocks[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(streamed)
    handle.remove()
    assert all(parameter.is_meta for parameter in block.transformer_blocks[0].ff.parameters())
    assert torch.equal(make(streamed), make(load(precision="fp32")))


def test_what_needs_all_weights_is_refused(streamed: Pipeline, tmp_path):
    with pytest.raises(UsageError, match="low_memory"):
        streamed.save(tmp_path / "model")
    lora = LoRA.create(streamed.unet, None, LoRASpec(rank=2))
    with pytest.raises(UsageError, match="low_memory"):
        lora.merge()


def test_large_images_are_decoded_in_tiles(streamed: Pipeline):
    calls = []
    streamed.decoder = lambda latents, *, tile=None: calls.append(tile) or streamed.vae.decode(latents, tile=tile)
    make(streamed, output="images")
    make(streamed, output="images", width=96)
    assert calls == [None, 64]


def test_the_pipeline_streams_only_when_asked(streamed: Pipeline):
    assert isinstance(streamed.residence.parts["unet"], StreamedPart)
    assert not isinstance(load().residence.parts["unet"], StreamedPart)

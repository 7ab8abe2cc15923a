"""Plug-and-play features on a small U-Net with random weights, in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.denoise import denoise
from latentdiff.diffusion.guidance import UNGUIDED, Guidance, blended_denoiser, guided_denoiser
from latentdiff.diffusion.parameterization import parameterization
from latentdiff.diffusion.samplers import ddim
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import UsageError
from latentdiff.networks import layers
from latentdiff.networks.attention import attention
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.taps import Tap
from latentdiff.networks.unet import UNet
from latentdiff.tasks.features import PnPSpec, default_spec, replay, with_source_features
from tests.analytic import sample
from tests.tiny import randomize

CONFIG = UNetConfig(
    in_channels=4, out_channels=4, sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=1,
    attention_levels=(True, True, True), num_heads=(2, 2, 2), cross_attention_dim=12, norm_num_groups=4,
)  # fmt: skip
STEPS = 5
READ = parameterization("v_prediction")
SCHEDULE = Schedule(ScheduleConfig(beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"))
LEVELS = SCHEDULE.levels(STEPS, "trailing")
GUIDANCE = Guidance(scale=4.0)
ALL = PnPSpec(("up_blocks.1.resnets.0",), ("up_blocks.1.attentions.0", "up_blocks.2.attentions.1"), 1.0, 1.0)


@pytest.fixture(scope="module")
def unet() -> UNet:
    return randomize(UNet(CONFIG), 0).double()


def noise(seed: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def text(seed: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 5, 12, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


EMPTY = text(0)


@torch.no_grad()
def trajectory(unet, source_text, start) -> list[torch.Tensor]:
    """The reconstruction trajectory: what unguided sampling goes through."""
    denoiser = guided_denoiser(unet, READ, source_text)
    return [start, *(done.x for done in denoise(denoiser, start, LEVELS, ddim.step))]


@torch.no_grad()
def translated(unet, spec, source_text, target_text, latents, guidance=GUIDANCE, source_of=(0,), model=None):
    inside = with_source_features(unet, model or unet, spec, LEVELS, latents, source_text, source_of)
    negative = EMPTY.expand_as(target_text)
    x = latents[0][list(source_of)].expand(len(target_text), -1, -1, -1)
    return sample(guided_denoiser(inside, READ, target_text, negative, guidance), x, LEVELS, ddim.step)


@torch.no_grad()
def plain(unet, target_text, x, guidance=GUIDANCE):
    return sample(
        guided_denoiser(unet, READ, target_text, EMPTY.expand_as(target_text), guidance), x, LEVELS, ddim.step
    )


@pytest.fixture(scope="module")
def source(unet) -> list[torch.Tensor]:
    return trajectory(unet, text(1), noise(1))


# --- P1, P2: where injection does nothing ---------------------------------------------------------


def test_without_thresholds_it_is_plain_guided_sampling_to_the_bit(unet, source):
    spec = replace(ALL, tau_f=0.0, tau_attn=0.0)
    assert translated(unet, spec, text(1), text(2), source).equal(plain(unet, text(2), source[0]))


def test_on_the_source_s_own_way_injection_changes_nothing(unet, source):
    out = translated(unet, ALL, text(1), text(1), source, UNGUIDED)
    torch.testing.assert_close(out, source[-1], rtol=0, atol=1e-5)


# --- P3: how much of the source comes through -----------------------------------------------------


def prediction_error(unet, names, x, target) -> float:
    """‖eps - eps_source‖ with these modules' outputs taken from the source, at the same latents."""
    both = torch.cat([text(1), target])
    with torch.no_grad(), Tap(unet, names, output=lambda name, arguments, out: out[:1].repeat(2, 1, 1, 1)[: len(out)]):
        own, other = unet(torch.cat([x, x]), LEVELS[1].t, both)
    return (own - other).norm().item()


def test_more_injection_brings_more_of_the_source_and_the_last_block_all_of_it(unet, source):
    x, target = source[1], text(2)
    convolutions = [f"up_blocks.{up}.resnets.{block}.conv2" for up in range(3) for block in range(2)]
    none, some = (prediction_error(unet, names, x, target) for names in ([], convolutions))
    assert 0 < some < none
    assert prediction_error(unet, ["up_blocks.2"], x, target) == 0.0


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_replay_gives_the_source_back_whatever_was_asked_for(unet, source, scale):
    own = guided_denoiser(unet, READ, text(1, 1).expand(2, -1, -1))
    with torch.no_grad():
        out = sample(replay(own, LEVELS, source), noise(9, 2), LEVELS, ddim.step)
    torch.testing.assert_close(out, source[-1].expand_as(out), rtol=0, atol=1e-12)


# --- P4: attention --------------------------------------------------------------------------------


def attention_maps(unet, spec, source, monkeypatch):
    """(rows, heads, L, L) of the self-attentions of the last level, per step, of source, negative and positive."""
    maps = []

    def recording(q, k, v):
        if len(q) == 3 and q.shape[2] == k.shape[2] == 64:
            maps.append((q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1))
        return attention(q, k, v)

    monkeypatch.setattr(layers, "attention", recording)
    translated(unet, spec, text(1), text(2), source)
    return maps


def test_targets_have_the_source_s_attention_where_it_is_taken_and_only_there(unet, source, monkeypatch):
    spec = PnPSpec((), ("up_blocks.2.attentions.0", "up_blocks.1.attentions.0"), 0.0, 0.6)
    maps = attention_maps(unet, spec, source, monkeypatch)
    per_step = 3  # one block on the way down and two on the way up see 64 tokens
    assert len(maps) == 3 * per_step  # the source is left out where nothing is taken
    for step in range(3):
        _, taken, left = maps[per_step * step : per_step * (step + 1)]
        torch.testing.assert_close(taken[1:], taken[:1].expand(2, -1, -1, -1), rtol=0, atol=1e-6)
        assert (left[1:] - left[:1]).abs().max() > 1e-4


def test_attention_to_equal_values_hides_what_is_injected(unet, source):
    name = "up_blocks.2.attentions.1.transformer_blocks.0.attn1.to_v"
    with Tap(unet, [name], output=lambda _, arguments, out: out.mean(1, keepdim=True).expand_as(out)):
        spec = PnPSpec((), ("up_blocks.2.attentions.1",), 0.0, 1.0)
        out = translated(unet, spec, text(1), text(2), source)
        expected = plain(unet, text(2), source[0])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


# --- P5 … P8 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_the_thresholds_count_steps(unet, source, tau):
    rows = []

    def counting(x, t, context):
        rows.append(len(x))
        return unet(x, t, context)

    translated(unet, replace(ALL, tau_f=tau, tau_attn=0.0), text(1), text(2), source, model=counting)
    assert rows == [3] * round(tau * STEPS) + [2] * (STEPS - round(tau * STEPS))


@torch.no_grad()
def store_and_load(unet, spec, source, target):
    """The other way to do it: run the source first, keep what is to be taken, put it into a run of the target alone."""
    x = source[0]
    for index, (level, next_level) in enumerate(pairwise(LEVELS)):
        names, kept = spec.taps(unet, index, STEPS), {}
        with Tap(unet, names, output=lambda name, arguments, out, kept=kept: kept.update({name: out})):
            unet(source[index], level.t, text(1))
        denoiser = guided_denoiser(unet, READ, target, EMPTY, GUIDANCE)
        with Tap(unet, names, output=lambda name, arguments, out, kept=kept: kept[name].expand_as(out)):
            x, _ = ddim.step(denoiser, x, level, next_level, None, None)
    return x


def test_the_fused_batch_equals_storing_and_loading(unet, source):
    spec = replace(ALL, tau_f=0.8, tau_attn=0.4)
    expected = store_and_load(unet, spec, source, text(2))
    torch.testing.assert_close(translated(unet, spec, text(1), text(2), source), expected, rtol=0, atol=1e-5)


def test_nothing_is_left_in_the_network_not_even_after_an_exception(unet, source):
    before = plain(unet, text(2), source[0])
    translated(unet, ALL, text(1), text(2), source)
    assert plain(unet, text(2), source[0]).equal(before)

    def failing(x, t, context):
        unet(x, t, context)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        translated(unet, ALL, text(1), text(2), source, model=failing)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    assert plain(unet, text(2), source[0]).equal(before)


def test_every_target_takes_from_its_own_source(unet, source):
    other = trajectory(unet, text(4), noise(4))
    joined = [torch.cat(pair) for pair in zip(source, other, strict=True)]
    targets = torch.cat([text(2), text(3), text(2)])
    out = translated(unet, ALL, torch.cat([text(1), text(4)]), targets, joined, source_of=(0, 1, 1))
    alone = [
        translated(unet, ALL, text(1), text(2), source),
        translated(unet, ALL, text(4), text(3), other),
        translated(unet, ALL, text(4), text(2), other),
    ]
    torch.testing.assert_close(out, torch.cat(alone), rtol=0, atol=1e-9)


# --- The blocks -----------------------------------------------------------------------------------


def test_the_default_blocks_are_the_paper_s_on_stable_diffusion():
    spec = default_spec(UNetConfig())
    assert spec.feature_blocks == ("up_blocks.1.resnets.1",)
    assert spec.attn_blocks == tuple(
        f"up_blocks.{up}.attentions.{block}" for up in (1, 2, 3) for block in range(3) if (up, block) >= (1, 1)
    )
    assert (spec.tau_f, spec.tau_attn) == (0.8, 0.5)


@pytest.mark.parametrize(
    ("levels", "attention_levels", "features", "attentions"),
    [
        (3, (False, True, True), "up_blocks.1.resnets.1", ("up_blocks.1.attentions.1",)),
        (2, (True, False), "up_blocks.0.resnets.1", ("up_blocks.1.attentions.0", "up_blocks.1.attentions.1")),
        (1, (False,), "up_blocks.0.resnets.1", ()),
    ],
)
def test_smaller_networks_have_default_blocks_that_exist(levels, attention_levels, features, attentions):
    config = replace(
        CONFIG,
        block_out_channels=(8,) * levels,
        num_heads=(2,) * levels,
        attention_levels=attention_levels,
        transformer_depth=(1,),
        only_cross_attention=(False,),
    )
    spec = default_spec(config)
    assert (spec.feature_blocks, spec.attn_blocks) == ((features,), attentions)
    assert len(spec.taps(UNet(config), 0, 10)) == 1 + 2 * len(attentions)


def test_wrong_blocks_and_shares_are_refused(unet, source):
    for name, message in [
        ("up_blocks.7.resnets.0", "name of a module"),
        ("up_blocks.1", "expected up_blocks.1 to be a ResnetBlock"),
    ]:
        spec = PnPSpec((name,), (), 0.0, 0.0)  # wrong also if no step uses it
        with pytest.raises(UsageError, match=message):
            with_source_features(unet, unet, spec, LEVELS, source, text(1))
    with pytest.raises(UsageError, match="tau_f in 0 to 1"):
        PnPSpec((), (), 1.1, 0.5)


# --- Negative prompting ---------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "avoided"), [(1.0, EMPTY), (0.0, text(7))])
def test_a_blend_of_all_or_nothing_is_plain_guidance(unet, share, avoided):
    denoiser = blended_denoiser(unet, READ, text(2), EMPTY, text(7), GUIDANCE, lambda level: share)
    with torch.no_grad():
        expected = guided_denoiser(unet, READ, text(2), avoided, GUIDANCE)(noise(3), LEVELS[0])
        found = denoiser(noise(3), LEVELS[0])
    torch.testing.assert_close(found.raw, expected.raw, rtol=0, atol=1e-9)


def test_a_blend_is_the_paper_s_formula_at_the_share_of_its_level(unet):
    x, level = noise(3), LEVELS[2]
    share = {level: 0.3}.__getitem__
    with torch.no_grad():
        empty, negative, positive = (unet(x, level.t, c) for c in (EMPTY, text(7), text(2)))
        found = blended_denoiser(unet, READ, text(2), EMPTY, text(7), GUIDANCE, share)(x, level)
        mixed = 0.3 * empty + 0.7 * negative
    torch.testing.assert_close(found.raw, mixed + 4.0 * (positive - mixed), rtol=0, atol=1e-9)

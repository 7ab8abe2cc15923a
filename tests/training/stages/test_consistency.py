"""The loss on distributions of one point each, whose denoisers, walks and jumps are known exactly."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import ConfigError
from latentdiff.training.stages.consistency import ConsistencyLoss

SCALE = 3.0  # of guidance
EMPTY, CAPTION = 1.0, 2.0  # the points
GUIDED = EMPTY + SCALE * (CAPTION - EMPTY)


class Points:
    """A U-Net that knows: everything is at the point that the text names, or that a LoRA knows better."""

    def __init__(self, config, student):
        self.alphas_cumprod = Schedule(config).alphas_cumprod
        self.kind, self.student, self.is_adapted = config.prediction_type, student, False
        self.conv_in = SimpleNamespace(weight=torch.zeros(1))
        self.layers = {}

    def __call__(self, x, timesteps, context):
        alpha, sigma = (value.float().view(-1, 1, 1, 1) for value in self.levels(timesteps))
        x0 = torch.full_like(x, self.student) if self.is_adapted else context[:, :1, :1, None].expand_as(x)
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[self.kind]

    def levels(self, timesteps):
        signal = self.alphas_cumprod[timesteps]
        return signal.sqrt(), (1 - signal).sqrt()

    @contextmanager
    def attached(self):
        self.is_adapted = True
        yield
        self.is_adapted = False


class Texts:
    """Embeddings that are the token ids; 0 is the empty caption."""

    def __call__(self, tokens):
        return torch.tensor([EMPTY, CAPTION])[tokens][..., None]


def loss_of(student, segments, kind="v_prediction", teacher_steps=20, span=1):
    config = ScheduleConfig(prediction_type=kind, set_alpha_to_one=True)
    points = Points(config, student)
    module = ConsistencyLoss(
        points, Texts(), points, Schedule(config), torch.zeros(2, dtype=torch.long),
        guidance_scale=SCALE, teacher_steps=teacher_steps, segments=segments, teacher_span=span, huber_c=0.03,
    )  # fmt: skip
    return module, points


def batch(timesteps):
    generator = torch.Generator().manual_seed(0)
    count = len(timesteps)
    return {
        "latents": torch.randn(count, 1, 2, 2, generator=generator),
        "noise": torch.randn(count, 1, 2, 2, generator=generator),
        "timesteps": torch.tensor(timesteps),
        "weights": torch.ones(count),
        "tokens": torch.ones(count, 1, 2, dtype=torch.long),
    }


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("segments", "span"), [(1, 1), (4, 1), (4, 2), (4, 5), (20, 3)])
def test_who_knows_what_guidance_leads_to_is_consistent(segments, span, kind):
    """DDIM is exact on the way to a point, so that every jump of such a student ends on its teacher's path."""
    module, _ = loss_of(GUIDED, segments, kind, span=span)
    found = module(batch([0, 49, 50, 249, 250, 501, 998, 999]), 0)
    assert found["mse"].item() < 1e-8 and found["loss"].item() < 1e-5


@pytest.mark.parametrize("segments", [1, 5])
def test_walks_of_both_end_at_the_guided_point(segments):
    module, _ = loss_of(GUIDED, segments)
    noise = torch.randn(3, 1, 2, 2)
    for student in (False, True):
        end = module.walk(noise, torch.ones(3, 1, 2, dtype=torch.long), student=student)
        torch.testing.assert_close(end, torch.full_like(end, GUIDED), rtol=0, atol=1e-4)


def test_one_segment_learns_from_the_clean_end():
    """A student that is consistent with itself alone, at the unguided point, errs where its teacher reaches the end."""
    module, _ = loss_of(CAPTION, 1)
    assert module(batch([50, 400, 999]), 0)["mse"].item() < 1e-8  # all later than the first step of 50 timesteps
    at_the_end = module(batch([0, 49]), 0)
    assert at_the_end["mse"].item() == pytest.approx((GUIDED - CAPTION) ** 2, rel=1e-4)
    assert at_the_end["loss"].item() == pytest.approx(((GUIDED - CAPTION) ** 2 + 0.03**2) ** 0.5 - 0.03, rel=1e-4)


@pytest.mark.parametrize(("span", "near"), [(1, 599), (2, 549), (3, 499), (5, 499)])
def test_several_segments_learn_from_every_step(span, near):
    """The difference by hand, of an unguided student in the middle of a segment of 5 steps of 50 timesteps."""
    module, points = loss_of(CAPTION, 4, span=span)
    one = batch([640])  # between 599 and 649, in the segment that begins at 749 and ends at 499
    (a, s), (a_near, s_near), (a_end, s_end) = (
        [value.item() for value in points.levels(torch.tensor(t))] for t in (649, near, 499)
    )
    x = a * one["latents"].double() + s * one["noise"].double()
    nearer = a_near * GUIDED + s_near * (x - a * GUIDED) / s
    made = a_end * CAPTION + s_end * (x - a * CAPTION) / s
    target = a_end * CAPTION + s_end * (nearer - a_near * CAPTION) / s_near
    assert module(one, 0)["mse"].item() == pytest.approx((made - target).square().mean().item(), rel=1e-3)


def test_weights_of_images_count():
    module, _ = loss_of(CAPTION, 1)
    one = batch([0, 0])
    one["weights"] = torch.tensor([0.0, 3.0])
    assert module(one, 0)["loss"].item() == pytest.approx(1.5 * module(batch([0, 0]), 0)["loss"].item())


@pytest.mark.parametrize(("teacher_steps", "segments"), [(30, 5), (40, 6)])
def test_steps_that_do_not_divide_are_refused(teacher_steps, segments):
    with pytest.raises(
        ConfigError, match="teacher_steps must divide the 1000 timesteps, and segments the teacher_steps"
    ):
        loss_of(GUIDED, segments, teacher_steps=teacher_steps)

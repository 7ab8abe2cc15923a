"""The protocol with made-up judges and models."""

from __future__ import annotations

import pytest
from PIL import Image

from latentdiff.errors import DataError, UsageError
from latentdiff.evaluation.judge import Seen, Verdict
from latentdiff.evaluation.network import JudgeConfig
from latentdiff.evaluation.prompts import EvaluationPrompt, Requirement
from latentdiff.evaluation.protocol import Outcome, Result, score_prompts
from latentdiff.evaluation.references import shuffled
from latentdiff.image import psnr

NOUNS = ("cat", "dog", "key")
CAT, DOG = (
    EvaluationPrompt("single_object", f"a {noun}", (Requirement(noun),), (), "red", n)
    for n, noun in enumerate(NOUNS[:2])
)
KEYS = EvaluationPrompt("counting", "two keys", (Requirement("key", 2),), (("key", 3),), "blue", 7)


class PixelJudge:
    """Reads the answer from the first pixel: as many of the noun as the pixel says."""

    config = JudgeConfig(NOUNS, ("red",), ("red", "blue"))

    def __call__(self, images):
        verdicts = []
        for image in images:
            noun, count, background = image.getpixel((0, 0))
            thing = Seen(NOUNS[noun], None, (0, 0, 1, 1), 1.0)
            verdicts.append(Verdict((thing,) * count, self.config.backgrounds[background]))
        return verdicts


class Model:
    """Draws what `answer` says for a prompt and a seed, and remembers how it was called."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, prompt, *, seed, **options):
        self.calls.append((list(prompt), list(seed), options))
        return [Image.new("RGB", (8, 8), self.answer(*pair)) for pair in zip(prompt, seed, strict=True)]


def right(prompt, seed):
    return {"a cat": (0, 1, 0), "a dog": (1, 1, 0), "two keys": (2, 2, 1)}[prompt]


def test_a_perfect_model():
    result = score_prompts(Model(right), [CAT, DOG, KEYS], judge=PixelJudge(), progress=False)
    assert {task: (score.value, score.images) for task, score in result.tasks.items()} == {
        "single_object": (1.0, 8),
        "counting": (1.0, 4),
    }
    assert (result.mean.value, result.mean.low, result.mean.high) == (1.0, 1.0, 1.0)
    assert result.background.value == 1.0


def test_scores_by_hand():
    def answer(prompt, seed):
        wrong = {"a cat": seed % 2 == 0, "a dog": True, "two keys": False}[prompt]  # half, none and all right
        return (2, 3, 1) if wrong else right(prompt, seed)

    result = score_prompts(Model(answer), [CAT, DOG, KEYS], judge=PixelJudge(), progress=False)
    assert result.tasks["single_object"].value == pytest.approx(2 / 8)
    assert result.tasks["counting"].value == 1.0
    assert result.mean.value == pytest.approx((2 / 8 + 1) / 2)  # of tasks, not of images
    assert result.mean.low < result.mean.value < result.mean.high
    assert result.background.value == pytest.approx(6 / 12)
    assert [one.reasons for one in result.outcomes if one.prompt == "a dog"] == [("expected 1 dog, saw 0",)] * 4


@pytest.mark.parametrize("batch_size", [1, 4, 9, 100])
def test_batches_do_not_change_seeds(batch_size):
    model = Model(right)
    score_prompts(
        model, [CAT, DOG, KEYS], judge=PixelJudge(), seeds_per_prompt=3, batch_size=batch_size, progress=False
    )
    asked = [pair for prompts, seeds, _ in model.calls for pair in zip(prompts, seeds, strict=True)]
    assert asked == [(prompt.text, 1000 * prompt.number + seed) for prompt in (CAT, DOG, KEYS) for seed in range(3)]


def test_settings_reach_the_model():
    model = Model(right)
    score_prompts(model, [CAT], judge=PixelJudge(), steps=7, guidance_scale=3.0, sampler="euler", progress=False)
    (_, _, options), expected = model.calls[0], {"steps": 7, "guidance_scale": 3.0, "sampler": "euler"}
    assert expected.items() <= options.items()


def test_images_are_handed_out_with_their_prompt():
    kept = []
    score_prompts(
        Model(right),
        [CAT, DOG],
        judge=PixelJudge(),
        seeds_per_prompt=2,
        progress=False,
        on_images=lambda prompt, images: kept.append((prompt, [image.getpixel((0, 0)) for image in images])),
    )
    assert kept == [(CAT, [(0, 1, 0)] * 2), (DOG, [(1, 1, 0)] * 2)]


def test_a_judge_that_does_not_know_a_word():
    with pytest.raises(DataError, match="the judge does not know 'yak'"):
        score_prompts(Model(right), [EvaluationPrompt("colors", "a yak", (Requirement("yak"),))], judge=PixelJudge())
    with pytest.raises(DataError, match="found none"):
        score_prompts(Model(right), [], judge=PixelJudge())


@pytest.mark.parametrize("seeds", [0, 1001])
def test_seeds_out_of_range(seeds):
    with pytest.raises(UsageError, match=f"expected 1 to 1000 seeds per prompt, found {seeds}"):
        score_prompts(Model(right), [CAT], judge=PixelJudge(), seeds_per_prompt=seeds)


def test_only_tasks_that_occur_count():
    outcomes = [Outcome(0, "colors", "", (), True), Outcome(0, "colors", "", ("wrong",), False)]
    assert Result.of(outcomes).mean.value == 0.5
    assert list(Result.of(outcomes).tasks) == ["colors"]


def test_shuffling_stays_inside_a_task():
    assert shuffled([CAT, KEYS, DOG]) == [DOG, KEYS, CAT]


def test_psnr():
    black, gray = Image.new("RGB", (4, 4), 0), Image.new("RGB", (4, 4), (51, 51, 51))
    assert psnr(black, gray) == pytest.approx(20 * 0.69897, abs=1e-4)  # 255 / 51 = 5
    assert psnr(black, black) == 99.0

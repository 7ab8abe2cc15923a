"""`latentdiff evaluate` from end to end, with a tiny random model and with one that draws real scenes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from PIL import Image

from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.adapters.lora.spec import LoRASpec
from latentdiff.cli.evaluate import evaluate as command
from latentdiff.errors import DataError, LatentDiffError, UsageError
from latentdiff.evaluation import evaluate
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.prompts import TASKS, EvaluationPrompt, read_prompts
from latentdiff.evaluation.protocol import score_prompts
from latentdiff.evaluation.run import unknown_words
from latentdiff.prompts.words import Words
from latentdiff.recipe import read_recipe
from tests import peers
from tests.scenes import FEW, JUDGE, SIZE, make_scenes, scene_folder, scene_language

SCORE = {"value", "low", "high", "images"}


@pytest.fixture(scope="module")
def model():
    return str(peers.folder("sd1"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scene_folder(tmp_path_factory.mktemp("scenes"), 30, "--split", "test")


def check_scores(values):
    assert set(values) >= {"tasks", "mean", "background"}
    for score in [*values["tasks"].values(), values["mean"], values["background"]]:
        assert set(score) == SCORE
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1 and score["images"] > 0


def test_everything_is_written(model, scenes, tmp_path):
    out = tmp_path / "out"
    report = evaluate(model, out=out, limit=1, seeds=2, steps=1, scenes=scenes, device="cpu", progress=False)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results == json.loads(json.dumps(report.to_json()))
    check_scores(results)
    assert set(results["tasks"]) == set(TASKS)
    assert results["settings"] == {"seeds_per_prompt": 2, "steps": 1, "guidance_scale": 5.0, "sampler": "ddim"}
    assert len(results["images"]) == 12 and results["model_hash"]
    references = results["references"]
    for name in ("real_scenes", "reconstructions", "wrong_captions"):
        check_scores(references[name])
    assert references["real_scenes"]["mean"]["value"] >= 0.9 > 0.2 >= references["wrong_captions"]["mean"]["value"]
    assert 0 < references["psnr"] < 60

    table = str(report)
    assert all(label in table for label in [*TASKS.values(), "mean of tasks", "background", "real scenes"])
    assert "shares no weights with the model" in table


def test_images_lie_in_the_layout_of_geneval(model, tmp_path):
    evaluate(model, out=tmp_path, limit=1, seeds=2, steps=1, device="cpu", progress=False)
    for prompt in read_prompts(limit=1):
        folder = tmp_path / f"{prompt.number:05d}"
        (line,) = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        assert EvaluationPrompt.from_json(json.loads(line), prompt.number) == prompt
        assert sorted(path.name for path in (folder / "samples").iterdir()) == ["0000.png", "0001.png"]
        with Image.open(folder / "samples" / "0001.png") as image:
            recipe = read_recipe(image.info)
        assert (recipe.prompt, recipe.seed, recipe.steps) == (prompt.text, 1000 * prompt.number + 1, 1)


def test_the_command_says_how_to_make_scenes(model, tmp_path):
    options = [
        "--model",
        model,
        "--out",
        str(tmp_path),
        "--limit",
        "1",
        "--seeds",
        "1",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(command, options, catch_exceptions=False)
    assert result.exit_code == 0
    assert re.search(r"mean of tasks +0\.\d{3} \[0\.\d{3}, \d\.\d{3}\]", result.output)
    assert "tools/make_scenes.py" in result.output and "real scenes" not in result.output
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["references"] == {} and "make_scenes.py" in results["notes"][0]


def test_loras_are_evaluated(model, tmp_path):
    pipe = peers.ours("sd1")
    save_lora(LoRA.create(pipe.unet, None, LoRASpec(rank=2)), tmp_path / "a.safetensors")
    loras = [(tmp_path / "a.safetensors", 0.5)]
    report = evaluate(model, out=tmp_path / "out", loras=loras, limit=1, seeds=1, steps=1, device="cpu", progress=False)
    assert report.to_json()["settings"]["loras"][0]["scale"] == 0.5
    with Image.open(tmp_path / "out/00000/samples/0000.png") as image:
        assert read_recipe(image.info).loras[0]["file"] == "a.safetensors"


def test_a_model_is_compared_with_another(model, tmp_path):
    ways = {"limit": 1, "seeds": 1, "steps": 1, "device": "cpu", "progress": False}
    compared = evaluate(model, out=tmp_path / "both", compare=model, **ways)
    assert compared.differences()["mean"].value == 0.0  # the same model, so the same images
    results = json.loads((tmp_path / "both/results.json").read_text(encoding="utf-8"))
    alone = json.loads((tmp_path / "both/compared/results.json").read_text(encoding="utf-8"))
    assert results["images"] == alone["images"] and results["compared"]["model_hash"] == results["model_hash"]
    assert image_of(tmp_path / "both") == image_of(tmp_path / "both/compared")
    with pytest.raises(LatentDiffError, match="nowhere"):
        evaluate(model, out=tmp_path / "none", compare=str(tmp_path / "nowhere"), **ways)
    assert not (tmp_path / "none").exists()


def image_of(folder):
    with Image.open(folder / "00000/samples/0000.png") as image:
        return image.convert("RGB").tobytes()


def test_words_that_the_model_was_not_trained_on():
    def told(known):
        model = SimpleNamespace(words=known and Words({}, frozenset(known.split()), 8))
        prompts = [EvaluationPrompt("colors", text, ()) for text in ("a red kite", "a kite")]
        return list(unknown_words(model, prompts))

    assert told("a red kite") == [] and told(None) == []  # most models do not say what they know
    assert told("a red") == [
        "this model does not know 1 of the words that it is judged by (kite): its scores suffer by that"
    ]


def test_kinds_of_failures_are_reported(model, tmp_path):
    report = evaluate(model, out=tmp_path, limit=1, seeds=1, steps=1, device="cpu", progress=False)
    groups = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["failures"]
    assert sum(group["images"] for group in groups) == sum(not one.correct for one in report.result.outcomes) > 0
    assert all((tmp_path / group["example"]).is_file() for group in groups)
    assert (tmp_path / "failures.png").is_file() and "not clear" in str(report)


def test_wrong_use_is_found_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="expected a folder for --out"):
        evaluate("no such model", out=tmp_path / "file")
    with pytest.raises(DataError, match="expected scenes in .* make them with tools/make_scenes.py"):
        evaluate("no such model", out=tmp_path / "out", scenes=tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a cat"}\n')
    with pytest.raises(DataError, match="metadata.jsonl line 1: expected a scene"):
        evaluate("no such model", out=tmp_path / "out", scenes=tmp_path)


class Painter:
    """A model that draws real scenes of the prompts; `skew` makes it draw those of later prompts."""

    def __init__(self, prompts, skew=0):
        self.of_text = {prompt.text: prompts[(index + skew) % len(prompts)] for index, prompt in enumerate(prompts)}

    def __call__(self, texts, *, seed, **options):
        return [self.paint(self.of_text[text], seed) for text, seed in zip(texts, seed, strict=True)]

    @staticmethod
    def paint(prompt, seed):
        things = [scene_language.Thing(need.noun, need.colour) for need in prompt.include for _ in range(need.count)]
        relation = None
        if prompt.task == "position":
            things.reverse()
            relation = prompt.include[1].position[0]
        kind = make_scenes.TASKS[prompt.task]
        plan = scene_language.Plan(kind, prompt.background, tuple(things), relation)
        rng = Random(seed)
        while (drawn := make_scenes.compose(plan, rng, SIZE, FEW)) is None:
            pass
        return Image.fromarray(drawn[0])


@pytest.fixture(scope="module")
def few_prompts():
    return [
        EvaluationPrompt.from_json(line, number)
        for number, line in enumerate(make_scenes.evaluation_prompts(8, 0, FEW))
    ]


def test_a_model_that_draws_what_is_asked(few_prompts):
    prompts, judge = few_prompts, Judge.load(JUDGE)
    # The judge's own threshold is for generated images, and leaves out true things that it sees less surely, as blue stars.
    judge.config = replace(judge.config, threshold=0.5)
    result = score_prompts(Painter(prompts), prompts, judge=judge, seeds_per_prompt=2, progress=False)
    assert result.mean.value >= 0.97 and result.background.value >= 0.97


def test_a_model_that_draws_something_else(few_prompts):
    prompts = few_prompts
    result = score_prompts(
        Painter(prompts, skew=9), prompts, judge=Judge.load(JUDGE), seeds_per_prompt=2, progress=False
    )
    assert result.mean.value <= 0.05

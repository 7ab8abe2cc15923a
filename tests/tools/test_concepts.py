from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from latentdiff.evaluation.judge import Judge, Seen, Verdict
from latentdiff.evaluation.protocol import Outcome, Result
from tests.scenes import FEW, JUDGE, SIZE, glyphs, scene_language

import concept_judge  # noqa: E402, isort: skip
import make_concept  # noqa: E402, isort: skip
import score_concept  # noqa: E402, isort: skip


@pytest.fixture(autouse=True)
def strange_things_of_the_few(monkeypatch):
    monkeypatch.setattr(concept_judge, "STRANGE", ("🏺",))
    monkeypatch.setattr(concept_judge, "STRANGE_TEST", ("🚪",))


@pytest.fixture(scope="module", params=["teapot", "sepia"])
def concept(request):
    return request.param


@pytest.fixture(scope="module")
def folder(concept, tmp_path_factory):
    folder = tmp_path_factory.mktemp(concept)
    make_concept.write_concept(concept, folder, 0, FEW)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_concept_is_24_captioned_images_and_what_was_held_out(concept, folder):
    train, test, prompts = (
        lines(folder / name) for name in ("train/metadata.jsonl", "test/metadata.jsonl", "prompts.jsonl")
    )
    asked = 30 if concept == "teapot" else len(make_concept.held_out_nouns(FEW.nouns))
    assert (len(train), len(test), len({line["prompt"] for line in prompts})) == (24, 200, asked)
    new = "sepia style" if concept == "sepia" else "teapot"
    assert all(line["concept"] == concept for line in prompts)
    assert all(new in line.get("text", line.get("prompt")) for line in [*train, *test, *prompts])
    for line in train:
        with Image.open(folder / "train" / line["file_name"]) as image:
            assert image.size == (SIZE, SIZE)


def test_nothing_held_out_is_trained_on(concept, folder):
    train, test = (lines(folder / name / "metadata.jsonl") for name in ("train", "test"))

    def about(entries):
        things = {thing["noun"] for line in entries for thing in line["scene"]["objects"]} - {concept}
        return things | ({line["scene"]["background"] for line in entries} if concept == "teapot" else set())

    assert about(train) and about(test) and not about(train) & about(test)


def test_another_test_seed_changes_only_what_was_held_out(concept, folder, tmp_path):
    make_concept.write_concept(concept, tmp_path, 0, FEW, test_seed=1)
    assert lines(tmp_path / "train/metadata.jsonl") == lines(folder / "train/metadata.jsonl")
    assert lines(tmp_path / "prompts.jsonl") != lines(folder / "prompts.jsonl")
    assert lines(tmp_path / "test/metadata.jsonl") != lines(folder / "test/metadata.jsonl")


def test_the_new_thing_is_in_no_random_plan():
    assert not set(scene_language.NEW_NOUNS) & set(scene_language.NOUNS)
    assert not set(concept_judge.STRANGE) & set(concept_judge.STRANGE_TEST)
    used = {*scene_language.NOUNS.values(), *scene_language.NEW_NOUNS.values()}
    assert not used & {*concept_judge.STRANGE, *concept_judge.STRANGE_TEST}


@pytest.mark.parametrize("name", make_concept.STYLES)
def test_a_style_has_its_paper_everywhere_and_its_shades_alone(name):
    style = make_concept.STYLES[name]
    plan = scene_language.Plan("single", "green", (scene_language.Thing("guitar"),))
    ((_, image, _),) = make_concept.drawn([plan], Random(0), FEW, style)
    colours = np.asarray(image, dtype=float)
    assert tuple(colours[0, 0]) == style.paper
    ends = np.array([style.paper, style.dark, style.light])
    assert (colours >= ends.min(0) - 1).all() and (colours <= ends.max(0) + 1).all()
    order = np.argsort(style.paper)  # red over green over blue, or the other way round
    assert (np.diff(colours[..., order], axis=-1) > 0).all()


def test_white_black_and_nothing_in_sepia():
    style = make_concept.STYLES["sepia"]
    white = glyphs.Sprite(
        np.float32([[[255] * 3, [0] * 3, [0] * 3]]), np.float32([[[0], [0], [1]]]), (0, 0, 3, 1), None
    )
    colour = style.toned(white).colour + white.keep * np.float32(style.paper)
    assert colour[0] == pytest.approx(np.array([style.light, style.dark, style.paper]), abs=0.1)


@pytest.fixture(scope="module")
def base():
    return Judge.load(JUDGE)


def test_the_extended_judge_begins_as_the_judge_it_was(base):
    network = concept_judge.extended(base).eval()
    nouns, backgrounds = len(base.config.nouns), len(base.config.backgrounds)
    images = torch.rand(2, 3, 96, 96) * 2 - 1
    with torch.no_grad():
        old, new = base.network(images), network(images)
    torch.testing.assert_close(new.noun[:, :nouns], old.noun[:, :nouns])
    added = len(scene_language.NEW_NOUNS)
    torch.testing.assert_close(new.noun[:, nouns + added :], old.noun[:, nouns:])  # "unknown"
    torch.testing.assert_close(new.background[:, :backgrounds], old.background)
    for name in ("centre", "colour", "box"):
        torch.testing.assert_close(getattr(new, name), getattr(old, name))
    assert network.config.nouns[nouns:] == tuple(scene_language.NEW_NOUNS)


@pytest.fixture
def scenes(base):
    config = concept_judge.extended(base).config
    compose = concept_judge.ConceptComposer(FEW, config, {"as it is": 1.0})
    return config, [compose(str(number)) for number in range(200)]


def test_scenes_of_the_judge_hold_all_that_is_new_and_what_is_strange(scenes):
    config, found = scenes
    names = (*config.nouns, "unknown")
    assert {*scene_language.NEW_NOUNS, "unknown"} < {names[noun] for scene in found for noun in scene.nouns}
    named = [config.backgrounds[scene.background] for scene in found]
    assert {*make_concept.STYLES} < {*named} and named.count("sepia") + named.count("blueprint") < 60


def test_paper_alone_is_not_the_style(scenes):
    config, found = scenes
    for name, style in make_concept.STYLES.items():
        on_paper = [scene for scene in found if tuple(scene.pixels[0, 0]) == style.paper]
        called = [config.backgrounds[scene.background] == name for scene in on_paper]
        assert any(called) and not all(called)


def test_training_the_judge_is_repeatable_and_is_kept(base, tmp_path):
    first = concept_judge.load_concept_judge(tmp_path / "a", base, FEW, steps=1)
    again = concept_judge.load_concept_judge(tmp_path / "b", base, FEW, steps=1)
    kept = concept_judge.load_concept_judge(tmp_path / "a", base, FEW)
    for name, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, kept.network.state_dict()[name])
        torch.testing.assert_close(tensor, again.network.state_dict()[name])


def test_the_rules_look_for_the_new():
    box = (0.0, 0.0, 1.0, 1.0)
    teapot, cat = Seen("teapot", None, box, 0.9), Seen("cat", None, box, 0.9)
    is_teapot, is_sepia = score_concept.shows("teapot"), score_concept.shows("sepia")
    assert is_teapot(Verdict((cat, teapot), "blue")) and not is_teapot(Verdict((cat,), "blue"))
    assert is_sepia(Verdict((), "sepia")) and not is_sepia(Verdict((cat,), "white"))


def outcomes(*right):
    return Result.of(
        [Outcome(number, "counting", "", () if yes else ("no",), True) for number, yes in enumerate(right)]
    )


def test_the_change_is_of_the_same_images_and_knows_how_sure_it_is():
    before, after = outcomes(*[True, False] * 20), outcomes(*[True] * 30, *[True, False] * 5)
    found = score_concept.change(before, after)
    assert found.value == pytest.approx(15 / 40) and found.images == 40
    alone = (15 / 40 * 25 / 40 / 40) ** 0.5  # standard error of a mean of 15 ones and 25 zeros
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * alone, rel=0.15)
    same = score_concept.change(before, before)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_the_change_may_be_of_some_tasks_alone():
    before = [Outcome(number, task, "", ("no",), True) for number, task in enumerate(("counting", "colors", "colors"))]
    after = [replace(one, reasons=()) if one.task == "colors" else one for one in before]
    found = [score_concept.change(Result.of(before), Result.of(after), tasks) for tasks in (["colors"], ["counting"])]
    assert [(score.value, score.images) for score in found] == [(1.0, 2), (0.0, 1)]


def test_the_command_asks_for_one_model(tmp_path):
    result = CliRunner().invoke(score_concept.main, [str(tmp_path)])
    assert result.exit_code == 2 and "--lora or --model" in result.output


class Painter:
    """A model that paints real images of what was held out, once it is fine-tuned, and plain ones before."""

    def __init__(self, images):
        self.images, self.learned = images, None

    def load_lora(self, path, scale=1.0):
        self.learned = (path, scale)

    def __call__(self, prompts, *, seed, **options):
        return [self.images[one % len(self.images)] if self.learned else Image.new("RGB", (96, 96)) for one in seed]

    def encode_images(self, images):
        return SimpleNamespace(mode=lambda: images)

    def decode(self, latents):
        return latents


class Seer:
    """A judge that sees the new wherever there is more than one colour."""

    def __call__(self, images):
        seen = (Seen("teapot", None, (0.0, 0.0, 1.0, 1.0), 0.9),)
        return [Verdict(seen if len(image.getcolors(10_000)) > 1 else (), "sepia") for image in images]


def test_the_command_scores_before_and_after(concept, folder, tmp_path, monkeypatch):
    if concept == "sepia":
        pytest.skip("a thing is enough")
    real = [Image.open(path).convert("RGB") for path in sorted((folder / "test").glob("*.png"))[:5]]
    painters = []

    def load(model):
        painters.append(Painter(real))
        return painters[-1]

    monkeypatch.setattr(score_concept.Pipeline, "load", load)
    monkeypatch.setattr(score_concept, "load_concept_judge", lambda *_: Seer())
    arguments = [
        str(folder),
        "--lora",
        "a.safetensors:0.5",
        "--seeds",
        "2",
        "--old-prompts",
        "0",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(score_concept.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and painters[1].learned == ("a.safetensors", 0.5) and painters[0].learned is None
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {name: one["value"] for name, one in scores.items()} == {
        "real held-out images": 1.0, "reconstructions by the VAE": 1.0, "seen in scenes of strange things": 1.0,
        "held-out prompts, before": 0.0, "held-out prompts, after": 1.0,
    }  # fmt: skip
    assert scores["held-out prompts, after"]["images"] == 60
    assert "held-out prompts, after" in result.output and (tmp_path / "after.png").is_file()

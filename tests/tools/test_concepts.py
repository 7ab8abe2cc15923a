from __future__ import annotations

import json
from itertools import islice
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from latentdiff.evaluation.judge import Judge, Seen, Verdict
from tests.scenes import FEW, JUDGE, SIZE, glyphs, scene_language

import concept_judge  # noqa: E402, isort: skip
import make_concept  # noqa: E402, isort: skip
import score_concept  # noqa: E402, isort: skip


@pytest.fixture(autouse=True)
def strange_things_of_the_few(monkeypatch):
    monkeypatch.setattr(concept_judge, "STRANGE", ("🏺",))
    monkeypatch.setattr(concept_judge, "STRANGE_TEST", ("🚪",))


@pytest.fixture(scope="module", params=["object", "style"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_concept.write_concept(request.param, folder, 0, FEW)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_concept_is_24_captioned_images_and_what_was_held_out(folder):
    train, test, prompts = (
        lines(folder / name) for name in ("train/metadata.jsonl", "test/metadata.jsonl", "prompts.jsonl")
    )
    asked = 30 if folder.name.startswith("object") else len(make_concept.held_out_nouns(FEW.nouns))
    assert (len(train), len(test), len({line["prompt"] for line in prompts})) == (24, 200, asked)
    new = "sepia style" if folder.name.startswith("style") else "teapot"
    assert all(new in line.get("text", line.get("prompt")) for line in [*train, *test, *prompts])
    for line in train:
        with Image.open(folder / "train" / line["file_name"]) as image:
            assert image.size == (SIZE, SIZE)


def test_nothing_held_out_is_trained_on(folder):
    train, test = (lines(folder / name / "metadata.jsonl") for name in ("train", "test"))

    def about(entries):
        things = {thing["noun"] for line in entries for thing in line["scene"]["objects"]} - {make_concept.OBJECT}
        return things | (
            {line["scene"]["background"] for line in entries} if folder.name.startswith("object") else set()
        )

    assert about(train) and about(test) and not about(train) & about(test)


def test_another_test_seed_changes_only_what_was_held_out(folder, tmp_path):
    kind = folder.name.rstrip("0123456789")
    make_concept.write_concept(kind, tmp_path, 0, FEW, test_seed=1)
    assert lines(tmp_path / "train/metadata.jsonl") == lines(folder / "train/metadata.jsonl")
    assert lines(tmp_path / "prompts.jsonl") != lines(folder / "prompts.jsonl")
    assert lines(tmp_path / "test/metadata.jsonl") != lines(folder / "test/metadata.jsonl")


def test_the_new_thing_is_in_no_random_plan():
    assert not set(scene_language.NEW_NOUNS) & set(scene_language.NOUNS)
    assert not set(concept_judge.STRANGE) & set(concept_judge.STRANGE_TEST)
    used = {*scene_language.NOUNS.values(), *scene_language.NEW_NOUNS.values()}
    assert not used & {*concept_judge.STRANGE, *concept_judge.STRANGE_TEST}


def test_sepia_has_one_hue_and_its_paper_everywhere():
    plan = scene_language.Plan("single", "blue", (scene_language.Thing("guitar"),))
    ((_, image, _),) = make_concept.drawn([plan], Random(0), FEW, sepia=True)
    sepia = np.asarray(image, dtype=int)
    assert tuple(sepia[0, 0]) == make_concept.PAPER
    assert (np.diff(sepia, axis=-1) < 0).all()  # red over green over blue


def test_white_black_and_nothing_in_sepia():
    white = glyphs.Sprite(
        np.float32([[[255] * 3, [0] * 3, [0] * 3]]), np.float32([[[0], [0], [1]]]), (0, 0, 3, 1), None
    )
    colour = make_concept.in_sepia(white).colour + white.keep * np.float32(make_concept.PAPER)
    assert colour[0] == pytest.approx(np.array([make_concept.LIGHT, make_concept.INK, make_concept.PAPER]), abs=0.1)


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
    torch.testing.assert_close(new.noun[:, nouns + 2 :], old.noun[:, nouns:])  # "unknown"
    torch.testing.assert_close(new.background[:, :backgrounds], old.background)
    for name in ("centre", "colour", "box"):
        torch.testing.assert_close(getattr(new, name), getattr(old, name))
    assert network.config.nouns[nouns:] == ("teapot", "something else")


def test_scenes_of_the_judge_are_named_rightly(base):
    config = concept_judge.extended(base).config
    scenes = list(islice(concept_judge.endless_scenes(config, Random(1), FEW), 200))
    named = {config.nouns[noun] for scene in scenes for noun in scene.nouns}
    assert {"teapot", "something else"} < named
    sepia = [scene for scene in scenes if config.backgrounds[scene.background] == "sepia"]
    assert 20 < len(sepia) < 80
    assert all(tuple(scene.pixels[0, 0]) == make_concept.PAPER for scene in sepia)
    tinted = [
        scene for scene in scenes if config.backgrounds[scene.background] == "white" and scene.pixels[0, 0, 2] < 200
    ]
    assert tinted  # tan paper alone is not the style


def test_a_jumbled_thing_keeps_its_colours_and_is_no_longer_the_thing(base):
    config = concept_judge.extended(base).config
    plan = scene_language.Plan("single", "blue", (scene_language.Thing("teapot", size="big"),))
    (scene,) = concept_judge._scenes([plan], config, Random(0), FEW)
    jumbled = concept_judge._jumbled(scene, config, Random(0))
    assert [config.nouns[noun] for noun in jumbled.nouns] == ["something else"]
    left, top, right, bottom = scene.boxes[0].astype(int)
    before, after = (np.sort(one.pixels.reshape(-1, 3).sum(1)) for one in (scene, jumbled))
    assert np.abs(before.astype(int) - after).mean() < 5
    assert (scene.pixels != jumbled.pixels)[top:bottom, left:right].any(-1).mean() > 0.5


def test_training_the_judge_is_repeatable_and_is_kept(base, tmp_path):
    first = concept_judge.load_concept_judge(tmp_path / "a", base, FEW, steps=1, scenes=8)
    again = concept_judge.load_concept_judge(tmp_path / "b", base, FEW, steps=1, scenes=8)
    kept = concept_judge.load_concept_judge(tmp_path / "a", base, FEW)
    for name, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, kept.network.state_dict()[name])
        torch.testing.assert_close(tensor, again.network.state_dict()[name])


def test_the_rules_look_for_the_new():
    box = (0.0, 0.0, 1.0, 1.0)
    teapot, cat = Seen("teapot", None, box, 0.9), Seen("cat", None, box, 0.9)
    assert score_concept.has_object(Verdict((cat, teapot), "blue"))
    assert not score_concept.has_object(Verdict((cat,), "blue"))
    assert score_concept.has_style(Verdict((), "sepia")) and not score_concept.has_style(Verdict((cat,), "white"))


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
        seen = (Seen(make_concept.OBJECT, None, (0.0, 0.0, 1.0, 1.0), 0.9),)
        return [Verdict(seen if len(image.getcolors(10_000)) > 1 else (), "sepia") for image in images]


def test_the_command_scores_before_and_after(folder, tmp_path, monkeypatch):
    if folder.name.startswith("style"):
        pytest.skip("the object is enough")
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

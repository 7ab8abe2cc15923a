from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.errors import DataError
from latentdiff.evaluation.judge import read_output
from latentdiff.evaluation.network import STRIDE, JudgeConfig, JudgeOutput
from tests.scenes import drawn, scene_language

import train_judge  # isort: skip  (found by tests.scenes)

CONFIG = JudgeConfig(
    tuple(scene_language.NOUNS),
    tuple(scene_language.OBJECT_COLOURS),
    tuple(scene_language.BACKGROUNDS),
    channels=(8, 8, 8),
    blocks=(1, 1, 1),
)
OWN_COLOURS = len(CONFIG.colours)


def square(left, top, right, bottom, noun=0, colour=1):
    """A black square on white."""
    pixels = np.full((96, 96, 3), 255, dtype=np.uint8)
    pixels[top:bottom, left:right] = 0
    boxes = np.array([[left, top, right, bottom]], dtype=np.float32)
    return train_judge.Scene(pixels, 0, np.array([noun]), np.array([colour]), boxes)


def rendered(count):
    rng, scenes = Random(5), []
    for _ in range(count):
        plan, image, boxes = drawn("train", "two", rng, CONFIG.size)
        nouns = np.array([CONFIG.nouns.index(thing.noun) for thing in plan.things])
        background = CONFIG.backgrounds.index(plan.background)
        scenes.append(
            train_judge.Scene(np.asarray(image), background, nouns, np.full(2, OWN_COLOURS), np.float32(boxes))
        )
    return scenes


def test_targets_of_a_square():
    target = train_judge.make_targets([square(20, 40, 40, 70, noun=3, colour=2)], 96)
    # Centre (30, 55) lies in column 7, row 13 of cells of four pixels.
    assert (target.heat[0] == 1).nonzero().tolist() == [[13, 7]]
    assert target.heat[0, 12, 7] < target.heat[0, 13, 6] == target.heat[0, 13, 8] < 1  # further and nearer
    assert len(target.noun) == 9 and set(target.noun.tolist()) == {3} and set(target.colour.tolist()) == {2}
    (middle,) = (target.weight == 1).nonzero().flatten().tolist()
    expected = ((7.5 - 7.5) / 24, (13.75 - 13.5) / 24, 20 / 96, 30 / 96)
    assert target.box[middle].tolist() == pytest.approx(expected)


def test_a_centre_between_cells_is_in_each_of_them():
    target = train_judge.make_targets([square(20, 40, 36, 72)], 96)  # centre (28, 56): the corner of four cells
    assert (target.heat[0] == 1).nonzero().tolist() == [[13, 6], [13, 7], [14, 6], [14, 7]]
    assert (target.weight == 1).sum() == 4
    assert target.box[target.weight == 1, :2].abs().unique().tolist() == pytest.approx([0.5 / 24])


def test_an_output_equal_to_the_targets_is_read_as_the_scene():
    scenes = rendered(8)
    target = train_judge.make_targets(scenes, 96)
    side = 96 // STRIDE
    raw = JudgeOutput(
        torch.logit(target.heat, eps=1e-3) + 1e-3 * torch.rand(target.heat.shape),  # no two cells are equal
        torch.zeros(8, len(CONFIG.nouns), side, side),
        torch.zeros(8, OWN_COLOURS + 1, side, side),
        torch.zeros(8, 4, side, side),
        torch.nn.functional.one_hot(target.background, len(CONFIG.backgrounds)).float(),
    )
    for index, where in enumerate(zip(*target.cells, strict=True)):
        if target.weight[index] == 1:
            image, row, column = where
            raw.noun[image, target.noun[index], row, column] = 20.0
            raw.colour[image, target.colour[index], row, column] = 20.0
            raw.box[image, :, row, column] = target.box[index]
    for scene, verdict in zip(scenes, read_output(raw, CONFIG), strict=True):
        assert verdict.background == CONFIG.backgrounds[scene.background]
        expected = sorted(
            (CONFIG.nouns[noun], *(box / 96).tolist()) for noun, box in zip(scene.nouns, scene.boxes, strict=True)
        )
        found = sorted((thing.noun, *thing.box) for thing in verdict.objects)
        assert [row[0] for row in found] == [row[0] for row in expected]
        assert np.allclose([row[1:] for row in found], [row[1:] for row in expected], atol=1e-5)


def test_boxes_follow_their_objects():
    rng = np.random.default_rng(0)
    scene, kept = square(30, 36, 60, 58), 0
    for _ in range(60):
        seen = train_judge.augmented(scene, rng)
        dark = np.argwhere(seen.pixels.mean(2) < 100)
        kept += len(seen.boxes)
        if len(seen.boxes) == 0:
            assert len(dark) == 0  # erased from the image and from its targets
            continue
        (top, left), (bottom, right) = dark.min(0), dark.max(0) + 1
        assert seen.boxes[0] == pytest.approx([left, top, right, bottom], abs=3)
    assert 30 < kept < 60


def test_an_object_pushed_over_the_edge_is_not_asked_for():
    rng = np.random.default_rng(0)
    for _ in range(60):
        seen = train_judge.augmented(square(0, 40, 9, 60), rng)
        assert all((right - left) * (bottom - top) > 0.5 * 9 * 20 for left, top, right, bottom in seen.boxes)


def test_the_loss_falls_and_an_interrupted_run_goes_on_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(train_judge, "BATCH", 8)
    monkeypatch.setattr(train_judge, "SAVE_EVERY", 2)
    scenes = rendered(8)

    def weights(out, *stops):
        for stop in stops:  # 4 steps are planned; a smaller stop is an interruption
            monkeypatch.setattr(train_judge, "learning_rate", lambda step, steps: train_judge.LEARNING_RATE)
            network = train_judge.train(scenes, CONFIG, out, stop, seed=3)
        return network.state_dict()

    whole, resumed = weights(tmp_path / "a", 4), weights(tmp_path / "b", 2, 4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    target = train_judge.make_targets(scenes, 96)
    images = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1

    def loss(network):
        return train_judge.loss_of(network.train()(images), target).item()

    torch.manual_seed(3)
    before = loss(train_judge.JudgeNetwork(CONFIG))
    assert loss(train_judge.train(scenes, CONFIG, tmp_path / "a", 30, seed=3)) < 0.6 * before


def test_reading_scenes(tmp_path):
    with pytest.raises(DataError, match="expected scenes in .*, found no metadata.jsonl"):
        train_judge.read_scenes(tmp_path, CONFIG)
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    cat = {"noun": "cat", "colour": None, "box": [1, 2, 3, 4]}
    line = {"file_name": "0.png", "scene": {"background": "red", "objects": [cat]}}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match="expected 96x96 pixels, found 64x64 in 0.png"):
        train_judge.read_scenes(tmp_path, CONFIG)
    Image.new("RGB", (96, 96)).save(tmp_path / "0.png")
    (scene,) = train_judge.read_scenes(tmp_path, CONFIG)
    assert (scene.nouns.tolist(), scene.colours.tolist()) == ([0], [OWN_COLOURS])
    assert scene.boxes.tolist() == [[1, 2, 3, 4]] and CONFIG.backgrounds[scene.background] == "red"

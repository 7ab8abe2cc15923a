from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from latentdiff.errors import DataError
from latentdiff.evaluation.judge import Judge, read_output, save_judge
from latentdiff.evaluation.network import STRIDE, JudgeNetwork, JudgeOutput
from tests.scenes import FEW, GLYPHS, drawn, scene_language

import judge_scenes  # isort: skip  (found by tests.scenes)
import score_judge  # isort: skip
import train_judge  # isort: skip

CONFIG = replace(train_judge.config_of(FEW, 96), channels=(8, 8, 8), blocks=(1, 1, 1))
OWN_COLOURS, UNKNOWN = len(CONFIG.colours), len(CONFIG.nouns)
NOTHING = np.empty((0, 96, 96, 3), dtype=np.uint8)


def square(left, top, right, bottom, noun=0, colour=1):
    """A black square on white."""
    pixels = np.full((96, 96, 3), 255, dtype=np.uint8)
    pixels[top:bottom, left:right] = 0
    boxes = np.array([[left, top, right, bottom]], dtype=np.float32)
    return judge_scenes.Scene(pixels, 0, np.array([noun]), np.array([colour]), boxes)


def rendered(count):
    rng, scenes = Random(5), []
    for _ in range(count):
        plan, image, boxes = drawn("train", "two", rng, CONFIG.size)
        nouns = np.array([CONFIG.nouns.index(thing.noun) for thing in plan.things])
        background = CONFIG.backgrounds.index(plan.background)
        scenes.append(
            judge_scenes.Scene(np.asarray(image), background, nouns, np.full(2, OWN_COLOURS), np.float32(boxes))
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
        torch.zeros(8, len(CONFIG.nouns) + 1, side, side),
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
    scene = square(30, 36, 60, 58)
    for _ in range(60):
        seen = judge_scenes.augmented(scene, rng)
        dark = np.argwhere(seen.pixels.mean(2) < 100)
        (top, left), (bottom, right) = dark.min(0), dark.max(0) + 1
        assert seen.boxes[0] == pytest.approx([left, top, right, bottom], abs=3)


def test_an_object_pushed_over_the_edge_is_not_asked_for():
    rng = np.random.default_rng(0)
    for _ in range(60):
        seen = judge_scenes.augmented(square(0, 40, 9, 60), rng)
        assert all((right - left) * (bottom - top) > 0.5 * 9 * 20 for left, top, right, bottom in seen.boxes)


def composed(fate, seed="0"):
    return judge_scenes.Composer(FEW, CONFIG, {fate: 1.0})(seed)


def test_whole_things_keep_their_names_and_melted_ones_lose_them():
    for seed in map(str, range(12)):
        whole, harmless, melted = (composed(fate, seed) for fate in ("as it is", "harmless", "melted"))
        assert max(whole.nouns) < UNKNOWN and max(whole.colours) <= OWN_COLOURS
        for scene in (harmless, melted):  # the same plan, drawn with other sprites
            assert np.array_equal(scene.boxes, whole.boxes) and scene.background == whole.background
            assert not np.array_equal(scene.pixels, whole.pixels)
        assert np.array_equal(harmless.nouns, whole.nouns) and np.array_equal(harmless.colours, whole.colours)
        assert set(melted.nouns) <= {UNKNOWN, judge_scenes.IGNORED} and set(melted.colours) == {judge_scenes.IGNORED}


def test_what_is_gone_is_neither_drawn_nor_asked_for():
    whole, gone = composed("as it is", "3"), composed("gone", "3")
    assert len(whole.nouns) > 0 and gone.boxes.shape == (0, 4)
    for left, top, right, bottom in whole.boxes.astype(int):
        inside = gone.pixels[top:bottom, left:right].astype(int)
        assert np.ptp(inside, axis=1).max() == 0  # the ground, whose colour changes with the height alone


def test_a_batch_depends_on_its_step_and_seed_alone():
    compose = judge_scenes.Composer(FEW, CONFIG)
    first, again, other = (
        judge_scenes.composed_batch(judge_scenes.Composer(FEW, CONFIG) if new else compose, step, 1, 6)
        for step, new in ((4, False), (4, True), (5, False))
    )
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, other, strict=True))


def test_damaged_things_are_asked_for_as_unknown_and_in_no_colour():
    scene = square(20, 40, 40, 70, noun=UNKNOWN, colour=judge_scenes.IGNORED)
    target = train_judge.make_targets([scene], 96)
    raw = JudgeOutput(*(torch.zeros(1, *shape, requires_grad=True) for shape in (
        (24, 24), (UNKNOWN + 1, 24, 24), (OWN_COLOURS + 1, 24, 24), (4, 24, 24), (len(CONFIG.backgrounds),),
    )))  # fmt: skip
    train_judge.loss_of(raw, target).backward()
    grown = -raw.noun.grad[0, :, 13, 7]
    assert grown[UNKNOWN] > 0 and (grown[:UNKNOWN] < 0).all()
    assert (raw.colour.grad == 0).all() and (raw.box.grad != 0).any()


def test_things_in_damaged_images_are_unknown_where_the_network_sees_them():
    centre = torch.full((1, 24, 24), -9.0)
    centre[0, 5, 6], centre[0, 5, 7], centre[0, 20, 3] = 4.0, 3.0, -5.0  # a peak, its slope, and what is no thing
    noun = torch.zeros(1, UNKNOWN + 1, 24, 24, requires_grad=True)
    raw = JudgeOutput(centre, noun, torch.zeros(0), torch.zeros(0), torch.zeros(0))
    loss = train_judge.unknown_loss(raw)
    assert loss.item() == pytest.approx(np.log(UNKNOWN + 1))
    loss.backward()
    assert noun.grad.abs().sum(1).nonzero().tolist() == [[0, 5, 6]]
    assert train_judge.unknown_loss(replace(raw, centre=centre - 20)).item() == 0


def test_the_loss_falls_and_an_interrupted_run_goes_on_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(train_judge, "BATCH", 8)
    monkeypatch.setattr(train_judge, "SAVE_EVERY", 2)
    monkeypatch.setattr(train_judge, "learning_rate", lambda step, steps: train_judge.LEARNING_RATE)
    compose = judge_scenes.Composer(FEW, CONFIG)
    damaged = np.random.default_rng(0).integers(255, size=(3, 96, 96, 3), dtype=np.uint8)

    def trained(out, *stops):
        for stop in stops:  # 4 steps are planned; a smaller stop is an interruption
            trainer = train_judge.Trainer(CONFIG, out, seed=3)
            train_judge.train(trainer, compose, damaged, stop, seed=3)
        return trainer

    whole, resumed = (
        trained(tmp_path / name, *stops).network.state_dict() for name, stops in (("a", (4,)), ("b", (2, 4)))
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    trainer = train_judge.Trainer(CONFIG, tmp_path / "c", seed=3)
    scenes = judge_scenes.composed_batch(compose, 0, 3, 8)
    losses = [trainer.learn(scenes, NOTHING, train_judge.LEARNING_RATE) for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]


def test_another_judge_lends_the_weights_that_fit(tmp_path):
    torch.manual_seed(1)
    lender = JudgeNetwork(replace(CONFIG, nouns=("cat",), size=64))
    save_judge(lender, tmp_path)
    own = train_judge.Trainer(CONFIG, tmp_path, seed=0, start=tmp_path).network
    assert torch.equal(own.stem[1][0].weight, lender.stem[1][0].weight.half().float())
    assert own.cell.weight.shape != lender.cell.weight.shape


def test_damaged_images_are_read_without_those_that_are_right(tmp_path):
    with pytest.raises(DataError, match="expected damaged images in .*, found no metadata.jsonl"):
        judge_scenes.read_damaged(tmp_path, 96)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    lines = [{"file_name": "a.png", "text": "a cat", "label": "right"}, {"file_name": "b.png", "text": "a dog"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    images = judge_scenes.read_damaged(tmp_path, 96)
    assert images.shape == (1, 96, 96, 3) and images[0, 0, 0].tolist() == [0, 0, 255]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(DataError, match="found 1 lines and all of them right"):
        judge_scenes.read_damaged(tmp_path, 96)


def test_the_tools_train_a_judge_and_measure_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train_judge, "BATCH", 4)
    monkeypatch.setattr(score_judge, "SEVERITIES", (0.1, 1.0))
    out = tmp_path / "judge"
    made = CliRunner().invoke(train_judge.main, [str(out), "--steps", "2", "--glyphs", str(GLYPHS)])
    assert made.exit_code == 0, made.output
    judge = Judge.load(out)
    assert judge.config.nouns == FEW.nouns and judge.config.size == 128 and judge.config.unknown
    assert set(judge.config.backgrounds) == {*scene_language.BACKGROUNDS, *scene_language.PLACES}
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    told = CliRunner().invoke(score_judge.main, [str(out), "--count", "8", "--damaged", "2", "--glyphs", str(GLYPHS)])
    assert told.exit_code == 0, told.output
    assert "| own captions | softened | wrong captions |" in told.output and "| mixed |" in told.output

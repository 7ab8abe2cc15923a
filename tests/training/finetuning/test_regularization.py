"""Images that only remind the model, weights of single images, and options of the samples."""

import json

import numpy as np
import pytest
from PIL import Image

from latentdiff.errors import ConfigError, DataError
from latentdiff.recipe import read_recipe
from latentdiff.training.data import DataSource, read_dataset
from latentdiff.training.finetuning.finetune import run
from latentdiff.training.finetuning.material import batches_of, read_material
from latentdiff.training.finetuning.preparation import Preparation, make_accelerator
from latentdiff.training.sample_options import sample_options
from tests.training.finetuning.build import captioned_folder, settings


@pytest.fixture
def tmp(tmp_path):
    captioned_folder(tmp_path / "data", 6)
    captioned_folder(tmp_path / "known", 9, seed=1)
    return tmp_path


def test_reminders_count_by_the_prior_weight_and_are_neither_held_out_nor_drawn(tmp):
    known = {"path": str(tmp / "known"), "regularization": True, "weight": 0.5, "repeats": 2}
    changes = {"data": [str(tmp / "data"), known], "prior_weight": 0.4, "validation_share": 0.4, "sample_count": 99}
    (tmp / "run").mkdir()
    accelerator, of = make_accelerator(settings(tmp, **changes))
    made = Preparation(of, accelerator)
    material = read_material(of, made.method.parts, [])
    names = np.array(material.samples.data.names)
    held_out, learned = material.held_out[1], material.learned
    assert len(held_out) and {name.split("/")[0] for name in names[[*held_out, *learned]]} == {"data"}
    assert len(learned) + len(held_out) == 6 and len(material.training) == len(learned) + 9
    assert set(names[material.training_part[1]]) <= set(names[learned])
    assert material.summary(4)["regularization"] == 9
    batches = batches_of(material, of, 1000, [])
    seen = {}
    for step in range(20):
        seen |= dict(zip(batches.names(step), batches.arrays(step, range(4))["weights"].tolist(), strict=True))
    assert {round(weight, 6) for name, weight in seen.items() if name.startswith("known/")} == {0.2}
    assert {weight for name, weight in seen.items() if name.startswith("data/")} == {1.0}


def test_what_regularization_needs(tmp):
    with pytest.raises(ConfigError, match="prior_weight goes with data that is for regularization"):
        settings(tmp, prior_weight=0.5)
    known = {"path": str(tmp / "known"), "regularization": True}
    with pytest.raises(ConfigError, match="held-out images are not for regularization"):
        settings(tmp, validation=known)
    with pytest.raises(DataError, match="all images are for regularization"):
        run(settings(tmp, data=known))


def test_images_that_cannot_be_read_leave_the_others_in_their_part(tmp):
    (tmp / "data" / "2.png").write_bytes(b"no image")
    data = read_dataset([DataSource(tmp / "data"), DataSource(tmp / "known", regularization=True)])
    assert {data.names[index].split("/")[0] for index in data.reminders} == {"known"} and len(data.reminders) == 9


def test_weights_of_single_images(tmp):
    lines = [json.loads(line) for line in (tmp / "data" / "metadata.jsonl").read_text().splitlines()]
    lines[1]["weight"], lines[2]["weight"] = 0.25, "3"
    (tmp / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = read_dataset([DataSource(tmp / "data", weight=2.0)])
    assert data.weights == [2.0, 0.5, 6.0, 2.0, 2.0, 2.0]
    assert any("2 images have a weight of their own" in note for note in data.notes)
    for wrong in (0, -1, "much", True, "inf"):
        lines[1]["weight"] = wrong
        (tmp / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(DataError, match=r"row 2: expected a 'weight' above 0"):
            read_dataset([tmp / "data"])


def test_samples_take_the_options_of_generate(tmp):
    texts = ["sampler=ddim", "steps=2", "guidance=3", "seed=11", "width=24", "negative-prompt=no dog: red"]
    options = sample_options(texts)
    assert options == {
        "sampler": "ddim", "steps": 2, "guidance_scale": 3.0, "seed": 11, "width": 24, "negative_prompt": "no dog: red",
    }  # fmt: skip
    run(settings(tmp, max_steps=1, preview_every=1, sample_count=2, sample_options=texts))
    image = Image.open(tmp / "run" / "samples" / "step-00000001" / "ema" / "01.png")
    recipe = read_recipe(image.info)
    assert image.size == (24, 16) and recipe.seed == 12 and recipe.negative_prompt == "no dog: red"
    again = settings(tmp, sample_options={"sampler": "ddim", "steps": 2})
    assert again.sample_options == ("sampler=ddim", "steps=2")
    for wrong in ("steps", "seed=[1, 2]", "controls=x", "num_images=2", "hires_steps=3", "sampler=worst"):
        with pytest.raises(ConfigError, match="sample_options: "):
            settings(tmp, sample_options=[wrong])

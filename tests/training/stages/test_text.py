import json

import numpy as np
import pytest
import torch

from latentdiff.errors import DataError
from latentdiff.training.data import read_dataset
from latentdiff.training.stages.config import TextStageSection
from latentdiff.training.stages.networks import load_tokenizer, new_text_encoder
from latentdiff.training.stages.text import SceneLabels, TextTask, in_classes_of, read_labels
from tests.training.build import captioned_folder, config, prepared


def thing(noun, colour=None, size=None):
    return {"noun": noun, "colour": colour, "size": size}


def with_scenes(folder, captions, scenes):
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    made = [row | {"text": text, "scene": scene} for row, text, scene in zip(rows, captions, scenes, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, made)))
    return read_dataset([folder])


def scene(*things, background="red", relation=None):
    return {"background": background, "relation": relation, "objects": list(things)}


def labels_of(caption, scene, tmp_path):
    data = with_scenes(captioned_folder(tmp_path / "one", 1), [caption], [scene])
    labels = read_labels(data)
    row = labels.values[0]
    return {q: answers[i] if i >= 0 else None for (q, answers), i in zip(labels.classes.items(), row, strict=True)}


def test_things_are_asked_for_in_the_order_of_mention(tmp_path):
    answers = labels_of(
        "two green frogs and a cat, red background", scene(thing("cat"), *[thing("frog", "green")] * 2), tmp_path
    )
    assert (answers["noun 1"], answers["colour 1"], answers["count 1"]) == ("frog", "green", "2")
    assert (answers["noun 2"], answers["colour 2"], answers["count 2"]) == ("cat", "none", "1")
    assert answers["noun 3"] == "none" and "colour 3" not in answers


def test_a_relation_turns_round_with_the_order_of_mention(tmp_path):
    found = labels_of("a dog with a cat on its left", scene(thing("cat"), thing("dog"), relation="left of"), tmp_path)
    assert (found["noun 1"], found["relation"]) == ("dog", "right of")


def test_a_background_that_is_not_mentioned_is_none(tmp_path):
    assert labels_of("a red cat", scene(thing("cat", "red")), tmp_path)["background"] == "none"


def test_held_out_answers_outside_the_classes_are_not_asked():
    ours = SceneLabels({"noun": ("cat", "dog")}, np.array([[0]]))
    others = SceneLabels({"noun": ("cow", "dog")}, np.array([[0], [1], [-100]]))
    assert in_classes_of(ours, others).tolist() == [[-100], [1], [-100]]


def test_metadata_without_scenes_is_refused(tmp_path):
    with pytest.raises(DataError, match="scene"):
        read_labels(read_dataset([captioned_folder(tmp_path / "plain", 2)]))


def test_the_text_encoder_learns_to_tell_scenes_apart(tmp_path):
    settings = config(prepared(tmp_path), text={"max_steps": 40, "batch_size": 8, "lr": 1e-2, "validation_images": 8})
    captions = ["a photo of the cat", "a photo of the dog"] * 4
    scenes = [scene(thing("cat")), scene(thing("dog"))] * 4
    data = with_scenes(captioned_folder(tmp_path / "scenes", 8), captions, scenes)
    tokenizer = load_tokenizer(settings.model.tokenizer, 16)
    text_encoder = new_text_encoder(settings.model.text_encoder, tokenizer, 0)
    stage = TextStageSection(**settings.text.model_dump())
    task = TextTask(text_encoder, stage, tokenizer, data, data, seed=0)
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        batch = {name: torch.from_numpy(array) for name, array in task.batch(step, range(8)).items()}
        loss = task.module(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert task.validate()["right_noun_1"] == 1.0

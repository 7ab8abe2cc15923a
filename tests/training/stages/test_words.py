import json

from latentdiff.training.data import read_dataset
from latentdiff.training.stages.words import words_of_data
from tests.training.build import captioned_folder


def scene(count, noun, colour=None, relation=None):
    return {"background": "red", "relation": relation, "objects": [{"noun": noun, "colour": colour}] * count}


def test_the_words_of_a_training_set(tmp_path):
    folder = captioned_folder(tmp_path / "train", 2)
    scenes = [scene(2, "cat", "blue"), scene(1, "dog", relation="above")]
    lines = [
        json.loads(line) | {"scene": s} for line, s in zip((folder / "metadata.jsonl").open(), scenes, strict=True)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = words_of_data(read_dataset([folder]), 64)
    assert found.kinds["things"] == ("cat", "dog") and found.kinds["colours"] == ("blue",)
    assert found.kinds["counts"] == ("one", "two") and found.kinds["relations"] == ("above",)
    assert found.all == {"a", "photo", "of", "the", "cat", "dog"} and found.size == 64


def test_captions_without_scenes_tell_no_words(tmp_path):
    assert words_of_data(read_dataset([captioned_folder(tmp_path / "train", 2)]), 64) is None

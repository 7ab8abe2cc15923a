import json

import pytest

from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.errors import CheckpointError
from latentdiff.prompts.words import KINDS, Words, as_json, read_words

KNOWN = Words(
    kinds={
        "things": ("cat", "hot dog", "whale"),
        "colours": ("red",),
        "backgrounds": ("blue",),
        "sizes": ("small", "big"),
        "counts": ("one", "two", "three", "four"),
        "relations": ("above",),
    },
    all=frozenset(
        "a an and on of photo background cat cats hot dog dogs whale red blue small big one two three four".split()
    ),
    size=96,
)

EMPTY = '{"things": %s, "colours": [], "backgrounds": [], "sizes": [], "counts": [], "relations": [], "words": [], "size": %s}'


def remarks(*prompts, **size):
    return list(KNOWN.remarks(prompts, **size))


@pytest.mark.parametrize(
    "prompt", ["", "a red cat on a blue background", "Two HOT dogs, a cat!", "a <mine> cat", "four cats above"]
)
def test_what_is_known_needs_no_remark(prompt):
    known = Words(KNOWN.kinds, KNOWN.all | {"above"}, 96)
    assert list(known.remarks([prompt])) == []


def test_unknown_words_are_named_once_with_the_nearest():
    (line,) = remarks("a whales and a dragon", "a dragon, whales")
    assert '"whales", "dragon" (nearest: "whale")' in line and line.count("dragon") == 1
    (line,) = remarks("eine rote Katze")
    assert '"eine", "rote", "katze"' in line


@pytest.mark.parametrize("prompt", ["seven cats", "7 cats", "twelve cats"])
def test_more_than_the_model_counts_to(prompt):
    (line,) = remarks(prompt)
    assert "counts to four" in line and f'"{prompt.split()[0]}"' in line


def test_digits_are_put_into_words():
    (line,) = remarks("2 cats")
    assert '"two" for "2"' in line


@pytest.mark.parametrize(
    ("width", "height", "far"),
    [(96, 96, False), (None, None, False), (192, 96, False), (512, 512, True), (96, 40, True)],
)
def test_sizes_far_from_the_training(width, height, far):
    lines = remarks("a cat", width=width, height=height)
    assert bool(lines) == far and all(f"{width}x{height}" in line and "96x96" in line for line in lines)


def test_other_scripts_and_odd_texts_get_a_line_and_no_error():
    assert len(remarks("一只猫", "кот", "٣ cats", "²")) >= 1


def test_words_survive_their_file(tmp_path):
    (tmp_path / "words.json").write_text(json.dumps(as_json(KNOWN)))
    assert read_words(tmp_path) == KNOWN


def test_words_that_were_learned_later_are_known():
    more = KNOWN.with_texts(["A dragon, in Sepia style", "two dragons"])
    assert list(more.remarks(["a dragon in sepia style"])) == [] and more.kinds == KNOWN.kinds
    assert list(KNOWN.remarks(["a dragon in sepia style"]))


def test_a_folder_without_the_file_says_nothing(tmp_path):
    assert read_words(tmp_path) is None


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"things": 3}', EMPTY % ("[3]", "96"), EMPTY % ('"cat"', "96"), EMPTY % ("[]", "0")]
)
def test_a_damaged_file_is_one_error(tmp_path, text):
    (tmp_path / "words.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"words\.json"):
        read_words(tmp_path)


def test_the_embedded_model_knows_its_own_prompts():
    known = read_words(embedded_model())
    assert all(known.kinds[kind] for kind in KINDS)
    assert list(known.remarks(["a photo of two cats and a rocket on a blue background"])) == []

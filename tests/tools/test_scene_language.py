from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scenes import ROOT
from tests.scenes import scene_language as language

randoms = st.integers(0, 2**32).map(Random)
kinds = st.sampled_from(list(language.KINDS))


def held_out(plan):
    return {sort for sort, combination in language.combinations_of(plan) if language.held_out(*combination)}


def test_size_of_the_world():
    assert len(language.NOUNS) >= 150 and len(set(language.NOUNS.values())) == len(language.NOUNS)
    assert len(language.BACKGROUNDS) == 10 and len(language.OBJECT_COLOURS) == 8
    assert sum(language.KINDS.values()) == pytest.approx(1)


@pytest.mark.parametrize("page", ["README.md", "weights/README.md"])
def test_pages_count_the_things_rightly(page):
    assert f" {len(language.NOUNS)} things" in (ROOT / page).read_text(encoding="utf-8")


@given(randoms, kinds)
def test_training_holds_no_held_out_combination(rng, kind):
    assert not held_out(language.draw_plan(rng, "train", kind))


@pytest.mark.parametrize(
    ("kind", "about"),
    [
        ("single", "single"),
        ("place", "single"),
        ("two", "two"),
        ("counting", "counting"),
        ("colour", "colour"),
        ("position", "two"),
        ("attribution", "colour"),
    ],
)
def test_testing_is_about_held_out_combinations(kind, about):
    rng = Random(4)
    assert all(about in held_out(language.draw_plan(rng, "test", kind)) for _ in range(30))


def test_one_combination_in_eight_is_held_out():
    pairs = [(noun, ground) for noun in language.NOUNS for ground in language.BACKGROUNDS]
    share = sum(language.held_out("background", *pair) for pair in pairs) / len(pairs)
    assert share == pytest.approx(1 / 8, abs=0.03)


def test_every_noun_is_trained_with_most_colours_and_backgrounds():
    for noun in language.NOUNS:
        assert sum(not language.held_out("background", noun, ground) for ground in language.BACKGROUNDS) >= 5
        assert sum(not language.held_out("colour", noun, colour) for colour in language.OBJECT_COLOURS) >= 3


@given(randoms, kinds)
def test_a_caption_names_everything(rng, kind):
    plan = language.draw_plan(rng, "train", kind)
    for words in (language.caption(plan, rng), language.prompt(plan)):
        for thing in plan.things:
            assert thing.noun in words or language.plural_of(thing.noun) in words
            assert (thing.colour or "") in words


@pytest.mark.parametrize(
    ("things", "relation", "background", "expected"),
    [
        ([("cat", None)], None, "red", "a photo of a cat on a red background"),
        ([("owl", "orange")], None, "red", "a photo of an orange owl on a red background"),
        ([("mouse", None)] * 3, None, "red", "a photo of three mice on a red background"),
        ([("glasses", "blue")], None, "red", "a photo of a pair of blue glasses on a red background"),
        ([("cheese", None)] * 2, None, "orange", "a photo of two pieces of cheese on an orange background"),
        ([("cat", "blue"), ("dog", "pink")], None, "red", "a photo of a blue cat and a pink dog on a red background"),
        ([("fox", None), ("key", None)], "left of", "red", "a photo of a fox to the left of a key on a red background"),
        ([("fox", None), ("key", None)], "below", "red", "a photo of a fox below a key on a red background"),
    ],
)
def test_prompts(things, relation, background, expected):
    plan = language.Plan("any", background, tuple(language.Thing(*thing) for thing in things), relation)
    assert language.prompt(plan) == expected


def test_a_place_is_named_as_people_name_it():
    plan = language.Plan("place", "night", (language.Thing("cat"),))
    assert {language.caption(plan, Random(seed)) for seed in range(60)} >= {
        "a cat at night",
        "a photo of a cat at night",
    }


def test_captions_fit_into_thirty_tokens(tmp_path):
    import make_tokenizer
    from transformers import CLIPTokenizer

    rng = Random(1)
    captions = [language.caption(language.draw_plan(rng, "train"), rng) for _ in range(3000)]
    make_tokenizer.write_files(tmp_path, *make_tokenizer.train_bpe(captions, 1400), max_length=32)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    others = [language.caption(language.draw_plan(rng, "test"), rng) for _ in range(1000)]
    assert max(len(ids) for ids in tokenizer([*captions, *others])["input_ids"]) <= 30

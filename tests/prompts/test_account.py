"""The account of a prompt: everything that it says, and everything that it does not."""

from __future__ import annotations

from functools import cache

from latentdiff.checkpoints.tokenizer import clip_tokenizer_files
from latentdiff.prompts.account import account
from latentdiff.prompts.tokenizer import Tokenizer


@cache
def clip() -> Tokenizer:
    return Tokenizer(clip_tokenizer_files("<|endoftext|>"))


def test_a_table_of_tokens_weights_and_chunks():
    found = account(clip(), "a (cat:1.5) <lora:ink:0.5:1> BREAK redd {a|b}", "a1111", 20)
    assert str(found).splitlines() == [
        "8 tokens in 2 chunks of 75",
        "  chunk  tokens  weight  text",
        "      1       1       1  a",
        "      1       1     1.5  cat",
        "      2       6       1  redd { a | b }",
        "LoRA ink: strength 0.5 in the text encoder, 1 in the U-Net",
        "has no meaning in the syntax a1111: '{a|b}'",
    ]
    assert found.stages[0][0].count == 8 and not found.cut


def test_parts_and_stages_are_named():
    lines = str(account(clip(), "[cat:dog:0.5] AND red:0.25", "a1111", 20)).splitlines()
    assert lines[0] == "part 1 of 2, weight 1"
    assert lines[1].startswith("steps 1 to 10: 1 tokens") and lines[3].endswith("cat")
    assert lines[4].startswith("steps 11 to 20: 1 tokens") and lines[6].endswith("dog")
    assert lines[7] == "part 2 of 2, weight 0.25"


def test_what_is_cut_is_said_and_quoted_short():
    found = account(clip(), "cat " * 75 + "dog " * 2000, "plain", 20)
    assert found.cut == ("dog " * 2000).strip()
    assert str(found).splitlines()[-1].startswith("cut, the model does not read it: 'dog dog")
    assert len(str(found).splitlines()[-1]) < 150


def test_every_token_is_accounted_for():
    prompt = "a photo, " * 50 + "(house:1.2)"
    found = account(clip(), prompt, "a1111", 20)
    assert found.stages[0][0].count == len(
        clip()(prompt.replace("(house:1.2)", "house"), add_special_tokens=False)["input_ids"]
    )


def test_the_empty_prompt_has_an_empty_chunk():
    assert str(account(clip(), "", "a1111", 20)).splitlines()[-1] == "      1       0       1  (empty)"

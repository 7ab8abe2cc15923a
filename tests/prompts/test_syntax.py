"""The outer grammar of prompts: tags, `AND`, and what is no grammar."""

from __future__ import annotations

import pytest

from latentdiff.errors import UsageError
from latentdiff.prompts.notice import PromptWarning, shortened
from latentdiff.prompts.syntax import Part, read_prompt, said, warn_of_unheeded
from latentdiff.prompts.tags import LoRATag


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", [("", 1)]),
        ("a cat", [("a cat", 1)]),
        ("a cat AND a dog", [("a cat ", 1), (" a dog", 1)]),
        ("a cat :1.2 AND a dog:0.5", [("a cat", 1.2), (" a dog", 0.5)]),
        ("a cat AND a dog: -1 ", [("a cat ", 1), (" a dog", -1)]),
        ("a cat:2", [("a cat", 2)]),
        ("(a cat:2)", [("(a cat:2)", 1)]),
        ("a AND b AND c:.25", [("a ", 1), (" b ", 1), (" c", 0.25)]),
        ("SAND ANDY and", [("SAND ANDY and", 1)]),
        ("AND", [("", 1), ("", 1)]),
        ("time 12:x", [("time 12:x", 1)]),
    ],
)
def test_composition(prompt, parts):
    assert read_prompt(prompt, "a1111").parts == tuple(Part(*part) for part in parts)
    for syntax in ("comfy", "plain"):
        assert read_prompt(prompt, syntax).parts == (Part(prompt),)


@pytest.mark.parametrize(
    ("prompt", "text", "tags"),
    [
        ("a cat <lora:ink:0.8>", "a cat ", [LoRATag("ink", 0.8, 0.8)]),
        ("<lora:ink>a", "a", [LoRATag("ink", 1, 1)]),
        ("a <lora:ink:0.5:1> b", "a  b", [LoRATag("ink", 0.5, 1)]),
        ("a <lora:my ink v2:unet=0.3>", "a ", [LoRATag("my ink v2", 1, 0.3)]),
        ("a <lora:ink:0.5:unet=0.3>", "a ", [LoRATag("ink", 0.5, 0.3)]),
        ("<lora:a:1><lora:b:-1>", "", [LoRATag("a"), LoRATag("b", -1, -1)]),
        ("a <lyco:ink:1>", "a ", [LoRATag("ink")]),
        ("a <ink> b < c", "a <ink> b < c", []),
    ],
)
def test_tags(prompt, text, tags):
    found = read_prompt(prompt, "a1111")
    assert found.parts == (Part(text),) and list(found.loras) == tags


@pytest.mark.parametrize("tag", ["<lora:a:b>", "<lora: :1>", "<lora:a:1:2:3>", "<lora:a:nan>", "<lora:a:x=1>"])
def test_tags_that_are_none(tag):
    with pytest.raises(UsageError, match="<lora:"):
        read_prompt(tag, "a1111")


@pytest.mark.parametrize(
    ("prompt", "syntax", "unheeded"),
    [
        ("a {red|blue} cat", "a1111", "'{red|blue}'"),
        ("a __colour__ cat", "comfy", "'__colour__'"),
        ("a <hypernet:x:1> cat", "a1111", "'<hypernet:x:1>'"),
        ("a cat BREAK dog", "comfy", "'BREAK'"),
        ("a cat <lora:x:1> AND dog", "comfy", "'AND', '<lora:x:1>'"),
        ("a [cat:dog:0.5]", "comfy", "'[cat:dog:0.5]'"),
    ],
)
def test_what_has_no_meaning_is_named(prompt, syntax, unheeded):
    with pytest.warns(PromptWarning) as caught:
        warn_of_unheeded(read_prompt(prompt, syntax))
    assert str(caught[0].message).endswith(f"have no meaning in the syntax {syntax!r}: {unheeded}")


def test_and_has_no_meaning_in_negative_prompts():
    found = read_prompt("blurry AND dark:2", "a1111", negative=True)
    assert found.parts == (Part("blurry AND dark:2"),) and found.unheeded == ("AND",)


def test_long_texts_are_quoted_short():
    assert shortened("cat") == "'cat'"
    assert len(shortened("x" * 5000)) < 100 and shortened("x" * 5000).endswith("(5000 letters)")


def test_unknown_syntax():
    with pytest.raises(UsageError, match="expected a prompt syntax of a1111, comfy, plain, found 'compel'"):
        read_prompt("a", "compel")


def test_simple_prompts():
    assert read_prompt("a (cat:1.2) BREAK dog", "a1111").is_simple
    assert not read_prompt("a AND b", "a1111").is_simple
    assert not read_prompt("[a:b:0.5]", "a1111").is_simple
    assert read_prompt("[a:b:0.5] AND", "plain").is_simple


def test_tags_in_negative_prompts_are_letters():
    found = read_prompt("red <lora:a:1>", "a1111", negative=True)
    assert found.parts == (Part("red <lora:a:1>"),) and found.unheeded == ("<lora:a:1>",) and not found.loras


def test_the_words_of_a_prompt_without_its_grammar():
    prompt = "a (cat:1.5) BREAK [dog:fox:0.3] AND red:2 <lora:x:1>"
    assert said(prompt, "a1111").split() == ["a", "cat", "dog", "a", "cat", "fox", "red"]
    assert said("(a:1)", "plain") == "(a:1)"

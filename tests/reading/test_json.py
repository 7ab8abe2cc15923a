"""JSON and YAML from anywhere: values, or one line of ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from latentdiff.errors import CheckpointError, ConfigError, DataError, LatentDiffError, printable
from latentdiff.reading.json import parse_json, parse_object, read_object
from latentdiff.reading.plain import open_file, read_text
from latentdiff.reading.yaml import parse_yaml

# Nine times nine times nine ...: 43,046,721 values in 600 letters.
BILLION = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


def refused(call, *arguments, **options) -> str:
    with pytest.raises(LatentDiffError) as error:
        call(*arguments, **options)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "levels deep"),
        ("[" * 500 + "]" * 500, "more than 64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "more than 64 levels"),
        ("9" * 5000, "digits"),
        ("9" * 40, "beyond 64 bits"),
        ("1e999", "beyond 64 bits"),
        ("NaN", "no number of JSON"),
        ('{"a": "\\ud800"}', "lone surrogate"),
        ('{"\\udc00": 1}', "lone surrogate"),
        ("", "Expecting value"),
        ("{'a': 1}", "Expecting property name"),
    ],
)
def test_what_is_refused(text, words):
    message = refused(parse_json, text, "a.json", DataError, remedy="write it again")
    assert words in message and message.startswith("a.json is not valid JSON") and message.endswith("; write it again")


@pytest.mark.parametrize("value", [None, {"a": [1, 2.5, "\U0001f680", "\\u00e9"], "b": {"c": 2**63}}, list(range(100))])
def test_what_is_read_is_what_json_reads(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text, "a") == value
    assert parse_json("[" * 64 + "]" * 64, "a") == json.loads("[" * 64 + "]" * 64)
    assert parse_json("[NaN, Infinity]", "a", finite=False)[1] == float("inf")


def test_an_object_is_demanded():
    assert "found a list" in refused(parse_object, "[]", "a.json")


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    cases = {"pipe": "a pipe", "loop": "symbolic links", "device": "a device", "": "a folder", "n" * 300: "too long"}
    for name, words in {**cases, "missing": "No such file", "null\0": "null"}.items():
        assert words in refused(open_file, tmp_path / name)


def test_texts(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_object(path) == {}
    path.write_bytes(b'{"a": "\xe9"}')
    assert "byte 7 is 0xe9" in refused(read_object, path, DataError)
    path.write_bytes(b" " * 3000)
    assert "at most 2 KiB" in refused(read_text, path, longest=2048)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not valid YAML"),
        ("[" * 5000, "nested"),
        ("a: 2024-99-99", "not valid YAML"),
        ("? [1]\n: 2", "not valid YAML"),
        ("a: &a [*a]", "values or 32 levels"),
        (BILLION, "100,000"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("x" * 300_000, "at most 256 KiB"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_yaml(text, words):
    assert words in refused(parse_yaml, text, "a.yaml", ConfigError)
    assert parse_yaml("a: &x [1, 2]\nb: *x", "a.yaml") == {"a": [1, 2], "b": [1, 2]}


def test_printable():
    assert printable("a\x1b[31mred\x07\u202e\nb\x9b") == "a\\x1b[31mred\\x07\\u202e b\\x9b"
    assert printable("猫 é 👩‍🚀") == "猫 é 👩‍🚀"
    assert str(CheckpointError("\x1b]0;title\x07")) == "\\x1b]0;title\\x07"
    assert printable(Path("a")) == "a" and printable("\ud800") == "\\ud800"

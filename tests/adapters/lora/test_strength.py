"""Strengths by part and by block: the grammar, and which layer gets which."""

from __future__ import annotations

import pytest

from latentdiff.adapters.lora.strength import Strength
from latentdiff.checkpoints.modules import expected_shapes
from latentdiff.checkpoints.tables import unet_map
from latentdiff.cli.loras import parse_scaled
from latentdiff.errors import UsageError
from latentdiff.networks.config import UNetConfig

NUMBERS = ",".join(map(str, range(26)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.8", Strength(0.8, 0.8)),
        ("-1", Strength(-1, -1)),
        ("unet=0.8,te=0.4", Strength(0.8, 0.4)),
        ("te=0.4", Strength(1, 0.4)),
        ("0.5,te=0", Strength(0.5, 0)),
        (f"0.5,blocks={NUMBERS}", Strength(0.5, 0.5, tuple(range(26)))),
        (f"blocks={NUMBERS[2:]},te=0", Strength(1, 0, (1, *range(1, 26)))),
        ("blocks=" + ",".join(["2"] * 17),
         Strength(1, 1, (2, 0, 2, 2, 0, 2, 2, 0, 2, 2, 0, 0, 0, 2, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2))),
    ],
)  # fmt: skip
def test_grammar(text, expected):
    found = Strength.parse(text)
    assert found == expected and Strength.parse(str(found)) == found and Strength.of(found.as_json) == found


@pytest.mark.parametrize("text", ["", "a", "0,8", "unet=", "unet=1,unet=2", "vae=1", "blocks=1,2", "0.8,te=1,2", "nan"])
def test_what_is_none(text):
    with pytest.raises(UsageError, match="expected a (strength such as|finite)"):
        Strength.parse(text)


def test_every_block_gets_its_own_number():
    """By the names of the original layout, which number the blocks."""
    config = UNetConfig()
    names = expected_shapes("unet", config.to_diffusers())
    strength = Strength(blocks=tuple(map(float, range(26))))
    table, seen = unet_map(config), set()
    for name in names:
        theirs = table.to_theirs(name)
        kind, _, rest = theirs.partition(".")
        number = int(rest.split(".")[0]) if kind in ("input_blocks", "output_blocks") else 0
        start = {"input_blocks": 1, "middle_block": 13, "output_blocks": 14}.get(kind, 0)
        assert strength.at(f"unet.{name}", 2) == start + number, theirs
        seen.add(start + number)
    assert seen == set(range(26))
    assert Strength(0.5, 2.0, strength.blocks).at("text_encoder.x", 2) == 0
    assert Strength(0.5, 2.0, (3.0, *strength.blocks[1:])).at("text_encoder.x", 2) == 6


def test_blocks_of_another_unet():
    small = UNetConfig(block_out_channels=(64, 64), attention_levels=(True, False), num_heads=(8, 8))
    Strength(0.5).check(small)
    with pytest.raises(UsageError, match="12 . 1 . 12 blocks, this one has 6 . 1 . 6"):
        Strength.parse(f"blocks={NUMBERS}").check(small)


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "b:0.5").touch()
    assert parse_scaled("a.safetensors") == ("a.safetensors", 1.0)
    assert parse_scaled("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert parse_scaled("a.safetensors:unet=0.8,te=0.4") == ("a.safetensors", Strength(0.8, 0.4))
    assert parse_scaled("b:0.5") == ("b:0.5", 1.0)
    assert parse_scaled("C:\\a.safetensors") == ("C:\\a.safetensors", 1.0)
    with pytest.raises(UsageError, match="expected a strength such as 0.8, or unet=0.8,te=0.4.*found '0,8'"):
        parse_scaled("a.safetensors:0,8")

"""The tool that measures kinds of guidance: what it counts of images whose values are known."""

from __future__ import annotations

from importlib import import_module

import pytest
from PIL import Image

import tests.scenes  # noqa: F401  # puts tools/ on the path

guidance_curves = import_module("guidance_curves")


def test_every_image_is_judged_and_its_clipped_values_are_counted():
    asked = []

    def draw(prompts, **options):
        asked.append(options)
        return [Image.new("RGB", (128, 128), (0, 255, 128)) for _ in prompts]

    row = guidance_curves.measured(draw, "cfg++", 5.0, limit=1, steps=3)
    assert (row["images"], row["truth"]) == (6, 0.0)  # one prompt of each task, and nothing to be seen
    assert row["clipped"] == pytest.approx(2 / 3)
    assert {(o["guidance_kind"], o["guidance_scale"], o["steps"]) for o in asked} == {("cfg++", 0.4, 3)}

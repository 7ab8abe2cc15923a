"""The measures of edits on scenes, and the two tools that use them."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module

import pytest
from click.testing import CliRunner
from PIL import Image

from latentdiff.checkpoints.embedded import embedded_judge
from latentdiff.errors import DataError
from latentdiff.evaluation.judge import Judge
from tests.scenes import scene_folder  # puts tools/ on the path

editing_measures, sweep_features, compare_inversion = map(
    import_module, ("editing_measures", "sweep_features", "compare_inversion")
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scene_folder(tmp_path_factory.mktemp("scenes") / "test", 60, "--split", "test", "--seed", "1")


@pytest.fixture(scope="module")
def cases(scenes):
    return editing_measures.read_cases(scenes, 6)


def test_cases_change_the_object_s_colour_or_the_background_and_nothing_else(cases):
    for index, case in enumerate(cases):
        (need,) = case.target.include
        assert case.source_prompt != case.target.text
        assert case.target.text.startswith("a photo of a") and need.noun in case.source_prompt
        assert (need.colour is not None) or index % 2 == 0
        assert case.target.background in case.target.text


def test_too_few_scenes_are_an_error(scenes, tmp_path):
    with pytest.raises(DataError, match="expected 1000 scenes with one object"):
        editing_measures.read_cases(scenes, 1000)
    with pytest.raises(DataError, match="no metadata.jsonl"):
        editing_measures.read_cases(tmp_path, 1)


def test_structure_is_blind_to_colours_and_sees_places(cases):
    shares = editing_measures.calibration([case.source for case in cases])
    assert shares["the same"] == 0.0
    assert shares["hue turned by a third"] < 0.2
    assert shares["contrast halved"] < 0.2
    assert shares["moved by 8 pixels"] > 0.5


def test_colours_shared_are_a_share():
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    assert editing_measures.colour_likeness(red, red) == 1.0
    assert editing_measures.colour_likeness(red, blue) == 0.0


def test_the_judge_tells_sources_from_targets(cases):
    judge, images = Judge.load(embedded_judge()), [case.source for case in cases]
    assert not any(editing_measures.text_score(judge, images, cases))
    own = [replace(case, target=case.shown) for case in cases]
    assert sum(editing_measures.text_score(judge, images, own)) >= len(cases) - 1


@pytest.mark.slow
def test_both_tools_print_their_tables(scenes, tmp_path):
    out = tmp_path / "sweep.json"
    done = CliRunner().invoke(sweep_features.main, [str(scenes), "--count", "2", "--steps", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "| features of |" in done.output and "| none |" in done.output
    assert len(json.loads(out.read_text())) == 1 + done.output.count("| up_blocks.")
    sheet = tmp_path / "sheet.png"
    done = CliRunner().invoke(
        compare_inversion.main, [str(scenes), "--count", "2", "--steps", "2", "--sheet", str(sheet)]
    )
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if line.strip().startswith("| ")]
    assert len(lines) == 9 + 1 + 8 + 2  # ways, the floor, edits, two heads
    assert sheet.exists()

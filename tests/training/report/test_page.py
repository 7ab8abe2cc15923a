from __future__ import annotations

import base64
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from latentdiff.cli import cli
from latentdiff.errors import DataError
from latentdiff.recipe import Recipe
from latentdiff.training.report.log import RunLog
from latentdiff.training.report.memorization import check_copies
from latentdiff.training.report.page import write_report
from latentdiff.training.sheets import sample_folder, write_samples

PROMPTS = ["a <b>teapot</b> & a cup", "a red teapot"]
VALIDATION = {0: 0.5, 100: 0.4, 200: 0.3, 300: 0.35}
TRAINING = {0: 0.5, 100: 0.38, 200: 0.25, 300: 0.2}


def noise(seed: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def make(prompt, *, seed):
    images = [noise(one) for one in seed]
    for image, text, one in zip(images, prompt, seed, strict=True):
        recipe = Recipe(prompt=text, seed=one, steps=5, sampler="ddim", guidance_scale=5.0, width=32, height=32)
        image.info.update(recipe.to_chunks())
    return images


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "my-lora"
    for step in (100, 200, 300):
        for weights in ("ema", "raw"):
            write_samples(make, PROMPTS, sample_folder(run, step, weights), seed=step)
    entries = [{"step": step, "loss": 1 / (1 + step), "lr": 1e-3, "images_per_second": 12.5, "peak_memory_mb": 900 + step / 100}
               for step in range(20, 301, 20)]  # fmt: skip
    entries += [{"step": step, "val_mse": VALIDATION[step], "val_0_199": 0.1, "train_mse": TRAINING[step],
                 "gap": VALIDATION[step] - TRAINING[step]} for step in VALIDATION]  # fmt: skip
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 3')
    (run / "config.yaml").write_text(
        yaml.safe_dump({"method": "lora", "batch_size": 25, "model": None, "rank": 8, "prompts": PROMPTS})
    )
    (run / "data.json").write_text(json.dumps({"images": 24, "buckets": {"96x96": 20, "96x88": 4}}))
    (run / "checkpoints/step-00000200").mkdir(parents=True)
    samples = sorted((run / "samples/step-00000300/ema").glob("0*.png"))
    training = [noise(seed) for seed in (301, 7, 8, 9)]  # the second sample has seed 301
    check_copies(run, samples, ["copied.png", "b.png", "c.png", "d.png"], training.__getitem__, range(4))
    write_report(run)
    return run


class Reader(HTMLParser):
    """What a browser would fetch, and which elements there are; fails where elements are not closed in order."""

    VOID = {"meta", "img", "br"}

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.fetched, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(run):
    reader = Reader()
    html = (run / "report.html").read_text(encoding="utf-8")
    reader.feed(html)
    assert not reader.open
    return reader, html, " ".join(" ".join(reader.text).split())


def test_the_report_needs_nothing_from_outside(run):
    reader, html, _ = read(run)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert reader.fetched and all(source.startswith("data:image/") for source in reader.fetched)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert "url(" not in html and "@import" not in html


def test_the_best_step_is_that_of_the_lowest_validation_loss(run):
    _, _, text = read(run)
    assert "step 200 best by validation loss, 0.3; kept on disk" in text
    assert "from 0.5 at step 0 to 0.3 at step 200 (-40.0 %)" in text
    assert "rose again to 0.35; as the training loss still fell, the later steps learned by heart" in text


def test_facts_settings_and_data_are_there(run):
    _, _, text = read(run)
    for fact in ("300 steps", "10 min 00 s training time", "12.5 images per second", "903 MB peak memory"):
        assert fact in text
    for setting in ("rank 8", "model none", "images 24", "buckets.96x96 20"):
        assert setting in text


def test_images_are_embedded_and_prompts_escaped(run):
    reader, html, text = read(run)
    assert "a <b>teapot</b> & a cup" in text and "<b>teapot" not in html
    samples = [source for source in reader.fetched if source.startswith("data:image/png")]
    assert len(samples) == 3 * 2 * 2 + 2 * 2  # steps x prompts x weights, pairs of the copying check
    first = Image.open(io.BytesIO(base64.b64decode(samples[0].split(",")[1])))
    assert np.array_equal(np.asarray(first), np.asarray(noise(100)))


def test_the_copied_sample_is_named(run):
    _, html, text = read(run)
    assert "1 of 2 samples are suspiciously near a training image" in text
    assert "copied.png; distance 0: suspiciously near" in re.sub(r"\s+([;:])", r"\1", text)
    assert html.count('class="suspicious"') == 1


def test_large_images_are_made_smaller_and_steps_left_out_are_counted(run, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1}\n')
    for step in range(20):
        folder = sample_folder(tmp_path, step, "raw")
        folder.mkdir(parents=True)
        noise(step, size=320).save(folder / "00.png")
    write_report(tmp_path)
    reader, _, text = read(tmp_path)
    assert "12 more steps lie in samples/" in text and "step 0 step 3" in text and "step 19" in text
    image = next(source for source in reader.fetched if not source.startswith("data:image/svg"))  # the curves are SVG
    shown = Image.open(io.BytesIO(base64.b64decode(image.split(",")[1])))
    assert shown.size == (256, 256)


def test_a_run_without_validation_is_told_so(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 20, "loss": 0.5}\n')
    write_report(tmp_path)
    assert "Nothing was held out" in read(tmp_path)[2]


def test_no_run_and_broken_log_are_one_line_errors(tmp_path):
    with pytest.raises(DataError, match=r"expected the folder of a training run, found no log.jsonl"):
        write_report(tmp_path)
    (tmp_path / "log.jsonl").write_text('nonsense\n{"step": 1}\n')
    with pytest.raises(DataError, match="line 1: expected a JSON object with a step"):
        write_report(tmp_path)


def test_the_log_is_read_by_name():
    log = RunLog({"val_mse": [(0, 2.0), (5, float("nan")), (10, 1.0), (20, 1.0)]})
    assert log.best == (10, 1.0) and log.steps == 20 and log.last("val_mse") == 1.0 and log.last("loss") is None


def test_stages_have_a_part_each_in_the_order_of_their_beginning(tmp_path):
    for place, (stage, entry) in enumerate([("vae", {"psnr": 20.0}), ("diffusion", {"val_mse": 0.5})]):
        (tmp_path / stage).mkdir()
        log = tmp_path / stage / "log.jsonl"
        log.write_text(json.dumps({"step": 10, "loss": 0.5}) + "\n" + json.dumps({"step": 10, **entry}) + "\n")
        os.utime(log, (place, place))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"vae": {"batch_size": 4}, "seed": 3}))
    write_report(tmp_path)
    _, html, text = read(tmp_path)
    assert html.index("<h1>vae</h1>") < html.index("<h1>diffusion</h1>")
    assert "Nothing was held out" not in text and "seed 3" in text


def test_without_matplotlib_the_page_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text('{"step": 20, "loss": 0.5}\n')
    monkeypatch.setattr("latentdiff.training.report.charts.find_spec", lambda name: None)
    write_report(tmp_path)
    reader, _, text = read(tmp_path)
    assert "pip install 'latentdiff[report]'" in text and not reader.fetched


def test_the_command_writes_it_at_any_time(tmp_path):
    result = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert isinstance(result.exception, DataError)
    (tmp_path / "log.jsonl").write_text('{"step": 20, "loss": 0.5}\n')
    result = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert result.exit_code == 0 and result.output.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()

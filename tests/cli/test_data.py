"""`data check`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from latentdiff.training.data.transforms import prepare
from tests import peers
from tests.training.data.build import an_image, encoded, jsonl_folder, shard

SIZE = (80, 64)


@pytest.fixture
def folder(workplace):
    """Five images, one in another shape."""
    made = jsonl_folder(workplace / "pictures", 5, size=SIZE)
    an_image(40, (64, 128)).save(made / "4.png")
    return made


@pytest.fixture
def check(command):
    return lambda *arguments: command("data", "check", *arguments, "--model", peers.folder("sd1"), "--bucket-step", 8)


def captions(folder, texts):
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def test_a_good_folder(check, folder):
    done = check(folder)
    assert done.code == 0 and not done.errors
    assert done.out.splitlines() == [
        f"layout: {folder}: metadata.jsonl, 5 images",
        "images: 5 readable, 0 not",
        "captions: 5 for 5 images, 0 without",
        "sizes: 64 to 80 wide, 64 to 128 high",
        "buckets of 64², sides multiples of 8: 2",
        "      48x80      1 ████████",
        "      72x56      4 ██████████████████████████████",
        "training would start",
    ]


def test_findings(check, folder):
    an_image(0, SIZE).save(folder / "3.png")  # equal to the first
    an_image(1, SIZE).save(folder / "2.jpg", quality=90)
    captions(folder, ["a", "b", "a photo of the " + "cat " * 90 + "dog fox", "d", "e"])
    text = (folder / "metadata.jsonl").read_text().replace("2.png", "2.jpg")
    (folder / "metadata.jsonl").write_text(text)
    (folder / "4.png").write_bytes(b"")
    done = check(folder)
    assert done.code == 0
    for said in (
        "images: 4 readable, 1 not",
        "4.png: the file is empty",
        "captions too long for the model: 1\n  2.jpg loses: 'cat cat",
        "groups of equal images: 1\n  0.png, 3.png",
        "groups of nearly equal images: 1\n  1.png, 2.jpg",
        "note: " + f"{folder}: 1 images are not in metadata.jsonl and are left out, the first is 2.png",
    ):
        assert said in done.out
    assert "loses" not in check(folder, "--long-captions", "chunk").out


def test_pairs(check, folder):
    pairs = [("0.png", "1.png"), ("1.png", "0.png"), ("2.png", "2.png")]
    rows = [{"preferred": one, "rejected": other, "text": "x"} for one, other in pairs]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = check(folder)
    assert done.code == 0
    for said in (
        "metadata.jsonl, 3 pairs of images",
        "pairs of images: 3 readable, 0 not\ncaptions: 3 for 3 pairs of images",
        "pairs of equal images, from which nothing is learned: 1\n  2.png > 2.png\n",
        "pairs that contradict one another: 1\n  0.png > 1.png and 1.png > 0.png\n",
        "training would start",
    ):
        assert said in done.out
    (folder / "metadata.jsonl").write_text(json.dumps(rows[2]))
    done = check(folder)
    assert done.code == 1 and "training would fail: all pairs are of equal images" in done.out
    (folder / "1.png").write_bytes(encoded(an_image(1, SIZE))[:-60])  # seen only when it is decoded
    (folder / "metadata.jsonl").write_text(json.dumps(rows[0]))
    done = check(folder)
    assert done.code == 1 and "0.png > 1.png: " in done.out and "no image can be read" in done.out


def test_leakage(check, folder, workplace):
    held_out = jsonl_folder(workplace / "held-out", 2, size=SIZE, seed=3)
    done = check(folder, "--validation", held_out)
    assert done.code == 0
    assert "validation images that are in training too: 1\n  3.png = 0.png" in done.out


def test_unreadable_fails_when_strict(check, folder):
    (folder / "1.png").write_text("no image")
    assert check(folder).code == 0
    done = check(folder, "--strict")
    assert done.code == 1 and "training would fail: 1 images cannot be used, and --strict is set" in done.out


def test_missing_captions_fail(check, folder):
    captions(folder, ["a", "", "c", None, "e"])
    done = check(folder)
    assert done.code == 1
    assert "captions: 3 for 3 images, 2 without\n  1.png\n  3.png" in done.out
    assert "training would fail: 2 images have no caption" in done.out
    assert check(folder, "--allow-missing").code == 0


def test_too_small_fails_unless_enlarged(check, folder):
    for number in range(5):
        an_image(number, (1, 1)).save(folder / f"{number}.png")
    done = check(folder)
    assert done.code == 1 and "training would fail: no image is large enough for sides of 8 pixels" in done.out
    assert check(folder, "--upscale").code == 0


def test_extreme_shapes_are_reported(check, folder):
    Image.new("RGB", (20000, 100)).save(folder / "0.png")
    done = check(folder)
    assert done.code == 0 and "0.png: 20000x100 in 80x48, 1% left" in done.out


@pytest.mark.parametrize("make", ["empty", "captions only", "nothing"])
def test_nothing_to_train_on(check, workplace, make):
    folder = workplace / "bare"
    if make != "nothing":
        folder.mkdir()
    if make == "captions only":
        (folder / "a.txt").write_text("x")
    done = check(folder)
    assert done.code == 1 and len(done.errors) == 1 and "Traceback" not in done.err


def test_default_step_is_that_of_fine_tuning(command, folder):
    done = command("data", "check", folder, "--model", peers.folder("sd1"))
    assert "buckets of 64², sides multiples of 32: 1" in done.out and "training would start" in done.out


def test_shards(check, workplace):
    samples = {str(number): {"png": encoded(an_image(number, SIZE)), "txt": b"a cat"} for number in range(3)}
    shard(workplace / "shards" / "0.tar", samples)
    done = check(workplace / "shards")
    assert done.code == 0 and "1 WebDataset shards, 3 images" in done.out


def test_sheet(check, folder, workplace):
    done = check(folder, "--sheet", "sheet.png", "--sheet-images", 2, "--resolution", 64, "--max-aspect", 1)
    assert done.code == 0 and "VAE: " in done.out and done.out.endswith("sheet.png\n")
    sheet = np.asarray(Image.open(workplace / "sheet.png"))
    left = prepare(Image.open(folder / "0.png"), (64, 64))
    assert np.array_equal(sheet[6 : 6 + 64, 6 : 6 + 64], left)
    assert sheet[6 : 6 + 64, 6 + 64 + 4 :][:, :64].std() > 0


def test_wrong_usage(command, folder, workplace):
    assert command("data", "check").code == 2
    done = command("data", "check", folder, "--sheet", "sheet.tif")
    assert done.code == 2 and "found .tif" in done.err
    assert command("data", "check", folder, "--sheet", folder / "0.png" / "sheet.png").code == 2


def test_help(command):
    assert "check" in command("data", "--help").out
    assert "--validation" in command("data", "check", "--help").out

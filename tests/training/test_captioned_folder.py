import json
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from latentdiff.errors import DataError
from latentdiff.training.captioned_folder import Prefetch, decoded_images, load_image, read_folder
from tests.training.build import RESOLUTION, captioned_folder


def test_metadata_file(tmp_path):
    data = read_folder(captioned_folder(tmp_path / "a", 3))
    assert data.names == ("0.png", "1.png", "2.png")
    assert data.captions[1] == "a photo of the cat"
    assert data.path(2) == tmp_path / "a" / "2.png"
    assert len(read_folder(tmp_path / "a", limit=2)) == 2


def test_sidecar_files(tmp_path):
    for name, caption in (("b", "second\n"), ("a", "first")):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    data = read_folder(tmp_path)
    assert data.names == ("a.png", "b.png")
    assert data.captions == ("first", "second")


def make_file(folder):
    folder.write_text("x")


def make_empty(folder):
    folder.mkdir()


def make_uncaptioned(folder):
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "x.png")


def make_bad_line(folder):
    folder.mkdir()
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png"}\n')


def make_number_as_text(folder):
    folder.mkdir()
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": 3}\n')


def make_empty_metadata(folder):
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "found nothing"),
        (make_file, "found a file"),
        (make_empty, r"no images in .* looked for metadata.jsonl and for \.bmp"),
        (make_uncaptioned, "1 of 1 images .* have no caption, the first is x.png"),
        (make_bad_line, "line 2: expected"),
        (make_number_as_text, "line 1: file_name and text must be strings"),
        (make_empty_metadata, "is empty"),
    ],
)
def test_unusable_folders(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(DataError, match=message) as error:
        read_folder(tmp_path / "x")
    assert "\n" not in str(error.value)


def test_fingerprint_follows_the_images(tmp_path):
    folder = captioned_folder(tmp_path / "a", 3)
    before = read_folder(folder).fingerprint
    assert read_folder(folder).fingerprint == before
    assert read_folder(folder, limit=2).fingerprint != before
    os.utime(folder / "1.png", ns=(1, 1))
    assert read_folder(folder).fingerprint != before


def test_fingerprint_names_a_missing_image(tmp_path):
    folder = captioned_folder(tmp_path / "a", 3)
    (folder / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png is named in the captions but cannot be read"):
        _ = read_folder(folder).fingerprint


def test_images_are_upright_opaque_and_square(tmp_path):
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, :20, 0] = 255  # left half red
    image = Image.fromarray(wide)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    turned = load_image(tmp_path / "turned.png", 20)
    assert turned.shape == (20, 20, 3)
    assert turned[2, 10].tolist() == [255, 0, 0] and turned[17, 10].tolist() == [0, 0, 0]

    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png", 8) == 255).all()

    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert (load_image(tmp_path / "grey.png", 8) == 77).all()


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\nbroken"])
def test_unreadable_image_is_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the image .*x\.png") as error:
        load_image(tmp_path / "x.png", 8)
    assert "\n" not in str(error.value)


def test_decoded_images_are_cached_and_follow_the_data(tmp_path):
    folder = captioned_folder(tmp_path / "a", 3)
    images = decoded_images(read_folder(folder), RESOLUTION, tmp_path / "cache")
    for index in range(3):
        assert np.array_equal(images[index], np.asarray(Image.open(folder / f"{index}.png")))
    file = next((tmp_path / "cache").iterdir())
    written = file.stat().st_mtime_ns
    decoded_images(read_folder(folder), RESOLUTION, tmp_path / "cache")
    assert file.stat().st_mtime_ns == written
    Image.new("RGB", (RESOLUTION, RESOLUTION), "red").save(folder / "1.png")
    again = decoded_images(read_folder(folder), RESOLUTION, tmp_path / "cache")
    assert again[1, 0, 0].tolist() == [255, 0, 0]


def test_a_failed_decode_leaves_no_file(tmp_path):
    folder = captioned_folder(tmp_path / "a", 3)
    (folder / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2\.png"):
        decoded_images(read_folder(folder), RESOLUTION, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_space_for_decoded_images(tmp_path, monkeypatch):
    data = read_folder(captioned_folder(tmp_path / "a", 3))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match="free some space"):
        decoded_images(data, RESOLUTION, tmp_path / "cache")


def test_captions_may_hold_anything(tmp_path):
    folder = captioned_folder(tmp_path / "a", 1)
    caption = 'ein "Fuchs"\u2028 \\ 狐'
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": caption}, ensure_ascii=False))
    assert read_folder(folder).captions == (caption,)


def test_prefetch_keeps_the_order_and_works_ahead():
    made = []

    def make(key):
        time.sleep(0.01 * (3 - key % 3))
        made.append(key)
        return key * key

    items = iter(Prefetch(make, range(10), depth=3, workers=3))
    assert next(items) == 0
    time.sleep(0.2)
    assert 2 <= len(made) <= 4
    assert list(items) == [key * key for key in range(1, 10)]


def test_prefetch_raises_errors_where_the_item_is_used():
    def make(key):
        if key == 2:
            raise DataError("broken")
        return key

    items = iter(Prefetch(make, range(5)))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(DataError, match="broken"):
        next(items)


def test_closing_prefetch_ends_its_threads():
    items = iter(Prefetch(lambda key: key, range(100)))
    next(items)
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]

import numpy as np
import pytest
from PIL import Image, ImageOps

from latentdiff.errors import DataError
from latentdiff.training.data import read_dataset
from latentdiff.training.stages.pixels import decoded_images
from tests.training.build import RESOLUTION, captioned_folder


def test_decoded_images_are_cached_and_follow_the_data(tmp_path):
    folder = captioned_folder(tmp_path / "a", 3)
    images = decoded_images(read_dataset([folder], verify=False), RESOLUTION, tmp_path / "cache")
    for index in range(3):
        assert np.array_equal(images[index], np.asarray(Image.open(folder / f"{index}.png")))
    file = next((tmp_path / "cache").iterdir())
    written = file.stat().st_mtime_ns
    decoded_images(read_dataset([folder], verify=False), RESOLUTION, tmp_path / "cache")
    assert file.stat().st_mtime_ns == written
    Image.new("RGB", (RESOLUTION, RESOLUTION), "red").save(folder / "1.png")
    again = decoded_images(read_dataset([folder], verify=False), RESOLUTION, tmp_path / "cache")
    assert again[1, 0, 0].tolist() == [255, 0, 0]


def test_a_failed_decode_leaves_no_file(tmp_path):
    folder = captioned_folder(tmp_path / "a", 3)
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])  # the header is whole
    with pytest.raises(DataError, match=r"2\.png"):
        decoded_images(read_dataset([folder], verify=False), RESOLUTION, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_space_for_decoded_images(tmp_path, monkeypatch):
    data = read_dataset([captioned_folder(tmp_path / "a", 3)])
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match="free some space"):
        decoded_images(data, RESOLUTION, tmp_path / "cache")


def test_images_are_upright_and_cut_to_squares_in_the_middle(tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (20, 41, 3), dtype=np.uint8)
    image = Image.fromarray(random)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    folder = tmp_path / "a"
    folder.mkdir()
    image.save(folder / "0.png", exif=exif)
    (folder / "0.txt").write_text("a cat")
    (found,) = decoded_images(read_dataset([folder]), 12, tmp_path / "cache")
    expected = ImageOps.fit(image.transpose(Image.Transpose.ROTATE_270), (12, 12), Image.Resampling.LANCZOS)
    assert np.array_equal(found, np.asarray(expected))

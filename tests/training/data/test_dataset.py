import csv
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from latentdiff.errors import DataError, MissingDependencyError, UsageError
from latentdiff.training.data import DataSource, read_dataset
from tests.training.data.build import an_image, encoded, jsonl_folder, shard


def rows_folder(folder, rows):
    """A folder whose images are those that the rows name, without metadata."""
    folder.mkdir()
    for number, row in enumerate(rows):
        path = folder / row["file_name"]
        path.parent.mkdir(exist_ok=True)
        an_image(number).save(path)
    return folder


ROWS = [{"file_name": "b.png", "text": "second"}, {"file_name": "sub/a.png", "text": "first"}]


def test_jsonl_with_several_captions(tmp_path):
    rows = [{**ROWS[0], "text": ["one", " two\n words "]}, ROWS[1]]
    folder = rows_folder(tmp_path / "x", rows)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for source in (folder, folder / "metadata.jsonl"):
        data = read_dataset([source])
        assert data.names == ("b.png", "sub/a.png")
        assert data.captions == (("one", "two words"), ("first",))
        assert data.sizes == [(16, 12)] * 2
        assert np.array_equal(data.load(1), an_image(1))


def test_csv(tmp_path):
    folder = rows_folder(tmp_path / "x", ROWS)
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(ROWS)
    assert read_dataset([folder]).captions == (("second",), ("first",))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = rows_folder(tmp_path / "x", ROWS)
    table = pyarrow.table({"file_name": [row["file_name"] for row in ROWS], "prompt": [["second", "2"], ["first"]]})
    parquet.write_table(table, folder / "metadata.parquet")
    assert read_dataset([folder]).captions == (("second", "2"), ("first",))


def test_caption_column(tmp_path):
    rows = [{**row, "long": f"long {row['text']}"} for row in ROWS]
    folder = rows_folder(tmp_path / "x", rows)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read_dataset([folder]).captions[0] == ("second",)
    assert read_dataset([folder], caption_column="long").captions[0] == ("long second",)
    with pytest.raises(DataError, match=r"no column 'alt'; its columns are file_name, text, long"):
        read_dataset([folder], caption_column="alt")


def test_metadata_in_subfolders(tmp_path):
    jsonl_folder(tmp_path / "a", 2)
    jsonl_folder(tmp_path / "b", 2, seed=10)
    data = read_dataset([tmp_path])
    assert data.names == ("a/0.png", "a/1.png", "b/0.png", "b/1.png")
    assert data.captions[2] == ("picture 10",)


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_sidecars(tmp_path, suffix):
    for number, name in enumerate(("b.jpg", "a.PNG", ".hidden.png")):
        an_image(number).save(tmp_path / name)
        (tmp_path / name).with_suffix(suffix).write_text(f"\ufeffcaption of\n{name}\n", encoding="utf-8")
    data = read_dataset([tmp_path])
    assert data.names == ("a.PNG", "b.jpg") and data.captions[1] == ("caption of b.jpg",)
    assert data.layouts == [f"{tmp_path}: {suffix} files beside the images, 2 images"]


def test_train_beside_validation(tmp_path):
    jsonl_folder(tmp_path / "train", 2)
    jsonl_folder(tmp_path / "test", 1, seed=5)
    data = read_dataset([tmp_path])
    assert len(data) == 2 and data.notes == [f"{tmp_path}: took train/ and left test/"]


def test_shards(tmp_path):
    row = json.dumps({"caption": ["three", "3"], "long": "a long one"}).encode()
    shard(tmp_path / "0.tar", {"x/a": {"png": encoded(an_image(0)), "txt": b"one"}, "b.c": {"jpg": b"", "txt": b"lost"}})
    shard(tmp_path / "1.tar", {"c": {"json": row, "PNG": encoded(an_image(3))}})
    for source in (tmp_path, tmp_path / "{0..1}.tar"):
        data = read_dataset([source])
        assert data.names == ("0.tar/x/a", "1.tar/c")
        assert data.captions == (("one",), ("three", "3"))
        assert np.array_equal(data.load(1), an_image(3))
        # The key ends at the first dot, so that "b.c.jpg" is the field "c.jpg", which is no image.
        assert [problem.name for problem in data.problems] == ["0.tar/b"]
    data = read_dataset([tmp_path / "1.tar"], caption_column="long")
    assert data.captions == (("a long one",),)
    with pytest.raises(DataError, match=r"1 of 3 shards .* are not there, the first is .*2\.tar"):
        read_dataset([tmp_path / "{0..2}.tar"])


def test_damaged_shard(tmp_path):
    shard(tmp_path / "0.tar", {"a": {"png": encoded(an_image(0)), "txt": b"one"}})
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:-11000])
    with pytest.raises(DataError, match=r"0\.tar|truncated"):
        read_dataset([tmp_path], strict=True)


def test_saved_data_set(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [an_image(0), an_image(1)], "text": ["one", "two"]}
    table = datasets.Dataset.from_dict(
        columns, features=datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    )
    table.save_to_disk(tmp_path / "table")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "splits")
    table.to_parquet(tmp_path / "hub" / "train-00000.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("table", "hub", "splits"):
        data = read_dataset([tmp_path / name])
        assert data.captions == (("one",), ("two",)) and np.array_equal(data.load(1), an_image(1))
    assert data.notes == [f"{tmp_path / 'splits'}: took the split 'train' of train, test"]


def test_hub_id(monkeypatch):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [an_image(0), an_image(1)], "caption": ["one", "two"]}
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *names, **options: (
            asked.append((names, options)) or datasets.Dataset.from_dict(columns, features=features)
        ),
    )
    data = read_dataset(["someone/pictures"])
    assert asked == [(("someone/pictures",), {"split": "train"})]
    assert data.names == ("row 0", "row 1") and data.captions == (("one",), ("two",))
    assert (
        np.array_equal(data.load(1), an_image(1)) and data.fingerprint == read_dataset(["someone/pictures"]).fingerprint
    )


def test_data_set_without_images(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names, **options: datasets.Dataset.from_dict({"text": ["one"]})
    )
    with pytest.raises(DataError, match="expected a column of images in someone/texts, found the columns text"):
        read_dataset(["someone/texts"])

    def fail(*names, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="cannot load the data set someone/texts: ConnectionError: no network"):
        read_dataset(["someone/texts"])


def test_hub_id_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'latentdiff\[data\]'"):
        read_dataset(["someone/pictures"])


def make_file(folder):
    folder.write_text("x")


def make_empty(folder):
    folder.mkdir()


def make_uncaptioned(folder):
    folder.mkdir()
    an_image().save(folder / "x.png")
    (folder / "metadata.json1").write_text("{}")


def make_unmatched(folder):
    folder.mkdir()
    an_image().save(folder / "x.png")
    (folder / "y.txt").write_text("a caption")


def make_half_captioned(folder):
    make_unmatched(folder)
    an_image().save(folder / "y.png")


def make_only_captions(folder):
    folder.mkdir()
    (folder / "a.txt").write_text("x")


def make_bad_line(folder):
    jsonl_folder(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n{"file_name": \n')


def make_number_as_text(folder):
    jsonl_folder(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": 3}\n')


def make_empty_metadata(folder):
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("")


def make_unreadable(folder):
    jsonl_folder(folder, 1)
    (folder / "0.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "found no such folder"),
        (make_file, "found the file"),
        (make_empty, r"no images in .*: looked for metadata.jsonl, .*; found nothing"),
        (
            make_uncaptioned,
            r"no captions in .*found 1 metadata.json1, 1 \.png; metadata.json1 is not one of these names",
        ),
        (
            make_unmatched,
            r"no captions in .*found 1 \.png, 1 \.txt; y.txt belongs to no image, the first image is x.png",
        ),
        (make_half_captioned, r"1 of 2 images .* have no caption, the first is x.png"),
        (make_only_captions, r"no images in .*found 1 \.txt"),
        (make_bad_line, "row 2 is not valid JSON .*; expected"),
        (make_number_as_text, "row 1: expected a caption as text or a list of text, found '3'"),
        (make_empty_metadata, "is empty"),
        (make_unreadable, "none of 1 images can be used, the first is 0.png: the file is empty"),
    ],
)
def test_unusable_sources(tmp_path, make, message):
    make(tmp_path / "x.y")
    with pytest.raises(DataError, match=message) as error:
        read_dataset([tmp_path / "x.y"])
    assert "\n" not in str(error.value)


def test_missing_captions_may_be_allowed(tmp_path):
    make_half_captioned(tmp_path / "x")
    assert read_dataset([tmp_path / "x"], allow_missing=True).captions == (("",), ("a caption",))


def bad_folder(folder):
    jsonl_folder(folder, 4)
    (folder / "1.png").write_text("I am no image")
    os.remove(folder / "2.png")
    data = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(data[: len(data) * 2 // 3])
    return folder


def test_bad_images_are_left_out(tmp_path):
    data = read_dataset([bad_folder(tmp_path / "x")])
    assert data.names == ("0.png",) and len(data.sizes) == len(data.captions) == 1
    problems = {problem.name: problem.reason for problem in data.problems}
    assert set(problems) == {"1.png", "2.png", "3.png"}
    assert "text file" in problems["1.png"] and "no such file" in problems["2.png"] and "truncated" in problems["3.png"]


def test_bad_images_are_errors_when_strict(tmp_path):
    with pytest.raises(DataError, match="3 images cannot be used, the first is 2.png"):
        read_dataset([bad_folder(tmp_path / "x")], strict=True)


def test_headers_alone_do_not_show_what_is_cut_off(tmp_path):
    data = read_dataset([bad_folder(tmp_path / "x")], verify=False)
    assert data.names == ("0.png", "3.png")
    with pytest.raises(DataError, match=r"3\.png.*truncated"):
        data.load(1)


def test_one_bad_caption_costs_one_image_and_all_are_named(tmp_path):
    for index in range(4):
        an_image(index).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_bytes("grün".encode("latin-1" if index in (1, 3) else "utf-8"))
    data = read_dataset([tmp_path])
    assert data.names == ("0.png", "2.png")
    assert [(problem.name, "not UTF-8" in problem.reason) for problem in data.problems] == [("1.png", True), ("3.png", True)]
    for index in (0, 2):
        os.remove(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match=r"no image of .* can be used; the first: .*1\.txt is not UTF-8"):
        read_dataset([tmp_path])


def test_endings_count_in_any_case_and_unread_images_are_named(tmp_path):
    an_image().save(tmp_path / "a.PNG")
    (tmp_path / "a.TXT").write_text("a caption")
    (tmp_path / "b.HEIC").write_bytes(b"?")
    (tmp_path / "c.Txt").write_text("alone")
    data = read_dataset([tmp_path])
    assert data.names == ("a.PNG",) and data.captions == (("a caption",),)
    assert any("1 .heic files are left out: convert them to one of .bmp" in note for note in data.notes)
    assert any("1 captions have no image, the first is c.Txt" in note for note in data.notes)


def test_several_sources(tmp_path):
    sources = [
        DataSource(jsonl_folder(tmp_path / "a", 1), repeats=3),
        DataSource(jsonl_folder(tmp_path / "b", 2), weight=0.5),
    ]
    data = read_dataset(sources)
    assert data.names == ("a/0.png", "b/0.png", "b/1.png")
    assert data.repeats == [3, 1, 1] and data.weights == [1, 0.5, 0.5]


@pytest.mark.parametrize("options", [{"repeats": 0}, {"weight": 0.0}, {"weight": float("nan")}])
def test_wrong_weights(options):
    with pytest.raises(UsageError):
        DataSource("x", **options)


def test_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="found none"):
        read_dataset([])
    with pytest.raises(UsageError, match="expected a colour"):
        read_dataset([jsonl_folder(tmp_path / "x")], background="whitish")


def test_background(tmp_path):
    folder = jsonl_folder(tmp_path / "x", 1)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(folder / "0.png")
    assert read_dataset([folder], background="red").load(0).getpixel((0, 0)) == (255, 0, 0)


def test_fingerprint_follows_the_images(tmp_path):
    folder = jsonl_folder(tmp_path / "x", 3)
    first = read_dataset([folder]).fingerprint
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace("picture", "photo"))
    assert read_dataset([folder]).fingerprint == first
    assert read_dataset([folder], background="black").fingerprint != first
    os.utime(folder / "1.png", ns=(1, 1))
    assert read_dataset([folder]).fingerprint == first
    about = os.stat(folder / "1.png")
    an_image(7).save(folder / "1.png")  # as old as before
    os.utime(folder / "1.png", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert read_dataset([folder]).fingerprint != first


def test_an_index_spares_reading_the_images_again(tmp_path, monkeypatch):
    folder, index = bad_folder(tmp_path / "x"), tmp_path / "index"
    an_image(9).save(folder / "2.png")
    first = read_dataset([folder], index=index)
    with monkeypatch.context() as patch:
        patch.setattr("latentdiff.training.data.dataset.read_image", None)
        again = read_dataset([folder], index=index)
    assert again == first and again.fingerprint == first.fingerprint and len(again.problems) == 2
    os.remove(folder / "1.png")
    an_image(1, (8, 8)).save(folder / "1.png")
    assert read_dataset([folder], index=index).sizes == [(16, 12), (8, 8), (16, 12)]


def test_a_limit_takes_the_first_images(tmp_path):
    folder = jsonl_folder(tmp_path / "a", 3)
    whole, part = read_dataset([folder]), read_dataset([folder], limit=2)
    assert part.names == whole.names[:2] and len(part.sizes) == len(part.repeats) == 2
    assert part.fingerprint != whole.fingerprint


def test_a_csv_caption_with_a_bare_comma_is_not_cut(tmp_path):
    folder = rows_folder(tmp_path / "x", ROWS)
    (folder / "metadata.csv").write_text("file_name,text\nb.png,a cat, asleep\nsub/a.png,a dog\n")
    with pytest.raises(DataError, match="row 1 has more cells than there are columns"):
        read_dataset([DataSource(str(folder))])
    (folder / "metadata.csv").write_text('file_name,text\nb.png,"a cat, asleep"\nsub/a.png,a dog\n')
    assert [entry.captions for entry in read_dataset([DataSource(str(folder))]).entries][0] == ("a cat, asleep",)


def pairs_folder(folder, rows):
    folder.mkdir()
    for row in rows:
        for name in (row["preferred"], row["rejected"]):
            an_image(len(name), size=(24, 16) if "large" in name else (16, 20)).save(folder / name)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_pairs(tmp_path):
    rows = [{"preferred": "a.png", "rejected": "bb_large.png", "text": "one", "weight": 2}]
    rows += [{"preferred": "bb_large.png", "rejected": "ccc.png", "text": "two"}]
    folder = pairs_folder(tmp_path / "x", rows)
    data = read_dataset([folder], pairs=True)
    assert data.paired and data.names == ("a.png > bb_large.png", "bb_large.png > ccc.png")
    assert data.captions == (("one",), ("two",)) and data.weights == [2, 1]
    assert data.sizes == [(16, 16)] * 2  # what both images cover
    assert data.load(0).size == (16, 20) and data.load(0, rejected=True).size == (24, 16)
    assert "2 pairs of images" in data.layouts[0]
    before = data.fingerprint
    an_image(9).save(folder / "ccc.png")
    assert read_dataset([folder], pairs=True).fingerprint != before


def test_pairs_that_cannot_be_read_are_left_out_whole(tmp_path):
    rows = [{"preferred": f"{n}a.png", "rejected": f"{n}b.png", "text": "x"} for n in range(3)]
    folder = pairs_folder(tmp_path / "x", rows)
    (folder / "0b.png").write_bytes(b"no image")
    (folder / "1a.png").unlink()
    data = read_dataset([folder], pairs=True)
    assert data.names == ("2a.png > 2b.png",)
    assert {problem.name: problem.reason for problem in data.problems} == {
        "1a.png": "metadata.jsonl names it, but there is no such file",
        "0a.png > 0b.png": data.problems[-1].reason,
    }
    assert "0b.png" in data.problems[-1].reason


def test_pairs_where_none_are_wanted_and_the_other_way_round(tmp_path):
    folder = pairs_folder(tmp_path / "x", [{"preferred": "a.png", "rejected": "bb.png", "text": "one"}])
    with pytest.raises(DataError, match="holds pairs .*--loss dpo"):
        read_dataset([folder])
    single = rows_folder(tmp_path / "y", ROWS)
    (single / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    with pytest.raises(DataError, match="expected pairs .*preferred, rejected and text"):
        read_dataset([single], pairs=True)
    (folder / "metadata.jsonl").write_text('{"preferred": "a.png", "text": "one"}')
    with pytest.raises(DataError, match="row 1: expected a 'rejected'"):
        read_dataset([folder], pairs=True)

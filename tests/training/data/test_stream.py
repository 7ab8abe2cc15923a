import itertools
import resource
import tarfile
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest

from latentdiff.errors import DataError, UsageError
from latentdiff.training.data.shards import members_of
from latentdiff.training.data.stream import Sample, ShardStream, _samples
from tests.training.data.build import an_image, encoded, shard

pytest.importorskip("webdataset")


def shards(folder: Path, count: int, each: int) -> tuple[Path, ...]:
    """Samples whose image is one byte long, so that nothing is decoded."""
    return tuple(
        shard(folder / f"{number:03}.tar", {f"{number:03}-{i:05}": {"png": b"x", "txt": b"a cat"} for i in range(each)})
        for number in range(count)
    )


def name(sample: Sample, step: int, row: int) -> str:
    return sample.name


def with_place(sample: Sample, step: int, row: int) -> tuple[str, int, int]:
    return sample.name, step, row


def unless_it_ends_with_3(sample: Sample, step: int, row: int) -> str:
    if sample.name.endswith("3"):
        raise DataError(f"cannot read {sample.name}")
    return sample.name


def names(stream: ShardStream, steps: int, **options) -> list[list[str]]:
    return [batch.items for batch in itertools.islice(stream.batches(name, **options), steps)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> tuple[Path, ...]:
    return shards(tmp_path_factory.mktemp("shards"), 12, 25)


def test_lanes(paths):
    lanes = {(batch, count): ShardStream(paths[:count], batch, 0).lanes for batch in (8, 7) for count in (1, 3, 8, 12)}
    assert lanes == {(8, 1): 1, (8, 3): 2, (8, 8): 8, (8, 12): 8, (7, 1): 1, (7, 3): 1, (7, 8): 7, (7, 12): 7}


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_every_sample_once_an_epoch(paths, batch_size):
    """Lanes divide the shards here, so that epochs end at the same step in all of them."""
    stream = ShardStream(paths, batch_size, 0)
    steps = 300 // batch_size
    seen = names(stream, 2 * steps)
    first, second = (list(itertools.chain(*seen[start : start + steps])) for start in (0, steps))
    assert len(set(first)) == len(first) == 300 and set(first) == set(second)
    assert first != second and sorted(first) != first


def test_order_depends_on_the_seed(paths):
    assert (
        names(ShardStream(paths, 4, 0), 9) == names(ShardStream(paths, 4, 0), 9) != names(ShardStream(paths, 4, 1), 9)
    )


@pytest.mark.parametrize("batch_size", [4, 5])
def test_goes_on_at_any_step(paths, batch_size):
    stream = ShardStream(paths, batch_size, 3, buffer=40)
    whole = names(stream, 200)
    for first in (1, 7, 74, 75, 76, 180):
        assert names(stream, 20, first_step=first) == whole[first : first + 20]


@pytest.mark.parametrize("count", [1, 2, 12])
def test_processes_share_the_batch(paths, count):
    """Whatever the number of shards, the parts of the processes make up the batch of one process."""
    stream = ShardStream(paths[:count], 8, 0)
    whole = names(stream, 30)
    parts = [names(stream, 30, rows=range(start, start + 2)) for start in (0, 2, 4, 6)]
    assert [sum(part, []) for part in zip(*parts, strict=True)] == whole


def test_workers_change_nothing(paths):
    stream = ShardStream(paths, 6, 0)
    alone = [batch.items for batch in itertools.islice(stream.batches(with_place, first_step=5, rows=range(1, 6)), 10)]
    shared = stream.batches(with_place, first_step=5, rows=range(1, 6), workers=2)
    assert [batch.items for batch in itertools.islice(shared, 10)] == alone
    assert [place[1:] for place in alone[2]] == [(7, row) for row in range(1, 6)]


def test_a_process_opens_only_its_own_shards(paths, monkeypatch):
    opened = []
    monkeypatch.setattr("latentdiff.training.data.stream._samples", lambda path: opened.append(path) or _samples(path))
    names(ShardStream(paths, 12, 0), 20, rows=range(3))
    assert len(opened) == 3


def test_shuffling_within_the_buffer(paths):
    lane = list(itertools.islice(ShardStream(paths[:1], 1, 0, buffer=10).lane(0), 25))
    order = [int(sample.name[-5:]) for sample in lane]
    assert sorted(order) == list(range(25)) != order
    # Nothing comes before it was read: with a buffer of 10, sample k at place k - 9 or later.
    assert all(place >= number - 10 for place, number in enumerate(order))


def test_unusable_samples_are_replaced_and_named(paths):
    stream = ShardStream(paths, 4, 0)
    whole = names(stream, 40)
    batches = list(itertools.islice(stream.batches(unless_it_ends_with_3), 40))
    later = list(itertools.islice(stream.batches(unless_it_ends_with_3, first_step=20), 20))
    for before, after in zip(whole, batches, strict=True):
        bad = [sample for sample in before if sample.endswith("3")]
        assert [problem.name for problem in after.problems] == bad
        assert all(new == old or old in bad for new, old in zip(after.items, before, strict=True))
        assert not any(sample.endswith("3") for sample in after.items)
    assert sum(len(batch.problems) for batch in batches) > 5
    assert [batch.items for batch in later] == [batch.items for batch in batches[20:]]


def refuse(sample: Sample, step: int, row: int) -> None:
    sample.image()


def test_nothing_usable(paths):
    with pytest.raises(DataError, match="100 samples in a row cannot be used, the last because: cannot read"):
        next(ShardStream(paths, 4, 0).batches(refuse))


def test_damaged_shards(tmp_path):
    good, bad, empty = shards(tmp_path, 3, 30)
    bad.write_bytes(bad.read_bytes()[:9000])
    with tarfile.open(empty, "w"):
        pass
    for paths, message in (((bad,), r"cannot read the shard .*001\.tar"), ((empty,), "no samples in 1 shards")):
        with pytest.raises(DataError, match=message):
            names(ShardStream(paths, 4, 0), 20)
    assert len(set(itertools.chain(*names(ShardStream((good, empty), 1, 0), 30)))) == 30


def test_samples(tmp_path):
    path = shard(
        tmp_path / "0.tar",
        {
            "x.y/a": {"PNG": encoded(an_image(1)), "json": b'{"caption": ["one", "two"], "long": "three"}'},
            "x.y/b": {"cls": b"1"},
            "__notes__/a": {"txt": b"a note of the library's own"},
            "c": {"seg.png": encoded(an_image(2)), "jpg": b"", "txt": b"four"},
        },
    )
    first, second, third = _samples(path)
    assert np.array_equal(first.image(), an_image(1))
    assert first.captions() == ("one", "two") and first.captions("long") == ("three",)
    assert third.captions() == ("four",)
    with pytest.raises(DataError, match=r"0.tar/x.y/b has no image; its fields are cls"):
        second.image()
    with pytest.raises(DataError, match=r"0.tar/x.y/b has no caption"):
        second.captions()
    assert second.captions(allow_missing=True) == ("",)
    with pytest.raises(DataError, match=r"cannot read 0.tar/c as an image: the file is empty"):
        third.image()
    # The index sees the samples that the library sees.
    expected = [(sample.name.removeprefix("0.tar/"), set(sample.fields)) for sample in (first, second, third)]
    assert [(key, set(members)) for key, members in members_of(path)] == expected


def test_wrong_usage(paths):
    for arguments in (((), 4, 0), (paths, 0, 0), (paths, 4, 0, 0)):
        with pytest.raises(UsageError):
            ShardStream(*arguments)
    for rows in (range(0), range(2, 5), range(-1, 2)):
        with pytest.raises(UsageError, match="rows of a batch of 4"):
            ShardStream(paths, 4, 0).batches(name, rows=rows)


def resident() -> int:
    """Bytes of memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
def test_200_000_samples_in_flat_memory(tmp_path):
    """Images of 2 KB each, 400 MB in all, 4096 of them in the buffers: memory stays where it was after the first
    tenth."""
    content = {"png": encoded(an_image(0, (24, 24))), "txt": b"a small image"}
    paths = tuple(
        shard(tmp_path / f"{number:03}.tar", {f"{number:03}-{i:04}": content for i in range(4000)})
        for number in range(50)
    )
    stream = ShardStream(paths, 40, 0)
    batches = stream.batches(lambda sample, step, row: (sample.name, sample.image().size))
    seen: Counter[str] = Counter()
    levels, last = [], deque(maxlen=100)
    steps = 200_000 // 40
    for step, batch in enumerate(itertools.islice(batches, steps)):
        seen.update(item[0][:7] for item in batch.items)  # the shard alone: names of all samples would be what grows
        last.append([item[0] for item in batch.items])
        if step % (steps // 10) == steps // 10 - 1:
            levels.append(resident())
    assert sum(seen.values()) == 200_000 and len(seen) == 50
    assert max(levels) - levels[0] < 20e6, [level / 1e6 for level in levels]
    assert names(stream, 100, first_step=steps - 100) == list(last)

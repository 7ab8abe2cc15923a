"""WebDataset shards as an endless stream of batches, without an index in memory, by the webdataset library.

The order is a pure function of the seed and the batch size. It has nothing to do with how many processes and workers
read, and the batch of any step can be found without replaying the steps before it, so that a resumed run needs nothing
but its step.

A batch is divided over lanes, as many as the batch size and the number of shards allow. All lanes together go through
the shards in one endless sequence, every epoch of which is a new permutation; lane j of L takes the shards number j, j
+ L, j + 2 L, ... of it. Within a shard samples are shuffled in a buffer. A process reads the lanes of its own rows
only; a resumed one passes over whole shards by their headers and reads at most one shard a lane again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from latentdiff.errors import DataError, MissingDependencyError, UsageError
from latentdiff.training.data.entries import MemberOrigin, Unusable
from latentdiff.training.data.images import BACKGROUND, read_image
from latentdiff.training.data.randomness import SampleOrder, torch_seed
from latentdiff.training.data.shards import IMAGE_FIELDS, is_text, members_of, read_caption, sample_captions

BUFFER = 4096  # samples that are shuffled together, over all lanes
_GIVE_UP = 100  # samples in a row that cannot be read

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """One sample of a shard, not decoded."""

    name: str
    fields: dict[str, bytes]

    def image(self, background: str = BACKGROUND) -> Image.Image:
        """Decode the image as `images.read_image` does.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        encoded = next((self.fields[name] for name in IMAGE_FIELDS if name in self.fields), None)
        if encoded is None:
            raise DataError(f"the sample {self.name} has no image; its fields are {', '.join(self.fields)}")
        return read_image(encoded, self.name, background=background)

    def captions(self, column: str | None = None, *, allow_missing: bool = False) -> tuple[str, ...]:
        """The captions; `("",)` where there are none and that is allowed.

        Raises:
            DataError: there are none.
        """
        captions = sample_captions(self.fields, column, self.name)
        if captions or allow_missing:
            return captions or ("",)
        raise DataError(f"the sample {self.name} has no caption; its fields are {', '.join(self.fields)}")


@dataclass
class StreamBatch(Generic[Item]):
    """What was made of some rows of a batch, and which samples could not be used."""

    items: list[Item]
    problems: list[Unusable] = field(default_factory=list)


@dataclass(frozen=True)
class ShardStream:
    """The endless order of the samples of some shards.

    Args:
        shards: local tar files, see `shards.find_shards`.
        batch_size: of the global batch.
        seed: of the order.
        buffer: samples that are shuffled together, over all lanes; encoded images of so many samples are in memory.

    Raises:
        MissingDependencyError: webdataset is not installed.
    """

    shards: tuple[Path, ...]
    batch_size: int
    seed: int
    buffer: int = BUFFER

    def __post_init__(self) -> None:
        if not self.shards or self.batch_size < 1 or self.buffer < 1:
            raise UsageError("expected at least one shard, a batch size and a buffer of at least 1")
        _library()

    @property
    def lanes(self) -> int:
        """Parts of a batch that different shards supply: the largest divisor of the batch size for which there are
        shards."""
        return next(n for n in range(min(self.batch_size, len(self.shards)), 0, -1) if self.batch_size % n == 0)

    def batches(
        self,
        make: Callable[[Sample, int, int], Item],
        *,
        first_step: int = 0,
        rows: range | None = None,
        workers: int = 0,
    ) -> Iterator[StreamBatch[Item]]:
        """What `make(sample, step, row)` makes of the rows of each batch from `first_step` on, for ever.

        A sample of which `make` raises DataError is left out; the next one of its lane that can be used stands in for
        it.

        Args:
            make: must be picklable where there are workers; row is the place in the global batch.
            first_step: where to go on.
            rows: of the global batch, those of this process; all by default.
            workers: processes that read and make; 0 does it in this one.

        Raises:
            DataError: a shard is damaged, or a hundred samples in a row cannot be used.
        """
        rows = range(self.batch_size) if rows is None else rows
        if not rows or rows.step != 1 or not 0 <= rows.start < rows.stop <= self.batch_size:
            raise UsageError(f"expected rows of a batch of {self.batch_size}, found {rows.start} to {rows.stop}")
        if not workers:
            return self._read(make, first_step, rows)
        return self._read_in_workers(make, first_step, rows, min(workers, len(rows)))

    def _read(
        self, make: Callable[[Sample, int, int], Item], first_step: int, rows: range
    ) -> Iterator[StreamBatch[Item]]:
        share = self.batch_size // self.lanes  # rows of a lane
        numbers = range(rows.start // share, (rows.stop - 1) // share + 1)
        lanes = {number: _Lane(self.lane(number, first_step * share)) for number in numbers}
        step = first_step
        while True:
            batch: StreamBatch[Item] = StreamBatch([])
            for number, lane in lanes.items():
                for row in range(number * share, (number + 1) * share):
                    if row in rows:
                        batch.items.append(lane.make(make, step, row, batch.problems))
                    lane.advance()
            yield batch
            step += 1

    def _read_in_workers(
        self, make: Callable[[Sample, int, int], Item], first_step: int, rows: range, workers: int
    ) -> Iterator[StreamBatch[Item]]:
        bounds = [rows.start + len(rows) * worker // workers for worker in range(workers + 1)]
        parts = [range(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
        # Each worker makes its rows of every batch; the loader hands them out in turn.
        loader = iter(DataLoader(_Parts(self, make, first_step, parts), batch_size=None, num_workers=workers))
        while True:
            found = list(islice(loader, workers))
            yield StreamBatch(
                [item for part in found for item in part.items],
                [problem for part in found for problem in part.problems],
            )

    def lane(self, lane: int, position: int = 0) -> Iterator[Sample]:
        """Samples of a lane from a position on, for ever."""
        order = SampleOrder(len(self.shards), torch_seed(self.seed, "shards"))
        size = max(1, self.buffer // self.lanes)
        number, empty = 0, 0
        while empty < len(self.shards):
            place = lane + number * self.lanes
            shard = self.shards[int(order.indices(place, 1)[0])]
            held = 0
            if position and position >= (held := _count(shard)):
                position -= held
            else:
                rng = random.Random(torch_seed(self.seed, "samples", place))
                mixed = _library().filters.shuffle(size, initial=size, rng=rng)(_samples(shard))
                for sample in islice(mixed, position, None):
                    held += 1
                    yield sample
                position = 0
            number, empty = number + 1, 0 if held else empty + 1
        raise DataError(f"no samples in {len(self.shards)} shards, the first is {self.shards[0]}")


class _Lane:
    """Samples of a lane with a look ahead to those that stand in for others."""

    def __init__(self, samples: Iterator[Sample]) -> None:
        self._samples = samples
        self._ahead: deque[Sample] = deque()

    def make(self, make: Callable[[Sample, int, int], Item], step: int, row: int, problems: list[Unusable]) -> Item:
        """Make an item of the sample in turn, or of the first after it that can be used."""
        for place in range(_GIVE_UP):
            while len(self._ahead) <= place:
                self._ahead.append(next(self._samples))
            sample = self._ahead[place]
            try:
                return make(sample, step, row)
            except DataError as error:
                if place == 0:
                    problems.append(Unusable(sample.name, str(error)))
                last = error
        raise DataError(f"{_GIVE_UP} samples in a row cannot be used, the last because: {last}") from last

    def advance(self) -> None:
        if self._ahead:
            self._ahead.popleft()
        else:
            next(self._samples)


class _Parts(IterableDataset):
    """What the workers of a loader run: each its own part of the rows."""

    def __init__(
        self, stream: ShardStream, make: Callable[[Sample, int, int], Any], first_step: int, parts: list[range]
    ) -> None:
        self._stream, self._make, self._first_step, self._parts = stream, make, first_step, parts

    def __iter__(self) -> Iterator[StreamBatch[Any]]:
        return self._stream._read(self._make, self._first_step, self._parts[get_worker_info().id])


def _library() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise MissingDependencyError("streaming shards needs webdataset; pip install 'latentdiff[data]'") from error
    return webdataset


@cache
def _count(shard: Path) -> int:
    """Samples of a shard, from its headers."""
    return sum(1 for _ in members_of(shard))


def _samples(shard: Path) -> Iterator[Sample]:
    """Samples of a shard in the order of the file.

    Raises:
        DataError: it is damaged.
    """
    for key, members in members_of(shard):
        yield Sample(
            f"{shard.name}/{key}",
            {
                name: read_caption(shard, member)
                if is_text(name)
                else MemberOrigin(shard, member.start, member.size).source()
                for name, member in members.items()
            },
        )

"""What training will see of a data set: the report of `latentdiff data check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from latentdiff.errors import DataError
from latentdiff.training.data.buckets import MAX_ASPECT, STEP, Size, assign, kept_share
from latentdiff.training.data.dataset import Dataset, each, problem
from latentdiff.training.data.duplicates import Look, look_at, near, same, shared
from latentdiff.training.data.entries import Unusable

SHOWN = 5  # examples of each finding
MUCH_CROPPED = 0.7  # an image of which less than this share is left is worth a word


@dataclass(frozen=True)
class Preprocessing:
    """How training will scale images and what it demands."""

    resolution: int
    step: int = STEP
    max_aspect: float = MAX_ASPECT
    upscale: bool = False
    strict: bool = False
    allow_missing: bool = False


@dataclass
class CheckReport:
    """What was found; `failures` are the reasons why training would not start."""

    layouts: list[str]
    images: int
    captioned: int
    captions: int
    notes: list[str]
    problems: list[Unusable]
    settings: Preprocessing
    sizes: list[Size] = field(default_factory=list)
    buckets: list[Size | None] = field(default_factory=list)
    cropped: list[str] = field(default_factory=list)
    too_small: list[str] = field(default_factory=list)
    uncaptioned: list[str] = field(default_factory=list)
    truncated: list[tuple[str, str]] = field(default_factory=list)  # name, lost words
    same: list[list[str]] = field(default_factory=list)
    near: list[list[str]] = field(default_factory=list)
    leaked: list[tuple[str, str]] = field(default_factory=list)  # training image, validation image
    pairs: int = 0  # of a preferred and a rejected image
    halves: list[str] = field(default_factory=list)  # pairs of one image with itself
    contrary: list[tuple[str, str]] = field(default_factory=list)  # pairs that say the opposite of one another

    @property
    def failures(self) -> list[str]:
        """Why training would fail; empty if it would not."""
        found = []
        if not self.images:
            found.append("no image can be read")
        if self.images and not any(self.buckets):
            found.append(f"no image is large enough for sides of {self.settings.step} pixels; take --upscale")
        if self.uncaptioned and not self.settings.allow_missing:
            found.append(f"{len(self.uncaptioned)} images have no caption; write them, or take --allow-missing")
        if self.images and len(self.halves) == self.images:
            found.append("all pairs are of equal images")
        if self.problems and self.settings.strict:
            found.append(f"{len(self.problems)} images cannot be used, and --strict is set")
        return found

    def lines(self) -> Iterator[str]:
        """The report as text."""
        yield from (f"layout: {layout}" for layout in self.layouts)
        kind = "pairs of images" if self.pairs else "images"
        yield f"{kind}: {self.images} readable, {len(self.problems)} not"
        yield from _examples(f"{item.name}: {item.reason}" for item in self.problems)
        yield f"captions: {self.captions} for {self.captioned} {kind}, {len(self.uncaptioned)} without"
        yield from _examples(self.uncaptioned)
        yield from (f"note: {note}" for note in self.notes[:SHOWN])
        if self.sizes:
            yield from self._size_lines()
        yield from _finding(
            "captions too long for the model", [f"{name} loses: {_cut(lost)}" for name, lost in self.truncated]
        )
        yield from _finding("pairs of equal images, from which nothing is learned", self.halves)
        yield from _finding("pairs that contradict one another", [" and ".join(two) for two in self.contrary])
        yield from _finding("groups of equal images", [", ".join(group[:SHOWN]) for group in self.same])
        yield from _finding("groups of nearly equal images", [", ".join(group[:SHOWN]) for group in self.near])
        yield from _finding("validation images that are in training too", [" = ".join(pair) for pair in self.leaked])
        yield from (f"training would fail: {failure}" for failure in self.failures)
        if not self.failures:
            yield "training would start"

    def _size_lines(self) -> Iterator[str]:
        widths, heights = zip(*self.sizes, strict=True)
        yield f"sizes: {min(widths)} to {max(widths)} wide, {min(heights)} to {max(heights)} high"
        counts = Counter(bucket for bucket in self.buckets if bucket is not None)
        yield f"buckets of {self.settings.resolution}², sides multiples of {self.settings.step}: {len(counts)}"
        most = max(counts.values(), default=1)
        for (width, height), count in sorted(counts.items()):
            yield f"  {f'{width}x{height}':>9} {count:6} {'█' * max(1, round(30 * count / most))}"
        yield from _finding(f"images smaller than {self.settings.step} pixels, left out", self.too_small)
        yield from _finding(f"images of which less than {MUCH_CROPPED:.0%} is left after cropping", self.cropped)


def check(
    data: Dataset,
    settings: Preprocessing,
    *,
    lost_words: Callable[[str], str] | None = None,
    validation: Dataset | None = None,
) -> CheckReport:
    """Look at every image and caption. Images that cannot be decoded are moved to the problems of `data`.

    Args:
        data: read with `allow_missing` and without `strict`, so that what they forbid is found here.
        settings: how training will be run.
        lost_words: the end of a caption that the model does not read, see `captions.lost_words`.
        validation: what must not be in the training data.
    """
    looks = _look(data)
    report = CheckReport(
        layouts=data.layouts,
        images=len(data),
        captioned=sum(bool(entry.captions) for entry in data.entries),
        captions=sum(len(entry.captions) for entry in data.entries),
        notes=data.notes,
        problems=data.problems,
        settings=settings,
        sizes=data.sizes,
        uncaptioned=[entry.name for entry in data.entries if not entry.captions],
        same=[[data.names[index] for index in group] for group in same(looks)],
        near=[[data.names[index] for index in group] for group in near(looks)],
    )
    _place(report, data)
    if lost_words:
        texts = (
            (name, lost_words(caption))
            for name, captions in zip(data.names, data.captions, strict=True)
            for caption in captions
        )
        report.truncated = [(name, lost) for name, lost in texts if lost]
    if data.paired:
        report.pairs = len(data)
        report.halves, report.contrary = _pairs(data)
    if validation is not None:
        pairs = shared(looks, _look(validation))
        report.leaked = [(data.names[one], validation.names[other]) for one, other in pairs]
    return report


def _pairs(data: Dataset) -> tuple[list[str], list[tuple[str, str]]]:
    """Pairs of one image with itself, and pairs that others of the same prompt contradict."""
    halves, contrary, known = [], [], {}
    for name, content, captions in zip(data.names, data.contents, data.captions, strict=True):
        half = len(content) // 2  # the two images' hashes are joined
        preferred, rejected = content[:half], content[half:]
        if preferred == rejected:
            halves.append(name)
        known[preferred, rejected, captions] = name
        if other := known.get((rejected, preferred, captions)):
            contrary += [(other, name)] if other != name else []
    return halves, contrary


def _look(data: Dataset) -> list[Look]:
    def work(index: int) -> Look | Unusable:
        try:
            if data.paired:
                data.load(index, rejected=True)
            return look_at(data.load(index))
        except (DataError, OSError) as error:
            return problem(data.entries[index], error)

    looks = each(work, len(data), "look at images")
    data.leave_out({index: look for index, look in enumerate(looks) if isinstance(look, Unusable)})
    return [look for look in looks if not isinstance(look, Unusable)]


def _place(report: CheckReport, data: Dataset) -> None:
    settings = report.settings
    options = {"upscale": settings.upscale, "max_aspect": settings.max_aspect}
    report.buckets = assign(data.sizes, settings.resolution, settings.step, **options)
    for name, size, bucket in zip(data.names, data.sizes, report.buckets, strict=True):
        if bucket is None:
            report.too_small.append(f"{name}: {size[0]}x{size[1]}")
        elif (kept := kept_share(size, bucket)) < MUCH_CROPPED:
            report.cropped.append(f"{name}: {size[0]}x{size[1]} in {bucket[0]}x{bucket[1]}, {kept:.0%} left")


def _finding(what: str, items: Sequence[str]) -> Iterator[str]:
    if items:
        yield f"{what}: {len(items)}"
        yield from _examples(items)


def _examples(items: Iterable[str]) -> Iterator[str]:
    listed = list(items)
    yield from (f"  {item}" for item in listed[:SHOWN])
    if len(listed) > SHOWN:
        yield f"  ... and {len(listed) - SHOWN} more"


def _cut(text: str, letters: int = 80) -> str:
    return repr(text if len(text) <= letters else f"{text[:letters]}…")

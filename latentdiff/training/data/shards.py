"""WebDataset shards: tar files in which the members of a sample follow each other and share their name up to the first
dot.

000.tar: cat.jpg cat.txt dog.jpg dog.json ...         the caption is .txt, .caption, or a column of .json
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from latentdiff.errors import DataError
from latentdiff.reading.json import parse_json
from latentdiff.reading.plain import LONGEST_CAPTION, decode
from latentdiff.reading.tars import Member, list_members
from latentdiff.training.data.entries import CAPTION_COLUMNS, Entry, Listing, MemberOrigin, Unusable, as_captions
from latentdiff.training.data.images import SUFFIXES

CAPTION_FIELDS = ("txt", "caption")
IMAGE_FIELDS = tuple(sorted(suffix[1:] for suffix in SUFFIXES))
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MEMBER = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]*)$")
_NOTE = re.compile(r"__[^/]*__($|/)")


def find_shards(source: str | Path) -> list[Path]:
    """Shards of a folder, a tar file, or a pattern with a range such as `train-{000..099}.tar`, in order of their
    names.

    An empty list means that the source is something else.

    Raises:
        DataError: the pattern names a shard that is not there.
    """
    path = Path(source)
    if path.is_dir():
        return sorted(file for file in path.rglob("*.tar") if not file.name.startswith("."))
    if path.suffix != ".tar":
        return []
    if (found := _RANGE.search(str(source))) is None:
        return [path] if path.is_file() else []
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    shards = [Path(_RANGE.sub(f"{number:0{len(first)}d}", str(source), count=1)) for number in numbers]
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise DataError(f"{len(missing)} of {len(shards)} shards of {source} are not there, the first is {missing[0]}")
    return shards


def list_shards(shards: list[Path], column: str | None) -> Listing:
    """All samples of shards, indexed: captions in memory, images where they lie.

    Raises:
        DataError: a shard is damaged, or there are no samples or no captions.
    """
    listing = Listing(f"{len(shards)} WebDataset shards", [])
    seen: set[str] = set()
    for shard in shards:
        for key, members in members_of(shard):
            seen.update(members)
            name = f"{shard.name}/{key}"
            image = next((members[field] for field in IMAGE_FIELDS if field in members), None)
            if image is None:
                listing.problems.append(Unusable(name, f"the sample has no image; its fields are {', '.join(members)}"))
                continue
            texts = {field: read_caption(shard, member) for field, member in members.items() if is_text(field)}
            captions = sample_captions(texts, column, name)
            listing.entries.append(Entry(name, captions, _origin(shard, image)))
    if not listing.entries:
        raise DataError(f"no images in {len(shards)} shards, the first is {shards[0]}: found {_fields(seen)}")
    if not any(entry.captions for entry in listing.entries):
        raise DataError(f"no captions in {shards[0].parent}: looked for {looked_for(column)}; found {_fields(seen)}")
    return listing


def members_of(shard: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Samples of a shard in order: the key, and its members by field; reads headers only.

    Raises:
        DataError: the shard is damaged, or holds a field of a sample twice.
    """
    members = ((name, member) for member in list_members(shard) if (name := split_name(member.name)))
    for key, group in groupby(members, lambda item: item[0][0]):
        fields: dict[str, Member] = {}
        for (_, field), member in group:
            if field in fields:
                raise DataError(f"the shard {shard} holds {key[:80]}.{field[:80]} twice; make it again")
            fields[field] = member
        yield key, fields


def split_name(name: str) -> tuple[str, str] | None:
    """Key and field of a member: the name up to the first dot behind its folder, and what follows, in lower case.

    None for what the webdataset library skips: names without a field, and its own notes such as `__index__/...`.
    """
    found = _MEMBER.match(name)
    return (found[1], found[2].lower()) if found and not _NOTE.match(name) else None


def sample_captions(fields: Mapping[str, Any], column: str | None, name: str) -> tuple[str, ...]:
    """Captions of a sample, given the content of its fields.

    Raises:
        DataError: a field does not hold what its name says.
    """
    try:
        if column is None and (field := next((field for field in CAPTION_FIELDS if field in fields), None)):
            return as_captions(fields[field].decode("utf-8"), name)
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read the captions of {name}: {error}") from error
    place = f"the captions of {name}"
    row = parse_json(decode(fields["json"], place, DataError), place, DataError) if "json" in fields else {}
    columns = [column] if column else CAPTION_COLUMNS
    found = next((row[each] for each in columns if each in row), None) if isinstance(row, dict) else None
    return as_captions(found, name)


def looked_for(column: str | None) -> str:
    """Where captions of shards are looked for, in words."""
    if column:
        return f"{column!r} in .json"
    return f"{', '.join(f'.{field}' for field in CAPTION_FIELDS)}, and {', '.join(CAPTION_COLUMNS)} in .json"


def is_text(field: str) -> bool:
    """Whether a field may hold captions."""
    return field in CAPTION_FIELDS or field == "json"


def read_caption(shard: Path, member: Member) -> bytes:
    """The text of a member.

    Raises:
        DataError: it is too long for a caption.
    """
    if member.size > LONGEST_CAPTION:
        raise DataError(f"{member.name[:80]} in {shard} has {member.size:,} bytes, expected a caption")
    return _origin(shard, member).source()


def _origin(shard: Path, member: Member) -> MemberOrigin:
    return MemberOrigin(shard, member.start, member.size)


def _fields(seen: set[str]) -> str:
    return ", ".join(f".{field}" for field in sorted(seen)) or "no files"

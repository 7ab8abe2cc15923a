"""Texts in image files, under the names that they have in a PNG whatever the format: "parameters" (the web UIs),
"latentdiff" (our recipes), "prompt" and "workflow" (ComfyUI), "comment" (GIF, JPEG).

Formats other than PNG keep them in EXIF (CIPA DC-008). The web UIs write UserComment in UTF-16; Fooocus adds a word to
MakerNote that says how to read it; ComfyUI's WebP files have `name:JSON` in tags of the first directory. Ours have the
JSON of the recipe in MakerNote, which programs that change EXIF leave as it is.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from latentdiff.reading.images import DAMAGED

EXIF_DIRECTORY, USER_COMMENT, MAKER_NOTE = 0x8769, 0x9286, 0x927C
OWN, PARAMETERS, COMMENT, FOOOCUS = "latentdiff", "parameters", "comment", "fooocus_scheme"

_LONG, _UNDEFINED = 4, 7  # types of TIFF
_MARK = OWN.encode() + b"\0"  # MakerNotes begin with the name of the maker
_CODE = 8  # bytes that say how a UserComment is written
_NAMED = re.compile(r"(\w{1,64}):\s*(?=[{\[])")
_SCHEME = re.compile(r"\w{1,32}")
_NO_TEXTS = ("compression",)  # what Pillow says of a TIFF


def texts_of(image: Image.Image) -> dict[str, str]:
    """All texts in an image as Pillow opened it; of one that was made in memory those of `info`.

    Texts behind the pixels of a PNG are known once it is loaded. Broken EXIF data, common in sound images, hold none.
    """
    info: Mapping[Any, Any] = image.info
    found = {name: text for name, text in info.items() if isinstance(name, str) and isinstance(text, str)}
    found = {name: str(text) for name, text in found.items() if name not in _NO_TEXTS}
    if isinstance(comment := info.get(COMMENT), bytes):
        found[COMMENT] = _decoded(comment)
    try:
        return dict(_of_exif(Image.Image.getexif(image))) | found
    except DAMAGED:
        return found


def exif_with(texts: Mapping[str, str]) -> bytes:
    """EXIF data that hold the "parameters" and the "latentdiff" of texts, or nothing where there are none."""
    own: dict[int, bytes] = {}
    if OWN in texts:
        own[MAKER_NOTE] = _MARK + texts[OWN].encode()
    if PARAMETERS in texts:
        own[USER_COMMENT] = b"UNICODE\0" + texts[PARAMETERS].encode("utf-16-be", "surrogatepass")
    if not own:
        return b""
    # By hand, as Pillow gives these tags a type that the web UIs do not read: IFD0 at 8, which names the other, at 26.
    entries, data, place = b"", b"", 26 + 2 + 12 * len(own) + 4
    for tag, value in own.items():
        entries += struct.pack(">HHII", tag, _UNDEFINED, len(value), place + len(data))
        data += value
    first = struct.pack(">HHHIII", 1, EXIF_DIRECTORY, _LONG, 1, 26, 0)
    return b"Exif\0\0MM\0*" + struct.pack(">I", 8) + first + struct.pack(">H", len(own)) + entries + bytes(4) + data


def _of_exif(exif: Image.Exif) -> Iterator[tuple[str, str]]:
    for value in dict(exif).values():
        named = _NAMED.match(value) if isinstance(value, str) else None
        if named:
            yield named[1].lower(), value[named.end() :].rstrip("\0")
    misplaced = {tag: exif[tag] for tag in (USER_COMMENT, MAKER_NOTE) if tag in exif}  # by Fooocus
    own = {**misplaced, **exif.get_ifd(EXIF_DIRECTORY)}
    if comment := _bytes(own.get(USER_COMMENT)):
        yield PARAMETERS, _user_comment(comment)
    note = _bytes(own.get(MAKER_NOTE))
    if note.startswith(_MARK):
        yield OWN, note.removeprefix(_MARK).decode(errors="replace")
    elif _SCHEME.fullmatch(scheme := note.rstrip(b"\0").decode("latin-1")):
        yield FOOOCUS, scheme


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else b""


def _user_comment(content: bytes) -> str:
    """The text of a UserComment. Its code UNICODE is UTF-16 of either order: the one that gives more of ASCII."""
    code, text = content[:_CODE], content[_CODE:]
    if code == b"UNICODE\0":
        read = [text.decode(name, "replace").lstrip("\ufeff") for name in ("utf-16-be", "utf-16-le")]
        return max(read, key=lambda one: sum(letter < "\x80" for letter in one)).rstrip("\0")
    return _decoded(text if code in (b"ASCII\0\0\0", bytes(_CODE)) else content)


def _decoded(content: bytes) -> str:
    try:
        return content.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return content.rstrip(b"\0").decode("latin-1")

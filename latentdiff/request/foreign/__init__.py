"""Images of other programs: what their texts ask for, as an `Account`. One file for each program.

To add one, write a function that reads its text into a `Draft`, and call it here.
"""

from __future__ import annotations

from collections.abc import Mapping

from latentdiff.errors import DataError
from latentdiff.reading.json import parse_json, parse_object
from latentdiff.request.foreign import a1111, comfy, fooocus, invokeai
from latentdiff.request.foreign.account import Account
from latentdiff.request.infotext import split

LONGEST = 4_000_000  # letters of a text; graphs of thousands of nodes have less
PARAMETERS, SCHEME = "parameters", "fooocus_scheme"
COMFY, INVOKE, OLD_INVOKE = "prompt", "invokeai_metadata", "sd-metadata"
_NOTHING_TO_DO = "the image cannot be read as a recipe"


def read_account(texts: Mapping[str, str]) -> Account | None:
    """The account of the texts in an image, by their names in a PNG; None if none is of a program that is known.

    Raises:
        DataError: a text is damaged, or longer than such texts are.
    """
    for name in (INVOKE, OLD_INVOKE, COMFY, PARAMETERS):
        if len(texts.get(name, "")) > LONGEST:
            raise DataError(f"expected at most {LONGEST:,} letters in the image's text {name!r}, found more")
    if INVOKE in texts:
        return invokeai.read(_object(texts, INVOKE))
    if OLD_INVOKE in texts:
        return invokeai.read_old(_object(texts, OLD_INVOKE))
    if texts.get(COMFY, "").lstrip()[:1] == "{":
        return comfy.read(parse_json(texts[COMFY], _place(COMFY), DataError, remedy=_NOTHING_TO_DO, finite=False))
    if PARAMETERS not in texts:
        return None
    if texts[PARAMETERS].lstrip()[:1] == "{":
        said = _object(texts, PARAMETERS)
        return fooocus.read(said) if texts.get(SCHEME) == "fooocus" or "base_model" in said else None
    found = split(texts[PARAMETERS])
    if not found.settings:
        return None
    is_of_fooocus = fooocus.is_text(found, texts.get(SCHEME, ""))
    return fooocus.read_text(found) if is_of_fooocus else a1111.read(found)


def _object(texts: Mapping[str, str], name: str) -> dict[str, object]:
    return parse_object(texts[name], _place(name), DataError, remedy=_NOTHING_TO_DO)


def _place(name: str) -> str:
    return f"the image's text {name!r}"

"""Options of `generate` for the samples of a training run, as texts NAME=VALUE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentdiff.errors import LatentDiffError, UsageError
from latentdiff.reading.yaml import parse_yaml
from latentdiff.request.calls import unknown
from latentdiff.request.domains import Texts
from latentdiff.request.options import OPTIONS, check_second_pass, checked

_FLAGS = {"guidance": "guidance_scale"}  # where flags are called otherwise than the options of Python
_NOT_OF_TEXT = {"num_images", "controls", "image_prompts"}
_OFFERED = sorted(name for name, option in OPTIONS.items() if option.flags != () and name not in _NOT_OF_TEXT)


def as_texts(value: Any) -> Any:
    """A mapping as texts NAME=VALUE; one text as a list of it; other values as they are."""
    if isinstance(value, Mapping):
        return [f"{name}={entry}" for name, entry in value.items()]
    return [value] if isinstance(value, str) else () if value is None else value


def sample_options(texts: Sequence[str]) -> dict[str, Any]:
    """The options as `Pipeline` takes them.

    Raises:
        UsageError: no such option, or a value outside its domain.
    """
    given = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        name = _FLAGS.get(name, name)
        if not equals:
            raise UsageError(f"expected NAME=VALUE, such as sampler=ddim, found {text!r}")
        if name not in _OFFERED:
            raise unknown(name, _OFFERED)
        given[name] = value if isinstance(OPTIONS[name].domain, Texts) else _value(value)
    check_second_pass(given)
    found = checked(given)
    if isinstance(found.get("seed"), list):
        raise UsageError("expected one seed, from which those of the samples count on; found a list")
    return found


def _value(text: str) -> Any:
    """A number, yes or no, a list of numbers, or the text as it is."""
    try:
        value = parse_yaml(text, "an option of the samples")
    except LatentDiffError:
        return text
    return text if value is None or isinstance(value, Mapping) else value

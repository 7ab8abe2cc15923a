"""Prompts of what a model knows already, on which forgetting is measured and against which it is kept."""

from __future__ import annotations

from collections.abc import Callable

from latentdiff.prompts.words import Words
from latentdiff.training.data.randomness import generator

# For models that do not list their words: what any text-to-image model was taught.
GENERAL = (
    "a photo of a cat", "a photo of a dog running on a beach", "a portrait of an old man", "a mountain lake at sunrise",
    "a red car on a street", "a bowl of fruit on a table", "a woman reading a book", "a city at night",
    "a house in a forest", "a bird on a branch", "an oil painting of a ship at sea", "a cup of coffee",
    "a close-up of a flower", "children playing football", "a bicycle against a brick wall", "a plate of pasta",
    "a horse in a field", "a pencil drawing of a tree", "a train at a station", "a living room with a sofa",
    "a snowy village", "a watercolour of a garden", "a man in a suit", "a robot in a workshop",
    "a glass of water on a desk", "an airplane in a blue sky", "a bridge over a river", "a kitchen with white tiles",
    "an astronaut on the moon", "a waterfall in a jungle", "a plain wooden chair", "a group of friends at dinner",
)  # fmt: skip


def old_prompts(words: Words | None, count: int, purpose: str) -> list[str]:
    """Up to `count` prompts, always the same for one model and one purpose.

    Args:
        words: what the model says that it knows; of one that does not say, general prompts are taken.
        purpose: "measured" or "kept", which have no prompt in common: what is measured must not be what was practised.
    """
    measured, kept = _of_words(words, count) if words and words.kinds["things"] else (GENERAL[::2], GENERAL[1::2])
    return list(measured if purpose == "measured" else kept)[:count]


def _of_words(words: Words, count: int) -> tuple[list[str], list[str]]:
    """Prompts to measure on and others to keep, of all the ways in which the words go together in turn."""
    found: dict[str, None] = {}
    forms = [form for form in _FORMS if _can(form, words)]
    for number in range(64 * count):
        if len(found) == 2 * count:
            break
        random = generator("old prompts", number)
        text = forms[len(found) // 2 % len(forms)](
            words, lambda options, random=random: options[random.integers(len(options))]
        )
        found.setdefault(text)
    return list(found)[::2], list(found)[1::2]


Pick = Callable[[tuple[str, ...]], str]


def _plain(words: Words, pick: Pick) -> str:
    return f"{_article(pick(words.kinds['things']))}{_background(words, pick)}"


def _coloured(words: Words, pick: Pick) -> str:
    coloured = f"{pick(words.kinds['colours'])} {pick(words.kinds['things'])}"
    return f"{_article(coloured)}{_background(words, pick)}"


def _counted(words: Words, pick: Pick) -> str:
    return f"{pick(words.kinds['counts'][1:])} {_plural(pick(words.kinds['things']), words)}{_background(words, pick)}"


def _related(words: Words, pick: Pick) -> str:
    relation = pick(words.kinds["relations"])
    joined = f"to the {relation}" if relation.endswith(" of") else relation
    return f"{f' {joined} '.join(map(_article, _two_things(words, pick)))}{_background(words, pick)}"


def _two(words: Words, pick: Pick) -> str:
    return f"{' and '.join(map(_article, _two_things(words, pick)))}{_background(words, pick)}"


def _two_coloured(words: Words, pick: Pick) -> str:
    coloured = (f"{pick(words.kinds['colours'])} {thing}" for thing in _two_things(words, pick))
    return f"{' and '.join(map(_article, coloured))}{_background(words, pick)}"


def _two_things(words: Words, pick: Pick) -> tuple[str, str]:
    things = words.kinds["things"]
    first = pick(things)
    return first, pick(tuple(thing for thing in things if thing != first) or things)


# All that a small model was taught to do, in turn, so that none of it is forgotten.
_FORMS = (_plain, _coloured, _counted, _related, _two, _two_coloured)
_NEEDS = {
    _plain: "things", _coloured: "colours", _counted: "counts", _related: "relations", _two: "things",
    _two_coloured: "colours",
}  # fmt: skip


def _can(form: Callable[..., str], words: Words) -> bool:
    if form in (_two, _two_coloured) and "and" not in words.all:
        return False
    enough = 2 if form is _counted else 1
    return len(words.kinds[_NEEDS[form]]) >= enough


# What stands behind the things where that is a place, not a colour.
_PLACES = {"meadow": "on a meadow", "beach": "on a beach", "snow": "in the snow", "night": "at night"}


def _background(words: Words, pick: Pick) -> str:
    if not words.kinds["backgrounds"]:
        return ""
    background = pick(words.kinds["backgrounds"])
    return f" {_PLACES.get(background) or f'on {_article(background)} background'}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


def _plural(noun: str, words: Words) -> str:
    """The plural as the model knows it; the noun itself where none is among its words."""
    forms = (f"{noun}s", f"{noun}es", f"{noun[:-1]}ies", f"{noun[:-1]}ves", f"{noun[:-2]}i", f"{noun[:-3]}men")
    return next((form for form in forms if form.split()[-1] in words.all), noun)

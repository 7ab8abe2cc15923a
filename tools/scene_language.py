"""The world of the embedded model: its nouns, colours and sentences, and which combinations are kept for testing.

Nothing here draws; `make_scenes.py` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from random import Random
from typing import Any

# Noun -> emoji. Things whose glyphs cannot be confused with one another at 50 pixels.
NOUNS = {
    "cat": "🐱", "dog": "🐶", "fox": "🦊", "panda": "🐼", "frog": "🐸", "pig": "🐷", "monkey": "🐵", "lion": "🦁",
    "tiger": "🐯", "bear": "🐻", "mouse": "🐭", "rabbit": "🐰", "cow": "🐮", "horse": "🐴", "unicorn": "🦄", "wolf": "🐺",
    "elephant": "🐘", "camel": "🐫", "sloth": "🦥", "sheep": "🐑", "chicken": "🐔", "penguin": "🐧", "owl": "🦉",
    "flamingo": "🦩", "duck": "🦆", "bat": "🦇", "snail": "🐌", "butterfly": "🦋", "bee": "🐝", "ladybug": "🐞",
    "turtle": "🐢", "snake": "🐍", "dinosaur": "🦕", "dragon": "🐲", "octopus": "🐙", "crab": "🦀", "fish": "🐠",
    "shark": "🦈", "dolphin": "🐬", "whale": "🐳", "apple": "🍎", "banana": "🍌", "strawberry": "🍓", "cherry": "🍒",
    "pineapple": "🍍", "watermelon": "🍉", "lemon": "🍋", "pear": "🍐", "peach": "🍑", "kiwi": "🥝", "carrot": "🥕",
    "corn": "🌽", "tomato": "🍅", "broccoli": "🥦", "avocado": "🥑", "mushroom": "🍄", "pizza": "🍕", "burger": "🍔",
    "taco": "🌮", "hot dog": "🌭", "cake": "🎂", "cupcake": "🧁", "donut": "🍩", "cookie": "🍪", "pretzel": "🥨",
    "croissant": "🥐", "cheese": "🧀", "egg": "🥚", "ice cream": "🍦", "popcorn": "🍿", "tree": "🌳", "palm tree": "🌴",
    "cactus": "🌵", "sunflower": "🌻", "rose": "🌹", "tulip": "🌷", "clover": "🍀", "moon": "🌙", "sun": "☀", "star": "⭐",
    "rainbow": "🌈", "cloud": "☁", "snowman": "⛄", "fire": "🔥", "planet": "🪐", "volcano": "🌋", "car": "🚗",
    "bus": "🚌", "truck": "🚚", "tractor": "🚜", "motorcycle": "🏍", "airplane": "✈", "helicopter": "🚁", "rocket": "🚀",
    "boat": "⛵", "ship": "🚢", "spaceship": "🛸", "house": "🏠", "castle": "🏰", "tent": "⛺", "guitar": "🎸",
    "piano": "🎹", "book": "📕", "clock": "⏰", "key": "🔑", "light bulb": "💡", "umbrella": "☂", "hat": "🎩",
    "crown": "👑", "shoe": "👟", "boot": "👢", "shirt": "👕", "dress": "👗", "socks": "🧦", "backpack": "🎒",
    "glasses": "👓", "camera": "📷", "television": "📺", "laptop": "💻", "robot": "🤖", "ghost": "👻", "skull": "💀",
    "alien": "👽", "pumpkin": "🎃", "balloon": "🎈", "gift": "🎁", "teddy bear": "🧸", "soccer ball": "⚽",
    "basketball": "🏀", "heart": "❤", "diamond": "💎", "ring": "💍", "trophy": "🏆", "bell": "🔔", "hammer": "🔨",
    "bucket": "🪣", "pencil": "✏", "envelope": "✉", "candle": "🕯", "anchor": "⚓", "magnet": "🧲", "globe": "🌍",
    "lock": "🔒", "mug": "☕", "kite": "🪁", "palette": "🎨", "compass": "🧭", "shield": "🛡", "bow": "🎀", "bomb": "💣",
}  # fmt: skip

# Things that the embedded model has never seen, for examples of fine-tuning; no random plan holds one.
NEW_NOUNS = {"teapot": "🫖", "raccoon": "🦝", "lantern": "🏮"}

_PLURALS = {
    "butterfly": "butterflies", "octopus": "octopuses", "fish": "fish", "sheep": "sheep", "strawberry": "strawberries",
    "cherry": "cherries", "cactus": "cacti", "bus": "buses", "dress": "dresses", "fox": "foxes",
    "snowman": "snowmen", "mouse": "mice", "wolf": "wolves", "tomato": "tomatoes", "peach": "peaches",
    "compass": "compasses", "volcano": "volcanoes", "trophy": "trophies",
}  # fmt: skip

# Nouns that are counted in something else: "a pair of glasses", "two pieces of cheese".
_MEASURES = {
    "glasses": ("pair", "pairs"), "socks": ("pair", "pairs"), "cheese": ("piece", "pieces"), "corn": ("ear", "ears"),
    "popcorn": ("box", "boxes"), "broccoli": ("head", "heads"),
}  # fmt: skip

COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}

BACKGROUNDS = {
    "white": (255, 255, 255), "black": (22, 22, 26), "gray": (148, 148, 152), "red": (214, 48, 52),
    "orange": (246, 146, 46), "yellow": (252, 218, 80), "green": (64, 170, 88), "blue": (58, 112, 226),
    "purple": (122, 72, 184), "pink": (250, 172, 206),
}  # fmt: skip

# Drawn places and how a sentence names them; things stand in the lower part.
PLACES = {"meadow": "on a meadow", "beach": "on a beach", "snow": "in the snow", "night": "at night"}

OBJECT_COLOURS = {
    "red": (224, 32, 36), "orange": (250, 134, 20), "yellow": (250, 214, 30), "green": (40, 168, 62),
    "blue": (38, 92, 230), "purple": (138, 52, 186), "pink": (250, 120, 182), "brown": (126, 76, 38),
}  # fmt: skip

# Sides of the square cells that things are drawn in, as shares of the image's side: of a thing alone, by the word that says
# its size; each of several has the smallest. Few sizes, so that a small model sees each of them often.
SIZES = {"small": 7 / 16, None: 11 / 16, "big": 14 / 16}

RELATIONS = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

KINDS = {
    "single": 0.16, "colour": 0.18, "place": 0.04, "counting": 0.10, "two": 0.08, "position": 0.12, "attribution": 0.24,
    "mixed": 0.08,
}  # fmt: skip

_PREFIXES = ("", "", "", "", "a photo of ", "a photo of ", "a picture of ", "a picture of ", "there {is} ")
_SUFFIXES = (
    " on {a} background",
    " on {a} background",
    " on {a} background",
    " in front of {a} background",
    ", {} background",
)

# One combination in eight is never trained on.
_HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class Thing:
    """One object as a sentence names it."""

    noun: str
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a scene has to show, before anything is placed."""

    kind: str
    background: str  # of BACKGROUNDS or PLACES
    things: tuple[Thing, ...]
    relation: str | None = None  # of the first thing to the second

    def as_json(self) -> dict[str, Any]:
        """Plain values for the metadata."""
        return {
            "kind": self.kind,
            "background": self.background,
            "relation": self.relation,
            "objects": [asdict(thing) for thing in self.things],
        }


def held_out(*combination: str) -> bool:
    """Whether a combination is kept for testing; the same for everybody and for ever."""
    digest = hashlib.sha256("|".join(combination).encode()).digest()
    return digest[0] % _HELD_OUT_SHARE == 0


def combinations_of(plan: Plan) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The combinations that a plan contains, each with the kind of scene that tests it."""
    for thing in dict.fromkeys(plan.things):
        yield "single", ("background", thing.noun, plan.background)
        if thing.colour:
            yield "colour", ("colour", thing.noun, thing.colour)
    nouns = [thing.noun for thing in plan.things]
    for pair in combinations(sorted(set(nouns)), 2):
        yield "two", ("pair", *pair)
    for noun in set(nouns):
        if nouns.count(noun) > 1:
            yield "counting", ("count", noun, str(nouns.count(noun)))


_TESTED_BY = {"position": "two", "attribution": "colour", "mixed": "two", "place": "single"}


def belongs_to(plan: Plan, split: str) -> bool:
    """Training plans hold no held-out combination; test plans hold one of the sort that their kind is about."""
    found = [(sort, held_out(*combination)) for sort, combination in combinations_of(plan)]
    if split == "train":
        return not any(out for _, out in found)
    about = _TESTED_BY.get(plan.kind, plan.kind)
    return any(out for sort, out in found if sort == about)


def draw_plan(rng: Random, split: str, kind: str | None = None, nouns: Sequence[str] = tuple(NOUNS)) -> Plan:
    """A random plan of the split."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    while True:
        plan = _draw(rng, kind, nouns)
        coloured_like_background = any(thing.colour == plan.background for thing in plan.things)
        if not coloured_like_background and belongs_to(plan, split):
            return plan


def _draw(rng: Random, kind: str, nouns: Sequence[str]) -> Plan:
    background = rng.choice(list(PLACES if kind == "place" else BACKGROUNDS))
    first, second, third = (Thing(noun) for noun in rng.sample(nouns, 3))
    colours = rng.sample(list(OBJECT_COLOURS), 2)
    match kind:
        case "single":
            things = (Thing(first.noun, size=rng.choice((None, None, None, "small", "big"))),)
        case "place":
            things = rng.choice(((first,), (first,), (first, second)))
        case "two":
            things = (first, second)
        case "counting":
            things = (first,) * rng.choice((1, 2, 2, 2, 3, 3, 3, 4, 4, 4))
        case "colour":
            things = (Thing(first.noun, colours[0], rng.choice((None, None, None, "small", "big"))),)
        case "position":
            return Plan(kind, background, (first, second), rng.choice(list(RELATIONS)))
        case "attribution":
            things = (Thing(first.noun, colours[0]), Thing(second.noun, colours[1]))
        case _:
            things = rng.choice((
                (first, first, second),
                (first, second, third),
                (first, first, second, second),
                (Thing(first.noun, colours[0]), second),
            ))  # fmt: skip
    return Plan(kind, background, things)


def caption(plan: Plan, rng: Random) -> str:
    """A sentence that says what the plan shows."""
    subject = _subject(plan, rng)
    plural = len(plan.things) > 1
    prefix = rng.choice(_PREFIXES).format(**{"is": "are" if plural else "is"})
    if plan.relation and prefix.startswith("there"):
        prefix = ""
    if plan.background in PLACES:
        return f"{prefix}{subject} {PLACES[plan.background]}"
    suffix = rng.choice(_SUFFIXES).format(plan.background, a=_article(plan.background)) if rng.random() < 0.88 else ""
    return prefix + subject + suffix


def prompt(plan: Plan) -> str:
    """The one sentence by which evaluation asks for a plan, after GenEval's "a photo of"."""
    phrases = _phrases(plan.things)
    subject = f" {RELATIONS[plan.relation][0]} ".join(phrases) if plan.relation else _list(phrases)
    where = PLACES.get(plan.background) or f"on {_article(plan.background)} background"
    return f"a photo of {subject} {where}"


def _subject(plan: Plan, rng: Random) -> str:
    phrases = _phrases(plan.things)
    if plan.relation:
        first, second = phrases
        if plan.relation in ("left of", "right of") and rng.random() < 0.15:
            side = "left" if plan.relation == "left of" else "right"
            return f"{second} with {first} on its {side}"
        return f"{first} {rng.choice(RELATIONS[plan.relation])} {second}"
    if len(phrases) == 2 and len(plan.things) == 3 and rng.random() < 0.5:  # others stand in the order of mention
        phrases.reverse()
    if len(phrases) == 2 and rng.random() < 0.15:
        return f"{phrases[0]} next to {phrases[1]}"
    if len(plan.things) == 1:
        return _alone(phrases[0], plan, rng)
    return _list(phrases)


def _alone(phrase: str, plan: Plan, rng: Random) -> str:
    """One thing: "one cat" where it is counted, now and then without its article."""
    without = phrase.split(" ", 1)[1]
    if plan.kind == "counting":
        return f"one {without}"
    return without.rpartition(" of ")[2] if rng.random() < 0.15 else phrase


def _phrases(things: tuple[Thing, ...]) -> list[str]:
    return [_phrase(thing, things.count(thing)) for thing in dict.fromkeys(things)]


def _phrase(thing: Thing, count: int) -> str:
    plural = count > 1
    if thing.noun in _MEASURES:
        words = (thing.size, _MEASURES[thing.noun][plural], "of", thing.colour, thing.noun)
    else:
        words = (thing.size, thing.colour, plural_of(thing.noun) if plural else thing.noun)
    phrase = " ".join(word for word in words if word)
    return f"{COUNTS[count]} {phrase}" if plural else _article(phrase)


def plural_of(noun: str) -> str:
    """ "cats", "foxes", "mice"; a noun that is counted in something else stays as it is."""
    return noun if noun in _MEASURES else _PLURALS.get(noun, noun + "s")


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeio' or words.startswith('umb') else 'a'} {words}"


def _list(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"

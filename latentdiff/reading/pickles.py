"""Pickles of weights, read without running anything: a small machine that knows what torch's files need and no more.

A pickle is a program for a stack machine that may call any function. This one calls none: a global name is looked up in
`pickled_names`, and stands for a tensor's description, a plain container, or something inert. Any other name is noted,
and the file refused. The opcodes are those of the module pickletools of Python, protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latentdiff.reading.pickled_names import GLOBALS, LEFTOVERS, Global, Inert, PickleError, Storage, checked_key

MOST_STEPS = 4_000_000  # opcodes; a training checkpoint of 10,000 tensors takes 600,000
_LONGEST_LONG = 64  # bytes of an integer
_LETTERS_PER_STEP = 16  # of a text that is copied


@dataclass
class Pickled:
    """What a pickle holds: dicts, lists, tuples, texts, numbers, `TensorPlace` and `Inert`; and where it ended."""

    value: Any
    end: int
    foreign: list[str]  # names it asks for that are refused
    storages: list[Storage]


class _Mark:
    pass


def read_pickle(content: bytes | memoryview, start: int = 0) -> Pickled:
    """Run one pickle, which may be followed by other bytes.

    Raises:
        PickleError: it is cut off or damaged, or uses what weights do not need.
    """
    machine = _Machine(memoryview(content), start)
    try:
        value = machine.run()
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, ValueError, KeyError, OverflowError) as error:
        if machine.foreign:  # what it asked for matters more than what went wrong without it
            return Pickled(None, machine.place, sorted(machine.foreign), [])
        raise PickleError(f"the pickle is damaged at byte {machine.place} ({type(error).__name__})") from error
    return Pickled(value, machine.place, sorted(machine.foreign), machine.storages)


class _Machine:
    """The stack machine. Every step costs and adds a bounded amount."""

    def __init__(self, content: memoryview, start: int) -> None:
        self.content, self.place, self.left = content, start, MOST_STEPS
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.foreign: set[str] = set()
        self.storages: list[Storage] = []

    def run(self) -> Any:
        while self.left > 0:
            self.left -= 1
            opcode = self.content[self.place]
            self.place += 1
            if opcode == 0x2E:  # STOP
                return self.stack.pop()
            action = _ACTIONS.get(opcode)
            if action is None:
                place = self.place - 1
                raise PickleError(f"the pickle has the instruction {chr(opcode)!r} at byte {place}, unknown in weights")
            action(self)
        raise PickleError(f"the pickle has more than {MOST_STEPS:,} instructions")

    def take(self, count: int) -> memoryview:
        found = self.content[self.place : self.place + count]
        if len(found) < count:
            raise PickleError("the pickle is cut off")
        self.place += count
        return found

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        for length in range(512):
            if self.content[self.place + length] == 0x0A:
                text = bytes(self.take(length)).decode()
                self.place += 1
                return text
        raise PickleError("the pickle has a name of more than 512 bytes")

    def text(self, form: str) -> None:
        # The null and the surrogates of Python's own writer are kept as they are.
        self.stack.append(bytes(self.take(self.number(form))).decode("utf-8", "surrogatepass"))

    def binary(self, form: str) -> None:
        self.stack.append(bytes(self.take(self.number(form))))

    def integer(self, form: str) -> None:
        length = self.number(form)
        if not 0 <= length <= _LONGEST_LONG:
            raise PickleError(f"the pickle has a number of {length} bytes")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def since_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while not isinstance(self.stack[place], _Mark):
            place -= 1
            if place < 0:
                raise PickleError("the pickle is damaged: a mark is missing")
        found = self.stack[place + 1 :]
        del self.stack[place:]
        return found

    def tuple_of(self, count: int) -> None:
        if count > len(self.stack):
            raise PickleError("the pickle is damaged: its stack is empty")
        self.stack[len(self.stack) - count :] = [tuple(self.stack[len(self.stack) - count :])]

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Inert):
            raise PickleError(f"the pickle appends to a {type(target).__name__}")

    def set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (dict, Inert)) or len(pairs) % 2:
            raise PickleError(f"the pickle sets items of a {type(target).__name__}")
        if isinstance(target, dict):
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                target[checked_key(key)] = value

    def name(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}"
        found = GLOBALS.get(full)
        if found is None:
            if not full.startswith(LEFTOVERS):
                self.foreign.add(full)
            found = Global(lambda *_: Inert())
        self.stack.append(found)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if isinstance(function, Inert):
            self.stack.append(function)
        elif isinstance(function, Global) and function.make and isinstance(arguments, tuple):
            self.left -= sum(map(_cost, arguments[:8])) + len(arguments)
            if self.left > 0:
                self.stack.append(function.make(*arguments))
        else:
            raise PickleError(f"the pickle calls a {type(function).__name__}")

    def build(self) -> None:
        self.stack.pop()  # the state of an object: what is kept here has none that matters

    def persistent(self) -> None:
        kind, storage, key, _, count, *view = self.stack.pop()
        if kind != "storage" or not isinstance(storage, Global) or not storage.dtype or (view and view[0] is not None):
            raise PickleError("the pickle refers to something else than a storage")
        if not isinstance(key, (str, int)) or type(count) is not int or count < 0:
            raise PickleError("the pickle has a storage of no size")
        self.storages.append(Storage(str(key), storage.dtype, count))
        self.stack.append(self.storages[-1])


def _cost(value: Any) -> int:
    """Steps of copying a value, which the pickle may ask for again and again."""
    if isinstance(value, (str, bytes)):
        return len(value) // _LETTERS_PER_STEP
    return len(value) if isinstance(value, (list, tuple, dict)) else 0


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


def _fresh(kind: type) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(kind())


def _remember(machine: _Machine, number: int) -> None:
    machine.memo[number] = machine.stack[-1]


_ACTIONS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    ord("("): _fresh(_Mark),
    ord("0"): lambda m: m.stack.pop(),  # POP
    ord("1"): lambda m: m.since_mark(),  # POP_MARK
    ord("2"): lambda m: m.stack.append(m.stack[-1]),  # DUP
    ord("N"): _push(None),
    0x88: _push(True),
    0x89: _push(False),
    ord("J"): lambda m: m.stack.append(m.number("<i")),  # BININT
    ord("K"): lambda m: m.stack.append(m.number("<B")),  # BININT1
    ord("M"): lambda m: m.stack.append(m.number("<H")),  # BININT2
    0x8A: lambda m: m.integer("<B"),  # LONG1
    0x8B: lambda m: m.integer("<i"),  # LONG4
    ord("G"): lambda m: m.stack.append(m.number(">d")),  # BINFLOAT
    ord("X"): lambda m: m.text("<I"),  # BINUNICODE
    0x8C: lambda m: m.text("<B"),  # SHORT_BINUNICODE
    0x8D: lambda m: m.text("<Q"),  # BINUNICODE8
    ord("U"): lambda m: m.text("<B"),  # SHORT_BINSTRING, of Python 2
    ord("T"): lambda m: m.text("<I"),  # BINSTRING, of Python 2
    ord("B"): lambda m: m.binary("<I"),  # BINBYTES
    ord("C"): lambda m: m.binary("<B"),  # SHORT_BINBYTES
    0x8E: lambda m: m.binary("<Q"),  # BINBYTES8
    0x96: lambda m: m.binary("<Q"),  # BYTEARRAY8
    ord(")"): _push(()),
    ord("t"): lambda m: m.stack.append(tuple(m.since_mark())),  # TUPLE
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("]"): _fresh(list),
    ord("l"): lambda m: m.stack.append(m.since_mark()),  # LIST
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("}"): _fresh(dict),
    ord("s"): lambda m: m.set([m.stack.pop(), m.stack.pop()][::-1]),
    ord("u"): lambda m: m.set(m.since_mark()),
    0x8F: _fresh(list),  # EMPTY_SET
    0x90: lambda m: m.append(m.since_mark()),  # ADDITEMS
    0x91: lambda m: m.stack.append(m.since_mark()),  # FROZENSET
    ord("c"): lambda m: m.name(m.line(), m.line()),  # GLOBAL
    0x93: lambda m: m.name(*[m.stack.pop(), m.stack.pop()][::-1]),  # STACK_GLOBAL
    ord("R"): lambda m: m.call(),  # REDUCE
    0x81: lambda m: m.call(),  # NEWOBJ
    0x92: lambda m: (m.stack.pop(), m.call()),  # NEWOBJ_EX
    ord("b"): lambda m: m.build(),
    ord("h"): lambda m: m.stack.append(m.memo[m.number("<B")]),  # BINGET
    ord("j"): lambda m: m.stack.append(m.memo[m.number("<I")]),  # LONG_BINGET
    ord("q"): lambda m: _remember(m, m.number("<B")),  # BINPUT
    ord("r"): lambda m: _remember(m, m.number("<I")),  # LONG_BINPUT
    0x94: lambda m: _remember(m, len(m.memo)),  # MEMOIZE
    ord("Q"): lambda m: m.persistent(),  # BINPERSID
}

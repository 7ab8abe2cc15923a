"""Pickles of weights, read without running anything: a small machine that knows what torch's files need and no more.

A pickle is a program for a stack machine that may call any function. This one calls none: a global name is looked up in
the tables below, and stands for a tensor's description, a plain container, or something inert. Any other name is noted,
and the file refused. The opcodes are those of the module pickletools of Python, protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_STEPS = 4_000_000  # opcodes; a training checkpoint of 10,000 tensors takes 600,000
_LONGEST_LONG = 64  # bytes of an integer
_LETTERS_PER_STEP = 16  # of a text that is copied

# Storage classes and dtypes of torch -> types as safetensors calls them.
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16", "half": "F16",
    "bfloat16": "BF16", "int64": "I64", "long": "I64", "int32": "I32", "int": "I32", "int16": "I16", "short": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "complex64": "C64",
}  # fmt: skip
# What PyTorch Lightning and its like leave in their checkpoints beside the weights.
_LEFTOVERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "typing.", "numpy.")
_BUILTINS = ("builtins", "__builtin__")
_PLAIN = ("bool", "int", "float", "complex", "str", "object", "list", "tuple", "dict", "long", "unicode")
_INERT = {
    *(f"{module}.{name}" for module in _BUILTINS for name in _PLAIN),
    "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer",
    "torch.serialization._get_layout", "copyreg._reconstructor", "copy_reg._reconstructor", "collections.defaultdict",
}  # fmt: skip


class PickleError(Exception):
    """The pickle is damaged, or asks for what the machine does not know; the message says which."""


class Inert:
    """Takes the place of an object that is not needed: takes any state and does nothing."""


@dataclass(frozen=True)
class Storage:
    """The bytes of one or several tensors: `key` names them in the file, `count` numbers of type `dtype`."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class TensorPlace:
    """A tensor: a view of a storage. Offset and strides count numbers of `dtype`, which is that of the tensor."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class Pickled:
    """What a pickle holds: dicts, lists, tuples, texts, numbers, `TensorPlace` and `Inert`; and where it ended."""

    value: Any
    end: int
    foreign: list[str]  # names it asks for that are refused
    storages: list[Storage]


class _Mark:
    pass


class _Global:
    """A name that the pickle asks for; `make` gives what calling it would."""

    def __init__(self, make: Callable[..., Any] | None = None, dtype: str = "") -> None:
        self.make, self.dtype = make, dtype


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
                target[_key(key)] = value

    def name(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}"
        found = _GLOBALS.get(full)
        if found is None:
            if not full.startswith(_LEFTOVERS):
                self.foreign.add(full)
            found = _Global(lambda *_: Inert())
        self.stack.append(found)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if isinstance(function, Inert):
            self.stack.append(function)
        elif isinstance(function, _Global) and function.make and isinstance(arguments, tuple):
            self.left -= sum(map(_cost, arguments[:8])) + len(arguments)
            if self.left > 0:
                self.stack.append(function.make(*arguments))
        else:
            raise PickleError(f"the pickle calls a {type(function).__name__}")

    def build(self) -> None:
        self.stack.pop()  # the state of an object: what is kept here has none that matters

    def persistent(self) -> None:
        kind, storage, key, _, count, *view = self.stack.pop()
        if kind != "storage" or not isinstance(storage, _Global) or not storage.dtype or (view and view[0] is not None):
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


def _key(key: Any) -> Any:
    """A key of a dictionary. Hashing nested tuples may take for ever, and large numbers may be made to collide."""
    parts = key if isinstance(key, tuple) and len(key) <= 8 else (key,)
    for part in parts:
        is_number = isinstance(part, int) and abs(part) < 2**60
        if not is_number and part is not None and not isinstance(part, (str, bytes, float, Inert, _Global)):
            raise PickleError("the pickle has a dictionary with a key that is no name or number")
    return key


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > 64 or any(type(v) is not int or v < 0 for v in values):
        raise PickleError("the pickle has a tensor whose shape is no list of sizes")
    return tuple(values)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str = "") -> TensorPlace:
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise PickleError("the pickle has a tensor without a storage")
    sizes, strides = _sizes(shape), _sizes(stride)
    if len(sizes) != len(strides):
        raise PickleError("the pickle has a tensor with another number of strides than sides")
    return TensorPlace(storage, dtype or storage.dtype, offset, sizes, strides)


def _tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Any:
    if not isinstance(dtype, _Global) or not dtype.dtype:
        raise PickleError("the pickle has a tensor of an unknown type")
    return _tensor(storage, offset, shape, stride, dtype.dtype)


def _first(value: Any, *_: Any) -> Any:
    return value


def _from_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor of a subclass, made by another function of the table."""
    if not isinstance(function, _Global) or function.make is None or function.make is _from_type:
        raise PickleError("the pickle makes a tensor by an unknown function")
    return function.make(*arguments)


def _dictionary(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    return {_key(key): value for key, value in items}


def _collection(values: Any = (), *_: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else []


def _bytes(text: Any = b"", *_: Any) -> bytes:
    """`_codecs.encode(text, "latin1")`, as protocol 2 writes bytes, and `bytearray(bytes)`: never of a size."""
    if not isinstance(text, (str, bytes)):
        raise PickleError("the pickle makes bytes of something else than a text")
    return text.encode("latin1") if isinstance(text, str) else text


_GLOBALS: dict[str, _Global] = {
    **{name: _Global(lambda *_: Inert()) for name in _INERT},
    **{f"torch.{name}": _Global(dtype=dtype) for name, dtype in (STORAGES | DTYPES).items()},
    "torch.storage.UntypedStorage": _Global(dtype="U8"),
    "torch._utils._rebuild_tensor": _Global(lambda s, o, shape, stride: _tensor(s, o, shape, stride)),
    "torch._utils._rebuild_tensor_v2": _Global(lambda s, o, shape, stride, *_: _tensor(s, o, shape, stride)),
    "torch._utils._rebuild_tensor_v3": _Global(_tensor_v3),
    "torch._utils._rebuild_parameter": _Global(_first),
    "torch._utils._rebuild_parameter_with_state": _Global(_first),
    "torch._tensor._rebuild_from_type_v2": _Global(_from_type),
    "torch.Size": _Global(lambda values=(): _sizes(values)),
    "collections.OrderedDict": _Global(_dictionary),
    "collections.Counter": _Global(_dictionary),
    "_codecs.encode": _Global(_bytes),
    **{f"{module}.bytearray": _Global(_bytes) for module in _BUILTINS},
    **{f"{module}.{name}": _Global(_collection) for module in _BUILTINS for name in ("set", "frozenset")},
}


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

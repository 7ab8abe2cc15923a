"""What a pickle of weights may name: storages, tensors, plain containers, and what is inert. Nothing here is the thing itself.

A name that is not in `GLOBALS` is foreign, and the file that asks for it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
LEFTOVERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "typing.", "numpy.")
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


class Global:
    """A name that the pickle asks for; `make` gives what calling it would."""

    def __init__(self, make: Callable[..., Any] | None = None, dtype: str = "") -> None:
        self.make, self.dtype = make, dtype


def checked_key(key: Any) -> Any:
    """A key of a dictionary. Hashing nested tuples may take for ever, and large numbers may be made to collide."""
    parts = key if isinstance(key, tuple) and len(key) <= 8 else (key,)
    for part in parts:
        is_number = isinstance(part, int) and abs(part) < 2**60
        if not is_number and part is not None and not isinstance(part, (str, bytes, float, Inert, Global)):
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
    if not isinstance(dtype, Global) or not dtype.dtype:
        raise PickleError("the pickle has a tensor of an unknown type")
    return _tensor(storage, offset, shape, stride, dtype.dtype)


def _first(value: Any, *_: Any) -> Any:
    return value


def _from_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor of a subclass, made by another function of the table."""
    if not isinstance(function, Global) or function.make is None or function.make is _from_type:
        raise PickleError("the pickle makes a tensor by an unknown function")
    return function.make(*arguments)


def _dictionary(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    return {checked_key(key): value for key, value in items}


def _collection(values: Any = (), *_: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else []


def _bytes(text: Any = b"", *_: Any) -> bytes:
    """`_codecs.encode(text, "latin1")`, as protocol 2 writes bytes, and `bytearray(bytes)`: never of a size."""
    if not isinstance(text, (str, bytes)):
        raise PickleError("the pickle makes bytes of something else than a text")
    return text.encode("latin1") if isinstance(text, str) else text


GLOBALS: dict[str, Global] = {
    **{name: Global(lambda *_: Inert()) for name in _INERT},
    **{f"torch.{name}": Global(dtype=dtype) for name, dtype in (STORAGES | DTYPES).items()},
    "torch.storage.UntypedStorage": Global(dtype="U8"),
    "torch._utils._rebuild_tensor": Global(lambda s, o, shape, stride: _tensor(s, o, shape, stride)),
    "torch._utils._rebuild_tensor_v2": Global(lambda s, o, shape, stride, *_: _tensor(s, o, shape, stride)),
    "torch._utils._rebuild_tensor_v3": Global(_tensor_v3),
    "torch._utils._rebuild_parameter": Global(_first),
    "torch._utils._rebuild_parameter_with_state": Global(_first),
    "torch._tensor._rebuild_from_type_v2": Global(_from_type),
    "torch.Size": Global(lambda values=(): _sizes(values)),
    "collections.OrderedDict": Global(_dictionary),
    "collections.Counter": Global(_dictionary),
    "_codecs.encode": Global(_bytes),
    **{f"{module}.bytearray": Global(_bytes) for module in _BUILTINS},
    **{f"{module}.{name}": Global(_collection) for module in _BUILTINS for name in ("set", "frozenset")},
}

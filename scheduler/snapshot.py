"""The state of plain Python objects as bytes, and back: what a journal needs to begin in the middle of a life.

Objects are saved with their identity: what was one object before is one after. Only classes of `scheduler` and `common`
are made, without calling anything of theirs, so a file from somebody else can be wrong but cannot do anything. A class
that is saved need not know of it: a new attribute is state like the others.
"""

import re
import sys
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import msgspec
from msgspec import Struct

Ref = msgspec.msgpack.Ext  # to a node, by its number
_PACKAGE = (__package__ or "").rpartition(".")[0]
_OURS = re.compile(r"(?:scheduler|common)\.\w+:\w+")
_PLAIN = frozenset({int, float, str, bytes, bool, type(None)})
_FACTORIES: dict[str, Callable[[], Any]] = {f.__name__: f for f in (int, float, list, dict, set, deque)}
_SERIES: dict[str, type] = {"list": list, "deque": deque, "set": set, "tuple": tuple, "frozenset": frozenset}
_MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


class Unsavable(TypeError):
    """An object of a kind that is no state."""


class Damaged(ValueError):
    """Bytes that `save` did not make, or made of classes that are others now."""


class Node(Struct, array_like=True, gc=False):
    """One object. In `content`, whatever is no number, string or bytes is a `Ref`; mappings and attributes alternate
    between names and values."""

    kind: str
    name: str  # of a class, a type code, a factory, a length
    content: Any


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Node])


def save(root: object, *, as_class: type | None = None, without: frozenset[str] = frozenset()) -> list[Node]:
    """The root comes first. It is saved as `as_class`, `without` some of its attributes. Raises Unsavable."""
    saver = _Saver()
    saver.value(root)
    first = _node_of_object(root, as_class, saver, without) if as_class else saver.node(root)
    saver.number = 1
    return [first, *saver.nodes()]


def encode(nodes: list[Node]) -> bytes:
    return _encoder.encode(nodes)


def decode(data: bytes) -> list[Node]:
    """Raises Damaged."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise Damaged(str(error)) from None


def load(nodes: list[Node]) -> list[Any]:
    """All objects, the root first. Raises Damaged."""
    try:
        return _Loader(nodes).objects()
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None


class _Saver:
    def __init__(self) -> None:
        self.number = 0
        self._objects: list[object] = []  # held, so that no other gets the id of one
        self._numbers: dict[int, int] = {}

    def value(self, value: Any) -> Any:
        """Itself, or the reference to its node."""
        if type(value) in _PLAIN:
            return value
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return Ref(1, number.to_bytes(4, "little"))

    def nodes(self) -> Iterator[Node]:
        """Of all that was referred to, and of what these refer to."""
        while self.number < len(self._objects):
            self.number += 1
            yield self.node(self._objects[self.number - 1])

    def node(self, value: Any) -> Node:
        kind = type(value)
        name = kind.__name__
        if kind in (list, tuple, deque, set, frozenset):
            length = value.maxlen if kind is deque else None
            return Node(name, "" if length is None else str(length), self._series(value))
        if kind in (dict, OrderedDict, Counter):
            return self._mapping(name, "", value)
        if kind is defaultdict:
            factory = value.default_factory.__name__
            if factory not in _FACTORIES:
                raise Unsavable(f"a defaultdict of {factory}")
            return self._mapping(name, factory, value)
        if kind is array:
            return Node("array", value.typecode, value.tobytes())
        if kind is MethodType:
            return Node("method", value.__name__, self.value(value.__self__))
        if kind is FunctionType:
            return Node("function", "" if "<" in value.__qualname__ else _name_of(value), None)
        if isinstance(value, tuple):
            return Node("named tuple", _name_of(kind), self._series(value))
        if isinstance(value, Enum):
            return Node("enum", _name_of(kind), value.value)
        if isinstance(value, Struct):
            return Node(
                "struct", _name_of(kind), self._attributes((n, getattr(value, n)) for n in kind.__struct_fields__)
            )
        return _node_of_object(value, kind, self, frozenset())

    def _series(self, values: Any) -> list[Any]:
        return list(values) if set(map(type, values)) <= _PLAIN else [self.value(value) for value in values]

    def _mapping(self, kind: str, name: str, mapping: dict[Any, Any]) -> Node:
        if set(map(type, chain(mapping, mapping.values()))) <= _PLAIN:  # the bulk of a pool
            return Node(kind, name, list(chain.from_iterable(mapping.items())))
        return Node(kind, name, [self.value(value) for item in mapping.items() for value in item])

    def _attributes(self, items: Any) -> list[Any]:
        return [part for name, value in items for part in (name, self.value(value))]


def _node_of_object(value: object, kind: type, saver: _Saver, without: frozenset[str]) -> Node:
    kept = [name for name in attributes(kind) if name not in without and hasattr(value, name)]
    return Node("object", _name_of(kind), saver._attributes((name, getattr(value, name)) for name in kept))


@cache
def attributes(kind: type) -> tuple[str, ...]:
    """What instances may hold: their slots, and every name in the code of the class that is no member of the class.

    To ask an instance for its `__dict__` would be simpler, but CPython 3.11 then lays it out anew, for good: a step
    of 256 rows takes 9 % longer after that.
    """
    names: dict[str, None] = {}
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names |= dict.fromkeys((slots,) if isinstance(slots, str) else slots)
        codes = [member.__code__ for member in base.__dict__.values() if isinstance(member, FunctionType)]
        names |= dict.fromkeys(name for code in codes for name in code.co_names if not hasattr(kind, name))
    return tuple(names)


class _Loader:
    """Makes objects empty and fills them later, since they may refer to each other in circles."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes = nodes
        self._made: dict[int, Any] = {}
        self._hollow: list[tuple[Any, Node]] = []

    def objects(self) -> list[Any]:
        for number in range(len(self._nodes)):
            self._make(number)
            while self._hollow:
                self._fill(*self._hollow.pop())
        return [self._made[number] for number in range(len(self._nodes))]

    def _value(self, value: Any) -> Any:
        return self._make(int.from_bytes(value.data, "little")) if type(value) is Ref else value

    def _make(self, number: int) -> Any:
        if number in self._made:
            return self._made[number]
        node = self._nodes[number]
        self._made[number] = value = self._shell(node)
        return value

    def _shell(self, node: Node) -> Any:
        match node.kind:
            case "tuple" | "frozenset" as kind:
                return _SERIES[kind](map(self._value, node.content))
            case "named tuple":
                return tuple.__new__(_ours(node.name, type), map(self._value, node.content))
            case "array":
                value = array(node.name)
                value.frombytes(node.content)
                return value
            case "method":
                return MethodType(
                    getattr(_named(type(self._value(node.content))), node.name), self._value(node.content)
                )
            case "function":
                return _ours(node.name, FunctionType) if node.name else _nothing_known
            case "enum":
                return _ours(node.name, type)(node.content)
            case "struct":
                return _ours(node.name, type)(**self._named_values(node))
            case "object":
                shell: Any = object.__new__(_ours(node.name, type))
            case "defaultdict":
                shell = defaultdict(_FACTORIES[node.name])
            case "deque":
                shell = deque(maxlen=int(node.name) if node.name else None)
            case kind:
                shell = (_SERIES | _MAPPINGS)[kind]()
        self._hollow.append((shell, node))
        return shell

    def _fill(self, shell: Any, node: Node) -> None:
        if node.kind == "object":
            for name, value in self._named_values(node).items():
                object.__setattr__(shell, name, value)
        elif node.kind in ("list", "deque"):
            shell.extend(map(self._value, node.content))
        elif node.kind == "set":
            shell.update(map(self._value, node.content))
        else:
            shell.update(self._pairs(node))

    def _pairs(self, node: Node) -> dict[Any, Any]:
        values = list(map(self._value, node.content))
        return dict(zip(values[::2], values[1::2], strict=True))

    def _named_values(self, node: Node) -> dict[str, Any]:
        return self._pairs(node)


def _nothing_known(*_: object) -> None:
    """In place of a function that has no name: a default, which answers nothing."""


def _name_of(thing: Any) -> str:
    """As `_ours` reads it. Raises Unsavable."""
    name = f"{thing.__module__.removeprefix(f'{_PACKAGE}.')}:{thing.__qualname__}"
    if not _OURS.fullmatch(name):
        raise Unsavable(f"{name} does not belong to the scheduler's state")
    return name


def _named(kind: type) -> type:
    _name_of(kind)
    return kind


def _ours(name: str, kind: type) -> Any:
    if not _OURS.fullmatch(name):
        raise ValueError(f"{name!r} does not belong to the scheduler's state")
    module, _, attribute = name.partition(":")
    found = getattr(sys.modules[f"{_PACKAGE}.{module}"], attribute)
    if not isinstance(found, kind) or found.__module__ != f"{_PACKAGE}.{module}":
        raise ValueError(f"{name} is none of the scheduler's")
    return found

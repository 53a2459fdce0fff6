"""What a traced graph depends on, as one hash: the model, its code, and all that the code reaches.

Two processes in which it is equal trace the same graph. It is made of

========  ======================================================================================
values    attributes of modules, containers and helper objects in them, contents of tensors; of
          those that stand for parameters and buffers the layout alone
code      of a function its bytecode and constants, its defaults, and what it has taken from the
          function around it; not the file it is from, so that what is replaced at run time
          counts as it is
names     what a function's names stand for in its globals and in the modules that those are;
          methods by their names, of all classes that were reached
========  ======================================================================================

torch, NumPy and Python's own library stand by their versions, as far as nobody has put a function
of another's in their places. What may differ and look alike (an open file, a generator of random
numbers) is `UntoldError`: such a graph is not kept.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import io
import logging
import os
import re
import sys
import threading
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from ..effects.code import is_foreign_module
from ..tensors.fakes import is_fake
from .asking import UntoldError as UntoldError
from .asking import asked_by, check_cache
from .code import hash_of, imports_in, names_in

MOST = 200_000  # values that are looked into
_AT_ONCE = 1_000  # words that are hashed together
_FEW = 500  # values in a container of a library's, such as sys.argv
MOST_BYTES = 1 << 28  # of tensors and arrays that code reaches
_CALLED_BACK = ("forward", "backward", "setup_context", "jvp", "vmap")  # by torch, by these names
_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)
_TOLD = ("__wrapped__", "__signature__", "_torchdynamo")  # of a function, by what it closes over
_OF_PROCESS = ("_original_object_hash",)  # of transformers: a hash of texts
_AT_BIRTH = ("__init__", "__new__", "__post_init__")
_ASIDE = {
    *("__init_subclass__", "__class_getitem__", "__set_name__", "__subclasshook__", "__del__"),
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__"),
    *("__repr__", "__str__", "__format__", "__dir__", "__sizeof__"),
}
"""Special methods that nothing which computes calls without naming them."""


def identity_of(*values: Any) -> str:
    """The hash of values and of all that their code reaches.

    Raises:
        UntoldError: some of it cannot be told from another of its kind.
    """
    walk = _Walk()
    walk.items(values)
    _functions(walk, vars(torch.Tensor))
    while walk.pending:
        walk.look_into(walk.pending.popleft())
    if walk.reads_environment:
        walk.say([(text, os.environ.get(text)) for text in sorted(walk.texts)])
    walk.flush()
    return walk.digest.hexdigest()


class _Walk:
    """Writes every value that is reached into the digest once, nearest first.

    Attributes:
        named: what code has named so far.
        methods: of reached classes, by their names, as long as nobody has named them.
        texts: that stand in code and may be names.
        reads_environment: whether code names what reads it.
    """

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.pending: deque[Any] = deque()
        self.named: set[str] = set(_CALLED_BACK)
        self.methods: dict[str, list[Any]] = defaultdict(list)
        self.texts: set[str] = set()
        self.reads_environment = False
        self._seen: dict[int, int] = {}
        self._held: list[Any] = []  # while it goes on no other value gets the id of one of them
        self._bytes = 0
        self._said: list[str] = []

    def say(self, *words: object) -> None:
        self._said.append(repr(words))
        if len(self._said) == _AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Hash what was said so far."""
        self.digest.update("".join(self._said).encode())
        self._said.clear()

    def describe(self, value: Any) -> None:
        """Write a value down; what is inside it follows later."""
        kind = type(value)
        if kind in _PLAIN:
            self.say(kind.__name__, value)
        elif id(value) in self._seen:
            self.say("again", self._seen[id(value)])
        elif len(self._seen) == MOST:
            raise UntoldError("more values than are looked into")
        else:
            self.say("new", len(self._seen), kind.__module__, kind.__qualname__)
            self._seen[id(value)] = len(self._seen)
            self._held.append(value)
            self.pending.append(value)

    def look_into(self, value: Any) -> None:
        self.say("in", self._seen[id(value)])
        for kinds, look in _LOOKS:
            if isinstance(value, kinds):
                look(self, value)
                return
        _object(self, value)

    def items(self, values: Iterable[Any]) -> None:
        for value in values:
            self.describe(value)
        self.say("end")

    def mapping(self, values: Mapping[Any, Any]) -> None:
        self.items(each for pair in values.items() for each in pair)

    def contents(self, data: np.ndarray[Any, Any]) -> None:
        self._bytes += data.nbytes
        if self._bytes > MOST_BYTES:
            raise UntoldError("more tensors than are read")
        self.flush()
        self.digest.update(data.tobytes())

    def call(self, name: str) -> None:
        """Something has this name as a method or an attribute."""
        if name not in self.named:
            self.named.add(name)
            self.items(self.methods.pop(name, ()))


# -- values ----------------------------------------------------------------------------------------


def _tensor(walk: _Walk, value: torch.Tensor) -> None:
    walk.say(tuple(value.shape), value.dtype, value.requires_grad, value.device, value.layout)
    if value.layout is torch.strided:
        walk.say(value.stride())
    if is_fake(value) or value.is_meta:
        return
    if type(value) not in (torch.Tensor, nn.Parameter) or value.layout is not torch.strided:
        raise UntoldError(f"a {type(value).__name__} of layout {value.layout}")
    flat = value.detach().cpu().contiguous().view(-1)
    walk.contents(flat.view(torch.uint8).numpy())


def _array(walk: _Walk, value: Any) -> None:
    array = np.ascontiguousarray(value)
    if array.dtype.hasobject:
        raise UntoldError("an array of objects")
    walk.say(array.dtype, array.shape)
    walk.contents(array.reshape(-1).view(np.uint8))


def _mapping(walk: _Walk, value: Mapping[Any, Any]) -> None:
    walk.mapping(value)
    if isinstance(value, defaultdict):
        walk.describe(value.default_factory)
    _own(walk, value)


def _sequence(walk: _Walk, value: Iterable[Any]) -> None:
    walk.items(value)
    _own(walk, value)


def _set(walk: _Walk, value: Iterable[Any]) -> None:
    if all(type(each) in _PLAIN for each in value):
        walk.say(sorted(map(repr, value)))
        return
    if not all(isinstance(each, (type, types.FunctionType)) for each in value):
        raise UntoldError("a set of objects, which has no order")
    walk.items(sorted(value, key=lambda each: (each.__module__, each.__qualname__)))


def _enum(walk: _Walk, value: Enum) -> None:
    walk.say(value.name)
    walk.items((type(value), value.value))


def _module(walk: _Walk, value: nn.Module) -> None:
    own = dict(vars(value))
    hooks = {name: own.pop(name) for name in _HOOKS}
    for name, each in hooks.items():  # by numbers that count those of all modules
        walk.say(name, [[i in other for i in each] for other in hooks.values() if other])
        walk.items(each.values())
    walk.describe(type(value))
    walk.mapping(own)


def _object(walk: _Walk, value: Any) -> None:
    kind = type(value)
    if not is_foreign_module(kind.__module__):
        _own(walk, value)
        return
    try:
        made = value.__reduce_ex__(2)
    except Exception as error:
        raise UntoldError(f"a {kind.__module__}.{kind.__qualname__}") from error
    walk.items((made,) if isinstance(made, str) else made)


def _own(walk: _Walk, value: Any) -> None:
    """The attributes of an object that is of none of the classes of libraries below."""
    kind = type(value)
    if is_foreign_module(kind.__module__):
        return
    walk.describe(kind)
    own = getattr(value, "__dict__", {})
    walk.mapping({name: each for name, each in own.items() if name not in _OF_PROCESS})
    for each in kind.__mro__:
        slots = vars(each).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                walk.describe(getattr(value, name, None))


# -- code ------------------------------------------------------------------------------------------


def _class(walk: _Walk, value: type) -> None:
    walk.say(value.__module__, value.__qualname__)
    if is_foreign_module(value.__module__):
        if issubclass(value, nn.Module):  # somebody may have replaced its forward
            _functions(walk, vars(value))
            walk.items(value.__bases__)
        return
    walk.describe(type(value))
    walk.say(_version(value.__module__))
    walk.items(value.__bases__)
    for name, each in vars(value).items():
        special = name.startswith("__") and name.endswith("__")
        if name == "_abc_impl" or (special and not _is_code(each)):
            continue
        walk.say(name)
        if not _is_code(each):
            walk.describe(each)
            continue
        walk.say(*map(hash_of, _codes(each)))
        if name in _AT_BIRTH:
            continue  # of what is there already
        if (special and name not in _ASIDE) or name in walk.named:
            walk.describe(each)
        else:
            walk.methods[name].append(each)


def _functions(walk: _Walk, space: Mapping[str, Any]) -> None:
    """Of torch's own, with settings among them: those of others are looked into."""
    for name, each in space.items():
        if type(each) in _PLAIN and name != "__doc__":
            walk.say(name, each)
        if isinstance(each, types.FunctionType):
            walk.say(name, hash_of(each.__code__))
            if not is_foreign_module(each.__module__):
                walk.describe(each)


def _function(walk: _Walk, value: types.FunctionType) -> None:
    walk.say(value.__module__, value.__qualname__, hash_of(value.__code__))
    walk.items((value.__defaults__, value.__kwdefaults__))
    for cell in value.__closure__ or ():
        walk.describe(None if cell == types.CellType() else cell.cell_contents)
    walk.mapping({name: v for name, v in vars(value).items() if not name.startswith(_TOLD)})
    if is_foreign_module(value.__globals__.get("__name__") or ""):
        return
    space, (names, texts) = value.__globals__, names_in(value.__code__)
    walk.texts.update(texts)
    walk.reads_environment |= not {"environ", "getenv"}.isdisjoint(names)
    walk.say(*asked_by(value, names))
    for name in names:
        if name in space:
            walk.say(name)
            _named(walk, space[name], names, set())
        elif name in vars(builtins):
            _of_library(walk, name, vars(builtins)[name])
    for name in imports_in(value.__code__, space.get("__package__") or ""):
        walk.say(name, name in sys.modules)
        if name in sys.modules:
            _named(walk, sys.modules[name], names, set())
    for name in (*names, *texts):
        walk.call(name)


def _cached(walk: _Walk, value: Any) -> None:
    check_cache(value)
    walk.describe(value.__wrapped__)


def _named(walk: _Walk, value: Any, names: Iterable[str], within: set[int]) -> None:
    """A global; of a module what code names of it."""
    if not isinstance(value, types.ModuleType):
        walk.describe(value)
        if isinstance(value, type):
            for kind in (kind for kind in value.__mro__ if not is_foreign_module(kind.__module__)):
                walk.items(vars(kind).get(name) for name in _AT_BIRTH)
        return
    foreign = is_foreign_module(value.__name__)
    walk.say(value.__name__, _version(value.__name__))
    within.add(id(value))
    for name in names:
        found = vars(value).get(name)
        if isinstance(found, types.ModuleType):
            if id(found) not in within:
                _named(walk, found, names, within)
        elif foreign:
            _of_library(walk, name, found)
        elif name in vars(value):
            walk.say(name)
            _named(walk, found, names, within)


def _of_library(walk: _Walk, name: str, value: Any) -> None:
    """What torch has under a name: what was replaced is looked into, settings count."""
    if type(value) in _PLAIN or isinstance(value, types.FunctionType):
        _functions(walk, {name: value})
        return
    few = type(value) in (list, tuple, set, dict) and len(value) < _FEW
    own = not is_foreign_module(type(value).__module__)
    if few or own or isinstance(value, (type, types.SimpleNamespace)):
        walk.describe(value)


def _built_in(walk: _Walk, value: Any) -> None:
    walk.say(getattr(value, "__module__", None), getattr(value, "__qualname__", str(value)))
    owner = getattr(value, "__self__", None)
    if not isinstance(owner, types.ModuleType):
        walk.describe(owner)


def _parts(*names: str) -> Callable[[_Walk, Any], None]:
    return lambda walk, value: walk.items(getattr(value, name, None) for name in names)


def _is_code(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, *_WRAPPING))


def _codes(value: Any) -> Iterator[types.CodeType]:
    """Of a method, without those that it reaches."""
    if isinstance(value, types.FunctionType):
        yield value.__code__
        return
    for name in ("__func__", "__wrapped__", "fget", "fset", "fdel", "func"):
        inner = getattr(value, name, None)
        if inner is not None:
            yield from _codes(inner)


def _version(module: str) -> str:
    return str(getattr(sys.modules.get(module.partition(".")[0]), "__version__", ""))


def _refused(_: _Walk, value: Any) -> None:
    raise UntoldError(f"a {type(value).__module__}.{type(value).__qualname__}")


_PLAIN = frozenset(
    (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type(NotImplemented))
) | {torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, range}
_WRAPPING = (
    *(property, classmethod, staticmethod, functools.cached_property, functools.partial),
    *(functools.partialmethod, functools._lru_cache_wrapper),
)
_LOOKS: tuple[tuple[Any, Callable[[_Walk, Any], None]], ...] = (
    (torch.Tensor, _tensor),
    (nn.Module, _module),
    (Enum, _enum),
    (type, _class),
    (types.FunctionType, _function),
    (types.MethodType, _parts("__func__", "__self__")),
    (functools.partial, _parts("func", "args", "keywords")),
    (functools.partialmethod, _parts("func", "args", "keywords")),
    (functools._lru_cache_wrapper, _cached),
    ((staticmethod, classmethod), _parts("__func__")),
    (property, _parts("fget", "fset", "fdel")),
    (functools.cached_property, _parts("func")),
    ((np.ndarray, np.generic), _array),
    ((dict, types.MappingProxyType), _mapping),
    ((list, tuple, deque), _sequence),
    ((set, frozenset), _set),
    (weakref.ref, lambda walk, value: walk.describe(value())),
    (ContextVar, lambda walk, value: walk.items((value.name, value.get(None)))),
    ((logging.Logger, logging.Handler, io.TextIOBase), _parts("name")),
    ((re.Pattern, PurePath, torch.finfo, torch.iinfo), lambda walk, value: walk.say(value)),
    ((types.ModuleType, threading.Event), _parts("__name__")),
    ((type(threading.Lock()), type(threading.RLock())), lambda walk, value: None),
    (torch._ops.OpOverload, lambda walk, value: walk.say(str(value))),
    (torch._ops.OpOverloadPacket, lambda walk, value: walk.say(str(value))),
    (
        (
            *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType),
            *(types.MethodWrapperType, types.ClassMethodDescriptorType, np.ufunc),
            *(types.GetSetDescriptorType, types.MemberDescriptorType),
        ),
        _built_in,
    ),
    ((types.UnionType, types.GenericAlias), lambda walk, value: walk.say(str(value))),
    (types.GeneratorType, lambda walk, value: walk.say(hash_of(value.gi_code))),
    ((torch.Generator, types.CoroutineType), _refused),
)
"""The first that a value is an instance of says how it is looked into."""

"""What a forward changes outside its results: attributes, containers, helper objects, globals.

A graph is the same in every step, and so is all that Python did while it was traced. What forward
has changed is put back after a trace, for it may hold tensors without values; and it is told, for
another forward that starts from it may compute something else.
"""

from __future__ import annotations

import functools
import inspect
import operator
import pickle
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..tensors.fakes import is_fake
from .caches import caches
from .code import is_foreign_module

MOST = 20_000  # containers that are watched
CALLED = 500  # functions and classes whose code is looked into, nearest first
LONG = 1_000  # of longer ones the items are not looked into
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_WATCHED = (dict, OrderedDict, defaultdict, Counter, list, set, deque)  # and no classes of others


@dataclass(frozen=True)
class Names:
    """Some names of a file's globals."""

    space: dict[str, Any]
    names: dict[str, None]


@dataclass(frozen=True)
class Closure:
    """What a function has taken from the one around it."""

    function: types.FunctionType

    @property
    def cells(self) -> dict[str, types.CellType]:
        names, cells = self.function.__code__.co_freevars, self.function.__closure__ or ()
        pairs = zip(names, cells, strict=True)
        return {name: cell for name, cell in pairs if cell != types.CellType()}  # but empty ones


@dataclass(frozen=True)
class Stream:
    """A generator of random numbers, whose state is what can change."""

    generator: Any

    @property
    def state(self) -> bytes:
        drawn = self.generator
        if isinstance(drawn, random.Random):
            return pickle.dumps(drawn.getstate())
        if isinstance(drawn, np.random.Generator):
            return pickle.dumps(drawn.bit_generator.state)
        return pickle.dumps(drawn.get_state(legacy=False))

    def reset(self, state: bytes) -> None:
        drawn, value = self.generator, pickle.loads(state)
        if isinstance(drawn, random.Random):
            drawn.setstate(value)
        elif isinstance(drawn, np.random.Generator):
            drawn.bit_generator.state = value
        else:
            drawn.set_state(value)


Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any] | type | Names | Closure | Stream
"""What can change: attributes of an object are its ``vars``, those of a class it itself."""


@dataclass(frozen=True)
class Change:
    """Of one place: an attribute, an item, a global.

    Attributes:
        where: as a user would write it.
        old, new: `NOTHING` where there is none.
    """

    where: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.where} ({_shown(self.old)} -> {_shown(self.new)})"


class _Nothing:
    def __str__(self) -> str:
        return "nothing"


NOTHING = _Nothing()


@dataclass
class Watched:
    """What a forward changed.

    Attributes:
        contents: containers with their paths, and what each held before and afterwards.
    """

    contents: list[tuple[str, Container, Any, Any]] = field(default_factory=list)

    @property
    def changes(self) -> list[Change]:
        """By place."""
        return [
            Change(f"{path}{where}", old, new)
            for path, _, before, after in self.contents
            for where, old, new in changes_in(before, after)
        ]

    @property
    def numbers(self) -> list[Change]:
        """The changes of numbers."""
        kinds = (int, float)
        return [c for c in self.changes if isinstance(c.old, kinds) and isinstance(c.new, kinds)]

    def keep(self) -> None:
        """Leave the model's modules as forward has left them, where that is without tensors."""
        for path, container, before, after in self.contents:
            left = [new for _, _, new in changes_in(before, after)]
            if path.startswith("self") and not any(map(_may_hold_tensors, left)):
                _put(container, after)

    def apart(self) -> list[Watched]:
        """One for each container."""
        return [Watched([each]) for each in self.contents]

    @property
    def is_stream(self) -> bool:
        """Whether random numbers were drawn from a generator, besides what else there is."""
        return any(isinstance(container, Stream) for _, container, *_ in self.contents)

    @property
    def values(self) -> list[Any]:
        """What is in the containers that forward has changed."""
        return [value for *_, after in self.contents for value in _values(after)]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those that forward has left behind."""
        return [each for each in self.values if isinstance(each, torch.Tensor) and is_fake(each)]


@contextmanager
def watching(model: nn.Module, others: Sequence[Any] = ()) -> Iterator[Watched]:
    """A forward inside; afterwards everything is as it was, and what is yielded says what was not.

    Args:
        others: what forward may change beside the model, such as a loss function.
    """
    before = [(path, each, content_of(each)) for path, each in containers(model, others)]
    cached = {id(function): function.cache_info().misses for function in caches()}
    found = Watched()
    try:
        yield found
    finally:
        for path, container, kept in before:
            content = content_of(container)
            if any(changes_in(kept, content)):
                found.contents.append((path, container, kept, content))
                _put(container, kept)
        for function in caches():
            if cached.get(id(function), 0) != function.cache_info().misses:
                function.cache_clear()


@contextmanager
def left_by(watched: Watched, changing: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Inside, containers are as a forward has left them.

    Args:
        changing: makes of a value before (`NOTHING` where there was none) and one afterwards the
            one that is there.
    """
    for _, container, before, after in watched.contents:
        if isinstance(after, dict):
            pairs = ((key, before.get(key, NOTHING), value) for key, value in after.items())
            _put(container, {key: changing(old, new) for key, old, new in pairs})
        else:
            _put(container, type(after)(changing(NOTHING, value) for value in after))
    try:
        yield
    finally:
        for _, container, before, _ in watched.contents:
            _put(container, before)


def _may_hold_tensors(value: Any) -> bool:
    return not isinstance(value, _PLAIN) and not callable(value)


def _values(content: Any) -> list[Any]:
    return list(content.values() if isinstance(content, dict) else content)


def content_of(container: Container) -> Any:
    if isinstance(container, type):
        return {key: value for key, value in vars(container).items() if not key.startswith("__")}
    if isinstance(container, Names):
        space = container.space
        return {key: space[key] for key in container.names if key in space}
    if isinstance(container, Closure):
        return {name: cell.cell_contents for name, cell in container.cells.items()}
    if isinstance(container, Stream):
        return {"state": container.state}
    return container.copy()


def changes_in(kept: Any, content: Any) -> Iterator[tuple[str, Any, Any]]:
    """Of what a container held: where, before and after."""
    if isinstance(content, dict):
        for key in kept.keys() | content.keys():
            old, new = kept.get(key, NOTHING), content.get(key, NOTHING)
            if not _same(old, new):
                yield _at(key), old, new
    elif len(kept) != len(content) or not all(map(_same, kept, content)):
        yield "", kept, content


def _same(old: Any, new: Any) -> bool:
    return old is new or (type(old) is type(new) and isinstance(old, _PLAIN) and old == new)


def _put(container: Container, content: Any) -> None:
    """Make a container hold this: in place, as others may hold the container."""
    if isinstance(container, Stream):
        container.reset(content["state"])
    elif isinstance(container, Closure):
        for name, cell in container.cells.items():
            cell.cell_contents = content[name]
    elif isinstance(container, (list, deque)):
        container.clear()
        container.extend(content)
    elif isinstance(container, set):
        container.clear()
        container.update(content)
    else:
        place: Any = container.space if isinstance(container, Names) else container
        remove = delattr if isinstance(place, type) else operator.delitem
        replace = setattr if isinstance(place, type) else operator.setitem
        now = content_of(container)
        for key in now.keys() | content.keys():
            if key not in content:
                remove(place, key)
            elif key not in now or now[key] is not content[key]:
                replace(place, key, content[key])


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    text = repr(value) if isinstance(value, _PLAIN) else str(value)
    return text if len(text) < 40 else f"a {type(value).__name__}"


# -- what there is --------------------------------------------------------------------------------


def containers(model: nn.Module, others: Sequence[Any]) -> Iterator[tuple[str, Container]]:
    """What forward can reach: attributes of modules first, then containers and helper objects in
    them, classes, and the globals that their code names."""
    parts = dict(model.named_modules())
    pending: deque[tuple[str, Any]] = deque()
    pending += [(f"self.{name}" if name else "self", vars(part)) for name, part in parts.items()]
    pending += [("loss_fn", other) for other in others]
    pending += _globals(list(parts.values()), others)
    seen: set[int] = set()
    while pending and len(seen) < MOST:
        path, value = pending.popleft()
        container = _container(value)
        if container is None or id(value) in seen:
            continue
        seen.add(id(value))
        yield path, container
        content = content_of(container)
        if len(content) < LONG and not isinstance(content, set):
            pairs = content.items() if isinstance(content, dict) else enumerate(content)
            pending += [(f"{path}{_at(key)}", item) for key, item in pairs]


def _globals(parts: Sequence[nn.Module], others: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """What the code of a forward names, and the code that it calls, of files that are not torch's
    or Python's own: classes, and namespaces with the names of data in them."""
    named: dict[int, Names] = {}
    methods: dict[str, list[Any]] = defaultdict(list)
    for kind in dict.fromkeys(kind for part in parts for kind in type(part).__mro__):
        if not is_foreign_module(kind.__module__):
            yield kind.__qualname__, kind
            for name, value in vars(kind).items():
                methods[name].append(value)
    hooks = [h for p in parts for h in (*p._forward_pre_hooks.values(), *p._forward_hooks.values())]
    given = [value for part in parts for value in vars(part).values() if _is_code(value)]
    pending = deque([*methods.pop("forward", ()), *hooks, *given, *others])
    seen: set[int] = set()
    while pending and len(seen) < CALLED:
        value = inspect.unwrap(pending.popleft())
        value = getattr(value, "__func__", getattr(value, "fget", value))
        if id(value) in seen or is_foreign_module(getattr(value, "__module__", None) or ""):
            continue
        seen.add(id(value))
        if isinstance(value, type):
            yield value.__qualname__, value
            pending += vars(value).values()
        elif isinstance(value, functools.partial):
            pending.append(value.func)
        elif not isinstance(value, types.FunctionType):
            pending.append(type(value))
        else:
            if value.__closure__:
                yield value.__qualname__, Closure(value)
            spaces = [value.__globals__]
            for name in _names(value.__code__):
                pending += methods.pop(name, ())
                for space in spaces:
                    found = space.get(name)
                    module = found.__name__ if isinstance(found, types.ModuleType) else ""
                    if module and not is_foreign_module(module):
                        spaces.append(vars(found))
                    elif callable(found):
                        pending.append(found)
                    elif name in space:
                        named.setdefault(id(space), Names(space, {})).names[name] = None
    yield from ((str(each.space["__name__"]), each) for each in named.values())


def _is_code(value: object) -> bool:
    return isinstance(value, (types.FunctionType, functools.partial))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _at(key: Any) -> str:
    return f".{key}" if isinstance(key, str) else f"[{key!r}]"


def _container(value: Any) -> Any:
    """What of a value can change: itself, its attributes, or nothing."""
    if type(value) in _WATCHED or isinstance(value, (Names, Closure)):
        return value
    if isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
        return Stream(value)
    if isinstance(value, type):
        return None if is_foreign_module(value.__module__) else value
    opaque = isinstance(value, (*_PLAIN, torch.Tensor, nn.Module, types.ModuleType)) or callable(
        value
    )
    if opaque or is_foreign_module(type(value).__module__):
        return None
    return getattr(value, "__dict__", None)

"""Plain attributes that a forward sets on the model while it is traced, and that stay set.

A model of transformers writes into its config which kind of problem its labels are, once. Other
graphs of the model find it so, also where the one that was traced is now found on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..effects.code import is_foreign_module

_PLAIN = (bool, int, float, str, type(None))
Place = tuple[str, str]
"""Of a module, and of an object in it; "" for the module itself."""


@dataclass(frozen=True)
class Change:
    """One attribute.

    Attributes:
        old: before; nothing where there was none.
    """

    place: Place
    name: str
    new: Any
    old: tuple[Any, ...] = ()


def plain_attributes(model: nn.Module) -> dict[Place, dict[str, Any]]:
    """All that are numbers and texts, of modules and of objects of theirs."""
    return {
        place: {name: value for name, value in space.items() if type(value) in _PLAIN}
        for place, space in _spaces(model)
    }


def changes_of(
    before: Mapping[Place, Mapping[str, Any]], after: Mapping[Place, Mapping[str, Any]]
) -> list[Change]:
    """The attributes that were set."""
    found = []
    for place, space in after.items():
        known = before.get(place, {})
        for name, value in space.items():
            old = (known[name],) if name in known else ()
            if not old or type(old[0]) is not type(value) or old[0] != value:
                found.append(Change(place, name, value, old))
    return found


def make(model: nn.Module, changes: Sequence[Change]) -> None:
    """Set them, in a model that has none of them yet.

    Raises:
        KeyError: it has no such place.
    """
    spaces = dict(_spaces(model))
    for each in changes:
        spaces[each.place][each.name] = each.new


def unmake(model: nn.Module, changes: Sequence[Change]) -> None:
    """As it was before."""
    spaces = dict(_spaces(model))
    for each in reversed(changes):
        if each.old:
            spaces[each.place][each.name] = each.old[0]
        else:
            del spaces[each.place][each.name]


def _spaces(model: nn.Module) -> Iterator[tuple[Place, dict[str, Any]]]:
    seen: set[int] = set()
    for path, part in model.named_modules():
        own = vars(part)
        yield (path, ""), own
        for name, value in own.items():
            inner = getattr(value, "__dict__", None)
            if type(inner) is dict and id(value) not in seen and not isinstance(value, nn.Module):
                seen.add(id(value))
                if not is_foreign_module(type(value).__module__):
                    yield (path, name), inner

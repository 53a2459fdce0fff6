"""Whether all that a forward can reach is as it was at an earlier moment of the same forward."""

from __future__ import annotations

import copy
import operator
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import nn

from .world import Container, changes_in, containers, content_of


class Contents:
    """What is in all that a forward can reach, at one moment.

    Args:
        apart: paths of submodules that are left out, with what they hold.
    """

    def __init__(self, model: nn.Module, apart: Sequence[str]):
        inner = tuple(f"self.{path}." for path in apart)
        found = ((f"{path}.", each) for path, each in containers(model, ()))
        self._kept = [
            (each, content_of(each)) for path, each in found if not path.startswith(inner)
        ]

    def now(self) -> Contents:
        """Of the same containers, as they are."""
        made = copy.copy(self)
        made._kept = [(each, content_of(each)) for each, _ in self._kept]
        return made

    def holds(self) -> bool:
        """Whether all is as it was."""
        return all(
            _same_items(each, kept) or not any(changes_in(kept, content_of(each)))
            for each, kept in self._kept
        )


def _same_items(container: Container, kept: Any) -> bool:
    """Whether a container has the very objects that it had, in their order; quickly."""
    if isinstance(container, (list, deque)):
        return len(container) == len(kept) and all(map(operator.is_, container, kept))
    content = container if isinstance(container, dict) else content_of(container)
    if not isinstance(content, dict) or len(content) != len(kept):
        return False
    values = map(operator.is_, content.values(), kept.values())
    return all(map(operator.is_, content, kept)) and all(values)
